"""A saved model: whole or not there, and an altered file is named."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vampsc import models, organs


@pytest.fixture(scope="module")
def model(): return models.VAMP(organs.load("pancreas")[:120], n_genes=40, n_latent=3, hidden=(8,), n_pseudo_inputs=5).train(max_epochs=2, progress=False)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def weights(model): return np.concatenate([w.ravel() for w in model.network.get_weights()])


def test_what_is_saved_comes_back(model, saved):
    again = models.load(saved)
    assert np.array_equal(weights(again), weights(model)) and again.history.equals(models.load(saved).history)
    assert (again.genes, again.split, again.architecture) == (model.genes, model.split, model.architecture)
    np.testing.assert_allclose(again.history["loss"], model.history["loss"], rtol=1e-12)


def test_the_checksums_are_those_of_sha256sum(saved):
    if not shutil.which("sha256sum"): pytest.skip("sha256sum is not installed")
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=saved).returncode == 0


@pytest.mark.parametrize("name", [*models.PARTS, models.CELLS, models.CHECKSUMS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name): models.load(saved)


@pytest.mark.parametrize("kind", ["flipped", "cut"])
def test_damage_is_noticed_or_harmless(model, saved, kind):
    "100 random places each, in all files together; wrong weights are never loaded quietly."
    rng, files = np.random.default_rng(0), sorted(saved.iterdir())
    sizes = np.array([f.stat().st_size for f in files])
    noticed = 0
    for _ in range(100):
        file = files[rng.integers(len(files))]                              # as many in the small files as in the large
        whole = file.read_bytes()
        at = int(rng.integers(len(whole)))
        damaged = whole[:at] if kind == "cut" else whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1:]
        file.write_bytes(damaged)
        try: assert np.array_equal(weights(models.load(saved)), weights(model))
        except ValueError as error: noticed += str(saved) in str(error)
        file.write_bytes(whole)
    assert noticed >= 95
    assert np.array_equal(weights(models.load(saved)), weights(model)) and len(sizes) == 6


def test_a_newer_format_asks_for_an_update(model, saved):
    file = saved / "model.json"
    file.write_text(file.read_text().replace(f'"format": {models.FORMAT}', '"format": 99'))
    (saved / "library.npy").unlink()                                        # formats may differ in their files
    (saved / models.CHECKSUMS).unlink()
    models._write_checksums(saved)
    with pytest.raises(ValueError, match="format 99, newer"): models.load(saved)


def test_a_full_disk_leaves_what_was_there(model, saved, monkeypatch):
    def full(path): raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(model.network, "save_weights", full)
    for path in (saved, saved.parent / "other"):
        with pytest.raises(OSError, match="No space left"): model.save(path, overwrite=True)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    assert np.array_equal(weights(models.load(saved)), weights(model))


OTHER = "import sys, vampsc; m = vampsc.load(sys.argv[1]); print(sum(float(abs(w).sum()) for w in m.network.get_weights()))"


@pytest.mark.slow
def test_it_loads_under_another_backend(model, saved):
    pytest.importorskip("jax", reason="JAX is not installed")
    done = subprocess.run([sys.executable, "-c", OTHER, saved], capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "jax"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(sum(float(abs(w).sum()) for w in model.network.get_weights()))
