"""The response of cells to a perturbation, predicted from others that have shown it."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from vampsc import groups, models


@pytest.fixture(scope="module")
def adata():
    """Two types with genes of their own; in stimulated cells of both, five genes are four times as
    high.
    """
    rng = np.random.default_rng(0)
    n = 400
    kind = np.repeat([0, 1], n // 2)
    stimulated = rng.random(n) < 0.5
    rate = np.full((n, 40), 3.0)
    rate[kind == 0, :10] *= 4
    rate[kind == 1, 10:20] *= 4
    rate[np.ix_(stimulated, range(20, 25))] *= 4
    obs = pd.DataFrame(
        {
            "cell_type": np.array(["a", "b"])[kind],
            "condition": np.where(stimulated, "stim", "ctrl"),
            "donor": np.array(["d1", "d2"])[rng.integers(2, size=n)],
        },
        index=[f"c{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"g{j}" for j in range(40)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype("float32")), obs, var)


@pytest.fixture(scope="module")
def without(adata):
    "All cells but the stimulated ones of type b."
    return adata[(adata.obs["cell_type"] == "a") | (adata.obs["condition"] == "ctrl")].copy()


@pytest.fixture(scope="module")
def trained(without):
    settings = dict(gene_space=None, hidden=(32,), n_latent=6, dropout=0.0, l1=0.0, l2=0.0)
    model = models.VAE(without, **settings)
    return model.train(max_epochs=120, learning_rate=5e-3, batch_size=64, progress=False)


@pytest.fixture(scope="module")
def control_b(adata):
    return adata[(adata.obs["cell_type"] == "b") & (adata.obs["condition"] == "ctrl")].copy()


def test_the_change_is_of_groups_equally():
    values = np.r_[np.zeros(90), np.ones(10), np.zeros(10), np.full(90, 3.0)][:, None]
    perturbed = np.r_[np.zeros(90), np.ones(10), np.zeros(10), np.ones(90)].astype(bool)
    kind = np.repeat(["few", "many"], 100)
    assert groups.mean_change(values, perturbed, kind, at_least=10) == 2
    # of all cells together, by their number
    assert groups.mean_change(values, perturbed) == pytest.approx(2.8)
    # a type of four cells is left out
    more = np.r_[values, [[0.0], [0.0], [99.0], [99.0]]]
    of_more = np.r_[perturbed, [False, False, True, True]], np.r_[kind, ["rare"] * 4]
    assert groups.mean_change(more, *of_more, at_least=10) == 2
    with pytest.raises(ValueError, match="no group has 50 control cells and 50 perturbed ones"):
        groups.mean_change(values, perturbed, kind, at_least=50)


def test_a_response_is_predicted_for_a_type_that_did_not_show_it(
    adata, without, trained, control_b
):
    found = trained.predict_response(control_b, without, "condition", "ctrl", groupby="cell_type")
    assert found.shape == control_b.shape and list(found.obs_names) == list(control_b.obs_names)
    assert list(found.var_names) == list(adata.var_names)
    is_b = (adata.obs["cell_type"] == "b") & (adata.obs["condition"] == "stim")
    real = adata[is_b.to_numpy()].X.toarray().mean(0)
    drawn = found.X.toarray()
    assert (drawn == np.round(drawn)).all() and drawn.min() >= 0
    # the five genes rise, most of the way, and those of the type stay
    before = control_b.X.toarray().mean(0)[20:25]
    assert (drawn.mean(0)[20:25] > 1.8 * before).all() and (before * 3 < real[20:25]).all()
    np.testing.assert_allclose(drawn.mean(0)[10:20], real[10:20], rtol=0.4)
    np.testing.assert_allclose(found.layers["mean"].mean(0), drawn.mean(0), rtol=0.15, atol=0.3)
    # of the cells' own library sizes
    sizes = found.layers["mean"].sum(1) / control_b.X.sum(1).A1
    assert 0.7 < np.median(sizes) < 1.4


def test_the_moved_z_is_the_embedding_and_the_mean_change(without, trained, control_b):
    found = trained.predict_response(control_b, without, "condition", "ctrl", groupby="cell_type")
    z = trained.get_latent_representation(without)
    stimulated = (without.obs["condition"] == "stim").to_numpy()
    # only type a was stimulated
    of_a = (without.obs["cell_type"] == "a").to_numpy()
    change = z[of_a & stimulated].mean(0) - z[of_a & ~stimulated].mean(0)
    expected = trained.get_latent_representation(control_b) + change
    np.testing.assert_allclose(found.obsm["z"], expected, atol=1e-5)
    again = trained.predict_response(control_b, without, "condition", "ctrl", groupby="cell_type")
    assert (again.X != found.X).nnz == 0
    other = trained.predict_response(
        control_b, without, "condition", "ctrl", groupby="cell_type", seed=1
    )
    assert (other.X != found.X).nnz > 0


def test_a_perturbed_value_can_be_chosen(without, trained, control_b):
    three = without.copy()
    three.obs["condition"] = np.where(
        np.arange(len(three)) % 5 == 0, "other", three.obs["condition"].astype(str)
    )
    all_others = trained.predict_response(control_b, three, "condition", "ctrl")
    stim = trained.predict_response(control_b, three, "condition", "ctrl", perturbed="stim")
    assert not np.allclose(all_others.obsm["z"], stim.obsm["z"])


def test_cells_of_batches_are_decoded_as_of_their_own(without, control_b):
    model = models.VAMP(
        without,
        gene_space=None,
        hidden=(8,),
        n_latent=3,
        n_pseudo_inputs=5,
        batch_key="donor",
        categorical_covariate_keys="cell_type",
    )
    model.train(max_epochs=2, progress=False)
    found = model.predict_response(control_b, without, "condition", "ctrl", batch_size=7)
    assert found.n_obs == control_b.n_obs and np.isfinite(found.layers["mean"]).all()
    bare = ad.AnnData(control_b.X, control_b.obs[["cell_type"]], control_b.var)
    with pytest.raises(ValueError, match="no column 'donor' for the batch"):
        model.predict_response(bare, without, "condition", "ctrl")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(condition="treatment"), "no column 'treatment' for the condition"),
        (dict(control="control"), "no cell is control: obs.'condition'. has ctrl, stim, not"),
        (dict(perturbed="stimm"), "no cell is perturbed: .* not perturbed='stimm'"),
        (dict(groupby="type"), "no column 'type' for the groups"),
        (dict(perturbed="ctrl"), "control and perturbed are both 'ctrl'"),
        (dict(at_least=1000), "no group has 1000 control cells"),
        (dict(at_least=0), "at_least must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_named(trained, without, control_b, given, message):
    settings = {"condition": "condition", "control": "ctrl", **given}
    with pytest.raises(ValueError, match=message):
        trained.predict_response(control_b, without, **settings)


def test_a_model_that_is_conditioned_on_the_condition_is_refused(without, control_b):
    for key in ("batch_key", "categorical_covariate_keys"):
        model = models.VAE(without, gene_space=None, hidden=(8,), n_latent=3, **{key: "condition"})
        model.train(max_epochs=1, progress=False)
        with pytest.raises(ValueError, match="is conditioned on 'condition', which takes the resp"):
            model.predict_response(control_b, without, "condition", "ctrl")


def test_conditions_that_are_numbers(without, trained, control_b):
    numbers = without.copy()
    numbers.obs["condition"] = (without.obs["condition"] == "stim").astype(float)
    found = trained.predict_response(control_b, numbers, "condition", 0, groupby="cell_type")
    same = trained.predict_response(control_b, without, "condition", "ctrl", groupby="cell_type")
    assert np.array_equal(found.obsm["z"], same.obsm["z"])


def test_perturbed_cells_without_labels_are_named(trained, without, control_b):
    "As where only the control cells were labelled: the way out is to label them, or no groups."
    unlabelled = without.copy()
    stim = (unlabelled.obs["condition"] == "stim").to_numpy()
    unlabelled.obs["cell_type"] = np.where(stim, None, unlabelled.obs["cell_type"].astype(object))
    settings = dict(condition="condition", control="ctrl")
    with pytest.raises(ValueError, match=f"none of the {stim.sum():,} perturbed .*predict_labels"):
        trained.predict_response(control_b, unlabelled, groupby="cell_type", **settings)
    trained.predict_response(control_b, unlabelled, **settings)
