"""`vampsc transfer`: a trained model goes on with other cells, and that is a run like any other.

And reports of cells without cell types.
"""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from vampsc import cli, models, organs, study, training

TINY = ["--max-epochs", 1, "--no-umap"]


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words], catch_exceptions=False)


def cells(n, seed, donors="ab"):
    kind = np.arange(n) % 2
    counts = np.random.default_rng(seed).poisson(1 + 2.0 * kind[:, None], (n, 20)) + 1
    obs = pd.DataFrame(
        {
            "cell_type": [f"t{k}" for k in kind],
            "donor": [donors[i % len(donors)] for i in range(n)],
        },
        index=[f"c{i}" for i in range(n)],
    )
    return ad.AnnData(
        sparse.csr_matrix(counts.astype("float32")),
        obs,
        pd.DataFrame(index=[f"g{j}" for j in range(20)]),
    )


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    profile = training.get_profile("quick", max_epochs=1)
    return study.run(
        cells(60, 0),
        "vae",
        tmp_path_factory.mktemp("runs"),
        profile,
        3,
        gene_space=None,
        hidden=(8,),
        n_latent=2,
        batch_key="donor",
        progress=False,
    ).folder


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "new.h5ad"
    # other donors, genes in another order
    more = cells(70, 1, "bc")[:, ::-1].copy()
    more.write_h5ad(path)
    return path


def test_it_is_a_run(origin, new, tmp_path):
    before = (origin / "model" / "model.weights.h5").read_bytes()
    done = invoke(
        "transfer", origin, new, "--out", tmp_path, "--label-key", "cell_type", "--json", *TINY
    )
    assert done.exit_code == 0, done.stderr
    # the model's seed
    run = study.read_run(tmp_path / "vae-seed3")
    said = json.loads(done.stdout)
    assert (
        said["folder"] == run.folder.as_posix()
        and said["metrics"]["asw"] == run.metrics["asw"]
        and len(run.history) == 1
    )
    model = models.load(run.folder / "model")
    assert (
        model.batches == ["a", "b", "c"]
        and model.architecture.hidden == (8,)
        and run.metrics["n_cells"] == 70
    )
    expected = models.load(origin / "model").transfer(
        ad.read_h5ad(new), training.get_profile("quick", max_epochs=1), progress=False
    )
    assert np.allclose(run.embedding, expected.get_latent_representation(), atol=1e-5)
    assert (origin / "model" / "model.weights.h5").read_bytes() == before

    time = (run.folder / "metrics.json").stat().st_mtime_ns
    again = invoke(
        "transfer", origin, new, "--out", tmp_path, "--label-key", "cell_type", "--json", *TINY
    )
    assert (
        json.loads(again.stdout) == {**said, "reused": True}
        and (run.folder / "metrics.json").stat().st_mtime_ns == time
    )
    other = invoke(
        "transfer", origin, new, "--out", tmp_path, "--label-key", "cell_type", "--max-epochs", 2
    )
    assert other.exit_code == 1 and "max_epochs" in other.stderr and "--overwrite" in other.stderr


def test_a_run_of_the_same_cells_that_began_elsewhere_is_another(origin, new, tmp_path):
    study.transfer(
        origin,
        ad.read_h5ad(new),
        tmp_path,
        training.get_profile("quick", max_epochs=1),
        progress=False,
    )
    changed = models.load(origin / "model")
    changed.network.set_weights([w * 1.01 for w in changed.network.get_weights()])
    changed.save(tmp_path / "changed")
    with pytest.raises(FileExistsError, match="begins_with was"):
        study.transfer(
            tmp_path / "changed",
            ad.read_h5ad(new),
            tmp_path,
            training.get_profile("quick", max_epochs=1),
        )


def test_an_interrupted_one_goes_on(origin, new, tmp_path, monkeypatch):
    adata = ad.read_h5ad(new)
    profile = training.get_profile("quick", max_epochs=3)
    whole = study.transfer(origin, adata, tmp_path / "whole", profile, progress=False)
    noted = training.Record.on_epoch_end

    def stops(self, epoch, logs=None):
        noted(self, epoch, logs)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Record, "on_epoch_end", stops)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        study.transfer(origin, adata, tmp_path / "part", profile, progress=False)
    monkeypatch.undo()
    assert (tmp_path / "part" / "vae-seed3" / "checkpoint").exists()
    went_on = study.transfer(origin, adata, tmp_path / "part", profile, progress=False)
    assert np.allclose(went_on.embedding, whole.embedding, atol=1e-5) and len(went_on.history) == 3


