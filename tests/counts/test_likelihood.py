"""The negative binomial against mpmath (50 digits), scipy and closed forms.

No formula here is the package's own.
"""

import keras
import mpmath
import numpy as np
import pytest
from autodiff import gradients
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from vampsc.likelihood import (
    digamma_error,
    nb_log_prob,
    nb_log_prob_sum,
    stirling_error,
    unit_deviance,
)

BACKEND = keras.backend.backend()
only_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="the sum at the non-zeros is TensorFlow's"
)
ULP = 2.0**-23  # of float32, relative


def exact(x, log_mean, log_dispersion):
    "log NB by its definition, from the very numbers that the function sees, in 50 digits."
    with mpmath.workdps(50):
        x, m, r = (mpmath.mpf(float(v)) for v in (x, log_mean, log_dispersion))
        theta = mpmath.exp(r)
        log_sum = mpmath.log(mpmath.exp(m) + mpmath.exp(r))
        return float(
            mpmath.loggamma(x + theta)
            - mpmath.loggamma(theta)
            - mpmath.loggamma(x + 1)
            + x * (m - log_sum)
            + theta * (r - log_sum)
        )


def exact_gradient(x, log_mean, log_dispersion):
    "Its derivatives by log mu and log theta."
    with mpmath.workdps(50):
        x, m, r = (mpmath.mpf(float(v)) for v in (x, log_mean, log_dispersion))
        mu = mpmath.exp(m)
        theta = mpmath.exp(r)
        by_theta = (
            mpmath.digamma(x + theta)
            - mpmath.digamma(theta)
            + r
            - mpmath.log(mu + theta)
            + 1
            - (x + theta) / (mu + theta)
        )
        return float(theta * (x - mu) / (mu + theta)), float(theta * by_theta)


@pytest.fixture(scope="module")
def grid():
    """Counts up to 100,000; mu and theta from 1e-6 to 1e8, e^-30 and e^30: 2,601 points, exact
    values and gradients.
    """
    logs = np.r_[np.log(10.0) * np.arange(-6, 9), -30, 30]
    x, m, r = (
        v.ravel().astype("float32")
        for v in np.meshgrid([0, 1, 2, 3, 10, 100, 1e3, 1e4, 1e5], logs, logs, indexing="ij")
    )
    points = list(zip(x, m, r))
    return (
        x,
        m,
        r,
        np.array([exact(*p) for p in points]),
        np.array([exact_gradient(*p) for p in points]),
    )


def in_sum(x, m, r, sparse):
    """nb_log_prob_sum of a matrix whose rows hold one point each, so that it gives the points' own
    values.
    """
    return nb_log_prob_sum(x[:, None], m[:, None], r[:, None], sparse=sparse)


FORMS = {
    "elementwise": nb_log_prob,
    "dense sum": lambda *at: in_sum(*at, False),
    "sum at the non-zeros": lambda *at: in_sum(*at, True),
}
forms = pytest.mark.parametrize(
    "form",
    ["elementwise", "dense sum", pytest.param("sum at the non-zeros", marks=only_tensorflow)],
)


@forms
def test_grid_values(grid, form):
    x, m, r, truth, _ = grid
    found = np.asarray(FORMS[form](x, m, r), "float64")
    error = np.abs(found - truth) / np.maximum(1, np.abs(truth))
    assert np.isfinite(found).all()
    assert error[x <= 1e3].max() <= 1e-4
    assert error[x > 1e3].max() <= 1e-3
    # and in fact a few float32 roundings, everywhere
    assert error.max() <= 1e-5


@forms
def test_grid_gradients(grid, form):
    x, m, r, _, truth = grid
    for found, true in zip(gradients(lambda m, r: FORMS[form](x, m, r), m, r), truth.T):
        excess = np.abs(found - true) - np.maximum(1e-3 * np.abs(true), 1e-5)
        worst = np.argmax(excess)
        assert np.isfinite(found).all() and excess[worst] <= 0, (
            x[worst],
            m[worst],
            r[worst],
            found[worst],
            true[worst],
        )


def test_against_scipy():
    rng = np.random.default_rng(0)
    mu = np.exp(rng.uniform(-4, 6, 3000))
    theta = np.exp(rng.uniform(-3, 4, 3000))
    x = rng.poisson(rng.gamma(theta, mu / theta))
    truth = stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    np.testing.assert_allclose(
        nb_log_prob(x, np.log(mu), np.log(theta)), truth, rtol=2e-5, atol=2e-5
    )


def test_where_the_plain_form_fails():
    """x = 3, mu = 2: -1.7123 in the Poisson limit, where the plain form in float32 gives -0.79 or
    -53.
    """
    values = nb_log_prob(3.0, np.log(2.0), np.log(np.float64([1e6, 1e8, 1e12])))
    np.testing.assert_allclose(values, stats.poisson.logpmf(3, 2), atol=5e-6)


