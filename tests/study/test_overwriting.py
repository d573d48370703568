"""What is there is not ours to replace: each writer asks before any work, names the file and says
how to replace it all the same.
"""

import os
import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from vampsc import beyond, cli, files, models, organs, peers, study, tables, training

MINE = "mine: years of work"
TINY = dict(gene_space=None, hidden=(8,), n_latent=2)


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def cells():
    counts = np.random.default_rng(0).poisson(1.0, (60, 30)) + 1
    obs = pd.DataFrame({"cell_type": ["a", "b"] * 30}, index=[f"c{i}" for i in range(60)])
    return ad.AnnData(
        sparse.csr_matrix(counts.astype("float32")),
        obs,
        pd.DataFrame(index=[f"g{j}" for j in range(30)]),
    )


@pytest.fixture(scope="module")
def finished(cells, tmp_path_factory):
    "A finished run."
    out = tmp_path_factory.mktemp("runs") / "own"
    return study.run(
        cells, "vae", out, training.get_profile("quick", max_epochs=1), progress=False, **TINY
    ).folder


@pytest.fixture()
def no_work(monkeypatch):
    "Whoever trains, reads data or starts a kernel did not ask first."

    def worked(*_, **__):
        raise AssertionError("it went to work before it asked")

    for owner, name in (
        (organs, "load"),
        (training, "fit"),
        (study, "configuration"),
        (study, "data_hash"),
        (models.CountAutoencoder, "__init__"),
    ):
        monkeypatch.setattr(owner, name, worked)
    monkeypatch.setattr("papermill.execute_notebook", worked)


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MINE)
    return path


def refused(path, done):
    "One line that names the file and the way out; the file is as it was."
    assert (
        done.exit_code == 1 and done.stderr.startswith("vampsc: ") and done.stderr.count("\n") == 1
    ), done.stderr
    assert str(path) in done.stderr and "--overwrite" in done.stderr and path.read_text() == MINE


# ---- a page


def test_a_page_over_data(finished, tmp_path):
    data = tmp_path / "precious.h5ad"
    data.write_bytes(b"\x89HDF")
    done = invoke("report", finished, "--out", data)
    assert (
        done.exit_code == 1
        and "a page's ending must be .html" in done.stderr
        and data.read_bytes() == b"\x89HDF"
    )


def test_a_page_over_somebodys_page(finished, tmp_path, monkeypatch):
    # of no interest here, and slow
    monkeypatch.setattr(study, "_embedding_figures", lambda runs: [])
    page = put(tmp_path / "page.html")
    refused(page, invoke("report", finished, "--out", page))
    assert invoke(
        "report", finished, "--out", page, "--overwrite"
    ).exit_code == 0 and files.is_page(page)
    # our own, again
    assert invoke("report", finished, "--out", page).exit_code == 0


def test_the_page_in_the_folder_of_the_run(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / finished.name)
    page = put(folder / "report.html")
    refused(page, invoke("report", folder))


def test_to_html_asks(tmp_path):
    shutil.copy(study.TEMPLATE, tmp_path / "a.ipynb")
    page = put(tmp_path / "a.html")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        study.to_html(tmp_path / "a.ipynb")
    assert page.read_text() == MINE
    assert (
        files.is_page(study.to_html(tmp_path / "a.ipynb", overwrite=True))
        and study.to_html(tmp_path / "a.ipynb") == page
    )


# ---- a run


@pytest.mark.parametrize(
    "name", ["config.json", "history.csv", "latent.npy", "cells.csv", "metrics.json", "checkpoint"]
)
def test_fit_asks_before_it_works(name, tmp_path, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("it went to work before it asked")

    monkeypatch.setattr(study, "configuration", worked)
    monkeypatch.setattr(training, "Run", worked)
    own = put(tmp_path / "vae-seed0" / name)
    refused(own, invoke("fit", "pancreas", "--model", "vae", "--out", tmp_path))
    assert os.listdir(own.parent) == [name]


def test_fit_leaves_a_folder_that_is_no_model(cells, tmp_path):
    notes = put(tmp_path / "ae-seed0" / "model" / "notes.txt")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="notes.txt is there.*move it away"):
            study.run(cells, "ae", tmp_path, overwrite=overwrite, **TINY)
    assert notes.read_text() == MINE and [p.name for p in notes.parent.parent.iterdir()] == [
        "model"
    ]


