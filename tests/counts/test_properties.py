"""What must hold for any shape, any dtype and any size of number: random examples of every density
and transform.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops
from scipy import special, stats

from vampsc.flows import IAFPosterior
from vampsc.likelihood import nb_log_prob, nb_log_prob_sum
from vampsc.networks import log_normalise, new_seeds, soft_bound
from vampsc.posteriors import (
    LOG_VAR_BOUNDS,
    GaussianPosterior,
    gaussian_sample,
    kl_to_standard_normal,
    soft_clip,
)
from vampsc.priors import HierarchicalPosterior, HierarchicalVampPrior, StandardNormal, VampPrior

seeds = st.integers(0, 999)
cells = st.sampled_from([1, 1, 2, 5])  # batches of one more often than others


def draws(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("float32")


def nb_by_hand(x, m, r):
    x, m, r = (np.asarray(v, "float64") for v in (x, m, r))
    theta = np.exp(r)
    log_sum = np.logaddexp(m, r)
    return (
        special.gammaln(x + theta)
        - special.gammaln(theta)
        - special.gammaln(x + 1)
        + x * (m - log_sum)
        + theta * (r - log_sum)
    )


# ---- the likelihood


@given(
    hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=4, max_side=4),
    seeds,
    st.sampled_from(["int32", "int64", "float32", "float64"]),
)
def test_likelihood_broadcasts_like_numpy(shapes, seed, dtype):
    rng = np.random.default_rng(seed)
    x = rng.poisson(2.0, shapes.input_shapes[0]).astype(dtype)
    m, r = (rng.normal(size=shape) for shape in shapes.input_shapes[1:])
    found = np.asarray(nb_log_prob(x, m, r))
    assert found.shape == shapes.result_shape and found.dtype == np.float32
    np.testing.assert_allclose(found, nb_by_hand(x, m, r), rtol=1e-4, atol=1e-4)


@given(cells, st.integers(1, 12), seeds, st.booleans())
def test_sum_over_genes_is_the_sum(n, genes, seed, all_zero):
    rng = np.random.default_rng(seed)
    x = rng.poisson(1.0, (n, genes)) * (not all_zero)
    m = draws(n, genes, seed=seed, scale=3)
    r = draws(genes, seed=seed + 1, scale=3)
    whole = np.asarray(nb_log_prob_sum(x, m, r))
    assert whole.shape == (n,) and whole.dtype == np.float32
    np.testing.assert_allclose(
        whole, np.asarray(nb_log_prob(x, m, r), "float64").sum(1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(nb_log_prob_sum(x[:1], m[:1], r), whole[:1], rtol=1e-5, atol=1e-6)


@given(st.floats(0, 2.0**24, width=32), st.floats(-30, 30, width=32), st.floats(-30, 30, width=32))
def test_likelihood_is_finite_and_negative_everywhere(x, m, r):
    "For any count, fractions included, up to 16 million."
    found = float(nb_log_prob(np.float32(x), m, r))
    assert np.isfinite(found) and (found <= 1e-4 or x != round(x))


@pytest.mark.parametrize("x", [1e-45, 1.1754943508222875e-38, 1e-31, 1e-29, 1e-20])
def test_tiny_fractions_are_zero(x):
    "1/x overflows there; the value tends to that of 0."
    for log_prob in (nb_log_prob, lambda *at: nb_log_prob_sum(*([[v]] for v in at))[0]):
        assert abs(float(log_prob(x, 0.5, -0.2)) - float(nb_log_prob(0.0, 0.5, -0.2))) < 1e-6


# ---- input layer and bounds


@given(cells, st.integers(1, 8), seeds)
def test_log_normalise_gives_cells_of_one_depth(n, genes, seed):
    x = np.random.default_rng(seed).poisson(3.0, (n, genes)).astype("float32") + (
        np.arange(genes) == 0
    )
    found = np.asarray(log_normalise(x.astype("float32")))
    assert found.shape == (n, genes) and found.dtype == np.float32 and (found >= 0).all()
    np.testing.assert_allclose(np.expm1(found.astype("float64")).sum(1), 1e4, rtol=1e-4)


@given(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-9, 3, width=32),
    st.floats(0.125, 10, width=32),
)
def test_bounds_hold_for_any_number(a, low, width):
    high = low + width
    slack = 1e-4 * max(1.0, abs(low), abs(high))
    clipped = float(soft_clip(ops.convert_to_tensor(np.float32(a)), low, high))
    assert low - slack <= clipped <= high + slack
    assert abs(float(soft_bound(ops.convert_to_tensor(np.float32(a))))) <= 20.001


@given(st.floats(-4, 2, width=32))
def test_clip_leaves_ordinary_log_variances_alone(a):
    assert abs(float(soft_clip(ops.convert_to_tensor(np.float32(a)), *LOG_VAR_BOUNDS)) - a) < 0.08


# ---- posteriors


@given(hnp.array_shapes(max_dims=3, max_side=4), seeds, st.floats(0, 30))
def test_gaussian_sample_of_any_shape(shape, seed, spread):
    mean = draws(*shape, seed=seed, scale=spread)
    log_var = draws(*shape, seed=seed + 1)
    noise = draws(*shape, seed=seed + 2)
    z, log_q = (np.asarray(v) for v in gaussian_sample(mean, log_var, noise))
    assert z.shape == log_q.shape == shape and z.dtype == log_q.dtype == np.float32
    sd = np.exp(log_var.astype("float64") / 2)
    np.testing.assert_allclose(z, mean + sd * noise, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        log_q, stats.norm.logpdf(mean + sd * noise, mean, sd), rtol=1e-4, atol=1e-4
    )


def posteriors(kind, d, seed):
    if kind == "gaussian":
        return GaussianPosterior(d, new_seeds(seed))
    if kind == "iaf":
        return IAFPosterior(d, new_seeds(seed), n_steps=seed % 4, hidden=(9, 9))
    return HierarchicalPosterior(d, new_seeds(seed), hidden=5)


@given(
    st.sampled_from(["gaussian", "iaf", "hierarchical"]),
    st.integers(2, 9),
    cells,
    seeds,
    st.sampled_from([1.0, 8.0, 100.0]),
)
def test_posteriors_of_any_width(kind, d, n, seed, size):
    """Finite for strange encodings and far-off noise; a cell's density does not depend on its
    batch; units add up.
    """
    posterior = posteriors(kind, d, seed)
    h = draws(n, 6, seed=seed, scale=size)
    noise = draws(n, d, seed=seed + 1, scale=min(size, 8))
    posterior.build((None, 6))
    z, log_q = (np.asarray(v) for v in posterior.sample(posterior(h), noise))
    assert z.shape == (n, d) and log_q.shape == (n,) and z.dtype == log_q.dtype == np.float32
    assert np.isfinite(z).all() and np.isfinite(log_q).all()
    same, by_unit = posterior.sample_by_unit(posterior(h), noise)
    np.testing.assert_allclose(same, z)
    np.testing.assert_allclose(np.asarray(by_unit, "float64").sum(1), log_q, rtol=1e-5, atol=1e-4)
    alone = posterior.sample(posterior(h[:1]), noise[:1])
    for a, b in zip(alone, (z, log_q)):
        np.testing.assert_allclose(a, b[:1], rtol=1e-4, atol=1e-4 * max(1, size))


@given(hnp.array_shapes(max_dims=3, max_side=4), seeds)
def test_kl_of_any_shape(shape, seed):
    found = np.asarray(
        kl_to_standard_normal(draws(*shape, seed=seed), draws(*shape, seed=seed + 1))
    )
    assert found.shape == shape and found.dtype == np.float32 and (found > -1e-6).all()


# ---- priors


@given(
    st.sampled_from(["normal", "vamp", "weighted", "hvamp"]),
    st.integers(2, 7),
    st.integers(1, 5),
    cells,
    seeds,
    st.sampled_from([1.0, 30.0, 1000.0]),
    st.booleans(),
)
def test_priors_of_any_width(kind, d, k, n, seed, size, narrow):
    """Also far from every component, and with variances at their lower bound: finite, batch-free,
    and units add up.
    """
    prior = {
        "normal": StandardNormal,
        "vamp": lambda: VampPrior(k, 3),
        "weighted": lambda: VampPrior(k, 3, learn_weights=True),
        "hvamp": lambda: HierarchicalVampPrior(k, 3, d, new_seeds(seed), hidden=4),
    }[kind]()
    if kind == "weighted":
        prior.logits.assign(draws(k, seed=seed + 3, scale=5))
    width = d - d // 2 if kind == "hvamp" else d
    log_var = (
        np.full((k, width), LOG_VAR_BOUNDS[0], "float32")
        if narrow
        else draws(k, width, seed=seed + 2)
    )
    components = (
        None if kind == "normal" else (draws(k, width, seed=seed + 1), log_var, prior.log_weights())
    )
    z = draws(n, d, seed=seed, scale=size)
    log_p = np.asarray(prior.log_prob(z, components))
    assert log_p.shape == (n,) and log_p.dtype == np.float32 and np.isfinite(log_p).all()
    np.testing.assert_allclose(prior.log_prob(z[:1], components), log_p[:1], rtol=1e-5, atol=1e-4)
    by_unit, component = prior.log_prob_by_unit(z, components)
    assert np.shape(by_unit) == (n, d) and (np.asarray(component) >= -1e-6).all()
    np.testing.assert_allclose(
        np.asarray(by_unit, "float64").sum(1) - component, log_p, rtol=2e-5, atol=1e-3
    )
    drawn = prior.sample(n, d, components, np.random.default_rng(seed))
    assert drawn.shape == (n, d) and drawn.dtype == np.float32 and np.isfinite(drawn).all()