EXTREMES = [(x, m, r) for x in (0, 1, 7, 1e3, 1e5) for m in (-30, 0, 30) for r in (-30, 0, 30)]


@pytest.mark.parametrize("x, m, r", EXTREMES)
def test_extreme_parameters(x, m, r):
    value = float(nb_log_prob(x, m, r))
    by = gradients(lambda m, r: nb_log_prob(x, m, r), m, r)
    truth, (by_m, by_r) = exact(x, m, r), exact_gradient(x, m, r)
    assert np.isfinite([value, *by]).all()
    assert abs(value - truth) <= 1e-4 * max(1, abs(truth))
    assert abs(by[0] - by_m) <= max(1e-3 * abs(by_m), 1e-5)
    assert abs(by[1] - by_r) <= max(1e-3 * abs(by_r), 1e-5)


parameters = st.floats(-30, 30, width=32)


@given(
    x=st.one_of(st.integers(0, 20), st.integers(0, 10**5), st.floats(2**-7, 500, width=32)),
    m=parameters,
    r=parameters,
)
def test_any_point(x, m, r):
    "Values and gradients at random points, non-integer counts included."
    x = np.float32(x)
    value, (by_m, by_r) = (
        float(nb_log_prob(x, m, r)),
        gradients(lambda m, r: nb_log_prob(x, m, r), m, r),
    )
    truth, (true_m, true_r) = exact(x, m, r), exact_gradient(x, m, r)
    assert abs(value - truth) <= 1e-4 * max(1, abs(truth))
    assert abs(by_m - true_m) <= 1e-3 * abs(true_m) + 1e-5
    assert abs(by_r - true_r) <= 1e-3 * abs(true_r) + 1e-5


@given(x=st.integers(1, 10**5), m=st.floats(-20, 20, width=32), r=st.floats(-20, 20, width=32))
def test_is_a_probability_and_prefers_its_mean(x, m, r):
    at, at_mean = (float(v) for v in nb_log_prob(x, [m, np.log(x)], r))
    assert at <= 1e-4  # at most one, to rounding
    # for given theta the likeliest mu is x itself
    assert at <= at_mean + 1e-5 * max(1, abs(at))


@pytest.mark.parametrize(
    "mu, theta", [(0.01, 0.1), (0.5, 10), (3, 0.7), (20, 5), (50, 1e5), (5, 1e8)]
)
def test_sums_to_one(mu, theta):
    x = np.arange(4000)
    p = np.exp(np.asarray(nb_log_prob(x, np.log(mu), np.log(theta)), "float64"))
    assert p.sum() == pytest.approx(1, abs=2e-5)
    assert p @ x == pytest.approx(mu, rel=5e-5)
    assert p @ (x - mu) ** 2 == pytest.approx(mu + mu**2 / theta, rel=2e-4)


@pytest.mark.parametrize("mu", [1e-4, 0.3, 4, 90, 3e3])
def test_poisson_limit(mu):
    x = np.unique(stats.poisson.ppf([0.001, 0.1, 0.5, 0.9, 0.999], mu))
    truth = stats.poisson.logpmf(x, mu)
    for log_theta in (25, 28, 30):
        np.testing.assert_allclose(
            nb_log_prob(x, np.log(mu), log_theta), truth, rtol=1e-5, atol=1e-5
        )


def test_geometric_distribution():
    "theta = 1 is the geometric distribution, p = 1/(1 + mu)."
    x = np.arange(50)
    mu = 2.5
    np.testing.assert_allclose(
        nb_log_prob(x, np.log(mu), 0.0), x * np.log(mu / (1 + mu)) - np.log(1 + mu), rtol=1e-5
    )


def test_non_integer_counts():
    x = np.float32([1e-3, 0.01, 0.25, 0.5, 0.9999, 1.5, 7.3, 250.75])
    for m, r in ((-2, -3), (0, 0), (3, 1), (1, 15)):
        truth = [exact(v, m, r) for v in x]
        np.testing.assert_allclose(nb_log_prob(x, m, r), truth, rtol=1e-5, atol=2e-5)
        found = gradients(lambda m, r: nb_log_prob(x, m, r), np.full(8, m), np.full(8, r))
        np.testing.assert_allclose(
            np.transpose(found), [exact_gradient(v, m, r) for v in x], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "x, m, r, shape",
    [
        ((), (), (), ()),
        ((4, 5), (4, 5), (4, 5), (4, 5)),
        ((4, 5), (4, 1), (5,), (4, 5)),
        ((5,), (4, 5), (), (4, 5)),
        ((4, 5), (3, 4, 5), (5,), (3, 4, 5)),
        ((0, 5), (5,), (), (0, 5)),
    ],
)
def test_broadcasting(x, m, r, shape):
    rng = np.random.default_rng(1)
    x = rng.poisson(1.0, x)
    m = rng.normal(size=m).astype("float32")
    r = rng.normal(size=r).astype("float32")
    value = np.asarray(nb_log_prob(x, m, r))
    assert value.shape == shape and value.dtype == np.float32
    theta = np.exp(np.float64(r))
    mu = np.exp(np.float64(m))
    np.testing.assert_allclose(
        value, stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-5, atol=1e-5
    )
    by_m, by_r = gradients(lambda m, r: nb_log_prob(x, m, r), m, r)
    assert by_m.shape == np.shape(m) and by_r.shape == np.shape(r)
    np.testing.assert_allclose(
        by_m.sum(), (theta * (x - mu) / (mu + theta)).sum(), rtol=1e-4, atol=1e-5
    )


