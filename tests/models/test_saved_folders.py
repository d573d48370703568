"A saved model replaces a saved model and nothing else, and a kill at any moment leaves one."

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from vampsc import files, models, organs, saving, study

TINY = dict(gene_space=None, hidden=(8,), n_latent=2)


def make(seed):
    counts = np.random.default_rng(0).poisson(1.0, (60, 20)) + 1
    return models.AE(
        ad.AnnData(counts.astype("float32"), var=pd.DataFrame(index=[f"g{j}" for j in range(20)])),
        seed=seed,
        **TINY,
    )


@pytest.fixture(scope="module")
def model():
    return make(0)


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    "A saved model of seed 1."
    folder = tmp_path_factory.mktemp("another") / "m"
    make(1).save(folder)
    return folder


@pytest.fixture()
def saved(model, tmp_path):
    model.save(tmp_path / "m")
    return tmp_path / "m"


def inside(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(model, path, words, kept):
    "Nothing in the folder `kept` is other than it was."
    before = inside(kept)
    with pytest.raises(FileExistsError, match=words) as error:
        model.save(path, overwrite=True)
    assert "\n" not in str(error.value)
    assert inside(kept) == before


def test_a_folder_with_another_file(model, saved, tmp_path):
    (saved / "notes.txt").write_text("mine")
    refused(model, saved, "notes.txt is there", tmp_path)


def test_a_folder_within_whose_name_is_that_of_a_file(model, saved, tmp_path):
    (saved / "cells.npz").unlink()
    (saved / "cells.npz").mkdir()
    (saved / "cells.npz" / "notes.txt").write_text("mine")
    refused(model, saved, "cells.npz is there", tmp_path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("model.json", '{"modelTopology": {}}'),
        ("model.json", "[1]"),
        ("history.csv", "mine"),
        ("SHA256SUMS", "0  thesis.pdf"),
    ],
)
def test_a_folder_with_a_file_of_such_a_name(name, text, model, tmp_path):
    own = tmp_path / "vae-seed0" / "model"
    own.mkdir(parents=True)
    (own / name).write_text(text)
    refused(model, own, "model is there and is no saved model", tmp_path)
    # before a run is trained
    with pytest.raises(FileExistsError, match="move it away"):
        study.check_replaceable_run(own.parent)


def test_what_is_a_damaged_model_is_replaced(model, saved):
    (saved / "SHA256SUMS").unlink()
    model.save(saved, overwrite=True)
    (saved / "model.json").write_text("{")
    model.save(saved, overwrite=True)
    assert models.load(saved).architecture.n_latent == 2


def test_what_is_no_folder(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("mine")
    for name in ("pipe", "file"):
        refused(model, tmp_path / name, f"{name} is there", tmp_path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# ---- symbolic links


def test_a_link_to_a_model_stays(model, saved, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "m"
    link.symlink_to(saved)
    before = saved.stat().st_ino
    model.save(link, overwrite=True)
    assert link.is_symlink() and saved.stat().st_ino != before
    assert models.load(link).architecture.n_latent == 2
    assert os.listdir(tmp_path / "links") == ["m"] and sorted(os.listdir(tmp_path)) == [
        "links",
        "m",
    ]


def test_a_link_to_something_else(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    (tmp_path / "m").symlink_to(tmp_path / "thesis")
    refused(model, tmp_path / "m", "thesis.tex is there", tmp_path)
    assert (tmp_path / "m").is_symlink()


@pytest.mark.parametrize("to", ["nowhere", "m"])
def test_a_link_that_leads_nowhere(to, model, tmp_path):
    (tmp_path / "m").symlink_to(tmp_path / to)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="m is there and is no saved model"):
            model.save(tmp_path / "m", overwrite)
    assert os.listdir(tmp_path) == ["m"] and os.readlink(tmp_path / "m") == str(tmp_path / to)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        models.load(tmp_path / "m")


# ---- folders that cannot take another name


def test_the_current_folder(model, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved)
    for path in (".", saved, "../m"):
        refused(model, path, "is the current folder", tmp_path)
    (saved / "below").mkdir()
    monkeypatch.chdir(saved / "below")
    refused(model, saved, "below is there", tmp_path)
    refused(model, "..", "below is there", tmp_path)


def test_a_mount_point(model):
    with pytest.raises(FileExistsError, match="/ is a mount point"):
        model.save("/", overwrite=True)


# ---- rights


@pytest.mark.parametrize(
    "umask, rights", [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700), (0o002, 0o775)]
)
def test_the_rights_are_as_the_umask_says(umask, rights, model, tmp_path):
    before = os.umask(umask)
    try:
        model.save(tmp_path / "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == rights
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()} == {rights & 0o666}


# ---- a kill

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from vampsc import files
    path, how, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    renames = []
    def seen(event, arguments):
        if event != "os.rename": return
        renames.append(arguments)
        if len(renames) == moment: os.kill(os.getpid(), signal.SIGKILL)              # before this rename is done
    with files.atomic_folder(path) as new:
        for p in Path(how).iterdir(): (new / p.name).write_bytes(p.read_bytes())
        sys.addaudithook(seen)
"""  # noqa: E501


def kill_between(path, content, moment):
    code = [sys.executable, "-c", textwrap.dedent(KILLED), path, content, moment]
    assert subprocess.run([*map(str, code)]).returncode == -signal.SIGKILL


def described(folder):
    return json.loads((folder / "model.json").read_text())["seed"]


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("moment, there", [(1, 0), (2, 0), (3, 1)])
def test_a_kill_at_any_rename_leaves_a_model(
    moment, there, through_a_link, model, another, saved, tmp_path
):
    "Before the old one is put aside, between the two, and before the old one is removed."
    path = tmp_path / "link" if through_a_link else saved
    if through_a_link:
        path.symlink_to(saved)
    kill_between(path, another, moment)
    if moment == 2:
        assert not saved.exists()
        with pytest.warns(
            UserWarning, match=r" was being replaced.* is read from .*\.m\..*old"
        ) as said:
            found = models.load(path)
        assert "\n" not in str(said[0].message)
        # which has put it back
        with pytest.raises(FileExistsError, match="exists; save elsewhere"):
            model.save(path)
    else:
        found = models.load(path)
    assert found.seed == described(saved) == there
    model.save(path, overwrite=True)
    assert models.load(path).seed == 0
    assert path.is_symlink() == through_a_link
    assert not list(tmp_path.glob(".*.old"))


def test_the_next_save_brings_it_back_first(saved, tmp_path):
    kill_between(saved, tmp_path / "m", 2)
    with pytest.raises(ZeroDivisionError):
        with saving._new_folder(saved, True):
            _ = 1 / 0
    assert models.load(saved).architecture.n_latent == 2


def test_an_interrupt_between_the_two_renames(saved, monkeypatch):
    "What is there is put back at once."
    before = inside(saved)
    rename = Path.rename

    def interrupted(self, target):
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with files.atomic_folder(saved) as new:
            (new / "a").write_text("new")
    assert inside(saved) == before and os.listdir(saved.parent) == ["m"]


def test_a_saved_model_is_known_by_its_files(tmp_path):
    model = models.VAE(organs.load("pancreas")[:60], n_genes=20, hidden=(4,), n_latent=2)
    model.save(tmp_path / "model")
    assert saving.is_saved(tmp_path / "model") and not saving.is_saved(tmp_path)
