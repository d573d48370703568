"""The VAMP prior against mixtures built by hand in float64, and inside a network, tied to its
encoder.
"""

import keras
import numpy as np
import pytest
from autodiff import gradients, jacobian, variable_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops
from scipy import sparse, special, stats

from vampsc import priors
from vampsc.assembly import Architecture, build_network
from vampsc.networks import log_normalise, new_seeds
from vampsc.priors import (
    ConditionalGaussian,
    HierarchicalPosterior,
    HierarchicalVampPrior,
    StandardNormal,
    VampPrior,
    gaussian_log_densities,
    mixture_by_unit,
    start_pseudo_inputs,
)


def draws(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("float32")


def by_hand(z, means, log_vars):
    "log 1/K sum_k prod_d N(z_d; m_kd, exp v_kd) in float64, one Gaussian at a time."
    z, means, log_vars = (np.asarray(v, "float64") for v in (z, means, log_vars))
    logs = [
        -0.5 * (np.log(2 * np.pi) + v + (z - m) ** 2 * np.exp(-v)).sum(-1)
        for m, v in zip(means, log_vars)
    ]
    return special.logsumexp(logs, axis=0) - np.log(len(means))


def prior(k=3, genes=4):
    return VampPrior(k, genes)


def mixture(means, log_vars):
    "Components of equal weight."
    return (
        ops.convert_to_tensor(means),
        ops.convert_to_tensor(log_vars),
        prior(len(means)).log_weights(),
    )


def log_prob(z, means, log_vars):
    return np.asarray(prior().log_prob(z, mixture(means, log_vars)))


# ---- standard normal


def test_standard_normal():
    z = draws(20, 7, scale=3)
    np.testing.assert_allclose(
        StandardNormal().log_prob(z), stats.norm.logpdf(z.astype("float64")).sum(1), rtol=1e-5
    )
    assert StandardNormal().components(None) is None
    sample = StandardNormal().sample(100_000, 3, None, np.random.default_rng(0))
    assert sample.shape == (100_000, 3) and sample.dtype == np.float32
    np.testing.assert_allclose(sample.mean(0), 0, atol=5 / np.sqrt(1e5))
    np.testing.assert_allclose(np.cov(sample.T), np.eye(3), atol=5 * np.sqrt(2 / 1e5))


# ---- the density


@pytest.mark.parametrize("k, d", [(1, 1), (2, 1), (3, 2), (17, 5), (50, 128)])
def test_density_by_hand(k, d):
    z = draws(30, d, scale=2)
    means = draws(k, d, seed=1, scale=2)
    log_vars = draws(k, d, seed=2)
    np.testing.assert_allclose(
        log_prob(z, means, log_vars), by_hand(z, means, log_vars), rtol=2e-5, atol=1e-5
    )
    pairs = [
        [
            stats.norm.logpdf(z_i.astype("float64"), m, np.exp(v.astype("float64") / 2)).sum()
            for m, v in zip(means, log_vars)
        ]
        for z_i in z
    ]
    np.testing.assert_allclose(
        gaussian_log_densities(z, means, log_vars), pairs, rtol=2e-5, atol=1e-5
    )


@pytest.mark.parametrize("far", [1, 10])
def test_tiny_variances_far_from_zero(far):
    """Variances of 1e-3, means up to 10, 128 units: z^2 - 2 z m + m^2 would cancel to nothing in
    float32.
    """
    rng = np.random.default_rng(3)
    means = rng.uniform(-far, far, (40, 128)).astype("float32")
    log_vars = np.full((40, 128), np.log(1e-3), "float32") + draws(40, 128, scale=0.01)
    at = rng.integers(40, size=60)
    # draws from it
    z = (means[at] + np.exp(log_vars[at] / 2) * rng.normal(size=(60, 128))).astype("float32")
    truth = by_hand(z, means, log_vars)
    np.testing.assert_allclose(log_prob(z, means, log_vars), truth, rtol=1e-5)
    # densities that are high, where it matters
    assert (truth > 100).all()
    z = draws(60, 128, scale=3)  # and far from every component
    np.testing.assert_allclose(log_prob(z, means, log_vars), by_hand(z, means, log_vars), rtol=1e-5)


def test_gradient_with_tiny_variances():
    """By z: (m_k - z)/v_k weighed by the responsibilities; by the means: the same, of opposite
    sign, component by component.
    """
    rng = np.random.default_rng(3)
    means = rng.uniform(-10, 10, (5, 128)).astype("float32")
    log_vars = np.full((5, 128), np.log(1e-3), "float32")
    means[1] = means[0] + 0.01 * draws(128)  # two that overlap
    z = (means[:1] + 0.03 * draws(4, 128, seed=1)).astype("float32")
    found = gradients(
        lambda z, *gaussians: prior().log_prob(z, (*gaussians, prior(5).log_weights())),
        z,
        means,
        log_vars,
    )
    logs = np.array([by_hand(z, means[k : k + 1], log_vars[k : k + 1]) for k in range(5)])
    share = special.softmax(logs, axis=0)[:, :, None]  # (K, cells, 1)
    pull = (means[:, None].astype("float64") - z) * np.exp(-log_vars.astype("float64"))[:, None]
    distance = (means[:, None].astype("float64") - z) ** 2 * np.exp(-log_vars.astype("float64"))[
        :, None
    ]
    for g, truth in zip(
        found,
        ((share * pull).sum(0), -(share * pull).sum(1), (share * 0.5 * (distance - 1)).sum(1)),
    ):
        np.testing.assert_allclose(g, truth, rtol=2e-3, atol=2e-3 * np.abs(truth).max())


def test_integrates_to_one_in_one_and_two_dimensions():
    axis = np.linspace(-25, 25, 5001, dtype="float32")
    density = np.exp(
        log_prob(axis[:, None], draws(6, 1, scale=4), draws(6, 1, seed=1)).astype("float64")
    )
    assert density.sum() * 0.01 == pytest.approx(1, abs=1e-4)
    axis = np.linspace(-15, 15, 301, dtype="float32")
    z = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    density = np.exp(
        log_prob(z, draws(4, 2, scale=3), draws(4, 2, seed=1, scale=0.5)).astype("float64")
    )
    assert density.sum() * 0.01 == pytest.approx(1, abs=1e-4)


def test_order_of_components_does_not_matter():
    z = draws(10, 4)
    means = draws(7, 4, seed=1)
    log_vars = draws(7, 4, seed=2)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(
        log_prob(z, means[order], log_vars[order]), log_prob(z, means, log_vars), rtol=1e-6
    )


@pytest.mark.parametrize("copies", [2, 10, 500])
def test_copies_of_a_component_are_one_component(copies):
    "So the log K is there."
    z = draws(10, 4)
    mean = draws(1, 4, seed=1)
    log_var = draws(1, 4, seed=2)
    many = log_prob(z, np.repeat(mean, copies, 0), np.repeat(log_var, copies, 0))
    np.testing.assert_allclose(many, log_prob(z, mean, log_var), rtol=1e-5, atol=1e-5)


def test_sum_over_units_is_inside():
    "Not a product of one-dimensional mixtures, which would put mass where no component is."
    means = np.float32([[-3, -3], [3, 3]])
    log_vars = np.zeros((2, 2), "float32")
    z = np.float32([[3, 3], [3, -3]])
    product = sum(
        by_hand(z[:, d : d + 1], means[:, d : d + 1], log_vars[:, d : d + 1]) for d in range(2)
    )
    found = log_prob(z, means, log_vars)
    np.testing.assert_allclose(found, by_hand(z, means, log_vars), rtol=1e-5)
    assert found[0] - found[1] > 15 and abs(product[0] - product[1]) < 1e-6
    assert (np.abs(found - product) > 0.5).all()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_density_lies_between_its_components(k, d, seed):
    z = draws(3, d, seed=seed, scale=3)
    means = draws(k, d, seed=seed + 1, scale=3)
    log_vars = draws(k, d, seed=seed + 2)
    each = np.asarray(gaussian_log_densities(z, means, log_vars))
    mixed = log_prob(z, means, log_vars)
    assert (mixed <= each.max(1) + 1e-4).all() and (mixed >= each.max(1) - np.log(k) - 1e-4).all()


# ---- weights of their own


def weighted(logits, genes=4):
    made = VampPrior(len(logits), genes, learn_weights=True)
    made.logits.assign(np.float32(logits))
    return made


@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 30), st.integers(0, 1000))
def test_weighted_density_by_hand(k, d, spread, seed):
    "Also where the weights differ by e^60."
    z = draws(3, d, seed=seed, scale=3)
    means = draws(k, d, seed=seed + 1, scale=3)
    log_vars = draws(k, d, seed=seed + 2)
    logits = np.linspace(-spread, spread, k).astype("float32")
    log_weights = logits - special.logsumexp(logits.astype("float64"))
    logs = np.array([by_hand(z, means[i : i + 1], log_vars[i : i + 1]) for i in range(k)])
    truth = special.logsumexp(logs + log_weights[:, None], axis=0)
    found = weighted(logits).log_prob(z, (means, log_vars, weighted(logits).log_weights()))
    np.testing.assert_allclose(found, truth, rtol=2e-5, atol=2e-5)


