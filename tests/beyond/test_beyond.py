"""Sweeps of variants, and their differences."""

import os

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vampsc import beyond, models, organs, priors, study, training

TINY = dict(
    profile=training.get_profile("quick", max_epochs=1, n_genes=60), hidden=(8,), n_latent=4
)
TWO = [beyond.Variant("full", "vae"), beyond.Variant("scaled", "vae", {"beta": 1e-3})]


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:400].copy()


@pytest.fixture(scope="module")
def swept(adata, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return out, beyond.sweep(adata, TWO, out, seeds=(0, 1), jobs=1, progress=False, **TINY)


def test_variants_share_a_folder_by_their_settings():
    assert (
        beyond.Variant("a", "vamp", {"n_pseudo_inputs": 10, "beta": 0.5}).folder
        == beyond.Variant("b", "vamp", {"beta": 0.5, "n_pseudo_inputs": 10}).folder
    )
    assert (
        beyond.Variant("a", "vamp").folder
        == "vamp"
        != beyond.Variant("a", "vamp", {"linear_decoder": True}).folder
    )
    with pytest.raises(ValueError, match="model 'vaap' is not known"):
        beyond.Variant("a", "vaap")


def test_a_sweep_has_a_row_for_each_run_with_all_numbers(swept):
    out, frame = swept
    assert list(zip(frame.variant, frame.seed)) == [
        ("full", 0),
        ("full", 1),
        ("scaled", 0),
        ("scaled", 1),
    ]
    assert frame.beta.tolist()[2:] == [1e-3] * 2
    for column in (
        "test_marginal_ll",
        "asw",
        "accuracy",
        "energy",
        "library",
        "types",
        "aggregate_kl",
        "real_accuracy",
    ):
        assert frame[column].notna().all(), column
    # the price is not paid
    assert frame.test_kl[2] > frame.test_kl[0]
    # the same cells of the same seed
    assert (frame.real_accuracy[:2].values == frame.real_accuracy[2:].values).all()
    # trained for one epoch
    assert (frame.accuracy > 0.8).all() and (frame.real_accuracy < 0.7).all()


def test_a_sweep_is_not_repeated_and_what_is_missing_is_done(adata, swept, monkeypatch):
    out, frame = swept
    monkeypatch.setattr(study, "_train_and_record", lambda *a: pytest.fail("trained again"))
    again = beyond.sweep(adata, TWO, out, seeds=(0, 1), jobs=1, progress=False, **TINY)
    pd.testing.assert_frame_equal(frame, again)


def test_a_variant_may_have_settings_of_its_training(adata, tmp_path):
    rises = beyond.Variant("rises", "vae", {"kl_warmup": 1, "beta": 0.5})
    how = {**TINY, "profile": training.get_profile("quick", max_epochs=2, n_genes=60)}
    row = beyond.run(adata, rises, tmp_path, invent=False, **how)
    done = study.read_run(row["folder"])
    assert (
        rises.folder == "vae_beta-0.5_kl_warmup-1"
        and row["kl_warmup"] == 1
        and row["best_epoch"] == 2
    )
    assert done.history["kl_weight"].tolist() == [0, 0.5]
    assert (
        done.config["training"]["kl_warmup"] == 1
        and "kl_warmup" not in done.config["settings"]
        and done.config["settings"]["beta"] == 0.5
    )


def test_a_run_that_fails_does_not_stop_the_others(adata, tmp_path, capsys):
    wrong = beyond.Variant("wrong", "vae", {"dispersion": "cell"})
    with pytest.raises(ValueError, match="1 of 2 runs failed: wrong, seed 0: .*dispersion='cell'"):
        beyond.sweep(adata, [wrong, TWO[0]], tmp_path, seeds=[0], jobs=1, **TINY)
    assert (
        tmp_path / "vae" / "vae-seed0" / "metrics.json"
    ).exists() and "wrong, seed 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least one"):
        beyond.sweep(adata, [], tmp_path)
    with pytest.raises(ValueError, match="1 of 1 runs failed: typo, seed 0: TypeError: .*n_latnt"):
        beyond.sweep(
            adata,
            [beyond.Variant("typo", "vae", {"n_latnt": 4})],
            tmp_path,
            seeds=[0],
            jobs=1,
            **TINY,
        )


