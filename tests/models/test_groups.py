"""Labels carried to new cells, and differences between groups: against truths that are known."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from vampsc import groups, models, organs

N_GENES = 60
UP = np.arange(6)  # genes that are four times as high in the second type
DOWN = np.arange(6, 12)  # and a quarter as high, so that the sum over genes is the same
MORE = np.arange(20, 35)  # caught three times as often in the south
LESS = np.arange(35, 50)


def made_up(rng, n=300, labs=False):
    "Counts of two types, in two laboratories that differ if labs is True."
    base = rng.lognormal(1.0, 0.5, N_GENES)
    base[DOWN] = 4 * base[UP]
    base[LESS] = 3 * base[MORE]
    rates = base * rng.lognormal(0, 0.2, (n, 1))
    second = np.arange(n) % 2 == 1
    south = (np.arange(n) // 2) % 2 == 1
    rates[np.ix_(second, np.r_[UP, DOWN])] = rates[np.ix_(second, np.r_[DOWN, UP])]
    if labs:
        rates[np.ix_(south, np.r_[MORE, LESS])] = rates[np.ix_(south, np.r_[LESS, MORE])]
    counts = rng.negative_binomial(5, 5 / (5 + rates)).astype("float32")
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.where(second, "second", "first")),
            "lab": np.where(south, "south", "north"),
            "donor": [f"d{i}" for i in np.arange(n) % 7],
        },
        index=[f"cell{i}" for i in range(n)],
    )
    genes = pd.DataFrame(index=[f"g{j}" for j in range(N_GENES)])
    return ad.AnnData(sparse.csr_matrix(counts), obs, genes)


def named(positions):
    return [f"g{j}" for j in positions]


SMALL = dict(hidden=(32,), n_latent=6, gene_space=None)


@pytest.fixture(scope="module")
def cells():
    return made_up(np.random.default_rng(0))


@pytest.fixture(scope="module")
def model(cells):
    return models.VAE(cells, **SMALL).train(max_epochs=60, progress=False)


# ---- differences


def test_the_genes_that_were_changed_are_called_with_their_size(model, cells):
    found = model.differential_expression(cells, "kind", "second", "first")
    called = set(found.index[found["is_de_fdr_0.05"]])
    changed = set(named(np.r_[UP, DOWN]))
    assert changed <= called and len(called - changed) <= 2
    assert np.allclose(found.loc[named(UP), "lfc_mean"], 2, atol=0.5)
    assert np.allclose(found.loc[named(DOWN), "lfc_mean"], -2, atol=0.5)
    assert found["proba_de"].round(4).is_monotonic_decreasing and found["group2"].eq("first").all()


def test_the_other_way_round_is_the_opposite(model, cells):
    one = model.differential_expression(cells, "kind", "second", "first")
    other = model.differential_expression(cells, "kind", "first", "second").loc[one.index]
    np.testing.assert_allclose(one["lfc_mean"], -other["lfc_mean"], atol=0.1)


def test_nothing_is_called_between_halves_of_one_type(model, cells):
    first = np.flatnonzero(cells.obs["kind"] == "first")
    for seed in range(3):
        half = np.random.default_rng(seed).permutation(first)[: len(first) // 2]
        other = np.setdiff1d(first, half)
        found = model.differential_expression(idx1=half, idx2=other, n_samples=30, delta=0.5)
        assert not found["is_de_fdr_0.05"].any()


def test_the_counts_beside_it_are_plain_means(model, cells):
    found = model.differential_expression(cells, "kind", "second", n_samples=2)
    counts = cells.to_df()[(cells.obs["kind"] == "second").to_numpy()]
    np.testing.assert_allclose(found["raw_mean1"], counts.mean()[found.index], rtol=1e-5)
    share = (counts > 0).mean()[found.index]
    np.testing.assert_allclose(found["non_zeros_proportion1"], share, rtol=1e-5)
    assert found["comparison"].eq("second vs rest").all()


def test_without_groups_each_is_compared_with_the_others(model, cells):
    found = model.differential_expression(cells, "kind", n_samples=2)
    assert found["comparison"].unique().tolist() == ["first vs rest", "second vs rest"]
    assert len(found) == 2 * N_GENES


def test_one_seed_one_answer_and_a_mask_is_as_good_as_positions(model, cells):
    mask = (cells.obs["kind"] == "second").to_numpy()
    settings = dict(n_samples=5, max_cells=50, seed=3)
    one = model.differential_expression(cells, idx1=mask, **settings)
    again = model.differential_expression(cells, idx1=np.flatnonzero(mask), **settings)
    pd.testing.assert_frame_equal(one, again)


@pytest.mark.long
def test_what_batches_do_is_not_a_difference():
    "The second type is mostly from the south, where thirty genes are caught otherwise."
    cells = made_up(np.random.default_rng(1), 600, labs=True)
    rare = np.flatnonzero((cells.obs["kind"] == "second") != (cells.obs["lab"] == "south"))
    cells = cells[np.setdiff1d(np.arange(600), rare[60:])].copy()
    caught = named(np.r_[MORE, LESS])
    called = {}
    for key in (None, "lab"):
        model = models.VAE(cells, batch_key=key, **SMALL).train(max_epochs=60, progress=False)
        found = model.differential_expression(cells, "kind", "second", "first", delta=0.5)
        called[key] = found.loc[caught, "is_de_fdr_0.05"].sum()
    assert called[None] >= 25 and called["lab"] <= 3


def test_groups_without_a_batch_in_common_are_refused():
    cells = made_up(np.random.default_rng(1), 60, labs=True)
    model = models.VAE(cells, batch_key="lab", **SMALL).train(max_epochs=1, progress=False)
    with pytest.raises(ValueError, match="'north' and 'south' have no lab in common"):
        model.differential_expression(cells, "lab", "north", "south")


@pytest.fixture(scope="module")
def patients():
    "Twelve donors, each different from the others by chance; in six ten genes are at four times."
    rng = np.random.default_rng(3)
    cells = made_up(rng, 720)
    donor = np.arange(720) % 12
    cells.obs["donor"] = [f"d{i}" for i in donor]
    cells.obs["group"] = np.where(donor < 6, "patient", "control")
    factor = rng.lognormal(0, 0.3, (12, N_GENES))
    factor[:6, 50:60] *= 4
    cells.X = sparse.csr_matrix(rng.poisson(factor[donor] * cells.X.toarray()).astype("float32"))
    return cells


def test_groups_of_different_donors_that_are_the_batches(patients):
    model = models.VAE(patients, batch_key="donor", **SMALL).train(max_epochs=60, progress=False)
    how = dict(groupby="group", group1="patient", group2="control")
    with pytest.raises(ValueError, match="have no donor in common.*sample_key='donor'"):
        model.differential_expression(patients, **how)
    found = model.differential_expression(patients, **how, sample_key="donor")
    called = set(found.index[found["is_de_fdr_0.05"]])
    changed = set(named(range(50, 60)))
    assert len(called & changed) >= 9 and len(called - changed) <= 1
    # donors of one group only, by the toss of a coin: nothing differs
    controls = patients[patients.obs["group"] == "control"].copy()
    coin = np.where(controls.obs["donor"].isin(["d6", "d7", "d8"]), "one", "other")
    controls.obs["group"] = coin
    how.update(group1="one", group2="other", sample_key="donor")
    found = model.differential_expression(controls, **how)
    assert found["is_de_fdr_0.05"].sum() <= 1


def test_batches_of_several_donors_are_no_donors(patients):
    cells = patients.copy()
    cells.obs["lab"] = cells.obs["group"].map({"patient": "clinic", "control": "city"})
    model = models.VAE(cells, batch_key="lab", **SMALL).train(max_epochs=1, progress=False)
    with pytest.raises(ValueError, match="have no lab in common"):
        model.differential_expression(
            cells, "group", "patient", "control", sample_key="donor", n_samples=2
        )


@pytest.mark.long
def test_donors_that_were_drawn_make_it_less_sure(model, cells):
    "One donor of eight has ten genes at four times the rate: a matter of who was drawn."
    cells = cells.copy()
    odd = named(range(50, 60))
    of_donor = (cells.obs["donor"] == "d0").to_numpy() & (cells.obs["kind"] == "second").to_numpy()
    counts = cells.to_df()
    counts.loc[of_donor, odd] *= 8
    cells.X = sparse.csr_matrix(counts.to_numpy())
    how = dict(adata=cells, groupby="kind", group1="second", group2="first")
    by_cells = model.differential_expression(**how).loc[odd]
    by_donors = model.differential_expression(**how, sample_key="donor").loc[odd]
    assert by_donors["lfc_error"].mean() > 1.5 * by_cells["lfc_error"].mean()


def test_comparing_cells_of_known_donors_warns(model, cells):
    how = dict(groupby="kind", group1="second", n_samples=2)
    with pytest.warns(UserWarning, match=r"sample_key='donor' \(--sample-key donor\)"):
        model.differential_expression(cells, **how)
    unnamed = cells.copy()
    del unnamed.obs["donor"]
    of_one_each = cells.copy()
    of_one_each.obs["donor"] = cells.obs["kind"].astype(str)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.differential_expression(cells, **how, sample_key="donor")
        model.differential_expression(unnamed, **how)
        model.differential_expression(of_one_each, **how)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "which cells are compared"),
        (dict(groupby="kind"), "hand in adata="),
        (dict(with_cells=True, groupby="kin"), "no column 'kin'"),
        (dict(with_cells=True, groupby="kind", group1="frist"), "no group 'frist'.*first"),
        (dict(with_cells=True, groupby="kind", group2="first"), "needs a group1="),
        (dict(idx1=[0]), "has 1 cells"),
        (dict(idx1=[0, 1], idx2=[1, 2]), "1 cells are in both"),
        (dict(idx1=[0, 1], sample_key="donor"), "hand in adata="),
        (dict(idx1=[0, 1], delta=-1), "delta"),
        (dict(idx1=[0, 1], n_samples=0), "n_samples"),
        (dict(idx1=[0, 1000]), "out of range"),
    ],
)
def test_what_cannot_be_compared_is_named(arguments, message, model, cells):
    arguments = dict(arguments)
    adata = cells if arguments.pop("with_cells", False) else None
    with pytest.raises(ValueError, match=message):
        model.differential_expression(adata, **arguments)


def test_an_autoencoder_compares_too(cells):
    model = models.AE(cells, **SMALL).train(max_epochs=60, progress=False)
    found = model.differential_expression(cells, "kind", "second", "first", n_samples=20)
    assert set(found.index[:10]) <= set(named(np.r_[UP, DOWN]))


def test_expected_fdr_is_the_mean_of_mistakes():
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 0.5, 4000)
    true = rng.random(4000) < p
    expected = groups.expected_fdr(p)
    for limit in (0.01, 0.05, 0.2):
        called = expected <= limit
        error = np.sqrt(limit / called.sum())
        assert abs((~true[called]).mean() - (1 - p[called]).mean()) < 3 * error
        assert (1 - p[called]).mean() <= limit
    assert groups.expected_fdr([]).shape == (0,)


def test_shrinkage_finds_the_normal_that_differences_were_drawn_from():
    "Then the posterior is that of a normal prior, in closed form."
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.5, 20_000)
    error = rng.choice([0.3, 1.0], 20_000)
    estimate = true + error * rng.standard_normal(20_000)
    found = np.stack(groups.shrunk(estimate, error, delta=0.5))
    keep = 1.5**2 / (1.5**2 + error**2)
    posterior = stats.norm(keep * estimate, np.sqrt(keep) * error)
    expected = [posterior.mean(), posterior.std(), posterior.cdf(-0.5) + posterior.sf(0.5)]
    # far out there are few genes from which the prior could be known
    near = np.abs(estimate) < 3
    np.testing.assert_allclose(found[:, near], np.stack(expected)[:, near], atol=0.12)


def test_shrinkage_of_nothing_is_nothing():
    rng = np.random.default_rng(0)
    error = rng.uniform(0.05, 2, 3000)
    mean, _, probability = groups.shrunk(error * rng.standard_normal(3000), error, delta=0.25)
    assert probability.max() < 0.5 and np.abs(mean).max() < 0.2
    assert all(len(part) == 0 for part in groups.shrunk([], [], 0.1))
    alone = groups.shrunk([0.0], [0.0])
    assert np.isfinite(alone).all() and alone[2][0] < 0.5


def test_a_decoder_that_is_wrong_is_corrected_by_the_counts(cells):
    "An untrained decoder expects the same of both groups; the difference is in the counts alone."
    model = models.VAE(cells, **SMALL)
    with pytest.warns(UserWarning, match="not trained"):
        found = model.differential_expression(cells, "kind", "second", "first")
    assert np.allclose(found.loc[named(UP), "lfc_raw"], 2, atol=0.4)
    assert np.allclose(found.loc[named(DOWN), "lfc_raw"], -2, atol=0.4)


def test_one_odd_cell_makes_no_difference_between_groups(model, cells):
    cells = cells.copy()
    first = np.flatnonzero(cells.obs["kind"] == "first")
    counts = cells.to_df()
    counts.iloc[first[0], 55] = 5000
    cells.X = sparse.csr_matrix(counts.to_numpy())
    half = first[: len(first) // 2]
    found = model.differential_expression(cells, idx1=half, idx2=np.setdiff1d(first, half))
    assert not found.loc["g55", "is_de_fdr_0.05"]


def test_strata_have_equal_weights_on_average_and_samples_vary():
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1], [30, 10])
    weights = groups.bootstrap_weights(rng, strata)
    assert np.isclose(weights[strata == 0].sum(), 0.5) and np.isclose(weights.sum(), 1)
    samples = np.repeat([0, 1, 2], [15, 15, 10])
    drawn = [
        groups.bootstrap_weights(rng, strata, samples, rng.exponential(size=3)) for _ in range(3000)
    ]
    shares = np.array([w[strata == 0].sum() for w in drawn])
    assert abs(shares.mean() - 0.5) < 0.06 and shares.std() > 0.1


def test_the_spread_over_donors_is_the_error_of_the_mean():
    "Six donors of five cells: where donors differ, and where only their cells do."
    rng = np.random.default_rng(0)
    donors = np.repeat(np.arange(6), 5)
    one = np.zeros(30, int)
    for of_donors in (0.0, 1.0):
        means, variances = [], []
        for _ in range(300):
            x = rng.normal(size=30) + of_donors * rng.normal(size=6)[donors]
            drawn = [
                groups.bootstrap_weights(rng, one, donors, rng.exponential(size=6)) @ x
                for _ in range(60)
            ]
            means.append(x.mean())
            variances.append(np.var(drawn, ddof=1) * 7 / 5)
        assert np.mean(variances) == pytest.approx(np.var(means), rel=0.2)


def test_variances_of_few_samples_are_moderated_as_by_limma():
    "Variances from a scaled inverse chi-squared prior of 8 degrees of freedom, around a trend."
    rng = np.random.default_rng(0)
    level = rng.uniform(-2, 5, 4000)
    trend = np.exp(0.3 * level - 1)
    variance = trend * 8 / rng.chisquare(8, 4000)
    spread = np.sqrt(variance * rng.chisquare(5, 4000) / 5)
    error, degrees = groups.moderated(spread, 5, level)
    assert degrees == pytest.approx(13, abs=2)
    assert np.mean((error**2 / variance - 1) ** 2) < 0.5 * np.mean((spread**2 / variance - 1) ** 2)
    # estimate / error follows Student's t with those degrees
    t = rng.normal(size=4000) * np.sqrt(variance) / error
    assert stats.kstest(t, stats.t(degrees).cdf).pvalue > 0.01
    # all genes alike: the trend says all
    error, degrees = groups.moderated(np.sqrt(trend * rng.chisquare(5, 4000) / 5), 5, level)
    assert degrees > 60 and np.corrcoef(np.log(error), level)[0, 1] > 0.99
    # nothing counted, and too few genes
    zeros = np.r_[0.0, spread]
    assert groups.moderated(zeros, 5, np.r_[0.0, level])[0][0] == 0
    few, degrees = groups.moderated(spread[:5], 5, level[:5])
    assert degrees == 5 and (few == spread[:5]).all()


def test_the_trend_counts_for_no_more_than_it_may():
    rng = np.random.default_rng(0)
    level = rng.uniform(-2, 5, 1000)
    spread = np.sqrt(rng.chisquare(5, 1000) / 5)
    spread[0] = 3
    error, degrees = groups.moderated(spread, 5, level, most=5)
    assert degrees == 10
    # a gene that varies far more than others of its expression stays unsure
    assert error[0] == pytest.approx(np.sqrt((9 + 1) / 2), rel=0.1)


@pytest.mark.long
def test_donors_show_what_a_test_by_donor_shows_and_nothing_where_nothing_is(shared_data):
    "Cytotoxic T cells and CD4 T cells of eight donors; then halves of each donor's CD4 T cells."
    cells = ad.read_h5ad(shared_data / "blood_kang_12k_1287g.h5ad")[::3].copy()
    model = models.VAE(cells, n_genes=300, hidden=(32,), n_latent=8, seed=0)
    model.train(max_epochs=15, progress=False)
    how = dict(sample_key="donor", n_samples=60)
    table = model.differential_expression(cells, "cell_type", "CD8 T cells", "CD4 T cells", **how)
    called = table.index[table["is_de_fdr_0.05"]]
    assert {"NKG7", "CCL5"} <= set(called) and table.loc["CCL5", "lfc_mean"] > 1
    rng = np.random.default_rng(0)
    cd4 = rng.permutation(np.flatnonzero(cells.obs["cell_type"] == "CD4 T cells"))
    half = len(cd4) // 2
    nothing = model.differential_expression(cells, idx1=cd4[:half], idx2=cd4[half:], **how)
    assert nothing["is_de_fdr_0.05"].sum() == 0
    in_errors = nothing["lfc_raw"] / nothing["lfc_error"]
    assert 0.7 < in_errors.std() < 1.2
    # where nothing is called, first what came nearest
    assert in_errors.abs().iloc[0] > in_errors.abs().median()


# ---- labels


def test_labels_come_back_and_a_type_that_is_left_out_is_unknown(model, cells):
    known = cells[model.split.train]
    new = cells[model.split.test]
    found = model.predict_labels(new, "kind", known)
    assert (found["nearest"] == new.obs["kind"].astype(str)).mean() > 0.9
    assert found.index.equals(new.obs_names)
    one_type = known[known.obs["kind"] == "first"]
    others = cells[cells.obs["kind"] == "second"]
    found = model.predict_labels(others, "kind", one_type)
    assert (found["label"] == "unknown").mean() > 0.4 and (found["nearest"] == "first").all()


def test_labels_of_the_models_own_cells_are_as_good_as_a_reference(model, cells):
    new = cells[:20]
    by_column = model.predict_labels(new, "kind", cells)
    by_labels = model.predict_labels(new, cells.obs["kind"])
    pd.testing.assert_frame_equal(by_column, by_labels)


def test_cells_without_a_label_do_not_vote(model, cells):
    some = cells.copy()
    kind = some.obs["kind"].astype(object)
    kind.iloc[::2] = "doublet"
    kind.iloc[1::4] = np.nan
    some.obs["kind"] = kind
    found = model.predict_labels(cells[:30], "kind", some, unlabelled="doublet")
    assert set(found["nearest"]) <= {"first", "second"}


@pytest.mark.parametrize(
    "labels, reference, message",
    [
        ("kind", False, "hand in the AnnData that has it as reference="),
        ("kin", True, "no column 'kin'"),
        (["first"], False, "300 cells"),
        ([None] * 300, False, "none of the 300 cells has a label"),
    ],
)
def test_labels_that_cannot_be_carried_are_named(labels, reference, message, model, cells):
    with pytest.raises(ValueError, match=message):
        model.predict_labels(cells[:5], labels, cells if reference else None)


def test_a_label_of_one_cell_does_no_harm():
    z = np.random.default_rng(0).normal(size=(40, 3))
    labels = ["many"] * 39 + ["one"]
    found = groups.carried_labels(z[:5], z, labels, n_neighbors=5)
    assert found["label"].eq("many").all() and found["typicality"].between(0, 1).all()
    alike = groups.carried_labels(np.zeros((2, 3)), np.zeros((10, 3)), ["a"] * 10, 3)
    assert np.isfinite(alike["typicality"]).all()


def test_typicality_of_known_cells_is_even():
    "A cell of the reference's own distribution is untypical by 5 % in 5 % of cases."
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(2000, 4)) * np.repeat([[1.0], [5.0]], 1000, axis=0)
    reference[1000:] += 60
    new = rng.normal(size=(2000, 4)) * np.repeat([[1.0], [5.0]], 1000, axis=0)
    new[1000:] += 60
    found = groups.carried_labels(new, reference, np.repeat(["near", "wide"], 1000))
    assert stats.kstest(found["typicality"], "uniform").statistic < 0.08


def test_alpha_and_beta_cells_differ_in_their_hormones():
    adata = organs.load("pancreas")
    adata = adata[adata.obs["cell_type"].isin(["alpha", "beta"])]
    model = models.VAMP(adata, n_genes=200, hidden=(64,), n_latent=16, n_pseudo_inputs=30)
    model.train(max_epochs=20, progress=False)
    found = model.differential_expression(adata, "cell_type", "alpha", "beta")
    assert found["lfc_mean"]["GCG"] > 4 and found["lfc_mean"]["INS"] < -3
    assert found.loc[["GCG", "INS", "TTR", "IAPP"], "is_de_fdr_0.05"].all()


# ---- what users hand in


@pytest.mark.long
def test_a_few_cells_of_one_kind_do_not_differ(model, cells):
    "Of the bootstrap alone a dozen genes would be called."
    first = np.flatnonzero(cells.obs["kind"] == "first")
    called = {}
    for n in (2, 4, 10):
        for seed in range(2):
            some = np.random.default_rng(seed).permutation(first)
            found = model.differential_expression(
                cells, idx1=some[:n], idx2=some[n : n + 60], n_samples=60, seed=seed
            )
            called.setdefault(n, []).append(int(found["is_de_fdr_0.05"].sum()))
    assert all(np.mean(counts) <= 1 for counts in called.values()), called


def test_a_large_difference_is_seen_in_a_few_cells(model, cells):
    found = model.differential_expression(
        cells,
        idx1=np.flatnonzero(cells.obs["kind"] == "second")[:15],
        idx2=np.flatnonzero(cells.obs["kind"] == "first")[:15],
    )
    called = set(found.index[found["is_de_fdr_0.05"]])
    assert len(called & set(named(np.r_[UP, DOWN]))) >= 9 and len(called) <= 14
    assert found["n_cells1"].eq(15).all()


def test_a_series_is_read_by_its_names(model, cells):
    shuffled = cells.obs["kind"].sample(frac=1, random_state=0)
    new = cells[:20]
    pd.testing.assert_frame_equal(
        model.predict_labels(new, shuffled), model.predict_labels(new, cells.obs["kind"])
    )
    mask = shuffled == "second"
    how = dict(n_samples=3)
    pd.testing.assert_frame_equal(
        model.differential_expression(cells, idx1=mask, **how),
        model.differential_expression(cells, idx1=(cells.obs["kind"] == "second"), **how),
    )
    with pytest.raises(ValueError, match="index is not the cells' names"):
        model.predict_labels(new, pd.Series("a", index=[f"x{i}" for i in range(300)]))


def test_far_away_is_unknown_also_of_few_labelled_cells():
    z = np.random.default_rng(0).normal(size=(20, 3))
    found = groups.carried_labels(np.full((1, 3), 1e6), z, ["a"] * 20, 5)
    assert found["typicality"][0] == 0 and not groups.is_named(found)[0]


def test_cells_of_no_group_may_be_anything(model, cells):
    some = cells.copy()
    kind = some.obs["kind"].astype(object)
    kind.iloc[:3] = np.nan
    some.obs["kind"] = kind
    some.obs["donor"] = some.obs["donor"].where(kind.notna())
    counts = some.X.tolil()
    counts[0] = 0
    some.X = counts.tocsr()
    how = dict(groupby="kind", group1="second", group2="first", n_samples=3)
    model.differential_expression(some, **how, sample_key="donor")


def test_a_type_of_one_cell_stops_nothing(model, cells):
    some = cells.copy()
    kind = some.obs["kind"].astype(object)
    kind.iloc[0] = "rare"
    some.obs["kind"] = kind
    with pytest.warns(UserWarning, match="rare has a single cell"):
        found = model.differential_expression(some, "kind", n_samples=2)
    assert found["group1"].unique().tolist() == ["first", "second"]


def test_batches_are_matched_before_cells_are_drawn():
    cells = made_up(np.random.default_rng(1), 200, labs=True)
    second = (cells.obs["kind"] == "second").to_numpy()
    north = (cells.obs["lab"] == "north").to_numpy()
    few = np.r_[np.flatnonzero(~second & ~north), np.flatnonzero(second & north)]
    of_both = np.flatnonzero(second & ~north)[:3]
    cells = cells[np.r_[few, of_both]].copy()
    model = models.VAE(cells, batch_key="lab", **SMALL).train(max_epochs=1, progress=False)
    how = dict(adata=cells, groupby="kind", group1="second", group2="first", n_samples=3)
    for seed in range(4):
        found = model.differential_expression(**how, max_cells=10, seed=seed)
        assert found["n_cells1"].eq(3).all() and found["n_cells2"].eq(10).all()
    one = cells[np.r_[np.arange(len(few)), len(few)]].copy()
    with pytest.raises(ValueError, match="'second' has 1 cells in batches that both groups have"):
        model.differential_expression(**{**how, "adata": one})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(groupby=["kind"]), ValueError, "groupby"),
        (dict(groupby="kind", idx1=[0, 1]), ValueError, "take one of the two"),
        (dict(idx1=[0, 0], idx2=[1, 1]), ValueError, "has 1 cells"),
        (dict(groupby="one"), ValueError, "has 1 groups of labelled cells"),
        (dict(idx1=[0, 1], fdr=2), ValueError, "fdr"),
        (dict(idx1=[0, 1], n_samples=1), ValueError, "n_samples"),
        (dict(idx1=[0, 1], pseudocount=0), ValueError, "pseudocount"),
        (dict(groupby="kind", sample_key="kind"), ValueError, "cells of one sample only"),
    ],
)
def test_arguments_of_other_kinds_are_named(arguments, error, message, model, cells):
    some = cells.copy()
    some.obs["one"] = "a"
    with pytest.raises(error, match=message):
        model.differential_expression(some, **arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(adata=None), TypeError, "AnnData"),
        (dict(reference="cells.h5ad"), TypeError, "AnnData"),
        (dict(labels=None), ValueError, "one label for each cell"),
        (dict(n_neighbors=2.5), ValueError, "n_neighbors"),
        (dict(unknown_below=50), ValueError, "at most 1"),
    ],
)
def test_arguments_of_labels_are_named(arguments, error, message, model, cells):
    given = {"adata": cells[:5], "labels": "kind", "reference": cells, **arguments}
    if given["labels"] is None:
        given["reference"] = None
    with pytest.raises(error, match=message):
        model.predict_labels(**given)


def test_few_labelled_cells_all_vote(model, cells):
    with pytest.warns(UserWarning, match="more than the 8 cells"):
        found = model.predict_labels(cells[100:110], "kind", cells[:8])
    assert found["probability"].between(0.5, 1).all()


def test_accuracy_is_that_of_a_classifier_that_leaves_each_cell_out():
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 3))
    labels = np.where(z[:, 0] + rng.normal(0, 0.5, 60) > 0, "b", "a")
    given = cross_val_predict(KNeighborsClassifier(5), z, labels, cv=LeaveOneOut())
    table = groups.label_accuracy(z, labels, n_neighbors=5)
    for name in "ab":
        assert table.loc[name, "accuracy"] == pytest.approx((given == name)[labels == name].mean())
        assert table.loc[name, "share"] == pytest.approx(1 - table.loc[name, "accuracy"])
        precision = (labels == name)[given == name].mean()
        assert table.loc[name, "precision"] == pytest.approx(precision)
    assert table["cells"].sum() == 60 and table["accuracy"].is_monotonic_increasing
    assert set(table["mistaken_for"]) == {"a", "b"}


def test_accuracy_of_labels_that_are_far_apart_and_of_too_few():
    z = np.repeat([[0.0], [9.0]], 8, axis=0) + np.linspace(0, 1, 16)[:, None]
    table = groups.label_accuracy(z, ["a"] * 8 + ["b"] * 8, n_neighbors=5)
    assert (table["accuracy"] == 1).all() and (table["mistaken_for"] == "").all()
    # one cell of c cannot be found by others of c
    table = groups.label_accuracy(z, ["c"] + ["a"] * 7 + ["b"] * 8, n_neighbors=100)
    assert table.loc["c", "accuracy"] == 0 and np.isnan(table.loc["c", "precision"])
    with pytest.raises(ValueError, match="two labelled cells or more, not 1"):
        groups.label_accuracy(z[:1], ["a"])


def test_a_model_judges_the_labels_of_a_reference(model, cells):
    labels = cells.obs["kind"].astype(object).copy()
    labels.iloc[:5] = None
    some = cells.copy()
    some.obs["kind"] = labels
    table = model.label_accuracy("kind", some)
    z = model.get_latent_representation(some)[5:]
    pd.testing.assert_frame_equal(table, groups.label_accuracy(z, labels[5:]))
