"""A saved model: whole or not there, and an altered file is named."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from vampsc import models, organs, priors, saving


@pytest.fixture(scope="module")
def model():
    return models.VAMP(
        organs.load("pancreas")[:120], n_genes=40, n_latent=3, hidden=(8,), n_pseudo_inputs=5
    ).train(max_epochs=2, progress=False)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def seal(folder):
    "Checksums that say that all is as it was written."
    (folder / saving.CHECKSUMS).unlink()
    (folder / saving.CHECKSUMS).write_bytes(
        saving._checksums({p.name: p.read_bytes() for p in folder.iterdir()})
    )


def weights(model):
    return np.concatenate([w.ravel() for w in model.network.get_weights()])


def test_what_is_saved_comes_back(model, saved):
    again = models.load(saved)
    assert np.array_equal(weights(again), weights(model)) and again.history.equals(
        models.load(saved).history
    )
    assert (again.genes, again.split, again.architecture) == (
        model.genes,
        model.split,
        model.architecture,
    )
    np.testing.assert_allclose(again.history["loss"], model.history["loss"], rtol=1e-12)


def test_the_checksums_are_those_of_sha256sum(saved):
    if not shutil.which("sha256sum"):
        pytest.skip("sha256sum is not installed")
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=saved).returncode == 0
    )


@pytest.mark.parametrize("name", [*saving.PARTS, saving.CELLS, saving.CHECKSUMS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        models.load(saved)


@pytest.mark.parametrize("kind", ["flipped", "cut"])
def test_damage_is_noticed_or_harmless(model, saved, kind):
    "100 random places each, in all files together; wrong weights are never loaded quietly."
    rng = np.random.default_rng(0)
    files = sorted(saved.iterdir())
    sizes = np.array([f.stat().st_size for f in files])
    noticed = 0
    for _ in range(100):
        # as many in the small files as in the large
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        at = int(rng.integers(len(whole)))
        damaged = (
            whole[:at]
            if kind == "cut"
            else whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :]
        )
        file.write_bytes(damaged)
        try:
            assert np.array_equal(weights(models.load(saved)), weights(model))
        except ValueError as error:
            noticed += str(saved) in str(error)
        file.write_bytes(whole)
    assert noticed >= 95
    assert np.array_equal(weights(models.load(saved)), weights(model)) and len(sizes) == 6


def test_a_newer_format_asks_for_an_update(model, saved):
    file = saved / "model.json"
    file.write_text(file.read_text().replace(f'"format": {saving.FORMAT}', '"format": 99'))
    # formats may differ in their files
    (saved / "library.npy").unlink()
    seal(saved)
    with pytest.raises(ValueError, match="format 99, newer"):
        models.load(saved)


# ---- a full disk

# A process of its own, since HDF5 can take it down. It lets no file grow beyond ten sizes, and
# prints a row for each.
ON_A_FULL_DISK = """
import json, resource, sys
from pathlib import Path
from vampsc import models, training

def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
def contents(path):
    if path.is_file(): return path.read_bytes()
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.exists() else None

folder, source = map(Path, sys.argv[1:])
model = models.load(source)
arrays = model.network.get_weights()
largest = max(p.stat().st_size for p in source.iterdir())
work = {"save": lambda: model.save(folder / "save"),
        "overwrite": lambda: model.save(folder / "overwrite", overwrite=True),
        "checkpoint": lambda: training.write_checkpoint(folder / "checkpoint", {}, arrays)}