def test_not_a_number_is_not_hidden():
    "A diverged network must show: NaN in, NaN out, at zero counts and others."
    assert np.isnan(np.asarray(nb_log_prob([0, 3], np.nan, 0.0))).all()
    assert np.isnan(np.asarray(nb_log_prob([0, 3], 0.0, np.nan))).all()


# ---- the sum over genes


def counts_like(kind, rng, cells=24, genes=300):
    if kind == "dense":
        return rng.poisson(6.0, (cells, genes)) + 1.0
    if kind == "all zero":
        return np.zeros((cells, genes))
    x = rng.poisson(rng.gamma(0.3, 0.3, (cells, genes)) * rng.lognormal(0, 1, (cells, 1))).astype(
        float
    )
    if kind == "zero rows":
        x[[0, 7, cells - 1]] = 0
    if kind == "fractions":
        x = x * rng.uniform(0.3, 1, x.shape)
    return x


KINDS = ["random", "zero rows", "all zero", "dense", "fractions"]


def check_sum(x, m, r, sparse):
    "Value and gradients of the sum, against scipy's and the closed forms."
    value = np.asarray(nb_log_prob_sum(x, m, r, sparse=sparse))
    x, m, r = np.broadcast_arrays(*(np.asarray(v, "float32").astype("float64") for v in (x, m, r)))
    mu = np.exp(m)
    theta = np.exp(r)
    log_sum = np.logaddexp(m, r)
    terms = (
        special.gammaln(x + theta)
        - special.gammaln(theta)
        - special.gammaln(x + 1)
        + x * (m - log_sum)
        + theta * (r - log_sum)
    )
    assert value.shape == (len(x),)
    np.testing.assert_allclose(value, terms.sum(-1), rtol=1e-5)
    # the cells' gradients must not be mixed up
    weight = np.linspace(1, 2, len(x)).astype("float32")
    by_m, by_r = gradients(lambda m, r: nb_log_prob_sum(x, m, r, sparse=sparse) * weight, m, r)
    true_r = theta * (
        special.digamma(x + theta)
        - special.digamma(theta)
        + r
        - log_sum
        + 1
        - (x + theta) / (mu + theta)
    )
    np.testing.assert_allclose(
        by_m, weight[:, None] * theta * (x - mu) / (mu + theta), rtol=1e-4, atol=2e-5
    )
    np.testing.assert_allclose(by_r, weight[:, None] * true_r, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=only_tensorflow), None])
@pytest.mark.parametrize("kind", KINDS)
def test_sum_over_genes(kind, sparse):
    rng = np.random.default_rng(2)
    x = counts_like(kind, rng)
    check_sum(x, rng.normal(-1, 1.5, x.shape), rng.normal(0, 1.5, x.shape), sparse)


@only_tensorflow
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_equals_dense(kind):
    rng = np.random.default_rng(3)
    x = counts_like(kind, rng).astype("float32")
    m = rng.normal(-1, 3, x.shape)
    r = rng.normal(0, 5, x.shape)
    one, other = (np.asarray(nb_log_prob_sum(x, m, r, sparse=s)) for s in (True, False))
    np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-4)
    one, other = (
        gradients(lambda m, r: nb_log_prob_sum(x, m, r, sparse=s), m, r) for s in (True, False)
    )
    # The term at the zeros may lose a few ulp of mu by r (see test_gradient_at_zeros_in_the_sum);
    # nothing else differs.
    slack = np.where(x == 0, 4 * ULP * np.exp(m), 0)
    for a, b, more in zip(one, other, (0, slack)):
        assert (np.abs(a - b) <= 3e-6 * np.abs(b) + 1e-6 + more).all()


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=only_tensorflow)])
def test_gradient_at_zeros_in_the_sum(grid, sparse):
    x, m, r, _, truth = (v[grid[0] == 0] for v in grid)
    by_m, by_r = (
        g[0]
        for g in gradients(
            lambda m, r: nb_log_prob_sum(x[None], m, r, sparse=sparse), m[None], r[None]
        )
    )
    for found, true in ((by_m, truth[:, 0]), (by_r, truth[:, 1])):
        assert (np.abs(found - true) <= np.maximum(1e-3 * np.abs(true), 1e-5)).all()


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=only_tensorflow)])
@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_sum_over_genes_of_other_than_matrices(shape, sparse):
    "Right, or refused."
    x = np.ones(shape, "float32")
    try:
        value = np.asarray(nb_log_prob_sum(x, 0 * x, 0 * x, sparse=sparse))
    except ValueError:
        return
    assert value.shape == shape[:-1] and np.allclose(value, -6 * np.log(2))