def test_what_is_well_is_written_when_another_data_set_fails(adata, tmp_path):
    adata.write_h5ad(tmp_path / "well.h5ad")
    logs = adata.copy()
    logs.X = np.log1p(logs.X)
    logs.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(
        ValueError, match="1 of 2 runs failed: bad, full, seed 0: .*The other runs are kept"
    ):
        beyond.gather(
            "q",
            [tmp_path / "bad.h5ad", tmp_path / "well.h5ad"],
            TWO[:1],
            tmp_path / "out",
            "0",
            jobs=1,
            max_epochs=1,
            n_genes=60,
            hidden=(8,),
            n_latent=4,
        )
    assert (
        len(pd.read_csv(tmp_path / "out" / "well" / "q.csv")) == 1
        and not (tmp_path / "out" / "bad" / "q.csv").exists()
    )


class Ends:
    "Ends the process that is sent it."

    obs = pd.DataFrame()

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_process_that_is_killed_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="ended from outside, most likely for want of memory; .*fewer jobs than 2"
    ):
        beyond.sweep(Ends(), TWO, tmp_path, seeds=[0, 1], jobs=2, progress=False, **TINY)


def test_lists_that_make_no_sense_are_named_before_anything_is_trained(
    adata, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "run", lambda *a, **k: pytest.fail("trained"))
    adata.write_h5ad(tmp_path / "x.h5ad")
    (tmp_path / "b").mkdir()
    one = tmp_path / "x.h5ad"
    two = tmp_path / "b" / "x.h5ad"
    for names, seeds, words in (
        ([one, two], "0", "names of their folders: 'x' is there twice"),
        ("", "0", "none is named"),
        (one, "0,a", "seeds: '0,a' is no list of whole numbers"),
        (one, "1,1", "seeds: 1 is there twice"),
        (one, " ", "seeds: none is named"),
        ([one, tmp_path / "lost.h5ad"], "0", "lost.h5ad"),
    ):
        with pytest.raises(ValueError, match=words):
            beyond.gather("q", names, TWO, tmp_path / "out", seeds, jobs=1)
    with pytest.raises(ValueError, match="no column 'celltype'.*Did you mean 'cell_type'"):
        beyond.gather("q", [one, "pancreas"], TWO, tmp_path / "out", "0", label_key="celltype")


def test_real_cells_are_judged_anew_by_other_labels_splits_and_genes():
    config = {
        "data": "d",
        "labels": "l",
        "settings": {"split": "Split a", "n_genes": 60, "gene_space": "auto", "n_latent": 4},
    }

    def changed(**to):
        return beyond._hash_for_real_cells({**config, **to})

    # a matter of the model
    assert changed() == changed(settings={**config["settings"], "n_latent": 8})
    assert (
        len(
            {
                changed(),
                changed(labels="m"),
                changed(data="e"),
                changed(settings={**config["settings"], "split": "Split b"}),
                changed(settings={**config["settings"], "n_genes": 61}),
            }
        )
        == 5
    )


def test_what_is_made_once_is_read_afterwards(tmp_path):
    made = []

    def how():
        made.append(1)
        return {"bound": -1.5, "cells": [1, 2]}

    path = tmp_path / "folder" / "number.json"
    assert beyond.made_once(path, how) == beyond.made_once(path, how) == how()
    assert len(made) == 2 and path.is_file()


@pytest.mark.slow
def test_processes_give_the_same_numbers(adata, swept, tmp_path, capfd):
    frame = beyond.sweep(adata, TWO[:1], tmp_path, seeds=(0, 1), jobs=2, progress=False, **TINY)
    for column in ("test_nats_per_cell", "test_kl"):
        np.testing.assert_allclose(frame[column], swept[1][column][:2], rtol=2e-3)
    # what TensorFlow prints as it starts
    assert "oneDNN" not in capfd.readouterr().err


def test_the_test_cells_are_a_fifth_and_of_the_seed(swept):
    runs = [study.read_run(f) for f in swept[1].folder]
    parts = [r.cells.index[r.cells.split == "test"] for r in runs]
    assert all(len(p) == 80 for p in parts) and list(parts[0]) == list(parts[2]) != list(parts[1])