def test_weights_start_equal_and_get_a_gradient():
    made = weighted(np.zeros(3))
    z = draws(10, 2)
    means = draws(3, 2, seed=1)
    log_vars = draws(3, 2, seed=2)
    np.testing.assert_allclose(
        made.log_prob(z, (means, log_vars, made.log_weights())),
        by_hand(z, means, log_vars),
        rtol=1e-5,
    )
    (by_logits,) = variable_gradients(
        lambda: made.log_prob(z, (means, log_vars, made.log_weights())), [made.logits]
    )
    r = special.softmax(
        [by_hand(z, means[k : k + 1], log_vars[k : k + 1]) for k in range(3)], axis=0
    )
    np.testing.assert_allclose(by_logits, r.sum(1) - 10 / 3, rtol=1e-4, atol=1e-5)
    assert prior().logits is None and len(prior().weights) == 1  # off unless asked for


def test_samples_follow_the_weights():
    made = weighted(np.log([0.7, 0.2, 0.1]))
    parts = (np.float32([[-50], [0], [50]]), np.zeros((3, 1), "float32"), made.log_weights())
    z = made.sample(20_000, 1, parts, np.random.default_rng(0))
    np.testing.assert_allclose(
        np.bincount(np.digitize(z[:, 0], [-25, 25])) / 20_000, [0.7, 0.2, 0.1], atol=0.015
    )


