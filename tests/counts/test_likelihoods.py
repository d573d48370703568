"""Likelihoods as objects: against scipy and mpmath, at the extremes, and in models."""

import copy

import anndata as ad
import keras
import mpmath
import numpy as np
import pytest
from scipy import stats

from vampsc import models
from vampsc.likelihood import (
    LIKELIHOODS,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)

COUNTS = np.float32([0, 1, 2, 7, 100, 1e4, 1e5])
LOGS = np.float32([-14, -3, -0.5, 0.1, 2, 5, 11.5])


def per_gene(likelihood, x, *parameters):
    "log_prob of single counts: each is a cell of one gene."
    columns = [np.asarray(v, "float32")[:, None] for v in (x, *parameters)]
    return np.asarray(likelihood.log_prob(*columns), "float64")


def test_poisson_at_the_extremes():
    x, m = (v.ravel() for v in np.meshgrid(COUNTS, LOGS))
    with mpmath.workdps(40):
        exact = [
            float(
                mpmath.mpf(float(a)) * mpmath.mpf(float(b))
                - mpmath.exp(mpmath.mpf(float(b)))
                - mpmath.loggamma(mpmath.mpf(float(a)) + 1)
            )
            for a, b in zip(x, m)
        ]
    error = np.abs(per_gene(Poisson(), x, m) - exact) / np.maximum(1, np.abs(exact))
    assert error.max() < 3e-6


