"""ELBO and importance-weighted bound against log p(x) where it is known: in closed form, and by
brute-force integration.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from scipy import special, stats

from vampsc import assembly, inference, models
from vampsc.assembly import Architecture, build_network
from vampsc.inference import importance_bound
from vampsc.networks import log_normalise, new_seeds
from vampsc.posteriors import GaussianPosterior
from vampsc.priors import StandardNormal

rng = np.random.default_rng(0)


def log_weights(net, x, parameters, components, n, draw):
    "n draws for each cell, in one pass: (n, cells)."

    def many(v):
        return np.tile(np.asarray(v), (n, 1))

    noise = draw.standard_normal((n * len(x), net.n_latent)).astype("float32")
    return np.asarray(
        net.log_importance_weight(many(x), [many(p) for p in parameters], noise, components)
    ).reshape(n, -1)


# ---- the mean of the weights


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.floats(-1e5, 1e3),
    st.floats(0, 300),
    st.integers(0, 99),
)
def test_bound_is_the_log_of_the_mean_weight(draws, cells, offset, spread, seed):
    log_w = (offset + spread * np.random.default_rng(seed).normal(size=(draws, cells))).astype(
        "float32"
    )
    bound, error = importance_bound(log_w)
    np.testing.assert_allclose(
        bound,
        special.logsumexp(log_w.astype("float64"), axis=0) - np.log(draws),
        rtol=1e-12,
        atol=1e-12,
    )
    assert bound.dtype == np.float64 and bound.shape == error.shape == (cells,)
    # one draw says nothing of the spread
    if draws == 1:
        return np.testing.assert_array_equal(error, np.nan)
    w = np.exp(log_w.astype("float64") - log_w.max(0))
    np.testing.assert_allclose(
        error, w.std(0, ddof=1) / w.mean(0) / np.sqrt(draws), atol=5e-5, rtol=1e-4
    )


def test_many_small_weights_are_not_lost():
    "Twenty thousand draws of weight e^-8 beside one of 1: in float32 their sum would drift."
    bound, _ = importance_bound([np.float32([0.0])] + [np.float32([-8.0])] * 20_000)
    assert float(bound[0]) == pytest.approx(np.log((1 + 20_000 * np.exp(-8)) / 20_001), rel=1e-12)


def test_no_draws_and_not_a_number():
    with pytest.raises(ValueError, match="n_mc_samples=0"):
        importance_bound([])
    with np.errstate(invalid="ignore"):
        bound = importance_bound([[np.nan, 1.0], [0.0, 1.0]])[0]
    assert np.isnan(bound[0]) and bound[1] == 1


# ---- a linear-Gaussian model, whose evidence is known


class LinearGaussian(assembly.Network):
    """z ~ N(0, I), x ~ N(W z, s^2 I), and a posterior N(A x, diag exp v) that need not be the right
    one.
    """

    def __init__(self, weights, noise_sd):
        super().__init__(
            None, GaussianPosterior(weights.shape[1], new_seeds(0)), StandardNormal(), None
        )
        self.W = weights
        self.noise_sd = noise_sd

    def reconstruction(self, x, z, training=False):
        residual = (x - z @ self.W.T) / self.noise_sd
        return ops.sum(
            0.5 * ops.square(residual) + np.log(self.noise_sd) + 0.5 * np.log(2 * np.pi), -1
        )


@pytest.fixture(scope="module")
def toy():
    W = rng.normal(size=(6, 3)).astype("float32")
    sd = 0.7
    x = (rng.normal(size=(60, 3)) @ W.T + sd * rng.normal(size=(60, 6))).astype("float32")
    evidence = stats.multivariate_normal.logpdf(
        x.astype("float64"), np.zeros(6), W @ W.T + sd**2 * np.eye(6)
    )
    covariance = np.linalg.inv(np.eye(3) + W.T @ W / sd**2)
    mean = x @ W @ covariance.T / sd**2
    return LinearGaussian(W, sd), x, evidence, mean, covariance


def bound(net, x, mean, log_var, n, seed=0):
    parameters = mean.astype("float32"), np.broadcast_to(log_var, mean.shape).astype("float32")
    return importance_bound(log_weights(net, x, parameters, None, n, np.random.default_rng(seed)))


def test_bound_rises_to_the_truth_and_stays_below_it(toy):
    net, x, truth, mean, covariance = toy
    # wider than it should be, without correlations, and
    log_var = np.log(np.diag(covariance)) + 0.5
    mean = mean + 0.2  # off centre
    means = []
    sizes = (1, 3, 10, 100, 1000)
    for n in sizes:
        means.append(
            np.mean(
                [
                    bound(net, x, mean, log_var, n, seed)[0].mean()
                    for seed in range(max(1, 200 // n))
                ]
            )
        )
    assert (np.diff(means) > 0).all()
    assert means[0] < truth.mean() - 0.3  # a gap to close
    assert truth.mean() - 0.02 < means[-1] < truth.mean() + 0.005
    found, error = bound(net, x, mean, log_var, 1000, seed=7)
    # the error is an honest one, cell by cell
    assert (np.abs(found - truth) < 6 * error + 1e-4).all()
    assert 0.2 < np.sqrt(np.mean((found - truth) ** 2)) / np.sqrt(np.mean(error**2)) < 3


def test_the_elbo_falls_short_by_the_kl_to_the_true_posterior(toy):
    net, x, truth, mean, covariance = toy
    log_var = np.log(np.diag(covariance))
    parameters = mean.astype("float32"), np.tile(log_var.astype("float32"), (len(x), 1))
    elbo = log_weights(net, x, parameters, None, 3000, np.random.default_rng(1)).mean(
        dtype="float64"
    )
    precision = np.linalg.inv(covariance)
    S = np.diag(np.exp(log_var))
    gap = 0.5 * (np.trace(precision @ S) - 3 + np.linalg.slogdet(covariance)[1] - log_var.sum())
    assert gap > 0.05 and truth.mean() - elbo == pytest.approx(gap, abs=0.01)


def test_with_the_true_posterior_every_draw_is_exact():
    """One latent unit, so that a diagonal Gaussian can be the true posterior: all weights are p(x),
    the error is 0.
    """
    W = np.float32([[1.0], [0.5], [-2.0]])
    sd = 0.5
    net = LinearGaussian(W, sd)
    x = rng.normal(size=(20, 3)).astype("float32")
    variance = 1 / (1 + float((W**2).sum()) / sd**2)
    found, error = bound(net, x, x @ W * variance / sd**2, np.log(variance), 4)
    truth = stats.multivariate_normal.logpdf(
        x.astype("float64"), np.zeros(3), W @ W.T + sd**2 * np.eye(3)
    )
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-4)
    assert error.max() < 1e-3


# ---- the models themselves, in two latent dimensions

KINDS = [
    ("gaussian", "normal"),
    ("iaf", "normal"),
    ("gaussian", "mixture"),
    ("gaussian", "vamp"),
    ("iaf", "vamp"),
    ("hierarchical", "hvamp"),
]


def network(posterior, prior):
    settings = dict(
        n_latent=2, hidden=(12, 8), n_pseudo_inputs=4, n_flow_steps=2, flow_hidden=(8, 8)
    )
    made = build_network(Architecture(posterior, prior, **settings), 6)
    draw = np.random.default_rng(1)
    for head in (made.posterior.mean, made.decoder.log_rate):
        head.kernel.assign(draw.normal(0, 0.3, head.kernel.shape))
    # Posteriors wider than they should be, as importance weights need them.
    made.posterior.log_var.kernel.assign(draw.normal(0, 0.1, made.posterior.log_var.kernel.shape))
    made.posterior.log_var.bias.assign([1.5] * made.posterior.log_var.units)
    if posterior == "iaf":
        # gates nearly open
        for step in made.posterior.flow.steps:
            step.outer_context.bias.assign([0.3, -0.3, 2.5, 3.0])
    made.decoder.log_rate.bias.assign(np.full(6, np.log(1e4 / 6)))
    if "vamp" in prior:
        made.prior.initialise(draw.gamma(1.0, 2.0, (4, 6)), draw)
    return made


def evidence(made, counts, half_width=10.0, points=201):
    "log p(x) of each cell as a sum over a fine grid of the plane of z, in float64."
    axis = np.linspace(-half_width, half_width, points)
    z = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype("float32")
    log_p = np.asarray(made.prior.log_prob(z, made.components()), "float64")
    log_area = 2 * np.log(axis[1] - axis[0])
    # the grid holds the prior
    assert special.logsumexp(log_p + log_area) == pytest.approx(0, abs=5e-3)

    def given_z(x):
        return -np.asarray(made.reconstruction(np.tile(x, (len(z), 1)), z), "float64")

    return np.array([special.logsumexp(log_p + given_z(x) + log_area) for x in counts])


@pytest.mark.parametrize("posterior, prior", KINDS)
def test_bounds_of_every_model_against_integration(posterior, prior):
    made = network(posterior, prior)
    draw = np.random.default_rng(2)
    counts = draw.poisson(3.0, (5, 6)).astype("float32") + np.eye(5, 6, dtype="float32")
    truth = evidence(made, counts)
    parameters = made.encode(log_normalise(counts))
    weights = log_weights(made, counts, parameters, made.components(), 6000, draw).astype("float64")
    found, error = importance_bound(weights)
    # 6e-3: what the grid itself may be off
    assert (np.abs(found - truth) < 6 * error + 6e-3).all()
    assert error.max() < 0.1
    assert (weights.mean(0) < truth).all()  # the ELBO


@pytest.mark.parametrize("posterior, prior", KINDS)
def test_log_weight_is_minus_the_terms(posterior, prior):
    """What training minimises and what the bound averages are one number, up to the closed form of
    the VAE's KL.
    """
    made = network(posterior, prior)
    draw = np.random.default_rng(3)
    counts = draw.poisson(4.0, (7, 6)).astype("float32") + 1
    noise = draw.standard_normal((7, 2)).astype("float32")
    reconstruction, kl = made.terms(counts, noise, made.components())
    parameters = made.encode(log_normalise(counts))
    if (posterior, prior) == ("gaussian", "normal"):
        z, log_q = made.posterior.sample(parameters, noise)
        kl = log_q - made.prior.log_prob(z)
    found = made.log_importance_weight(counts, parameters, noise, made.components())
    np.testing.assert_allclose(
        found, -(np.asarray(reconstruction) + np.asarray(kl)), rtol=1e-5, atol=1e-4
    )


# ---- the verb


def test_verb_is_the_bound_by_hand():
    from vampsc import organs

    adata = organs.load("pancreas")[:120].copy()
    model = models.VAMP(adata, n_genes=200, n_latent=4, hidden=(16,), n_pseudo_inputs=10)
    found = model.get_marginal_ll(n_mc_samples=30)
    per_cell = model.get_marginal_ll(n_mc_samples=30, per_cell=True)
    net = model.network
    x = model.X.toarray()
    draw = np.random.default_rng(0)
    parameters = net.encode(log_normalise(x))
    truth, error = importance_bound(
        net.log_importance_weight(
            x, parameters, draw.standard_normal((120, 4)).astype("float32"), net.components()
        )
        for _ in range(30)
    )
    assert per_cell.shape == (120,) and per_cell.dtype == np.float64
    np.testing.assert_allclose(per_cell, truth, rtol=1e-6)
    assert found["marginal_ll"] == pytest.approx(truth.mean())
    assert found["standard_error"] == pytest.approx(truth.std(ddof=1) / np.sqrt(120))
    assert found["mc_error"] == pytest.approx(np.sqrt((error**2).sum()) / 120)
    few = [
        model.get_marginal_ll(**these, n_mc_samples=30, per_cell=True)
        for these in (dict(indices=[3, 1]), dict(adata=adata[[3, 1]]))
    ]
    np.testing.assert_allclose(*few, rtol=1e-5)
    # other draws, the same cells
    small = model.get_marginal_ll(n_mc_samples=30, batch_size=16, per_cell=True)
    assert np.corrcoef(small, per_cell)[0, 1] > 0.95
    single = model.get_marginal_ll(indices=[3], n_mc_samples=2)
    assert np.isnan(single["standard_error"]) and np.isfinite(single["marginal_ll"])
    verbs = model.get_elbo, model.get_marginal_ll, model.get_kl_per_unit
    for verb in verbs:
        with pytest.raises(
            ValueError, match="n_mc_samples must be a whole number of at least 1, not 0"
        ):
            verb(n_mc_samples=0)
    for verb in (*verbs, model.get_latent_representation, model.get_reconstruction_error):
        with pytest.raises(ValueError, match="no cells"):
            verb(indices=np.array([], int))
    with pytest.raises(ValueError, match="no prior"):
        models.AE(adata, n_genes=200, n_latent=4, hidden=(16,)).get_marginal_ll()


# ---- draws from posterior and prior


def test_log_prob_of_the_posterior_is_that_of_its_draws():
    made = network("gaussian", "normal")
    draw = np.random.default_rng(1)
    parameters = made.encode(log_normalise(draw.poisson(4.0, (7, 6)).astype("float32") + 1))
    z, log_q = made.posterior.sample(parameters, draw.standard_normal((7, 2)).astype("float32"))
    np.testing.assert_allclose(made.posterior.log_prob(z, parameters), log_q, rtol=1e-5)
    mean, log_var = map(np.asarray, parameters)
    np.testing.assert_allclose(
        made.posterior.log_prob(z + 3, parameters),
        stats.norm.logpdf(np.asarray(z) + 3, mean, np.exp(log_var / 2)).sum(1),
        rtol=1e-4,
    )


@pytest.mark.parametrize("prior", ["normal", "vamp"])
def test_both_proposals_find_what_a_wrong_posterior_misses(prior):
    """log p(x) by quadrature over two units; the posterior is made far too narrow and shifted, as
    small weights of the KL term make it.
    """
    made = network("gaussian", prior)
    draw = np.random.default_rng(2)
    counts = draw.poisson(4.0, (5, 6)).astype("float32") + 1
    mean, log_var = map(np.asarray, made.encode(log_normalise(counts)))
    wrong = (mean + 2.5, np.full_like(log_var, np.log(1e-3)))
    components = made.components()
    axis = np.linspace(-7, 7, 141)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2).astype("float32")
    log_joint = np.stack(
        [
            np.asarray(made.prior.log_prob(grid, components))
            - np.asarray(made.reconstruction(np.repeat(x[None], len(grid), 0), grid))
            for x in counts
        ]
    )
    truth = special.logsumexp(log_joint, axis=1) + 2 * np.log(axis[1] - axis[0])
    many = np.repeat(counts, 1000, 0)  # all draws at once
    wrong = [np.repeat(v, 1000, 0) for v in wrong]
    noise = draw.standard_normal((5000, 2)).astype("float32")
    narrow, _ = importance_bound(
        np.asarray(made.log_importance_weight(many, wrong, noise, components)).reshape(5, 1000).T
    )
    from_prior = np.arange(5000)[:, None] % 2 == 1
    z = np.where(
        from_prior,
        np.asarray(made.prior.sample(5000, 2, components, draw)),
        wrong[0] + np.exp(wrong[1] / 2) * noise,
    ).astype("float32")
    both, error = importance_bound(
        np.asarray(made.log_importance_weight_of_both(many, wrong, z, components))
        .reshape(5, 1000)
        .T
    )
    assert np.all(np.abs(both - truth) < 5 * error + 0.02) and np.all(narrow < truth - 1)


def test_the_verb_with_both_proposals():
    from vampsc import organs

    model = models.VAMP(
        organs.load("pancreas")[:120].copy(),
        n_genes=200,
        n_latent=4,
        hidden=(16,),
        n_pseudo_inputs=10,
    ).train("quick", max_epochs=5, progress=False)
    one, both = (model.get_marginal_ll(n_mc_samples=200, proposal=p) for p in ("posterior", "both"))
    assert (
        both["marginal_ll"] == pytest.approx(one["marginal_ll"], abs=3)
        and both["marginal_ll"] != one["marginal_ll"]
    )
    with pytest.raises(
        ValueError, match="proposal='prior' is not known; take one of posterior, both"
    ):
        model.get_marginal_ll(proposal="prior")
    iaf = models.IAF(organs.load("pancreas")[:120].copy(), n_genes=200, n_latent=4, hidden=(16,))
    with pytest.raises(ValueError, match="IAF has a posterior whose density"):
        iaf.get_marginal_ll(proposal="both")
    with pytest.raises(ValueError, match="no prior"):
        models.AE(
            organs.load("pancreas")[:120].copy(), n_genes=200, n_latent=4, hidden=(16,)
        ).get_marginal_ll(proposal="both")


# ---- odd numbers of draws from both


class Exact(inference.Bounds):
    """The verbs for one latent unit of the linear-Gaussian model, with its true posterior: cells
    are rows of numbers.
    """

    def __init__(self, x):
        self.network = LinearGaussian(np.float32([[1.0], [0.5], [-2.0]]), 0.5)
        self.x = x
        self.genes = range(3)
        self._compiled = {}
        W = self.network.W
        sd = self.network.noise_sd
        variance = 1 / (1 + float((W**2).sum()) / sd**2)
        log_var = np.full((len(x), 1), np.log(variance), "float32")
        self.network.encode_counts = lambda cells: (
            (cells @ W * variance / sd**2).astype("float32"),
            log_var[: len(cells)],
        )

    def _cells(self, adata=None, indices=None, of_batch=True):
        return self.x, np.arange(len(self.x))


@pytest.fixture(scope="module")
def one_unit():
    "Such a model, and log p(x) of its cells."
    draw = np.random.default_rng(3)
    x = (draw.normal(size=(200, 1)) * [[1.0, 0.5, -2.0]] + 0.5 * draw.normal(size=(200, 3))).astype(
        "float32"
    )
    W = np.array([[1.0], [0.5], [-2.0]])
    return Exact(x), stats.multivariate_normal.logpdf(
        x.astype("float64"), np.zeros(3), W @ W.T + 0.25 * np.eye(3)
    )


@pytest.mark.parametrize("draws", [1, 2, 3, 5])
def test_both_proposals_bound_log_p_for_any_number_of_draws(one_unit, draws):
    """Weighed as if there were equally many of both, one draw had 0.44 nats above log p(x), three
    had 0.16.
    """
    model, truth = one_unit
    found = [
        model.get_marginal_ll(n_mc_samples=draws, seed=seed, per_cell=True, proposal="both")
        for seed in range(60)
    ]
    # of the mean over cells, for each seed
    gaps = np.mean(found - truth, axis=1)
    assert gaps.mean() < 4 * gaps.std(ddof=1) / np.sqrt(len(gaps)) + 1e-4
    assert gaps.mean() > -1


def test_shares_of_the_draws(one_unit):
    """Of even numbers the weights are those of even chances, to the last digit; of one draw they
    are the posterior's.
    """
    model, truth = one_unit
    assert (
        inference.log_twice_the_shares(4).tolist()
        == [0, 0]
        == inference.log_twice_the_shares(200).tolist()
    )
    np.testing.assert_allclose(np.exp(inference.log_twice_the_shares(3)), [4 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(
        model.get_marginal_ll(n_mc_samples=1, proposal="both", per_cell=True), truth, atol=2e-4
    )
    net = model.network
    parameters = model.network.encode_counts(model.x)
    z, _ = net.sample(parameters, rng.standard_normal((200, 1)).astype("float32"))
    log_p = net.prior.log_prob(z, None)
    even = (
        log_p
        - net.reconstruction(model.x, z)
        - (ops.logaddexp(net.posterior.log_prob(z, parameters), log_p) - np.log(2))
    )
    np.testing.assert_array_equal(
        net.log_importance_weight_of_both(model.x, parameters, z, None), even
    )