# ---- unit by unit


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_shares_of_units_and_component(k, d, seed):
    """By enumeration: the responsibilities, each unit's expected log-density, and the divergence
    from the weights.
    """
    z = draws(4, d, seed=seed, scale=2)
    means = draws(k, d, seed=seed + 1, scale=2)
    log_vars = draws(k, d, seed=seed + 2)
    log_weights = special.log_softmax(draws(k, seed=seed + 3).astype("float64"))
    by_unit, component = mixture_by_unit(z, means, log_vars, log_weights)
    # (cells, K, D)
    each = stats.norm.logpdf(
        z[:, None].astype("float64"), means, np.exp(log_vars.astype("float64") / 2)
    )
    joint = each.sum(2) + log_weights
    r = special.softmax(joint, axis=1)
    np.testing.assert_allclose(by_unit, (r[:, :, None] * each).sum(1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        component, special.rel_entr(r, np.exp(log_weights)).sum(1), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(
        by_unit.sum(1) - component, special.logsumexp(joint, axis=1), rtol=1e-9
    )
    assert (component > -1e-9).all() and (component <= -log_weights.min() + 1e-9).all()


def test_one_component_is_free_and_a_certain_one_costs_log_k():
    means = np.float32(np.eye(5) * 100)
    parts = means, np.zeros((5, 5), "float32"), np.full(5, -np.log(5))
    np.testing.assert_allclose(mixture_by_unit(means, *parts)[1], np.log(5))
    assert (
        mixture_by_unit(draws(3, 5), *(p[:1] * (i < 2) for i, p in enumerate(parts)))[1] == 0
    ).all()
    by_unit, component = StandardNormal().log_prob_by_unit(draws(3, 5))
    np.testing.assert_allclose(by_unit, stats.norm.logpdf(draws(3, 5).astype("float64")), rtol=1e-5)
    assert component == 0


# ---- two levels


def conditional_by_hand(made, v):
    h = np.tanh(
        np.asarray(v, "float64") @ np.asarray(made.body.kernel, "float64")
        + np.asarray(made.body.bias)
    )
    mean, raw = (
        h @ np.asarray(head.kernel, "float64") + np.asarray(head.bias)
        for head in (made.mean, made.log_var)
    )
    low = np.log(1e-3)
    high = np.log(100)
    return mean, low + np.logaddexp(0, raw - low) - np.logaddexp(0, raw - high)


def two_levels(n_latent=5, k=3, seed=0, **settings):
    "A posterior and a prior of two levels, with weights that matter, and components for z2."
    posterior = HierarchicalPosterior(n_latent, new_seeds(seed), hidden=7, **settings)
    posterior.build((None, 6))
    prior_ = HierarchicalVampPrior(k, 4, n_latent, new_seeds(seed + 1), hidden=7, **settings)
    rng = np.random.default_rng(seed)
    for w in (*posterior.trainable_weights, *prior_.first.trainable_weights):
        w.assign(rng.normal(0, 0.7, w.shape))
    n2 = n_latent - n_latent // 2
    return (
        posterior,
        prior_,
        (draws(k, n2, seed=1), draws(k, n2, seed=2, scale=0.3), prior_.log_weights()),
    )


# two networks are made for each
@settings(max_examples=min(25, settings.default.max_examples))
@given(st.integers(2, 7), st.integers(1, 4), st.integers(1, 5))
def test_two_level_densities_by_hand(n_latent, k, cells):
    posterior, prior_, parts = two_levels(n_latent, k)
    n1 = n_latent // 2
    h = draws(cells, 6)
    noise = draws(cells, n_latent, seed=5)
    parameters = posterior(h)
    z, log_q = (np.asarray(v, "float64") for v in posterior.sample(parameters, noise))
    z1 = z[:, :n1]
    z2 = z[:, n1:]
    mean2, log_var2 = (np.asarray(p, "float64") for p in parameters[:2])
    np.testing.assert_allclose(
        z2, mean2 + np.exp(log_var2 / 2) * noise[:, n1:], rtol=1e-4, atol=1e-5
    )
    mean1, log_var1 = conditional_by_hand(posterior.first, np.hstack([h, z2]))
    np.testing.assert_allclose(
        z1, mean1 + np.exp(log_var1 / 2) * noise[:, :n1], rtol=1e-4, atol=1e-4
    )

    def density(v, m, s):
        return stats.norm.logpdf(v, m, np.exp(s / 2)).sum(1)

    np.testing.assert_allclose(
        log_q, density(z2, mean2, log_var2) + density(z1, mean1, log_var1), rtol=1e-3, atol=1e-3
    )
    truth = by_hand(z2, *parts[:2]) + density(z1, *conditional_by_hand(prior_.first, z2))
    np.testing.assert_allclose(
        prior_.log_prob(z.astype("float32"), parts), truth, rtol=1e-3, atol=1e-3
    )
    by_unit, component = prior_.log_prob_by_unit(z.astype("float32"), parts)
    assert by_unit.shape == z.shape
    np.testing.assert_allclose(by_unit.sum(1) - component, truth, rtol=1e-3, atol=1e-3)


def test_two_level_prior_integrates_to_one_and_its_samples_have_its_moments():
    _, prior_, parts = two_levels(2)
    axis = np.linspace(-15, 15, 401)
    plane = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    p = (
        np.exp(np.asarray(prior_.log_prob(plane.astype("float32"), parts), "float64"))
        * (axis[1] - axis[0]) ** 2
    )
    assert p.sum() == pytest.approx(1, abs=2e-3)
    z = prior_.sample(100_000, 2, parts, np.random.default_rng(0))
    assert z.shape == (100_000, 2) and z.dtype == np.float32
    mean = p @ plane
    covariance = (p[:, None] * (plane - mean)).T @ (plane - mean)
    np.testing.assert_allclose(z.mean(0), mean, atol=5 * np.sqrt(covariance.max() / 1e5) + 5e-3)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.05 * covariance.max())
    # the levels do depend on each other
    assert abs(covariance[0, 1]) > 0.02


def test_two_level_posterior_is_the_density_of_its_sample():
    """Change of variables from the noise, by autodiff: q(z1, z2) is exact, z2 inside z1's mean
    included.
    """
    posterior, *_ = two_levels(5)
    h = draws(6, 6)
    noise = draws(6, 5, seed=1)
    found, (log_q,) = jacobian(lambda noise: posterior.sample(posterior(h), noise), noise)
    truth = stats.norm.logpdf(noise.astype("float64")).sum(1) - np.linalg.slogdet(found)[1]
    np.testing.assert_allclose(log_q, truth, rtol=1e-4, atol=5e-4)
    # z1 moves with the noise of z2
    assert (found[:, :2, 2:] != 0).all()


def test_two_levels_have_no_training_mode_and_need_two_units():
    made = ConditionalGaussian(3, new_seeds(0), hidden=5)
    made.build((None, 4))
    v = draws(6, 4)
    for a, b, true in zip(made(v), made(v), conditional_by_hand(made, v)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, true, rtol=1e-4, atol=1e-5)
    # the penalty is the hidden kernel's
    assert len(made.weights) == 6 and len(made.losses) == 1
    assert not HierarchicalPosterior(4, new_seeds(0)).exact_mean
    with pytest.raises(ValueError, match="at least 2"):
        HierarchicalPosterior(1, new_seeds(0))


# ---- sampling


def test_sample_moments():
    means = np.float32([[-4, 0], [2, 1], [2, -5]])
    log_vars = np.float32([[0, -2], [1, 0], [-3, 0.5]])
    z = prior().sample(200_000, 2, mixture(means, log_vars), np.random.default_rng(0))
    assert z.shape == (200_000, 2) and z.dtype == np.float32
    covariance = np.cov(means.T.astype("float64"), bias=True) + np.diag(
        np.exp(log_vars.astype("float64")).mean(0)
    )
    np.testing.assert_allclose(z.mean(0), means.mean(0), atol=5 * np.sqrt(covariance.max() / 2e5))
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.15)
    # Mean log-density of its own draws = minus the entropy; another mixture's draws would score
    # lower.
    nearest = np.argmax(np.asarray(gaussian_log_densities(z, means, log_vars)), 1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / 2e5, 1 / 3, atol=0.02)
    assert np.array_equal(
        z, prior().sample(200_000, 2, mixture(means, log_vars), np.random.default_rng(0))
    )