def test_judges_of_real_and_invented_cells(adata, swept):
    run = study.read_run(swept[1].folder[0])
    model = models.load(run.folder / "model", adata)
    labels = run.cells["label"]
    real = beyond.judge_real(model, labels, seed=3)
    invented = beyond.judge_invented(model, labels, seed=3)
    assert real["accuracy_low"] <= 0.5 <= real["accuracy_high"] and real["energy_p"] > 0.01
    assert (
        invented["accuracy_low"] > 0.5
        and invented["energy"] > 3 * abs(real["energy"])
        and invented["energy_p"] < 0.05
    )
    assert {*invented} - {*real} == {
        "aggregate_kl",
        "mutual_information",
        "log_p",
    } and real == beyond.judge_real(model, labels, seed=3)
    learning, comparing = beyond.training_halves(model, seed=3)
    assert sorted([*learning, *comparing]) == sorted(model.split.train)
    # the test cells themselves; no types without labels
    same = beyond.judge_cells(model, model.X[model.split.test])
    assert same["energy"] < 0 and same["library"] == same["dropout"] == 0 and "types" not in same
    assert "copied" not in same and real["copied_p"] > 0.01 and invented["copied_p"] > 0.01
    copies = model.X[model.split.train][::2]
    assert beyond.judge_cells(model, copies, training=model.split.train)["copied"] == 1
    with pytest.raises(ValueError, match="an AE has no prior"):
        beyond.judge_invented(models.AE(adata, n_genes=60, hidden=(8,), n_latent=4))


def test_lists_as_people_write_them():
    assert beyond.listed(" a, b,") == beyond.listed(["a", "b"]) == ["a", "b"] and beyond.listed(
        3
    ) == ["3"]
    assert (
        beyond.plain("data/my cells.h5ad") == "my-cells"
        and beyond.plain("pancreas:paper") == "pancreas-paper"
    )


def test_an_autoencoder_is_not_asked_for_cells(adata, tmp_path):
    row = beyond.run(
        adata, beyond.Variant("AE", "ae"), tmp_path, TINY["profile"], hidden=(8,), n_latent=4
    )
    assert "test_nats_per_cell" in row and "accuracy" not in row


def test_compare_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 6)
    gain = rng.normal(1, 0.3, 6)
    frame = pd.DataFrame(
        {"variant": ["a"] * 6 + ["b"] * 6, "seed": [*range(6)] * 2, "x": [*hard, *(hard + gain)]}
    ).sample(frac=1, random_state=0)
    found = beyond.compare(frame, "b", "a", "x")
    reference = stats.ttest_rel(hard + gain, hard).confidence_interval()
    assert (
        (found["low"], found["high"]) == pytest.approx((reference.low, reference.high))
        and found["clear"]
        and found["seeds"] == 6
    )
    # one seed says nothing
    assert not beyond.compare(frame[frame.seed == 0], "b", "a", "x")["clear"]
    with pytest.raises(ValueError, match="no variant 'c'; there are"):
        beyond.compare(frame, "c", "a", "x")
    with pytest.raises(ValueError, match="no column 'y'"):
        beyond.compare(frame, "b", "a", "y")


def test_compare_knows_how_the_cells_were_divided(swept):
    "The seeds of a sweep divide the same cells anew, 280 to train on and 80 to test on."
    frame = swept[1]
    assert set(zip(frame.n_train, frame.n_test)) == {(280, 80)} and frame.test_cells.nunique() == 2
    found = beyond.compare(frame, "scaled", "full", "test_kl")
    wide = frame.pivot(index="seed", columns="variant", values="test_kl")
    independent = stats.ttest_rel(wide["scaled"], wide["full"]).confidence_interval()
    width = (found["high"] - found["low"]) / (independent.high - independent.low)
    assert width == pytest.approx(np.sqrt(1 + 2 * 80 / 280)) and found["clear"] == (
        found["p"] < 0.05
    )
    low, high = beyond.over_seeds(frame[frame.variant == "full"], "test_kl")[1:]
    assert (
        beyond.summary(frame, {"test_kl": "KL"}, 3)
        .loc["full", "KL"]
        .endswith(f"[{low:.3f},\u00a0{high:.3f}]")
    )
    same = frame.assign(test_cells="one split for all")
    assert beyond.compare(same, "scaled", "full", "test_kl")["high"] == pytest.approx(
        independent.high
    )
    other = frame.assign(test_cells=["a", "b", "a", "c"])
    with pytest.raises(
        ValueError, match="scaled and full were tested on other cells with seed 1, so they cannot"
    ):
        beyond.compare(other, "scaled", "full", "test_kl")


