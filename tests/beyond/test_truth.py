"""Cells whose distribution is known: log p(x) against sums over a grid, by scipy alone."""

import numpy as np
import pytest
from scipy import special, stats

from vampsc import models, training, truth

GENES = np.array([f"g{i}" for i in range(6)])


def decode(z):
    slopes = np.array([[1.5, -1.0, 0.5, 0.0, 2.0, -0.3]])
    log_share = z @ slopes - np.array([1.0, 0.5, 2.0, 0.2, 3.0, 6.0])
    log_share = log_share - special.logsumexp(log_share, axis=1, keepdims=True)
    # from nearly always zero to nearly Poisson
    return log_share, np.broadcast_to(np.log([1e-4, 0.3, 1.0, 4.0, 30.0, 1e5]), log_share.shape)


@pytest.fixture(scope="module")
def known():
    return truth.Truth(
        means=np.array([[-2.0], [0.5], [1.5]]),
        deviations=np.array([[0.3], [0.5], [0.2]]),
        shares=np.array([0.6, 0.3, 0.1]),
        types=np.array(["a", "b", "b"]),
        totals=np.array([30.0, 3000.0]),
        decode=decode,
        genes=GENES,
    )


def log_p_on_a_grid(x, log_mean, theta, log_prior, step):
    "log p(x) of one cell: log-means (grid, genes) and the log-density of z (grid,)."
    mu = np.exp(log_mean)
    log_likelihood = stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1)
    return special.logsumexp(log_likelihood + log_prior) + np.log(step)


def test_log_p_is_that_of_a_grid(known):
    cells = known.draw(150, seed=3)
    found = truth.log_prob(known, cells, n_draws=600)
    z = np.linspace(-5, 5, 8001)[:, None]
    log_share, log_dispersion = decode(z)
    log_prior = special.logsumexp(known.log_prior(z), axis=1)
    on_grid = np.array(
        [
            log_p_on_a_grid(x, log_share + np.log(s), np.exp(log_dispersion), log_prior, 10 / 8000)
            for x, s in zip(cells.X.toarray(), cells.obs["expected"])
        ]
    )
    wrong = found["log_p"].to_numpy() - on_grid
    assert abs(wrong.mean()) < 0.01
    assert (np.abs(wrong) / np.maximum(found["error"], 1e-3)).max() < 6
    assert np.abs(wrong).max() < 0.3


def test_best_guesses_are_right_as_often_as_the_posterior_expects(known):
    cells = known.draw(600, seed=4)
    found = truth.log_prob(known, cells, n_draws=200)
    largest = found["p_best"]
    right = (found["best_type"] == cells.obs["cell_type"].astype(str)).mean()
    assert abs(right - largest.mean()) < 3 * np.sqrt(largest.mean() * (1 - largest.mean()) / 600)


def test_counts_have_the_means_and_variances_of_the_decoder(known):
    alone = truth.Truth(
        np.array([[0.4]]),
        np.array([[1e-9]]),
        np.ones(1),
        np.array(["a"]),
        np.array([500.0]),
        decode,
        GENES,
    )
    x = alone.draw(20_000).X.toarray()
    mu = 500 * np.exp(decode(np.array([[0.4]]))[0][0])
    theta = np.array([1e-4, 0.3, 1.0, 4.0, 30.0, 1e5])
    variance = mu + mu**2 / theta
    # a gene of dispersion 1e-4 is nearly always zero, and its moments need far more cells
    here = theta > 0.1
    error = np.sqrt(variance / len(x))
    assert (np.abs(x.mean(0) - mu) < 5 * error)[here].all()
    np.testing.assert_allclose(x.var(0)[here], variance[here], rtol=0.15)


def test_a_mode_is_higher_than_where_it_was_sought(known):
    cells = known.draw(40, seed=5)
    x = cells.X.toarray()
    expected = cells.obs["expected"].to_numpy()
    at, information = truth.mode_of(known, x, expected, cells.obsm["z"])
    step = 1e-3

    def height(x, s, z):
        log_share, log_dispersion = decode(z)
        mu = s * np.exp(log_share)
        theta = np.exp(log_dispersion)
        return stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1) + special.logsumexp(
            known.log_prior(z), 1
        )

    tops = 0
    for i in range(len(x)):
        here = height(x[i], expected[i], at[[i]])[0]
        assert here >= height(x[i], expected[i], cells.obsm["z"][[i]])[0]
        around = height(x[i], expected[i], at[[i]] + np.array([[-step], [step]]))
        tops += here >= around.max() - 1e-3
    assert tops > 0.9 * len(x)
    assert (information > 0).all()


@pytest.fixture(scope="module")
def model(known):
    cells = known.draw(300, seed=6)
    model = models.VAE(cells, gene_space=None, n_latent=1, hidden=(8,), dispersion="gene")
    model.train(max_epochs=15, progress=False)
    return model


@pytest.mark.long
def test_the_bound_of_a_model_is_just_below_its_log_p_on_a_grid(known, model):
    cells = known.draw(30, seed=7)
    z = np.linspace(-8, 8, 4001, dtype="float32")[:, None]
    log_rate, log_dispersion = (
        np.asarray(v, float) for v in model.network.decoder(z, np.zeros((len(z), 1), "float32"))
    )
    log_prior = stats.norm.logpdf(z[:, 0].astype(float))
    on_grid = [
        log_p_on_a_grid(x, log_rate + np.log(s / 1e4), np.exp(log_dispersion), log_prior, 16 / 4000)
        for x, s in zip(cells.X.toarray(), cells.obs["expected"])
    ]
    bound = truth.bound_at(model, cells, 500)
    assert abs((bound - on_grid).mean()) < 0.05
    assert (bound - on_grid).max() < 0.5


def test_a_model_of_other_genes_is_refused(known):
    cells = known.draw(60, seed=8)
    model = models.VAE(cells[:, :4].copy(), gene_space=None, n_latent=1, hidden=(4,))
    with pytest.raises(ValueError, match="4 of the truth's 6 genes; train it with gene_space=None"):
        truth.bound_at(model, cells, 2)


def test_cells_without_a_molecule_are_drawn_again(known):
    few = truth.Truth(**{**vars(known), "totals": np.array([0.5])})
    cells = few.draw(200, seed=1)
    assert cells.n_obs == 200 and (cells.X.sum(1) > 0).all() and cells.obs_names.is_unique


def test_a_file_that_is_there_is_kept(known, tmp_path):
    path = truth.write_cells(known, tmp_path / "cells.h5ad", 20)
    written = path.read_bytes()

    def never():
        raise AssertionError("it was made again")

    assert truth.write_cells(never, path, 30).read_bytes() == written


def test_an_unknown_kind_is_named(model):
    with pytest.raises(ValueError, match="kind='many' is not known; take one of types, one"):
        truth.truth_of(model, None, kind="many")


def test_cells_without_types_make_no_truth(known, tmp_path):
    cells = known.draw(80, seed=9)
    del cells.obs["cell_type"]
    cells.write_h5ad(tmp_path / "bare.h5ad")
    brief = training.get_profile("quick", max_epochs=1)
    with pytest.raises(ValueError, match="has no cell types; they belong into obs"):
        truth.fit_truth(str(tmp_path / "bare.h5ad"), tmp_path, 2, 6, profile=brief)