# ---- pseudo-inputs


def test_initialise():
    made = prior(3, 4)
    cells = np.abs(draws(3, 4))
    made.initialise(cells, np.random.default_rng(0), noise=0)
    np.testing.assert_array_equal(made.pseudo_inputs, cells)
    made.initialise(cells, np.random.default_rng(0), noise=0.01)
    off = np.asarray(made.pseudo_inputs) - cells
    assert 0 < np.abs(off).max() < 0.06
    made.initialise(np.zeros((3, 4)), np.random.default_rng(0))
    assert (np.asarray(made.pseudo_inputs) >= 0).all()


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (12,)])
def test_initialise_with_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"\(3, 4\).*cells"):
        prior(3, 4).initialise(np.zeros(shape), np.random.default_rng(0))


# ---- inside a network


def counts(cells, genes=11, seed=0):
    x = np.random.default_rng(seed).poisson(1.5, (cells, genes)).astype("float32")
    x[:, 0] += 1
    return x


def network(k=4, posterior="gaussian", cells=None, **settings):
    "A small network whose batch norm has statistics that matter, with pseudo-inputs at cells."
    settings = (
        dict(n_latent=3, hidden=(9, 6), n_pseudo_inputs=k, n_flow_steps=2, flow_hidden=(8, 8))
        | settings
    )
    made = build_network(Architecture(posterior, "vamp", **settings), 11)
    rng = np.random.default_rng(7)
    for layer in (*made.encoder.layers, *made.decoder.body.layers):
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(0, 0.3, layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.2, 2, layer.moving_variance.shape))
            (
                layer.gamma.assign(rng.uniform(0.5, 2, layer.gamma.shape)),
                layer.beta.assign(rng.normal(size=layer.beta.shape)),
            )
    made.prior.initialise(
        log_normalise(counts(k, seed=5) if cells is None else cells), rng, noise=0
    )
    return made


