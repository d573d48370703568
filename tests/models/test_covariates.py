"""Covariates beside the batch: columns of names and of numbers that a model is conditioned on."""

import copy
import json
import pickle
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from vampsc import intake, models
from vampsc.counts import Counts, condition_columns, split_cells

TINY = dict(gene_space=None, hidden=(8,), n_latent=3)
HOW = dict(progress=False, max_epochs=2, batch_size=32)
KEYS = dict(categorical_covariate_keys=["sex", "site"], continuous_covariate_keys="age")


@pytest.fixture(scope="module")
def adata():
    "Cells of which half of the genes depend on sex, and one on age."
    rng = np.random.default_rng(0)
    n = 240
    sex = rng.integers(2, size=n)
    age = rng.uniform(20, 80, n)
    rate = np.full((n, 20), 3.0)
    rate[:, :10] *= np.where(sex, 3.0, 1.0)[:, None]
    rate[:, 10] = age / 8
    obs = pd.DataFrame(
        {
            "sex": np.array(["f", "m"])[sex],
            "site": np.array(["lung", "liver", "skin"])[rng.integers(3, size=n)],
            "age": age,
            "donor": np.array(["d1", "d2"])[rng.integers(2, size=n)],
        },
        index=[f"c{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"g{j}" for j in range(20)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype("float32")), obs, var)


@pytest.fixture(scope="module")
def trained(adata):
    return models.VAE(adata, batch_key="donor", **KEYS, **TINY).train(**HOW)


def test_columns_are_covariates_then_batches(adata, trained):
    columns = trained.X.conditions(np.arange(len(adata)))
    assert columns.dtype == np.float32 and columns.shape == (len(adata), 2 + 3 + 1 + 2)
    of = adata.obs
    expected = [
        *(of["sex"] == name for name in ("f", "m")),
        *(of["site"] == name for name in ("liver", "lung", "skin")),
    ]
    assert np.array_equal(columns[:, :5], np.transpose(expected))
    train = of["age"].iloc[trained.split.train]
    assert np.allclose(columns[:, 5], (of["age"] - train.mean()) / train.std(ddof=0), atol=1e-5)
    assert np.array_equal(columns[:, 6:], pd.get_dummies(of["donor"]).to_numpy())
    assert trained.architecture.n_conditions == trained.network.n_conditions == 8
    assert "conditioned on sex, site, age" in repr(trained)


def test_conditions_of_neither_is_none():
    assert condition_columns(None, 0) is None
    assert Counts(sp.eye(3, format="csr")).conditions([0]) is None


def test_a_covariate_alone_without_a_batch(adata):
    model = models.VAMP(adata, categorical_covariate_keys="sex", n_pseudo_inputs=5, **TINY)
    model.train(**HOW)
    assert model.batches == [] and model.network.n_conditions == 2
    expression = model.get_normalized_expression(indices=[0, 1])
    assert expression.shape == (2, 20) and np.isfinite(expression.to_numpy()).all()
    assert model.sample_prior(5).shape == (5, 20)


@pytest.mark.long
@pytest.mark.parametrize("backed", [False, True])
def test_one_call_of_many_steps_trains_as_one_call_a_step(adata, backed, tmp_path):
    "A reading inside of the compiled call, or rows from a file: the same losses."
    data = adata
    if backed:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        data = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    here, there = (
        models.VAE(x, encode_batch=True, **KEYS, **TINY).train(**HOW) for x in (adata, data)
    )
    assert np.allclose(here.history["val_loss"], there.history["val_loss"], rtol=1e-5)


@pytest.mark.long
def test_the_decoder_learns_what_belongs_to_a_covariate(adata):
    model = models.VAE(adata, **KEYS, **TINY)
    model.train(progress=False, max_epochs=60, learning_rate=1e-2, batch_size=32)
    mean = model.get_normalized_expression(library_size="observed").groupby(adata.obs["sex"]).mean()
    genes = mean.columns[:10]
    ratio = (mean.loc["m", genes] / mean.loc["f", genes]).mean()
    assert 2 < ratio < 4
    # other values of the covariates, the same counts and the same embedding
    other = adata.copy()
    other.obs["sex"] = np.where(adata.obs["sex"] == "m", "f", "m")
    first = model.get_latent_representation(adata)
    assert np.array_equal(first, model.get_latent_representation(other))
    own, exchanged = (model.get_normalized_expression(x)[genes] for x in (adata, other))
    women = (adata.obs["sex"] == "f").to_numpy()
    assert (exchanged[women].mean() / own[women].mean()).mean() > 1.5
    # groups are compared with the covariates that their cells have
    found = model.differential_expression(adata, groupby="sex", group1="m", group2="f", seed=0)
    assert found.loc[genes, "lfc_mean"].between(0.5, 2.5).all()


def test_encode_batch_conditions_the_encoder_too(adata):
    model = models.VAMP(adata, encode_batch=True, n_pseudo_inputs=5, **KEYS, **TINY).train(**HOW)
    # a pseudo-input has the covariates of its cell
    assert np.asarray(model.network.pseudo_batch).shape == (5, 6)
    other = adata.copy()
    other.obs["sex"] = np.where(adata.obs["sex"] == "m", "f", "m")
    first = model.get_latent_representation(adata)
    assert not np.allclose(first, model.get_latent_representation(other))
    with pytest.raises(ValueError, match="no column 'age' for the covariate"):
        model.get_latent_representation(
            ad.AnnData(adata.X, adata.obs.drop(columns="age"), adata.var)
        )


def test_cells_without_the_columns_are_embedded_and_not_decoded(adata, trained):
    bare = ad.AnnData(adata.X, adata.obs[["donor"]], adata.var)
    embedded = trained.get_latent_representation(bare)
    assert np.array_equal(embedded, trained.get_latent_representation(adata))
    with pytest.raises(ValueError, match="no column 'sex' for the category"):
        trained.get_normalized_expression(bare)
    with pytest.raises(ValueError, match="no column 'sex' for the category"):
        trained.get_normalized_expression(bare, transform_batch="d1")


def test_transform_batch_keeps_the_covariates(adata, trained):
    columns = []
    decoder = trained.network.decoder

    def watched(z, log_size, conditions):
        columns.append(conditions)
        return decoder(z, log_size, conditions=conditions)

    watched.likelihood = decoder.likelihood
    trained.network.decoder = watched
    try:
        trained.get_normalized_expression(indices=[3], transform_batch="d2", n_mc_samples=1)
    finally:
        trained.network.decoder = decoder
    assert np.array_equal(columns[0][:, :6], trained.X.covariates[[3]])
    assert columns[0][:, 6:].tolist() == [[0, 1]]


def test_saved_copied_and_pickled(adata, trained, tmp_path):
    trained.save(tmp_path / "model")
    expected = trained.get_normalized_expression(adata, seed=1)
    alone = models.load(tmp_path / "model")
    shuffled = adata[np.random.default_rng(0).permutation(len(adata))].copy()
    others = [
        alone,
        models.load(tmp_path / "model", shuffled),
        copy.deepcopy(trained),
        pickle.loads(pickle.dumps(trained)),
    ]
    for other in others:
        assert other.covariates == trained.covariates
        assert other.get_normalized_expression(adata, seed=1).equals(expected)
    invented = trained.sample_prior(20, seed=2)
    assert (alone.sample_prior(20, seed=2).X != invented.X).nnz == 0
    changed = adata.copy()
    changed.obs["age"] += 1
    with pytest.warns(UserWarning, match="192 of 192 training cells have other covariates"):
        models.load(tmp_path / "model", changed)


@pytest.mark.long
def test_a_run_goes_on_only_with_the_same_covariates(adata, tmp_path):
    path = tmp_path / "run.checkpoint"
    models.VAE(adata, **KEYS, **TINY).train("paper", **HOW, checkpoint=path)
    longer = {**HOW, "max_epochs": 3}
    whole = models.VAE(adata, **KEYS, **TINY).train("paper", **longer)
    resumed = models.VAE(adata, **KEYS, **TINY)
    resumed.train("paper", **longer, checkpoint=path, resume=True)
    assert resumed.history["loss"].equals(whole.history["loss"])
    changed = adata.copy()
    changed.obs["age"] = changed.obs["age"].to_numpy()[::-1]
    other = models.VAE(changed, **KEYS, **TINY)
    with pytest.raises(ValueError, match="covariates of each cell"):
        other.train("paper", **longer, checkpoint=path, resume=True)


def test_other_covariates_are_said_and_the_same_in_other_numbers_are_not(adata, trained, tmp_path):
    trained.save(tmp_path / "model")
    rounded = adata.copy()
    rounded.obs["age"] = adata.obs["age"].astype("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        models.load(tmp_path / "model", rounded)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    codes = description["covariates"]["of_library"][0]
    names = description["covariates"]["categorical"][0][1]
    train = adata.obs["sex"].iloc[trained.split.train]
    assert [names[code] for code in codes] == list(train)


def test_invented_cells_have_covariates_of_training_cells(adata, trained):
    for batch in (None, "d2"):
        cells = trained.sample_prior(40, seed=3, batch=batch)
        columns = ["sex", "site", "age", "donor"]
        known = adata.obs[columns].iloc[trained.split.train].round({"age": 2})
        found = cells.obs[columns].astype({"age": float}).round({"age": 2})
        assert len(found.merge(known.drop_duplicates(), on=columns)) >= 39
        if batch:
            assert set(found["donor"]) == {"d2"}
        assert np.isfinite(trained.get_elbo(cells)["elbo"])


def test_numbers_far_from_the_training_cells_are_said(adata, trained):
    far = adata[:5].copy()
    far.obs["age"] = [1e200, 40, 50, -999, 60]
    with pytest.warns(UserWarning, match="in 2 of 5 cells obs.'age'. lies more than 10 standard"):
        expression = trained.get_normalized_expression(far)
    assert np.isfinite(expression.to_numpy()).all()


def test_transfer_adds_batches_and_keeps_covariates(adata, trained):
    query = adata[:60].copy()
    query.obs["donor"] = "d3"
    new = trained.transfer(query, **HOW)
    assert new.batches == ["d1", "d2", "d3"] and new.covariates == trained.covariates
    assert new.network.n_conditions == 9
    assert np.array_equal(
        trained.get_latent_representation(adata), new.get_latent_representation(adata)
    )
    assert np.allclose(
        trained.get_normalized_expression(adata), new.get_normalized_expression(adata), rtol=1e-5
    )
    query.obs["site"] = "brain"
    with pytest.raises(ValueError, match="site brain was not seen in training.*liver, lung, skin"):
        trained.transfer(query, **HOW)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(categorical_covariate_keys="sexx"), "no column 'sexx' for the category"),
        (dict(continuous_covariate_keys="agee"), "no column 'agee' for the covariate"),
        (dict(continuous_covariate_keys="sex"), "holds text, such as .*categorical_covariate_keys"),
        (dict(continuous_covariate_keys="gap"), "120 of 240 cells have no finite number in obs"),
        (dict(continuous_covariate_keys="same"), "is 7 in all training cells"),
        (dict(categorical_covariate_keys="hole"), "120 of 240 cells have no hole"),
        (dict(categorical_covariate_keys="age"), "values for 240 cells; a category needs several"),
        (dict(categorical_covariate_keys=["sex", "sex"]), "names sex twice"),
        (dict(categorical_covariate_keys="sex", batch_key="sex"), "'sex'.* is named twice"),
        (dict(categorical_covariate_keys=[["sex"]]), "each of categorical_covariate_keys"),
        (dict(continuous_covariate_keys=3.5), "each of continuous_covariate_keys must be the name"),
        (dict(categorical_covariate_keys=b"sex"), "each of categorical_covariate_keys must be"),
        (dict(continuous_covariate_keys="tenth"), "is 0.1 in all training cells"),
        (dict(continuous_covariate_keys="day"), "holds datetime64.*days since the first"),
    ],
)
def test_columns_that_are_no_covariates(adata, settings, message):
    cells = adata.copy()
    cells.obs["gap"] = [np.nan, 1.5] * 120
    cells.obs["same"] = 7
    cells.obs["tenth"] = 0.1
    cells.obs["day"] = pd.Timestamp("2026-01-01")
    cells.obs["hole"] = ["NA", "x"] * 120
    with pytest.raises(ValueError, match=message):
        models.VAE(cells, **settings, **TINY)


def test_numbers_as_text_and_as_categories_are_numbers(adata):
    cells = adata.copy()
    cells.obs["text"] = adata.obs["age"].map(repr)
    cells.obs["category"] = pd.Categorical(adata.obs["age"])
    for key in ("text", "category"):
        assert np.allclose(intake.numbers_of_column(cells, key), adata.obs["age"])


def test_a_category_without_training_cells_is_said(adata):
    cells = adata.copy()
    split = split_cells(len(cells), seed=0)
    cells.obs["site"] = "lung"
    cells.obs.loc[cells.obs_names[split.test], "site"] = "eye"
    with pytest.warns(UserWarning, match="site eye has no training cell"):
        models.VAE(cells, categorical_covariate_keys="site", split=split, **TINY)


def test_a_model_without_covariates_is_as_before(adata, tmp_path):
    "Its settings in a checkpoint name none, so that runs of earlier versions go on."
    model = models.VAE(adata, batch_key="donor", **TINY)
    assert model.covariates is None and model.library_covariates is None
    from vampsc import training

    identity = model._identity(training.get_profile("quick"), model.X)
    assert not any("covariate" in name for name in identity)