@only_tensorflow
def test_sparse_equals_dense_on_real_counts():
    from vampsc import organs

    x = organs.load("pancreas").X[:64, ::4].toarray()
    assert 0 < (x > 0).mean() < 0.5  # a matrix of zeros, mostly
    size = x.sum(1, keepdims=True)
    m = np.log((x + 0.1) / size) + np.log(size) + np.random.default_rng(0).normal(0, 0.5, x.shape)
    r = np.random.default_rng(1).normal(0, 1, x.shape[1])  # one theta a gene
    check_sum(x, m, np.broadcast_to(r, x.shape), True)
    one, other = (np.asarray(nb_log_prob_sum(x, m, r, sparse=s)) for s in (True, False))
    np.testing.assert_allclose(one, other, rtol=2e-6)


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=only_tensorflow)])
def test_sum_broadcasts_parameters(sparse):
    "One theta a gene, one mean a cell; the gradient has the parameter's own shape."
    x = np.float32([[0, 2, 1], [3, 0, 0]])
    m = np.float32([[0.3], [-0.7]])
    r = np.float32([0.1, 1.2, -2])
    theta = np.exp(np.float64(r))
    mu = np.exp(np.float64(m))
    np.testing.assert_allclose(
        nb_log_prob_sum(x, m, r, sparse=sparse),
        stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1),
        rtol=1e-5,
    )
    by_m, by_r = gradients(lambda m, r: nb_log_prob_sum(x, m, r, sparse=sparse), m, r)
    np.testing.assert_allclose(
        by_m, (theta * (x - mu) / (mu + theta)).sum(1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_allclose(
        by_r,
        [sum(exact_gradient(x[i, j], m[i, 0], r[j])[1] for i in range(2)) for j in range(3)],
        rtol=1e-4,
    )


@only_tensorflow
def test_sum_in_a_compiled_function_of_unknown_batch():
    import tensorflow as tf

    compiled = tf.function(nb_log_prob_sum, input_signature=[tf.TensorSpec((None, 3))] * 3)
    for cells in (1, 4):
        x = np.random.default_rng(0).poisson(1.0, (cells, 3)).astype("float32")
        # mu = theta = 1: 2^-(x+1)
        assert np.allclose(compiled(x, 0 * x, 0 * x), -np.log(2) * (1 + x).sum(1), rtol=1e-5)


def test_sparse_needs_tensorflow():
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow has it")
    with pytest.raises(ValueError, match="TensorFlow"):
        nb_log_prob_sum([[1.0]], [[0.0]], [[0.0]], sparse=True)


# ---- the three functions underneath


def test_unit_deviance():
    t = np.concatenate([[-1], -np.logspace(-8, -1e-4, 300), [0], np.logspace(-8, 12, 300)]).astype(
        "float32"
    )
    with mpmath.workdps(50):
        truth = [
            float((1 + v) * mpmath.log(1 + v) - v) if v > -1 else 1.0
            for v in map(mpmath.mpf, t.tolist())
        ]
    np.testing.assert_allclose(unit_deviance(t), truth, rtol=3e-6)


def test_stirling_and_digamma_errors():
    y = np.logspace(-12, 9, 400).astype("float32")
    with mpmath.workdps(50):
        exact_y = [mpmath.mpf(v) for v in y.tolist()]
        s = [
            float(
                mpmath.loggamma(v) - ((v - 0.5) * mpmath.log(v) - v + mpmath.log(2 * mpmath.pi) / 2)
            )
            for v in exact_y
        ]
        b = [float(mpmath.digamma(v) - mpmath.log(v)) for v in exact_y]
    np.testing.assert_allclose(stirling_error(y), s, rtol=1e-6, atol=4e-6)
    np.testing.assert_allclose(digamma_error(y), b, rtol=2e-6, atol=1e-7)


def test_stirling_error_is_continuous_where_it_changes_form():
    below = np.nextafter(np.float32(8), np.float32(0))
    above = np.float32(8)
    for function in (stirling_error, digamma_error):
        assert float(function(below)) == pytest.approx(float(function(above)), abs=2e-6)
