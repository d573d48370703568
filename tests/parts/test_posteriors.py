"""The point and the Gaussian posterior, against scipy's densities and integrals."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from vampsc.networks import new_seeds
from vampsc.posteriors import (
    LOG_VAR_BOUNDS,
    GaussianPosterior,
    PointPosterior,
    kl_to_standard_normal,
    soft_clip,
)


def built(cls, n_latent=5, width=6, seed=0):
    posterior = cls(n_latent, new_seeds(seed))
    posterior.build((None, width))
    return posterior


def draws(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("float32")


# ---- point


def test_point():
    posterior = built(PointPosterior)
    h = draws(4, 6)
    posterior.mean.bias.assign(draws(5, seed=1))
    parameters = posterior(h)
    assert len(parameters) == 1 and posterior.exact_mean
    np.testing.assert_allclose(
        parameters[0],
        h @ np.asarray(posterior.mean.kernel) + np.asarray(posterior.mean.bias),
        atol=1e-5,
    )
    z, log_q = posterior.sample(parameters, draws(4, 5, scale=100))
    assert log_q is None and np.array_equal(z, parameters[0])  # the noise has no say
    assert not posterior.losses and len(posterior.weights) == 2


# ---- Gaussian


def test_parameters_are_two_linear_heads():
    posterior = built(GaussianPosterior)
    h = draws(4, 6)
    for w in posterior.weights:
        w.assign(draws(*w.shape, seed=w.shape[0]))
    mean, log_var = (np.asarray(p, "float64") for p in posterior(h))

    def line(head):
        return h.astype("float64") @ np.asarray(head.kernel) + np.asarray(head.bias)

    np.testing.assert_allclose(mean, line(posterior.mean), rtol=1e-4, atol=1e-5)
    low = np.log(1e-3)
    high = np.log(100)
    clipped = (
        low
        + np.logaddexp(0, line(posterior.log_var) - low)
        - np.logaddexp(0, line(posterior.log_var) - high)
    )
    np.testing.assert_allclose(log_var, clipped, rtol=1e-4, atol=1e-5)
    assert posterior.exact_mean and not posterior.losses and len(posterior.weights) == 4


@pytest.mark.parametrize("log_var", [LOG_VAR_BOUNDS[0], -2.0, 0.0, 1.5, LOG_VAR_BOUNDS[1]])
def test_log_q_is_the_density_at_the_sample(log_var):
    mean = draws(50, 8, scale=3)
    noise = draws(50, 8, seed=1)
    log_vars = np.full((50, 8), log_var, "float32") + draws(50, 8, seed=2, scale=0.1)
    z, log_q = GaussianPosterior(8, new_seeds(0)).sample((mean, log_vars), noise)
    assert np.asarray(z).shape == (50, 8) and np.asarray(log_q).shape == (50,)
    sd = np.exp(0.5 * log_vars.astype("float64"))
    np.testing.assert_allclose(z, mean + sd * noise, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        log_q, stats.norm.logpdf(mean + sd * noise, mean, sd).sum(1), rtol=1e-5, atol=1e-4
    )


def test_sample_moments():
    mean = np.float32([[1, -2]])
    log_var = np.float32([[0.5, -3]])
    z = np.asarray(
        GaussianPosterior(2, new_seeds(0)).sample((mean, log_var), draws(100_000, 2))[0], "float64"
    )
    sd = np.exp(0.5 * log_var[0])
    np.testing.assert_allclose((z.mean(0) - mean[0]) / sd, 0, atol=5 / np.sqrt(1e5))
    np.testing.assert_allclose(z.var(0) / sd**2, 1, atol=5 * np.sqrt(2 / 1e5))


# ---- KL


@pytest.mark.parametrize("mean", [0.0, 0.3, -2.0, 7.0])
@pytest.mark.parametrize("log_var", [LOG_VAR_BOUNDS[0], -1.0, 0.0, 0.7, LOG_VAR_BOUNDS[1]])
def test_closed_kl_is_the_integral(mean, log_var):
    q = stats.norm(mean, math.exp(log_var / 2))
    p = stats.norm()

    def density(z):
        return q.pdf(z) * (q.logpdf(z) - p.logpdf(z))

    ends = mean - 12 * q.std(), mean + 12 * q.std()
    truth = integrate.quad(density, *ends, points=[mean], epsabs=1e-11, epsrel=1e-10, limit=200)[0]
    assert float(kl_to_standard_normal(np.float32(mean), np.float32(log_var))) == pytest.approx(
        truth, rel=1e-5, abs=1e-6
    )


def test_closed_kl_is_the_mean_of_the_sampled_one():
    mean = np.float32([[0.5, -1, 2]])
    log_var = np.float32([[-1, 0.3, -4]])
    z, log_q = GaussianPosterior(3, new_seeds(0)).sample((mean, log_var), draws(100_000, 3))
    sampled = np.asarray(log_q, "float64") - stats.norm.logpdf(np.asarray(z)).sum(1)
    closed = float(np.asarray(kl_to_standard_normal(mean, log_var)).sum())
    assert abs(sampled.mean() - closed) < 5 * sampled.std() / np.sqrt(len(sampled))


@given(st.floats(-50, 50, width=32), st.floats(-6.875, 4.5, width=32))
def test_kl_is_not_negative_and_grows_with_the_mean(mean, log_var):
    kl, at_zero = (
        float(v) for v in kl_to_standard_normal(np.float32([mean, 0]), np.float32(log_var))
    )
    assert kl >= at_zero >= -1e-7
    assert kl - at_zero == pytest.approx(mean**2 / 2, rel=1e-4, abs=1e-4)


def test_kl_vanishes_at_the_prior():
    kl = np.asarray(kl_to_standard_normal(np.zeros((2, 3), "float32"), np.zeros((2, 3), "float32")))
    assert kl.shape == (2, 3) and (kl == 0).all()
    # v^2/4
    assert float(kl_to_standard_normal(np.float32(0), np.float32(1e-3))) == pytest.approx(
        2.5e-7, rel=1e-2
    )


# ---- bounds of the variance


def test_log_variance_bounds():
    assert np.exp(LOG_VAR_BOUNDS) == pytest.approx([1e-3, 100])


def test_variance_stays_in_bounds():
    posterior = built(GaussianPosterior)
    posterior.log_var.kernel.assign(draws(6, 5, scale=100))
    log_var = np.asarray(posterior(draws(500, 6, seed=1, scale=3))[1], "float64")
    assert LOG_VAR_BOUNDS[0] - 1e-3 < log_var.min() < LOG_VAR_BOUNDS[0] + 1e-3
    assert LOG_VAR_BOUNDS[1] - 1e-3 < log_var.max() < LOG_VAR_BOUNDS[1] + 1e-3


def test_soft_clip():
    a = np.linspace(-100, 100, 2001)
    clipped = np.asarray(soft_clip(a.astype("float32"), -2.0, 3.0), "float64")
    np.testing.assert_allclose(
        clipped, -2 + np.logaddexp(0, a + 2) - np.logaddexp(0, a - 3), atol=2e-5
    )
    assert (
        (np.diff(clipped) >= -2e-5).all()
        and clipped.min() >= -2 - 2e-5
        and clipped.max() <= 3 + 2e-5
    )
    # The identity between the bounds, but for what the two softplus round off at the corners (at
    # most log 2).
    off = np.abs(clipped - a)[(a >= -2) & (a <= 3)]
    assert (
        off.max() <= np.log(2) + 1e-5
        and np.abs(float(soft_clip(np.float32(0.5), -2.0, 3.0)) - 0.5) < 1e-6
    )


def test_seed_decides():
    one, same, other = (built(GaussianPosterior, seed=s).get_weights() for s in (0, 0, 1))
    assert all(map(np.array_equal, one, same)) and not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[2])  # the two heads start apart
    assert keras.backend.floatx() == "float32"