def test_cells_of_one_new_donor_with_covariates(tmp_path):
    "One donor cannot be mixed with others; another covariate is another run."
    profile = training.get_profile("quick", max_epochs=1)
    settings = dict(gene_space=None, hidden=(8,), n_latent=2, progress=False)
    settings.update(batch_key="donor", continuous_covariate_keys="age")
    adata = cells(60, 0)
    adata.obs["age"] = np.arange(60.0)
    first = study.run(adata, "vae", tmp_path / "first", profile, 3, **settings).folder
    query = cells(40, 1, donors="c")
    query.obs["age"] = 30.0
    new = study.transfer(first, query, tmp_path / "new", profile, progress=False)
    assert new.config["settings"]["continuous_covariate_keys"] == ["age"]
    assert "batch_mixing" not in new.metrics
    query.obs["age"] = 20.0
    with pytest.raises(FileExistsError, match="covariate age"):
        study.transfer(first, query, tmp_path / "new", profile, progress=False)


def test_what_is_refused(origin, new, tmp_path):
    done = invoke("transfer", origin, new, "--out", origin.parent, *TINY)
    assert (
        done.exit_code == 1
        and "is the run that this one begins with; choose another folder" in done.stderr
    )
    own = tmp_path / "vae-seed3" / "history.csv"
    own.parent.mkdir()
    own.write_text("mine")
    done = invoke("transfer", origin, new, "--out", tmp_path, *TINY)
    assert (
        done.exit_code == 1 and "history.csv is there" in done.stderr and own.read_text() == "mine"
    )
    assert invoke("transfer", tmp_path / "nowhere", new).exit_code == 1


def test_nothing_new_is_refused_unless_all_is_trained(origin, tmp_path):
    cells(60, 4).write_h5ad(tmp_path / "same donors.h5ad")
    done = invoke("transfer", origin, tmp_path / "same donors.h5ad", "--out", tmp_path, *TINY)
    assert (
        done.exit_code == 1
        and "no batch of these cells is new" in done.stderr
        and "vampsc embed" in done.stderr
    )
    assert not (tmp_path / "vae-seed3" / "metrics.json").exists()
    done = invoke(
        "transfer", origin, tmp_path / "same donors.h5ad", "--out", tmp_path, "--unfrozen", *TINY
    )
    assert done.exit_code == 0 and len(study.read_run(tmp_path / "vae-seed3").history) == 1


def test_frozen_and_unfrozen_are_two_runs(origin, new, tmp_path):
    first = study.transfer(
        origin,
        ad.read_h5ad(new),
        tmp_path,
        training.get_profile("quick", max_epochs=1),
        progress=False,
    )
    expected = models.load(origin / "model").get_latent_representation(ad.read_h5ad(new))
    # the embedding is the first model's
    assert np.allclose(first.embedding, expected, atol=1e-5)
    with pytest.raises(FileExistsError, match="trains only was new batches and is None"):
        study.transfer(
            origin,
            ad.read_h5ad(new),
            tmp_path,
            training.get_profile("quick", max_epochs=1),
            unfrozen=True,
        )


# ---- without cell types


def test_the_way_out_without_cell_types_is_named_and_works(new, tmp_path):
    bare = ad.read_h5ad(new)
    del bare.obs["cell_type"]
    with pytest.raises(
        ValueError,
        match=r"no column 'cell_type'.*label_key=None, on the command line --label-key none",
    ):
        organs.labels(bare)
    bare.write_h5ad(tmp_path / "bare.h5ad")
    words = (
        "fit",
        tmp_path / "bare.h5ad",
        "--model",
        "ae",
        "--gene-space",
        "none",
        "--out",
        tmp_path,
        *TINY,
    )
    refused = invoke(*words, "--label-key", "cell_type")
    assert refused.exit_code == 1 and "--label-key none" in refused.stderr
    assert invoke(*words, "--label-key", "none").exit_code == 0
    assert "asw" not in study.read_run(tmp_path / "ae-seed0").metrics