def test_zero_inflated_is_a_mixture_of_zero_and_a_negative_binomial():
    x, m, r, logit = (
        v.ravel().astype("float64")
        for v in np.meshgrid(COUNTS[:5], LOGS[1:6], [-3, 0.5, 4], [-6, -0.7, 0, 5])
    )
    theta = np.exp(r)
    nb = stats.nbinom.logpmf(x, theta, theta / (theta + np.exp(m)))
    share = 1 / (1 + np.exp(-logit))
    exact = np.where(x == 0, np.log(share + (1 - share) * np.exp(nb)), np.log1p(-share) + nb)
    found = per_gene(ZeroInflatedNegativeBinomial(), x, m, r, logit)
    np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_are_those_of_a_difference_quotient(name):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("gradients are taken with TensorFlow's tape")
    import tensorflow as tf

    likelihood = LIKELIHOODS[name]()
    x = np.float32([[0, 3, 40]])
    point = [np.float32([[0.3, 1.2, 3.0]]) for _ in range(1 + len(likelihood.others))]
    variables = [tf.Variable(v) for v in point]
    with tf.GradientTape() as tape:
        value = likelihood.log_prob(x, *variables)
    gradients = tape.gradient(value, variables)

    def exact(*parameters):
        "By scipy, in double precision."
        mu = np.exp(parameters[0])
        if name == "poisson":
            return stats.poisson.logpmf(x, mu).sum()
        theta = np.exp(parameters[1])
        nb = stats.nbinom.logpmf(x, theta, theta / (theta + mu))
        if name == "nb":
            return nb.sum()
        share = 1 / (1 + np.exp(-parameters[2]))
        zero = np.log(share + (1 - share) * np.exp(nb))
        return np.where(x == 0, zero, np.log1p(-share) + nb).sum()

    step = 1e-5
    for k, gradient in enumerate(gradients):
        for j in range(3):
            at = [v.astype("float64") for v in point]
            at[k][0, j] += step
            above = exact(*at)
            at[k][0, j] -= 2 * step
            quotient = (above - exact(*at)) / (2 * step)
            assert float(gradient[0, j]) == pytest.approx(quotient, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_have_the_mean_and_the_share_of_zeros(name):
    likelihood = LIKELIHOODS[name]()
    values = [1.5, 0.4, -0.5][: 1 + len(likelihood.others)]
    many = [np.full((200_000, 1), v, "float32") for v in values]
    drawn = likelihood.sample(np.random.default_rng(1), *many)
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(float(likelihood.mean(*many)[0, 0]), rel=0.02)
    p_zero = np.exp(per_gene(likelihood, [0], *[[v] for v in values])[0])
    assert (drawn == 0).mean() == pytest.approx(p_zero, abs=0.005)


def test_the_rate_given_a_count_is_that_of_simulated_cells():
    rng = np.random.default_rng(2)
    mu, theta, share = 4.0, 1.3, 0.4
    rates = rng.gamma(theta, mu / theta, 400_000)
    x = np.where(rng.random(len(rates)) < share, 0, rng.poisson(rates))
    log_odds = np.log(share / (1 - share))
    for count in (0, 1, 6):
        given = ZeroInflatedNegativeBinomial().rate_given(
            np.full((1, 1), count), np.log(mu), np.log(theta), log_odds
        )
        assert given.item() == pytest.approx(rates[x == count].mean(), rel=0.02)
    plain = rng.poisson(rates)
    given = NegativeBinomial().rate_given(np.full((1, 1), 2), np.log(mu), np.log(theta))
    assert given.item() == pytest.approx(rates[plain == 2].mean(), rel=0.02)
    assert Poisson().rate_given(3, np.log(mu)) == pytest.approx(mu)


def test_confidence_is_between_a_poisson_count_and_none():
    m, r = np.log([[0.1, 5.0]]), np.log([[2.0, 2.0]])
    np.testing.assert_allclose(NegativeBinomial().confidence(m, r), [[2 / 2.1, 2 / 7]])
    assert (Poisson().confidence(m) == 1).all()
    inflated = ZeroInflatedNegativeBinomial().confidence(m, r, np.zeros((1, 2)))
    np.testing.assert_allclose(inflated, [[1 / 2.1, 1 / 7]])


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(3)
    means = np.exp(rng.normal(0.5, 1, (3, 30)))
    kind = rng.integers(3, size=150)
    cells = ad.AnnData(rng.poisson(means[kind] * rng.gamma(2, 0.5, (150, 30))).astype("float32"))
    cells.obs["cell_type"] = np.array(["a", "b", "c"])[kind]
    cells.obs["donor"] = np.array(["one", "two"])[np.arange(150) % 2]
    return cells


SMALL = dict(gene_space=None, n_latent=3, hidden=(8,))


@pytest.fixture(scope="module", params=["poisson", "zinb"])
def trained(request, cells):
    model = models.VAMP(
        cells, likelihood=request.param, n_pseudo_inputs=5, batch_key="donor", **SMALL
    )
    model.train(max_epochs=4, progress=False)
    return model


def test_a_model_of_it_trains_and_every_verb_works(trained, cells):
    loss = trained.history["loss"]
    assert loss.iloc[-1] < loss.iloc[0]
    some = np.arange(40)
    assert np.isfinite(trained.get_marginal_ll(indices=some)["marginal_ll"])
    expression = trained.get_normalized_expression(indices=some, library_size="observed")
    with_counts = trained.get_normalized_expression(
        indices=some, library_size="observed", use_counts=True
    )
    assert expression.shape == with_counts.shape == (40, 30)
    assert (expression.to_numpy() > 0).all()
    drawn = trained.posterior_predictive_sample(indices=some)
    assert drawn.shape == (40, 30) and (drawn.X.data == np.round(drawn.X.data)).all()
    assert trained.sample_prior(20).shape == (20, 30)
    found = trained.differential_expression(cells, groupby="cell_type", group1="a", group2="b")
    assert len(found) == 30 and found["lfc_mean"].notna().all()


def test_it_is_saved_copied_and_loaded(trained, cells, tmp_path):
    trained.save(tmp_path / "model")
    again = models.load(tmp_path / "model", cells)
    assert again.architecture.likelihood == trained.architecture.likelihood
    for other in (again, copy.deepcopy(trained)):
        np.testing.assert_array_equal(
            other.get_elbo(n_mc_samples=1), trained.get_elbo(n_mc_samples=1)
        )


@pytest.mark.long
def test_a_run_in_two_parts_equals_one(trained, cells, tmp_path):
    kind = trained.architecture.likelihood
    whole, parts = (models.VAE(cells, likelihood=kind, **SMALL) for _ in range(2))
    whole.train(max_epochs=4, progress=False)
    path = tmp_path / "run.checkpoint"
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(parts.network, "stop_training", epoch == 1)
    )
    parts.train(max_epochs=4, progress=False, checkpoint=path, callbacks=stop)
    assert len(parts.history) == 2
    parts.train(max_epochs=4, progress=False, checkpoint=path, resume=True)
    np.testing.assert_array_equal(whole.history["loss"], parts.history["loss"])


def test_one_dispersion_a_gene_goes_with_zeros_that_are_set(cells):
    model = models.VAE(cells, likelihood="zinb", dispersion="gene", **SMALL)
    assert model.network.decoder.gene_dispersion.shape == (30,)
    assert np.isfinite(list(model.get_elbo().values())).all()


def test_a_negative_binomial_is_written_as_before(cells, tmp_path):
    model = models.VAE(cells, **SMALL)
    assert "likelihood" not in model.architecture.as_dict()
    names = [weight.path for weight in model.network.decoder.weights]
    assert not any("zero" in name for name in names)


def test_another_likelihood_is_refused_by_name(cells):
    with pytest.raises(ValueError, match="likelihood='normal' is not known"):
        models.VAE(cells, likelihood="normal", **SMALL)
    with pytest.raises(TypeError, match="likelihood=, 'nb', 'zinb' or 'poisson'"):
        models.VAE(cells, gene_likelihood="zinb", **SMALL)