def test_a_sentence_is_a_family(swept):
    """Of 20 judges that see nothing but chance, some seem clear alone in most cases; a sentence of
    all of them says so in one of twenty.
    """
    rng = np.random.default_rng(0)
    alone = 0
    said = 0
    judged = {f"judge {k}": (f"judge {k}", 1, 1) for k in range(20)}
    for _ in range(60):
        frame = pd.DataFrame(
            {
                "data": "one",
                "variant": ["a", "b"] * 5,
                "seed": np.repeat(range(5), 2),
                **{name: rng.normal(size=10) for name in judged},
            }
        )
        alone += any(beyond.compare(frame, "a", "b", name)["clear"] for name in judged)
        said += beyond.changes(frame, "a", "b", judged) != "not clearly better or worse in anything"
    assert alone > 25 and said <= 8
    # and one that sees something
    frame["judge 3"] = [1.0, 0] * 5 + rng.normal(0, 0.01, 10)
    assert beyond.changes(frame, "a", "b", judged) == "better in judge 3 (+1.0)"


def test_numbers_in_words():
    assert (
        beyond.in_words((1.234, 1.0, 1.5), 2) == "1.23 [1.00, 1.50]"
        and beyond.in_words((1.234, np.nan, np.nan), 1) == "1.2"
    )
    assert (
        beyond.in_words({"mean": 1, "low": 0.5, "high": 1.5, "clear": True}, 1)
        == "+1.0 [+0.5, +1.5]"
    )
    whole = pd.DataFrame(
        {
            "variant": ["a", "b"] * 3,
            "seed": [0, 0, 1, 1, 2, 2],
            "pcs95": [8, 6, 9, 7, 8, 6],
            "same": [1] * 6,
        }
    )
    assert beyond.in_words(beyond.compare(whole, "b", "a", "pcs95"), 1) == "-2.0 in every seed"
    assert beyond.in_words(beyond.compare(whole, "b", "a", "same"), 1) == "0 in every seed"
    frame = pd.DataFrame({"variant": ["b", "b", "a"], "x": [1.0, 3.0, np.nan]})
    assert beyond.summary(frame, {"x": "X", "absent": "Y"}, 1).to_dict() == {
        "X": {"b": "2.0 [-10.7,\u00a014.7]", "a": "-"}
    }


# ---- programmes and components


@pytest.fixture(scope="module")
def linear():
    cells = organs.load("pancreas")
    model = models.VAMP(
        cells, n_genes=400, hidden=(32,), n_latent=8, n_pseudo_inputs=40, linear_decoder=True
    )
    return model.train("quick", max_epochs=40, progress=False), cells.obs["cell_type"]


def test_programmes_are_the_decoders_change_between_means(linear):
    model, labels = linear
    table = beyond.programmes(model, labels, at_least=100)
    z = model.get_latent_representation()
    is_beta = (labels == "beta").to_numpy()
    a = np.asarray(
        model.network.decoder.heads(np.stack([z[is_beta].mean(0), z[~is_beta].mean(0)]))[0]
    )
    # the network's order; the table has that of the data
    by_symbol = pd.Series(a[0] - a[1], index=model.genes.symbols)
    assert by_symbol.index.is_unique and set(by_symbol.index) == set(table.index)
    np.testing.assert_allclose(table["beta"], by_symbol[table.index], atol=1e-4)
    assert set(table) == {"beta", "alpha", "delta", "endothelial", "ductal", "acinar"} and {
        "INS",
        "IAPP",
    } & set(table["beta"].nlargest(10).index)


def test_agreement_with_known_markers(linear):
    found = beyond.marker_agreement(beyond.programmes(*linear), beyond.marker_genes()).set_index(
        "cell_type"
    )
    assert found.loc["beta", "auc"] > 0.9 > 0.6 > found.auc_elsewhere.mean()
    table = pd.DataFrame({"a": [3.0, 2, 1], "b": [1.0, 2, 3]}, index=["x", "y", "z"])
    by_hand = beyond.marker_agreement(
        table, pd.DataFrame({"cell_type": ["a", "c"], "gene": ["x", "y"]})
    )
    assert by_hand.to_dict("records") == [
        {"cell_type": "a", "n_markers": 1, "auc": 1.0, "auc_elsewhere": 0.0}
    ]