def encoder_by_hand(made, u):
    """The encoder and its Gaussian heads in inference mode, in float64, from the weights alone; u
    (cells, genes).
    """
    h = np.asarray(u, "float64")
    for layer in made.encoder.layers:
        if isinstance(layer, layers.Dense):
            h = np.tanh(h @ np.asarray(layer.kernel, "float64") + np.asarray(layer.bias))
        elif isinstance(layer, layers.BatchNormalization):
            g, b, m, v = (
                np.asarray(w, "float64")
                for w in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
            )
            h = g * (h - m) / np.sqrt(v + layer.epsilon) + b
    mean, raw = (
        h @ np.asarray(head.kernel, "float64") + np.asarray(head.bias)
        for head in (made.posterior.mean, made.posterior.log_var)
    )
    low = np.log(1e-3)
    high = np.log(100)
    return mean, low + np.logaddexp(0, raw - low) - np.logaddexp(0, raw - high)


@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
def test_components_are_the_encoders_at_the_pseudo_inputs(posterior):
    made = network(posterior=posterior)
    truth = encoder_by_hand(made, made.prior.pseudo_inputs)
    assert len(made.components()) == 3
    for found, true in zip(made.components(), (*truth, np.full(4, -np.log(4))), strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5])
def test_pseudo_input_at_the_cell_costs_nothing(k):
    "K components, all of them the posterior of the one cell: KL 0 at every z, not only on average."
    x = counts(1)
    made = network(k, cells=np.repeat(x, k, 0))
    noise = draws(40, 3, scale=2)
    kl = made.terms(np.repeat(x, 40, 0), noise, made.components())[1]
    np.testing.assert_allclose(kl, 0, atol=2e-5)
    other = made.terms(counts(40, seed=9), noise, made.components())[1]
    assert np.abs(np.asarray(other)).max() > 0.05  # other cells do cost