model.save(folder / "overwrite")
training.write_checkpoint(folder / "checkpoint", {}, arrays)
sizes = {kind: (folder / "checkpoint").stat().st_size if kind == "checkpoint" else largest for kind in work}
model.network.decoder.log_rate.bias.assign(model.network.decoder.log_rate.bias + 1)
for kind, do in work.items():
    for tenth in range(10):
        before, said = contents(folder / kind), None
        limit(sizes[kind] * tenth // 10)
        try: do()
        except OSError as error: said = str(error)
        finally: limit(resource.RLIM_INFINITY)
        others = {p.name for p in folder.iterdir()} - {"overwrite", "checkpoint"}
        print(json.dumps([kind, tenth, said, contents(folder / kind) == before, sorted(others)]))
model.save(folder / "elsewhere")
"""  # noqa: E501


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A saved model whose weights are the largest of its files."
    adata = organs.load("pancreas")[:80]
    most = np.sort(np.argsort(-np.asarray(adata.X.sum(0)).ravel())[:100])
    path = tmp_path_factory.mktemp("small") / "m"
    models.VAE(adata[:, most].copy(), gene_space=None, n_latent=3, hidden=(8,)).save(path)
    return path


@pytest.mark.long
def test_a_full_disk_leaves_what_was_there_and_the_model(small, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, tmp_path, small], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 30
    for kind, _, said, stays, others in rows:
        assert (
            said and "File too large" in said and str(tmp_path / kind) in said and "\n" not in said
        )
        assert stays and not others
    one, other = (weights(models.load(path)) for path in (small, tmp_path / "elsewhere"))
    assert np.abs(one - other).max() == pytest.approx(1, abs=1e-5)


# ---- another process

# It replaces a model for so many seconds; each time all parts of it hold the same number.
WRITER = """
import sys, time
import numpy as np, pandas as pd
from vampsc import models

model, end, k = models.load(sys.argv[1]), time.time() + float(sys.argv[2]), 0
while time.time() < end:
    k += 1
    bias = model.network.decoder.log_rate.bias
    bias.assign(np.full(bias.shape, k, "float32"))
    model.library = np.full(len(model.library), float(k))
    model.history = pd.DataFrame({"loss": [float(k)]}, index=pd.RangeIndex(1, 2, name="epoch"))
    model.save(sys.argv[1], overwrite=True)
    if k == 1: print("begun", flush=True)
"""


@pytest.mark.slow
def test_a_model_that_another_process_replaces_is_of_one_save(small, tmp_path):
    path = shutil.copytree(small, tmp_path / "m")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path, "3"], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"begun\n"
        seen = []
        while writer.poll() is None:
            model = models.load(path)
            bias = model.network.decoder.log_rate.bias
            seen.append((float(bias[0]), model.library[0], model.history["loss"].iloc[0]))
    assert writer.returncode == 0 and len({one for one, *_ in seen}) > 2
    assert all(len(set(parts)) == 1 for parts in seen)


# ---- valid checksums, and what no model is


def altered(path, **fields):
    "The model with other values in model.json; names such as architecture__n_latent reach within."
    description = json.loads((path / "model.json").read_text())
    for name, value in fields.items():
        *above, last = name.split("__")
        within = description
        for part in above:
            within = within[part]
        if value is None:
            del within[last]
        else:
            within[last] = value
    (path / "model.json").write_text(json.dumps(description))
    seal(path)


WRONG = [
    ("name", 3),
    ("name", None),
    ("seed", "0"),
    ("seed", 1.5),
    ("layer", ["counts"]),
    ("use_raw", "no"),
    ("format", "3"),
    ("format", None),
    ("genes__ids", "abc"),
    ("genes__symbols", [1, 2]),
    ("genes", []),
    ("architecture__n_latent", "3"),
    ("architecture__depth", 2),
    ("architecture", None),
    ("split__train", [0, 1, 10**6]),
    ("split__train", [0, 1]),
    ("split__test", "all"),
    ("split", []),
    ("batch", {"key": "donor", "names": ["a"], "of_library": [0]}),
    ("architecture__n_batches", 2),
    ("architecture__n_covariates", 1),
    ("covariates", {"categorical": [["sex", ["f"]]], "continuous": [], "of_library": [[0]]}),
    ("covariates", {"categorical": [], "continuous": [["age", [40, 0]]], "of_library": [[0]]}),
]


@pytest.mark.parametrize("field, value", WRONG)
def test_a_field_of_another_kind_is_named(small, tmp_path, field, value):
    path = shutil.copytree(small, tmp_path / "m")
    altered(path, **{field: value})
    named = [name for name in ("batch", "covariates") if name in field]
    name = named[0] if named else field.split("__")[0]
    wanted = f"^{name} in {path / 'model.json'} is not as save writes it .*; take it from a copy"
    with pytest.raises(ValueError, match=wanted) as error:
        models.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value", [("n_latent", 10**9), ("hidden", [10**9]), ("hidden", [8, 10**6])]
)
def test_absurd_sizes_take_no_memory(small, tmp_path, field, value):
    path = shutil.copytree(small, tmp_path / "m")
    altered(path, **{f"architecture__{field}": value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=f"model.weights.h5 is not .*no array fits {field}=1,0.* in model.json"
    ):
        models.load(path)
    # kilobytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.long
def test_sizes_that_fit_every_kind_of_model(tmp_path):
    "All lengths differ, so that no array stands in for another."
    adata = organs.load("pancreas")[:60].copy()
    adata.obs["lab"] = np.where(np.arange(60) % 2, "a", "b")
    for name, kind in models.PRESETS.items():
        more = {"n_pseudo_inputs": 13} if "VAMP" in name else {}
        model = kind(
            adata,
            n_genes=37,
            n_latent=6,
            hidden=(17, 11),
            flow_hidden=(19,),
            n_flow_steps=2,
            batch_key="lab",
            encode_batch=True,
            **more,
        )
        model.save(tmp_path / name)
        assert np.array_equal(weights(models.load(tmp_path / name)), weights(model))
    linear = models.VAE(adata, n_genes=37, n_latent=6, hidden=(), linear_decoder=True)
    linear.save(tmp_path / "linear")
    assert np.array_equal(weights(models.load(tmp_path / "linear")), weights(linear))


def test_an_array_larger_than_its_file_takes_no_memory(small, tmp_path):
    path = shutil.copytree(small, tmp_path / "m")
    with h5py.File(path / "model.weights.h5", "a") as file:
        file.create_dataset("more", (10**6, 10**6), "float32", chunks=True)
    seal(path)
    with pytest.raises(ValueError, match="/more has the shape .* more than the file holds"):
        models.load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(small, tmp_path, value):
    path = shutil.copytree(small, tmp_path / "m")
    with h5py.File(path / "model.weights.h5", "a") as file:

        def spoil(name, item):
            if name.endswith("log_rate/vars/0"):
                item[0, 0] = value

        file.visititems(spoil)
    seal(path)
    with pytest.raises(
        ValueError, match="model.weights.h5 is not as .*decoder/log_rate/kernel are not finite"
    ):
        models.load(path)
    model = models.load(small)
    bias = model.network.decoder.log_rate.bias
    bias.assign(bias * value)
    with pytest.raises(ValueError, match="decoder/log_rate/bias are not finite"):
        model.save(path, overwrite=True)


def test_arrays_of_another_network_are_refused(small, tmp_path):
    path = shutil.copytree(small, tmp_path / "m")
    with h5py.File(path / "model.weights.h5", "a") as file:
        del file["decoder/log_rate"]
    seal(path)
    with pytest.raises(ValueError, match="model.weights.h5 is not as save writes it") as error:
        models.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..", "a/b"])
def test_checksums_of_files_elsewhere_are_refused(small, tmp_path, name):
    path = shutil.copytree(small, tmp_path / "m")
    (tmp_path / "x").write_bytes(b"elsewhere")
    sums = path / saving.CHECKSUMS
    with open(sums, "a") as file:
        file.write(f"{hashlib.sha256(b'elsewhere').hexdigest()}  {name}\n")
    with pytest.raises(
        ValueError, match=f"{sums} was altered .*lists '{name}', which is not in the folder"
    ):
        models.load(path)


OTHER_CONTENTS = [
    ("library.npy", np.zeros(64)),
    ("library.npy", np.ones((8, 8))),
    ("library.npy", np.ones(3)),
    ("library.npy", np.array(["a"] * 64)),
    ("cells.npz", np.ones(80)),
    ("history.csv", "epoch,loss\n1,low\n"),
    ("model.weights.h5", "none"),
    ("model.json", "[1, 2]"),
    ("model.json", "{"),
]


@pytest.mark.parametrize("name, content", OTHER_CONTENTS)
def test_other_files_of_another_kind_are_named(small, tmp_path, name, content):
    path = shutil.copytree(small, tmp_path / "m")
    if isinstance(content, str):
        (path / name).write_text(content)
    else:
        with open(path / name, "wb") as file:
            np.save(file, content)
    seal(path)
    with pytest.raises(ValueError, match=f"{path}.* is not as save writes it") as error:
        models.load(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_models_of_older_formats_load(small, tmp_path):
    "Formats 1 and 2 knew neither raw counts nor batches, nor the marks of cells."
    for old in (1, 2):
        path = shutil.copytree(small, tmp_path / f"{old}")
        (path / saving.CELLS).unlink()
        later = [
            "use_raw",
            "batch",
            "covariates",
            *(f"architecture__{name}" for name in ("n_batches", "encode_batch", "precision")),
        ]
        altered(path, format=old, **dict.fromkeys(later))
        assert np.array_equal(weights(models.load(path)), weights(models.load(small)))


OTHER = (
    "import sys, vampsc; m = vampsc.load(sys.argv[1]); print(sum(float(abs(w).sum()) for w in"
    " m.network.get_weights()))"
)


@pytest.mark.slow
def test_it_loads_under_another_backend(model, saved):
    pytest.importorskip("jax", reason="JAX is not installed")
    done = subprocess.run(
        [sys.executable, "-c", OTHER, saved],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(
        sum(float(abs(w).sum()) for w in model.network.get_weights())
    )


def test_a_part_that_was_put_in_by_hand_is_not_saved_as_another(tmp_path):
    "load makes parts by their names: it would give a standard normal, without a word."

    class Wide(priors.StandardNormal):
        pass

    own = models.VAE(organs.load("pancreas")[:120], n_genes=40, n_latent=3, hidden=(8,))
    own.network.prior.__class__ = Wide
    with pytest.raises(ValueError, match="prior of this network is a Wide, .* names 'normal'"):
        own.save(tmp_path / "own")
    assert not (tmp_path / "own").exists()