def test_markers_of_ones_own(tmp_path):
    (tmp_path / "m.csv").write_text("cell_type,symbol\na,x\n")
    with pytest.raises(ValueError, match="no column 'gene'"):
        beyond.marker_genes(tmp_path / "m.csv")
    assert len(beyond.marker_genes()) > 80


def test_component_use_of_a_prior_that_uses_two_of_its_components(linear):
    model, labels = linear
    use = beyond.component_use(model, labels)
    assert (
        1 <= use["effective"] <= 40
        and use["used"] <= 40
        and 2 <= use["types"] <= use["n_types"] == 14
    )
    before = np.asarray(model.network.prior.pseudo_inputs)
    # all alike: each has an equal share
    model.network.prior.pseudo_inputs.assign(before[[0] * 40])
    assert (
        beyond.component_use(model)["effective"] == pytest.approx(40, rel=1e-3)
        and beyond.component_use(model, labels)["types"] == 1
    )
    model.network.prior.pseudo_inputs.assign(before)
    with pytest.raises(ValueError, match="VAE has no components"):
        beyond.component_use(models.VAE(organs.load("pancreas"), n_genes=100, hidden=(8,)))


# ---- a new posterior for the same decoder and prior


@pytest.mark.parametrize("name", ["VAE", "MOG", "VAMP"])
def test_a_new_posterior_leaves_p_of_x_as_it_is(adata, name):
    settings = dict(n_genes=60, hidden=(8,), n_latent=2, n_pseudo_inputs=5, beta=1e-3)
    if name == "VAE":
        settings.pop("n_pseudo_inputs")
    model = models.PRESETS[name](adata, **settings).train(max_epochs=3, progress=False)
    before = model.network.get_weights()
    new = beyond.refit_posterior(model, max_epochs=3)
    z = np.random.default_rng(0).normal(size=(7, 2)).astype("float32")
    cells = model.X[:7].toarray()

    def density(network):
        log_p = network.prior.log_prob(z, network.components())
        return np.asarray(log_p) - np.asarray(network.reconstruction(cells, z))

    np.testing.assert_allclose(density(new.network), density(model.network), rtol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.network.get_weights()))
    assert new.network.beta == 1 and new.architecture.beta == 1 and len(new.history) == 3
    kernel = [network.posterior.mean.kernel.numpy() for network in (new.network, model.network)]
    assert not np.allclose(*kernel, atol=0.05)