@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
def test_kl_is_log_q_less_log_p(posterior):
    made = network(posterior=posterior)
    x = counts(6, seed=9)
    noise = draws(6, 3)
    kl = made.terms(x, noise, made.components())[1]
    z, log_q = made.posterior.sample(made.encode(log_normalise(x)), noise)
    truth = np.asarray(log_q) - by_hand(z, *encoder_by_hand(made, made.prior.pseudo_inputs))
    np.testing.assert_allclose(kl, truth, rtol=1e-3, atol=1e-4)


def norms(made):
    return [layer for layer in made.encoder.layers if isinstance(layer, layers.BatchNormalization)]


def test_pseudo_inputs_pass_in_inference_mode_also_in_training(monkeypatch):
    "Dropout off, batch norm by its moving statistics, also in the very call that trains."
    made = network()
    seen = []
    monkeypatch.setattr(
        made.prior, "log_prob", lambda z, components: seen.append(components) or z[:, 0]
    )
    # before the cells move the statistics
    truth = encoder_by_hand(made, made.prior.pseudo_inputs)
    made(counts(16), training=True)
    for found, true in zip(seen[0][:2], truth, strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1


def test_pseudo_inputs_leave_the_moving_statistics_alone():
    "Components do not touch them; a training call moves them once, by its cells."
    made = network()
    x = counts(64)
    before = [np.asarray(w).copy() for norm in norms(made) for w in norm.non_trainable_weights]
    made.components()
    assert all(
        map(np.array_equal, before, (w for norm in norms(made) for w in norm.non_trainable_weights))
    )
    first = norms(made)[0]
    kernel, bias = (np.asarray(w, "float64") for w in made.encoder.layers[0].weights)
    h = np.tanh(np.asarray(log_normalise(x), "float64") @ kernel + bias)
    mean, variance = (np.asarray(w, "float64") for w in (first.moving_mean, first.moving_variance))
    made(x, training=True)
    np.testing.assert_allclose(
        first.moving_mean,
        first.momentum * mean + (1 - first.momentum) * h.mean(0),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        first.moving_variance,
        first.momentum * variance + (1 - first.momentum) * h.var(0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_gradient_reaches_encoder_and_pseudo_inputs():
    """Of the prior's density alone, against central differences of a float64 copy, for single
    entries of each kernel.
    """
    made = network()
    z = draws(20, 3)
    watched = [
        made.prior.pseudo_inputs,
        made.encoder.layers[0].kernel,
        made.encoder.layers[3].kernel,
        made.posterior.mean.kernel,
        made.posterior.log_var.kernel,
    ]
    found = variable_gradients(lambda: made.prior.log_prob(z, made.components()), watched)
    assert all(np.isfinite(g).all() and (g != 0).mean() > 0.9 for g in found)
    for v, g in zip(watched, found):
        start = np.asarray(v).copy()

        def at(index, step):
            moved = start.copy()
            moved[index] += step
            v.assign(moved)
            return by_hand(z, *encoder_by_hand(made, made.prior.pseudo_inputs)).sum(), float(
                moved[index]
            )

        for index in zip(
            *np.unravel_index(np.random.default_rng(0).integers(start.size, size=4), start.shape)
        ):
            (up, a), (down, b) = at(index, 2e-3), at(index, -2e-3)
            assert g[index] == pytest.approx(
                (up - down) / (a - b), rel=1e-2, abs=1e-3 * float(np.abs(g).max())
            )
        v.assign(start)


@pytest.mark.long
def test_training_moves_pseudo_inputs_and_keeps_them_at_least_zero():
    made = network()
    x = counts(32)
    made.compile(optimizer=keras.optimizers.Adam(0.1), jit_compile=keras.backend.backend() == "jax")
    before = np.asarray(made.prior.pseudo_inputs).copy()
    for _ in range(8):
        made.train_on_batch(x)
    after = np.asarray(made.prior.pseudo_inputs)
    assert (after >= 0).all() and np.isfinite(after).all()
    # some were pushed against 0, most moved
    assert (after == 0).any() and (after != before).mean() > 0.5
    assert any(v is made.prior.pseudo_inputs for v in made.trainable_variables)
    assert after.max() > 1  # nothing holds them below one


def test_components_of_a_model_without_prior_or_with_the_standard_normal():
    for posterior, prior_name in (("point", "none"), ("gaussian", "normal")):
        made = build_network(Architecture(posterior, prior_name, n_latent=3, hidden=(5,)), 11)
        assert made.components() is None
        assert not any("pseudo" in v.path for v in made.variables)


def test_what_every_mixture_does():
    "Against scipy's densities, and moments of its draws against those of the mixture."
    rng = np.random.default_rng(3)
    means = rng.normal(size=(4, 2)).astype("float32")
    log_vars = rng.normal(-1, 0.5, size=(4, 2)).astype("float32")
    shares = np.float32([0.4, 0.3, 0.2, 0.1])
    components = (means, log_vars, np.log(shares))
    z = rng.normal(size=(9, 2)).astype("float32")
    densities = [
        share * stats.norm.pdf(z, m, np.exp(v / 2)).prod(1)
        for m, v, share in zip(means, log_vars, shares)
    ]
    expected = np.log(np.sum(densities, axis=0))
    mixture = priors.Mixture()
    np.testing.assert_allclose(mixture.log_prob(z, components), expected, atol=1e-5)
    by_unit, component = mixture.log_prob_by_unit(z, components)
    np.testing.assert_allclose(by_unit.sum(1) - component, expected, atol=1e-5)
    drawn = mixture.sample(200_000, 2, components, rng)
    mean = shares @ means
    var = shares @ (np.exp(log_vars) + (means - mean) ** 2)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(drawn.var(0), var, atol=0.02)


def test_the_shares_of_a_plain_mixture_are_learnt_and_its_variances_bounded():
    prior = priors.MixturePrior(3, 2, new_seeds(0))
    assert len(prior.trainable_variables) == 3
    prior.log_vars.assign(np.float32([[-100, 100]] * 3))
    means, log_vars, log_weights = prior.components()
    np.testing.assert_allclose(np.asarray(log_vars)[0], priors.LOG_VAR_BOUNDS, atol=0.02)
    np.testing.assert_allclose(np.exp(log_weights), 1 / 3, rtol=1e-5)
    assert np.std(means) > 0.1


# ---- the registries


class Wider(StandardNormal):
    "A normal of standard deviation 2, made from the standard one."

    def log_prob_by_unit(self, z, components=None):
        return super().log_prob_by_unit(z / 2)[0] - np.log(2), 0.0


def small_network(posterior, prior):
    a = Architecture(posterior, prior, 4, (8,), n_pseudo_inputs=3, flow_hidden=(8,))
    return build_network(a, 6, seed=0)


def test_a_prior_made_from_another_does_not_inherit_its_closed_form(monkeypatch):
    "KL of N(0, 1) from N(0, 4) is log 2 + 1/8 - 1/2 in each unit."
    net = small_network("gaussian", "normal")
    standard = [np.zeros((2000, 4), "float32")] * 2
    noise = draws(2000, 4)
    z, log_q = net.posterior.sample(standard, noise)
    assert net.closed_kl and np.allclose(net.kl(standard, z, log_q, None), 0, atol=1e-6)
    monkeypatch.setitem(priors.PRIORS, "normal", Wider)
    net = small_network("gaussian", "normal")
    assert net.closed_kl is None
    expected = 4 * (np.log(2) + 1 / 8 - 1 / 2)
    assert np.mean(net.kl(standard, z, log_q, None)) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("pair", priors.CLOSED_KL, ids=lambda pair: pair[1].__name__)
def test_closed_forms_are_what_draws_estimate(pair):
    names = [
        next(name for name, known in registry.items() if known is part)
        for registry, part in zip((priors.POSTERIORS, priors.PRIORS), pair)
    ]
    net = small_network(*names)
    parameters = [np.repeat(draws(1, 4, seed=s, scale=0.7), 20_000, 0) for s in (1, 2)]
    z, log_q = net.posterior.sample(parameters, draws(20_000, 4, seed=3))
    closed = np.asarray(net.kl(parameters, z, log_q, None))
    drawn = np.asarray(log_q) - np.asarray(net.prior.log_prob(z))
    assert abs(closed[0] - drawn.mean()) < 4 * drawn.std() / np.sqrt(len(drawn))


@pytest.mark.parametrize("name", priors.PRIORS)
def test_what_every_prior_does(name):
    "A new entry of the registry is tested here as it is."
    net = small_network(priors.PRIORS[name].posteriors[0], name)
    components = net.components()
    z = net.prior.sample(40_000, 4, components, np.random.default_rng(0))
    assert z.shape == (40_000, 4) and z.dtype == np.float32
    log_p = np.asarray(net.prior.log_prob(z, components))
    by_unit, choice = net.prior.log_prob_by_unit(z, components)
    assert np.allclose(np.sum(by_unit, 1) - choice, log_p, rtol=1e-4, atol=1e-3)
    # E_p[r(z) / p(z)] is the integral of r, r a normal of half their variance
    mean, covariance = z.mean(0), np.cov(z.T) / 2
    weights = np.exp(stats.multivariate_normal.logpdf(z, mean, covariance) - log_p)
    assert weights.mean() == pytest.approx(1, abs=5 * weights.std() / np.sqrt(len(weights)) + 1e-3)


def test_pseudo_inputs_start_at_training_cells_or_at_their_shuffled_values():
    x = sparse.csr_matrix(np.random.default_rng(3).poisson(2.0, (40, 7)).astype("float32"))
    train = np.arange(5, 30)
    prior = VampPrior(6, 7)
    cells = start_pseudo_inputs(prior, x, train, "cells", np.random.default_rng(1))
    assert len(set(cells)) == 6 and set(cells) <= set(train)
    expected = np.asarray(log_normalise(x[cells].toarray()))
    at_cells = np.asarray(prior.pseudo_inputs)
    np.testing.assert_allclose(at_cells, expected, atol=0.06)
    again = start_pseudo_inputs(prior, x, train, "random", np.random.default_rng(1))
    np.testing.assert_array_equal(again, cells)
    shuffled = np.asarray(prior.pseudo_inputs)
    np.testing.assert_allclose(np.sort(shuffled, 0), np.sort(expected, 0), atol=0.06)
    assert np.abs(shuffled - expected).max() > 1
