"""What a model is used for, against truths that are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from vampsc import beyond, models, organs, training, uses

VAE = [beyond.Variant("VAE", "vae")]


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:400].copy()


def run_on(cells, folder, epochs=10, n_genes=60):
    "The folder of a small run on a file of cells."
    profile = training.get_profile("quick", max_epochs=epochs, n_genes=n_genes)
    how = dict(seeds=(0,), profile=profile, jobs=1, progress=False, hidden=(16,), n_latent=8)
    frame = beyond.sweep(organs.load(cells), VAE, folder, **how, invent=False)
    return frame.folder[0]


@pytest.fixture(scope="module")
def a_run(adata, tmp_path_factory):
    "The file of some cells, and the folder of a run on them."
    folder = tmp_path_factory.mktemp("judged")
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad", run_on(folder / "cells.h5ad", folder / "out")


def test_labels_are_judged_once_by_the_model_and_without(a_run):
    cells, folder = a_run
    judged = uses.judge_labels(cells, folder)
    assert set(judged) == {"model", "PCA"} and judged["PCA"]["accuracy"] > 0.8
    for of_space in judged.values():
        assert sum(of_space["n_in_bin"]) == 80 >= sum(of_space["right_in_bin"])
        assert all(0 <= share <= 1 for share in of_space["left_out"].values())
    # no cells are needed any more
    assert uses.judge_labels("nowhere.h5ad", folder) == judged


def test_thinned_genes_are_those_that_are_found(a_run):
    cells, folder = a_run
    rows = uses.judge_differences(cells, folder, repetitions=2, n_samples=20)
    rows = pd.DataFrame(rows)
    assert len(rows) == 2 * 2 * 5 and (rows.false <= rows.called).all()
    nothing = rows[rows.what == "nothing"]
    assert (nothing.called == nothing.false).all() and nothing["found_2"].isna().all()
    known = rows[(rows.what == "known") & (rows.method == "model")]
    assert known["found_2"].mean() >= known["found_0.5"].mean()


def test_thinning_changes_one_side_by_what_it_says():
    counts = np.full((4000, 3), 20.0)
    first, second = uses.thinned(counts, [0, 1], [1.0, -2.0], np.random.default_rng(0))
    np.testing.assert_allclose(first.mean(0), [20, 5, 20], rtol=0.02)
    np.testing.assert_allclose(second.mean(0), [10, 20, 20], rtol=0.02)


def test_cells_without_labels_are_refused_by_name(adata, tmp_path):
    bare = adata[:100].copy()
    del bare.obs["cell_type"]
    bare.write_h5ad(tmp_path / "bare.h5ad")
    folder = run_on(tmp_path / "bare.h5ad", tmp_path / "out", epochs=1)
    for judge in (uses.judge_labels, uses.judge_differences):
        with pytest.raises(ValueError, match="its cells have no labels"):
            judge(tmp_path / "bare.h5ad", folder)
    with pytest.raises(ValueError, match="needs a column of obs"):
        uses.write_permuted(tmp_path / "bare.h5ad", tmp_path / "permuted.h5ad")


# ---- denoising


@pytest.fixture(scope="module")
def half(a_run, tmp_path_factory):
    "A file of one half of the molecules, and the folder of a run on it."
    folder = tmp_path_factory.mktemp("half")
    cells = uses.write_halves(a_run[0], folder / "half.h5ad")
    return cells, run_on(cells, folder / "out")


def test_halves_add_up_and_do_not_depend_on_each_other(adata, a_run, half):
    parts = organs.load(half[0])
    first = parts.X
    second = sparse.csr_matrix(parts.layers["held_out"])
    whole = sparse.csr_matrix(adata.X)
    assert (first + second != whole).nnz == 0 and (first.data > 0).all()
    # of many molecules half, give or take the coins
    n = whole.sum()
    assert abs(first.sum() - n / 2) < 4 * np.sqrt(n / 4)
    coins = (first - second).toarray()[whole.toarray() == 2]
    assert np.mean(coins == 0) == pytest.approx(0.5, abs=0.03)
    # one that is there is kept
    assert uses.write_halves(a_run[0], half[0]) == half[0]
    # but not taken for that of other cells, or of other coins
    for name, seed in (("nowhere.h5ad", 0), (a_run[0], 1)):
        with pytest.raises(ValueError, match="half.h5ad was made of .* remove it"):
            uses.write_halves(name, half[0], seed)


def test_values_that_are_no_counts_are_not_divided(adata, tmp_path):
    logs = adata[:20].copy()
    logs.X = np.log1p(logs.X.toarray())
    logs.write_h5ad(tmp_path / "logs.h5ad")
    for write in (uses.write_halves, uses.write_permuted):
        with pytest.raises(ValueError, match="X must hold raw counts"):
            write(tmp_path / "logs.h5ad", tmp_path / "new.h5ad")
    assert not (tmp_path / "new.h5ad").exists()


def test_poisson_loss_is_that_of_scipy():
    x = np.array([[0.0, 3.0, 200.0], [1.0, 0.0, 7.0]])
    mu = np.array([[1e-8, 2.5, 180.0], [0.3, 4.0, 7.0]])
    expected = -stats.poisson.logpmf(x, mu).sum(1)
    np.testing.assert_allclose(uses.poisson_loss(x, mu), expected, rtol=1e-10)


def test_losses_of_rates_are_those_of_test_cells():
    rng = np.random.default_rng(0)
    mu = rng.gamma(2, 2, (4000, 3)) * [0.1, 1, 5]
    # of 3,000 cells the dispersion is found, which is 2 for all genes; 1,000 are judged
    x = rng.negative_binomial(2, 2 / (2 + mu))
    few = np.array([True, False, False])
    losses = uses.losses_of_rates(mu, x, few, 3000)
    expected = -stats.poisson.logpmf(x, mu)[3000:]
    assert losses["poisson"] == pytest.approx(expected.sum(1).mean())
    assert losses["poisson_few"] == pytest.approx(expected[:, 0].mean())
    expected = -stats.nbinom.logpmf(x, 2, 2 / (2 + mu))[3000:].sum(1).mean()
    assert losses["negative_binomial"] == pytest.approx(expected, rel=0.01)


def test_denoising_is_judged_by_molecules_that_no_method_has_seen(half):
    judged = uses.judge_denoising(*half)
    assert set(judged) == {
        "model",
        "model and counts",
        "own counts",
        "mean of all",
        "mean of the type",
        "mean of the type and counts",
        "neighbours",
        "neighbours and counts",
        "components",
    }
    poisson = {method: losses["poisson"] for method, losses in judged.items()}
    assert all(np.isfinite(list(losses.values())).all() for losses in judged.values())
    assert poisson["model and counts"] < poisson["model"] < poisson["mean of all"]
    assert poisson["mean of the type"] < poisson["mean of all"]
    # no cells are needed any more
    assert uses.judge_denoising("nowhere.h5ad", half[1]) == judged


def test_cells_whose_molecules_were_not_divided_are_refused(a_run):
    with pytest.raises(ValueError, match="no layers.*write_halves"):
        uses.judge_denoising(*a_run)


def test_denoising_without_labels(adata, tmp_path):
    bare = adata[:120].copy()
    del bare.obs["cell_type"]
    bare.write_h5ad(tmp_path / "bare.h5ad")
    cells = uses.write_halves(tmp_path / "bare.h5ad", tmp_path / "half.h5ad")
    judged = uses.judge_denoising(cells, run_on(cells, tmp_path / "out", epochs=1))
    assert "neighbours" in judged and "mean of the type" not in judged


def test_rates_by_counts_are_the_mean_of_a_gamma_posterior(half):
    "Of rates drawn from the prior Gamma(theta, mu / theta), weighted by the count's probability."
    cells, folder = half
    model = models.load(f"{folder}/model", organs.load(cells))
    how = dict(indices=[0], library_size="observed", n_mc_samples=1, seed=3)
    plain = model.get_normalized_expression(**how, gene_list=model.genes.ids).to_numpy()[0]
    given = model.get_normalized_expression(
        **how, gene_list=model.genes.ids, use_counts=True
    ).to_numpy()[0]
    x = model.X[[0]].toarray()[0]
    _, _, (log_mu, log_theta) = next(model._decoded(model.X, np.array([0]), None, 1, 3, 512))
    theta = np.exp(np.broadcast_to(np.asarray(log_theta), log_mu.shape))[0]
    for gene in np.argsort(-x)[[0, 1, 5, 30]]:
        shape, scale = theta[gene], plain[gene] / theta[gene]
        grid = stats.gamma.ppf((np.arange(200_000) + 0.5) / 200_000, shape, scale=scale)
        log_weight = stats.poisson.logpmf(x[gene], grid)
        weight = np.exp(log_weight - log_weight.max())
        assert given[gene] == pytest.approx((grid * weight).sum() / weight.sum(), rel=0.02)
    with pytest.raises(ValueError, match="use_counts= takes the cells' own counts"):
        model.get_normalized_expression(use_counts=True, transform_batch="a")
    with pytest.raises(ValueError, match="use_counts must be True or False"):
        model.get_normalized_expression(use_counts=2)


# ---- correlations

METHODS = {"counts", "model", "model and counts", "drawn", "neighbours", "components"}


def test_permuted_genes_keep_their_counts_within_a_type_and_lose_each_other(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    permuted = organs.load(uses.write_permuted(tmp_path / "cells.h5ad", tmp_path / "new.h5ad"))
    assert list(permuted.obs_names) == list(adata.obs_names)
    for kind in adata.obs["cell_type"].unique():
        of_type = (adata.obs["cell_type"] == kind).to_numpy()
        before = np.sort(np.asarray(sparse.csr_matrix(adata.X)[of_type].todense()), axis=0)
        after = np.sort(np.asarray(sparse.csr_matrix(permuted.X)[of_type].todense()), axis=0)
        assert (before == after).all()
    assert (sparse.csr_matrix(adata.X) != permuted.X).nnz


def test_share_of_correlated_pairs():
    rng = np.random.default_rng(0)
    alone = rng.standard_normal((1000, 4))
    assert uses.share_correlated(alone) == 0
    # a monotone function of a column is a pair of six; a constant column has no pairs
    values = np.c_[alone[:, :3], np.exp(alone[:, 0]), np.ones(1000)]
    assert uses.share_correlated(values) == pytest.approx(1 / 6)


def test_rank_correlations_are_spearmans():
    values = np.random.default_rng(0).poisson(2.0, (50, 4)).astype(float)
    values[:, 3] = 1
    rho = uses.rank_correlations(values)
    by_scipy = stats.spearmanr(values[:, :3]).statistic
    assert rho[[0, 1, 3]] == pytest.approx(by_scipy[np.triu_indices(3, 1)])
    assert np.isnan(rho[[2, 4, 5]]).all()


def test_correlations_that_both_halves_have_are_agreed_on(half):
    "Two halves of one draw agree better than the first half with genes in another order."
    cells, folder = half
    kept = uses.judge_kept_correlations(cells, folder, n_genes=20, n_samples=2)
    assert set(kept) == METHODS | {"held out"} and "agreement" not in kept["held out"]
    assert all(-1 <= kept[method]["agreement"] <= 1 for method in METHODS)
    assert kept["counts"]["agreement"] > 0.3
    assert uses.judge_kept_correlations("nowhere.h5ad", folder) == kept


def test_agreement_by_hand():
    rho = np.array([0.1, 0.5, np.nan, -0.2])
    others = np.array([0.3, 0.7, 0.9, 0.0])
    assert uses.agreement(rho, others) == pytest.approx(1)
    assert uses.agreement(-rho, others) == pytest.approx(-1)


def test_correlations_are_judged_once(a_run):
    judged = uses.judge_correlations(*a_run, n_genes=20, n_samples=2)
    assert set(judged) == METHODS
    assert all(0 <= share <= 1 for share in judged.values())
    assert uses.judge_correlations("nowhere.h5ad", a_run[1]) == judged


# ---- a perturbation


@pytest.fixture(scope="module")
def stimulated(tmp_path_factory):
    """A file of cells in which six genes are lowered to an eighth in half of the cells, in all
    types alike; these genes; and the file with labels for all.
    """
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("stimulated")
    adata = organs.load("pancreas")[:500].copy()
    x = adata.X.toarray()
    # genes of all types
    lowered = np.argsort(-np.median(x, 0))[5:35:5]
    half = rng.random(len(x)) < 0.5
    x[np.ix_(half, lowered)] = rng.binomial(x[np.ix_(half, lowered)].astype(int), 0.125)
    adata.X = sparse.csr_matrix(x)
    adata.obs["drug"] = np.where(half, "b", "none")
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object).where(~half)
    adata.write_h5ad(folder / "cells.h5ad")
    how = dict(condition="drug", control="none")
    labelled = uses.write_labelled(
        folder / "cells.h5ad", folder / "labelled.h5ad", **how, max_epochs=30
    )
    return labelled, how, lowered


def test_labels_are_carried_to_stimulated_cells_alone(stimulated):
    labelled, how, _ = stimulated
    cells = organs.load(labelled)
    truth = organs.load("pancreas")[:500].obs["cell_type"].astype(str)
    carried = cells.obs["carried"].to_numpy()
    assert (cells.obs["drug"][carried] == "b").all() and carried.sum() > 200
    found = cells.obs["cell_type"].astype(object)
    right = (found[carried].astype(str) == truth[found[carried].index]).mean()
    assert right > 0.9
    control = (cells.obs["drug"] == "none").to_numpy()
    assert (found[control].astype(str) == truth[found[control].index]).all()
    with pytest.raises(ValueError, match="labelled.h5ad was made of"):
        uses.write_labelled("nowhere.h5ad", labelled)


def test_stimulated_cells_of_a_type_are_left_out_and_predicted(stimulated, tmp_path):
    labelled, how, _ = stimulated
    kind = uses.frequent_types(labelled, n=1, **how)[0]
    without = uses.write_without(labelled, tmp_path / "without.h5ad", kind, **how)
    before = organs.load(labelled).obs
    after = organs.load(without).obs
    gone = before[~before.index.isin(after.index)]
    assert (gone["cell_type"] == kind).all() and (gone["drug"] == "b").all() and len(gone) > 20
    assert len(after) + len(gone) == len(before)
    folder = run_on(without, tmp_path / "out", epochs=5, n_genes=None)
    judged = uses.judge_perturbation(labelled, folder, kind, **how, n_top=6)
    assert set(judged) == {"no change", "mean shift", "nearest type", "model", "model's shift"}
    assert judged["no change"]["explained"] == 0 and judged["no change"]["r2_mean"] < 1
    # all types change alike, which the mean of the others knows
    assert judged["mean shift"]["explained_top"] > 0.8
    assert judged["mean shift"]["direction_top"] == 1
    assert all(scores["energy"] > 0 for scores in judged.values())
    assert all(np.isfinite(list(scores.values())).all() for scores in judged.values())
    assert uses.judge_perturbation("nowhere.h5ad", folder, kind) == judged


def test_conditions_and_types_that_cannot_be_used_are_named(stimulated, tmp_path):
    labelled, how, _ = stimulated
    for given, words in (
        ({**how, "condition": "dose"}, "obs has no column 'dose'"),
        ({**how, "control": "ctrl"}, "control='ctrl' divides no cells; .* has .*none"),
    ):
        with pytest.raises(ValueError, match=words):
            uses.frequent_types(labelled, **given)
    with pytest.raises(ValueError, match="'epsilon' has . control and . stimulated cells"):
        uses.write_without(labelled, tmp_path / "x.h5ad", "epsilon", **how)
    assert uses.LEAST_OF_TYPE == 20


def test_energy_distance_by_hand():
    one, other = np.array([[0.0, 0], [2, 0]]), np.array([[0.0, 1], [2, 1]])
    # between: 1, sqrt 5, sqrt 5, 1; within each: 0, 2, 2, 0
    assert uses.energy_of(one, other) == pytest.approx((1 + 5**0.5) - 1 - 1, rel=1e-6)
    assert uses.energy_of(one, one) == pytest.approx(0, abs=1e-9)


def test_made_up_batches_differ_by_technique_alone(a_run, adata, tmp_path):
    cells, _ = a_run
    path = uses.write_made_up_batches(cells, tmp_path / "batches.h5ad", seed=1)
    found = organs.load(path)
    assert set(found.obs["batch"]) == {"one", "two"}
    before = organs.load(cells)[found.obs_names]
    change = sparse.csr_matrix(before.X) - sparse.csr_matrix(found.X)
    second = (found.obs["batch"] == "two").to_numpy()
    # nothing is lost in the first, and nothing is gained anywhere
    assert abs(change[~second]).nnz == 0 and change.min() >= 0
    kept = found[second].to_df().sum() / before[second].to_df().sum()
    kept = kept[before[second].to_df().sum() > 200]
    assert (kept < 0.5).mean() == pytest.approx(0.5, abs=0.1)
    assert kept[kept < 0.5].median() == pytest.approx(0.2, abs=0.02)
    assert kept[kept >= 0.5].min() == 1
    with pytest.raises(ValueError, match="was made of"):
        uses.write_made_up_batches(cells, path, seed=2)


def test_a_type_stays_in_one_batch(a_run, tmp_path):
    cells, _ = a_run
    batches = uses.write_made_up_batches(cells, tmp_path / "batches.h5ad")
    before = organs.load(batches)
    found = organs.load(uses.write_type_in_one_batch(batches, tmp_path / "alone.h5ad"))
    kind = before.obs["cell_type"].value_counts().index[0]
    assert found.uns["alone"] == kind
    n = pd.crosstab(found.obs["cell_type"].astype(str), found.obs["batch"].astype(str))
    most = before.obs["batch"][before.obs["cell_type"] == kind].value_counts()
    assert n.loc[kind].max() == most.max() and n.loc[kind].min() == 0
    others = before[before.obs["cell_type"] != kind]
    assert found.n_obs == others.n_obs + most.max()
    with pytest.raises(ValueError, match="'no such type' has no cells in several batches"):
        uses.write_type_in_one_batch(batches, tmp_path / "other.h5ad", kind="no such type")


def test_a_part_of_the_cells(a_run, tmp_path):
    cells, _ = a_run
    part = organs.load(uses.write_part(cells, tmp_path / "part.h5ad", "cell_type", "beta"))
    assert set(part.obs["cell_type"]) == {"beta"} and part.n_obs > 10
    with pytest.raises(ValueError, match="no cell has 'betta' in obs.'cell_type'.; there are"):
        uses.write_part(cells, tmp_path / "none.h5ad", "cell_type", "betta")