@pytest.mark.parametrize("name", ["VAE", "VAMP", "VAMPIAF"])
def test_a_new_posterior_is_saved_and_loaded(adata, tmp_path, name):
    settings = dict(
        n_genes=60, hidden=(8,), n_latent=2, **dict(n_pseudo_inputs=5) if "P" in name else {}
    )
    model = models.PRESETS[name](adata, **settings).train(max_epochs=1, progress=False)
    new = beyond.refit_posterior(model, max_epochs=1)
    new.save(tmp_path / "new")
    again = models.load(tmp_path / "new", adata)
    assert again.architecture == new.architecture
    for a, b in zip(again.network.get_weights(), new.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Shifted(priors.StandardNormal):
    "A normal around a mean that is learnt."

    def __init__(self):
        super().__init__()
        self.mean = self.add_weight((2,), "ones")

    def log_prob_by_unit(self, z, components=None):
        return super().log_prob_by_unit(z - self.mean)


def test_a_new_posterior_leaves_a_learnt_prior_as_it_is(adata, monkeypatch):
    monkeypatch.setitem(priors.PRIORS, "normal", Shifted)
    model = models.VAE(adata, n_genes=60, hidden=(8,), n_latent=2)
    model.train(max_epochs=2, progress=False)
    learnt = model.network.prior.mean.numpy()
    assert not np.allclose(learnt, 1, atol=1e-4)
    new = beyond.refit_posterior(model, max_epochs=2)
    np.testing.assert_array_equal(new.network.prior.mean.numpy(), learnt)


class Wider(priors.MixturePrior):
    "A mixture that no mixture of Gaussians replaces."


def test_a_new_posterior_leaves_a_mixture_of_ones_own_what_it_is(adata, monkeypatch):
    monkeypatch.setitem(priors.PRIORS, "mixture", Wider)
    model = models.MOG(adata, n_genes=60, hidden=(8,), n_latent=2, n_pseudo_inputs=3)
    model.train(max_epochs=1, progress=False)
    new = beyond.refit_posterior(model, max_epochs=1)
    assert type(new) is models.MOG and type(new.network.prior) is Wider
    for a, b in zip(new.network.prior.get_weights(), model.network.prior.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_a_point_has_no_posterior_to_fit(adata):
    model = models.AE(adata, n_genes=60, hidden=(8,), n_latent=2)
    with pytest.raises(ValueError, match="a point posterior"):
        beyond.refit_posterior(model)


def test_the_bound_of_a_run_by_a_new_posterior_is_kept(adata, swept, tmp_path):
    _, frame = swept
    row = frame[frame.variant == "scaled"].iloc[0]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    bound = beyond.bound_by_new_posterior(str(tmp_path / "cells.h5ad"), row.folder)
    assert np.isfinite(bound) and bound > row.test_marginal_ll - 20
    # no cells are needed any more
    assert beyond.bound_by_new_posterior("nowhere.h5ad", row.folder) == bound


def test_a_prior_that_is_fitted_later(adata):
    vae = models.VAE(adata, n_genes=60, hidden=(8,), n_latent=4, beta=1e-3)
    vae.train(max_epochs=3, progress=False)
    z = beyond.latent_draws(vae, vae.split.train)
    assert z.shape == (5 * len(vae.split.train), 4)
    one = beyond.fit_prior(vae, (1,))
    # the mean and the variance of the draws
    means, log_vars, log_shares = one.network.components()
    np.testing.assert_allclose(means[0], z.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.exp(log_vars[0]), z.var(0) + 1e-3, rtol=1e-4)
    assert float(log_shares[0]) == 0
    np.testing.assert_array_equal(one.get_latent_representation(), vae.get_latent_representation())
    several = beyond.fit_prior(vae, (1, 2, 5))
    unseen = beyond.latent_draws(vae, vae.split.validation)
    density = {
        name: float(np.mean(m.network.prior.log_prob(unseen, m.network.components())))
        for name, m in {"normal": vae, "one": one, "several": several}.items()
    }
    assert density["normal"] < density["one"] <= density["several"]
    assert several.architecture.n_pseudo_inputs in (1, 2, 5) and vae.architecture.prior == "normal"


@pytest.mark.parametrize("name", ["AE", "IAF"])
def test_a_prior_is_fitted_to_gaussian_posteriors_only(adata, name):
    model = getattr(models, name)(adata, n_genes=60, hidden=(8,), n_latent=4)
    with pytest.raises(ValueError, match="fitted to a Gaussian posterior"):
        beyond.fit_prior(model)


def test_a_prior_needs_more_cells_than_components(adata):
    model = models.VAE(adata, n_genes=60, hidden=(8,), n_latent=4)
    with pytest.raises(ValueError, match="1,000 Gaussians are more than 320 training cells"):
        beyond.fit_prior(model, (1000,))


def test_a_run_with_a_prior_that_is_fitted_later_is_kept(adata, swept, tmp_path):
    _, frame = swept
    row = frame[frame.variant == "scaled"].iloc[0]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = beyond.judged_with_fitted_prior(str(tmp_path / "cells.h5ad"), row.folder)
    assert found["n_components"] in (1, 3, 10, 30, 100) and 0.5 <= found["accuracy"] + 0.1 <= 1.1
    assert np.isfinite(found["log_p"]) and found["log_p"] > row.test_marginal_ll - 20
    # no cells are needed any more
    assert beyond.judged_with_fitted_prior("nowhere.h5ad", row.folder) == found


def test_changes_name_what_is_clear_data_set_by_data_set():
    rows = [
        ("one", v, seed, loss, asw)
        for seed in range(3)
        for v, loss, asw in (("a", 1 + seed, 0.2), ("b", 4.9 + seed + seed / 10, 0.3 + seed / 100))
    ]
    rows += [
        ("two", v, seed, loss, np.nan)
        for seed in range(3)
        for v, loss in (("a", seed), ("b", (seed + 1) % 3))
    ]
    frame = pd.DataFrame(rows, columns=["data", "variant", "seed", "loss", "asw"])
    judged = {"loss": ("loss", 1, -1), "asw": ("ASW", 2, 1), "absent": ("absent", 1, 1)}
    assert (
        beyond.changes(frame, "a", "b", judged)
        == "better in loss (-4.0, –) and worse in ASW (-0.11, –)"
    )
    assert (
        beyond.changes(frame, "b", "a", judged)
        == "better in ASW (+0.11, –) and worse in loss (+4.0, –)"
    )
    assert (
        beyond.changes(frame[frame.data == "two"], "a", "b", judged)
        == "not clearly better or worse in anything"
    )
    assert (
        beyond.changes(frame[frame.seed == 0], "a", "b", judged)
        == "not clearly better or worse in anything"
    )


# ---- units by the number of steps


def test_units_are_counted_on_the_way_and_read_back(adata, tmp_path):
    vae = beyond.Variant("VAE", "vae")
    small = dict(steps=12, counts_made=3, n_genes=60, hidden=(8,), n_latent=4)
    counted = beyond.units_by_step(adata, vae, tmp_path, **small)
    per_epoch = -(
        -len(
            models.VAE(
                adata, **{k: small[k] for k in ("n_genes", "hidden", "n_latent")}
            ).split.train
        )
        // 128
    )
    assert (
        counted.step.tolist()[0] == per_epoch
        and counted.step.iloc[-1] >= 12
        and (counted.step % per_epoch == 0).all()
    )
    assert counted.active_units.between(0, 4).all() and np.isfinite(counted.val_loss).all()
    (path,) = (tmp_path / "vae").glob("units-*-seed0.csv")
    written = path.stat().st_mtime_ns
    assert (
        beyond.units_by_step(adata, vae, tmp_path, **small).equals(counted)
        and path.stat().st_mtime_ns == written
    )
    # something else: a file of its own
    beyond.units_by_step(adata, vae, tmp_path, **{**small, "learning_rate": 1e-3})
    assert len(list((tmp_path / "vae").glob("units-*.csv"))) == 2


@pytest.mark.parametrize("model", ["VAE", "IAF", "AE"])
def test_counted_units_are_those_of_the_study(adata, model):
    trained = getattr(models, model)(adata, n_genes=60, hidden=(8,), n_latent=4)
    trained.train(max_epochs=2, progress=False)
    found = study.units_and_pcs(*study.embed(trained, indices=np.arange(len(adata))))
    judged = study.compactness(trained, *study.embed(trained))
    assert found["active_units"] == judged["active_units"] and found["pcs95"] == judged["pcs95"]


def test_tasks_that_fail_are_named_and_the_others_done():
    found, failed = beyond.in_processes(
        lambda n: "text" if n else 1 / n,
        [{"n": 0}, {"n": 2}],
        ["zero", "two"],
        jobs=1,
        progress=False,
    )
    assert found == [None, "text"] and failed == ["zero: ZeroDivisionError: division by zero"]


def test_units_are_counted_after_so_many_steps(adata):
    trained = models.VAE(adata, n_genes=60, hidden=(8,), n_latent=4)
    count = beyond.CountUnits(trained, steps_per_epoch=13, every=25)
    trained.train(max_epochs=6, progress=False, callbacks=[count])
    # the first epoch, then each first one after 25, 50, 75 steps
    assert [row["step"] for row in count.rows] == [13, 26, 52, 78]
    assert [row["val_loss"] for row in count.rows] == trained.history["val_loss"].iloc[
        [0, 1, 3, 5]
    ].tolist()


def test_lists_on_the_command_line_are_checked():
    assert beyond.distinct(["a", "b"], "organs") == ["a", "b"]
    assert beyond.listed_seeds("0,3") == beyond.listed_seeds((0, 3)) == [0, 3]
    for wrong, message in (("0,0", "seeds: 0 is there twice"), ("x", "no list of whole numbers")):
        with pytest.raises(ValueError, match=message):
            beyond.listed_seeds(wrong)
    assert beyond.data_sets_of("pancreas", "auto") == {"pancreas": "pancreas"}
    said = beyond.failures_in_words(["a: b"] * 4, 9)
    assert said.startswith("4 of 9 runs failed: a: b; a: b; a: b; ...")