def test_a_run_over_other_files_when_asked(cells, tmp_path):
    put(tmp_path / "ae-seed0" / "config.json"), put(tmp_path / "ae-seed0" / "notes.txt")
    profile = training.get_profile("quick", max_epochs=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        study.run(cells, "ae", tmp_path, profile, **TINY)
    done = study.run(cells, "ae", tmp_path, profile, progress=False, overwrite=True, **TINY)
    assert done.config["model"] == "ae" and (done.folder / "notes.txt").read_text() == MINE
    # it is a run now
    assert study.check_replaceable_run(done.folder) == done.folder
    (done.folder / "config.json").write_text("{")
    # a damaged one still is, by its model
    study.check_replaceable_run(done.folder)


def test_a_model_is_not_saved_over_other_things(finished, tmp_path):
    model = models.load(finished / "model")
    model.save(tmp_path / "m")
    notes = put(tmp_path / "m" / "notes.txt")
    with pytest.raises(FileExistsError, match="notes.txt is there and is no saved model"):
        model.save(tmp_path / "m", overwrite=True)
    assert notes.read_text() == MINE


def test_a_checkpoint_over_data(cells, tmp_path):
    data = put(tmp_path / "my.h5ad")
    model = models.VAE(cells, **TINY)
    with pytest.raises(FileExistsError, match="my.h5ad exists"):
        model.train(max_epochs=1, checkpoint=data, progress=False)
    with pytest.raises(ValueError, match="no checkpoint"):
        model.train(max_epochs=1, checkpoint=data, resume=True, progress=False)
    assert data.read_text() == MINE


# ---- folders of a report, of tables, of a question


@pytest.mark.parametrize(
    "name",
    [
        "report.ipynb",
        "report.html",
        "table.csv",
        "metrics.json",
        "umap.png",
        "covariance.png",
        "curves.png",
    ],
)
def test_a_report_asks_before_it_works(name, tmp_path, no_work):
    own = put(tmp_path / name)
    refused(own, invoke("report", "pancreas", "--out", tmp_path))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["tables.ipynb", "tables.html", *tables.WRITTEN])
def test_tables_ask_before_they_work(name, finished, tmp_path, no_work):
    shutil.copytree(finished.parent, tmp_path / "own")
    refused(put(tmp_path / name), invoke("tables", tmp_path))


@pytest.mark.parametrize("name", ["both.ipynb", "both.html", "my/both.csv"])
def test_a_question_asks_before_it_works(name, tmp_path, no_work):
    refused(
        put(tmp_path / name), invoke("beyond", "both", "--organs", "my.h5ad", "--out", tmp_path)
    )
    assert not (tmp_path / "both.ipynb").exists() or name == "both.ipynb"


def test_gathering_asks_of_all_data_sets_first(tmp_path, no_work, monkeypatch):
    monkeypatch.setattr(peers, "environment", lambda *_: "python")
    for question, gather in (
        ("both", lambda: beyond.gather("both", "a.h5ad,b.h5ad", [], tmp_path)),
        ("peers", lambda: peers.gather("a.h5ad,b.h5ad", ("pca",), tmp_path)),
    ):
        own = put(tmp_path / "b" / f"{question}.csv")
        with pytest.raises(FileExistsError, match=f"{question}.csv"):
            gather()
        assert own.read_text() == MINE and not (tmp_path / "a").exists()


def test_with_overwrite_it_goes_to_work_and_again_without(tmp_path, monkeypatch):
    "What was replaced on request is ours from then on."
    began = []

    def execute(template, target, *_, **__):
        began.append(Path(shutil.copy(template, target)))

    monkeypatch.setattr("papermill.execute_notebook", execute)
    put(tmp_path / "table.csv")
    with pytest.raises(FileExistsError, match="table.csv"):
        study.report(tmp_path, organ="pancreas")
    for overwrite in (True, False):
        assert study.report(tmp_path, overwrite, organ="pancreas") == tmp_path / "report.html"
    put(tmp_path / "b" / "my" / "both.csv")
    for overwrite in (True, False):
        beyond.make("both", tmp_path / "b", overwrite, organs="my.h5ad")
    assert len(began) == 4
    beyond.check_replaceable(tmp_path / "b", "both", "my.h5ad")


def test_a_report_of_before_the_notes_is_known_by_its_notebook(tmp_path, monkeypatch):
    shutil.copy(study.TEMPLATE, tmp_path / "report.ipynb")
    (tmp_path / "table.csv").write_text("model\n")
    monkeypatch.setattr("papermill.execute_notebook", lambda template, target, *_, **__: None)
    assert study.report(tmp_path) == tmp_path / "report.html"


# ---- the functions that ask


def test_ask_and_claim(tmp_path):
    own = put(tmp_path / "x" / "a.csv")
    for wrong, error in (
        (tmp_path / "x", IsADirectoryError),
        (own / "b" / "c.csv", NotADirectoryError),
        (own, FileExistsError),
    ):
        with pytest.raises(
            error, match=re.escape(str(own if error is NotADirectoryError else wrong))
        ):
            files.check_replaceable(wrong)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        files.check_replaceable(tmp_path / "link")
    with pytest.raises(FileExistsError):
        files.prepare_folder(tmp_path / "x", "report", ["b.csv", "a.csv"])
    # nothing was made
    assert os.listdir(tmp_path / "x") == ["a.csv"]
    (
        files.prepare_folder(tmp_path / "x", "report", ["b.csv"]),
        files.prepare_folder(tmp_path / "x", "tables", ["c.csv"]),
        files.prepare_folder(tmp_path / "x", "report", ["d.csv"]),
    )
    assert (
        files.recorded_names(tmp_path / "x")
        == {"b.csv", "c.csv", "d.csv"}
        == {*files.recorded_names(tmp_path / "x")}
    )
    with pytest.raises(FileExistsError, match="a.csv is there and is no part"):
        files.check_replaceable_folder(
            tmp_path / "x", [".vampsc-report", ".vampsc-tables"], "part of it"
        )


def test_embed_and_sample_ask_first(finished, tmp_path, no_work, monkeypatch):
    monkeypatch.setattr(models, "load", None)
    data = put(tmp_path / "my.h5ad")
    for words in (("embed", finished, data), ("sample", finished)):
        refused(put(tmp_path / "e.h5ad"), invoke(*words, "--out", tmp_path / "e.h5ad"))
