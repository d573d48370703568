"""Input layer, hidden layers, penalties, bounds and decoder, against numpy in float64."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops
from scipy import stats

from vampsc.assembly import Architecture, build_network
from vampsc.networks import (
    Decoder,
    head,
    hidden_layers,
    log_normalise,
    new_seeds,
    size_factors,
    soft_bound,
)


def counts(cells, genes, seed=0):
    x = np.random.default_rng(seed).poisson(1.0, (cells, genes)).astype("float32")
    x[:, 0] += 1  # no empty cell
    return x


def scramble(layer, seed=0):
    """Random numbers for all weights, variances above 0: initial zeros and ones would hide a
    missing term.
    """
    rng = np.random.default_rng(seed)
    for w in layer.weights:
        if w.dtype == "float32":
            value = rng.normal(0, 0.4, w.shape)
            w.assign(np.exp(value) if "variance" in w.path else value)


def forward(stack, x):
    "The stack in inference mode, by hand: from its Dense and BatchNormalization weights alone."
    for layer in stack.layers:
        if isinstance(layer, layers.Dense):
            kernel, bias = (np.asarray(w, "float64") for w in layer.weights)
            x = np.tanh(x @ kernel + bias)
        elif isinstance(layer, layers.BatchNormalization):
            gamma, beta, mean, variance = (
                np.asarray(getattr(layer, k), "float64")
                for k in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            x = gamma * (x - mean) / np.sqrt(variance + layer.epsilon) + beta
    return x


# ---- input


def test_log_normalise():
    x = counts(20, 30)
    truth = np.log1p(1e4 * x.astype("float64") / x.sum(1, keepdims=True))
    np.testing.assert_allclose(log_normalise(x), truth, rtol=1e-6)
    np.testing.assert_allclose(
        np.expm1(np.asarray(log_normalise(x), "float64")).sum(1), 1e4, rtol=1e-5
    )
    np.testing.assert_allclose(size_factors(x), x.sum(1, keepdims=True) / 1e4, rtol=1e-6)
    assert np.asarray(size_factors(x)).shape == (20, 1)
    assert (np.asarray(log_normalise(x))[x == 0] == 0).all()


@given(st.integers(1, 1000), st.lists(st.integers(0, 50), min_size=2, max_size=8).filter(any))
def test_depth_does_not_matter(factor, cell):
    "A cell sequenced `factor` times as deep looks the same to the encoder."
    cell = np.float32([cell])
    np.testing.assert_allclose(
        log_normalise(cell * factor), log_normalise(cell), rtol=1e-5, atol=1e-6
    )


# ---- hidden layers


def test_order_and_settings_of_hidden_layers():
    stack = hidden_layers((7, 5), new_seeds(0))
    assert [type(layer) for layer in stack.layers] == [
        layers.Dense,
        layers.BatchNormalization,
        layers.Dropout,
    ] * 2
    for dense, norm, dropout in (stack.layers[:3], stack.layers[3:]):
        assert (
            dense.activation is keras.activations.tanh
            and dense.use_bias
            and dense.bias_regularizer is None
        )
        assert isinstance(dense.kernel_initializer, keras.initializers.GlorotUniform)
        assert (dense.kernel_regularizer.l1, dense.kernel_regularizer.l2) == pytest.approx(
            (5e-4, 5e-4)
        )
        assert norm.center and norm.scale and dropout.rate == 0.2
    assert [stack.layers[0].units, stack.layers[3].units] == [7, 5]


def test_hidden_layers_in_inference_mode():
    stack = hidden_layers((7, 5), new_seeds(0))
    stack.build((None, 4))
    scramble(stack)
    x = np.random.default_rng(1).normal(size=(6, 4)).astype("float32")
    np.testing.assert_allclose(
        stack(x, training=False), forward(stack, x.astype("float64")), rtol=1e-4, atol=1e-5
    )
    assert np.array_equal(stack(x), stack(x, training=False))  # inference is the default


def test_hidden_layers_in_training_mode():
    """Batch statistics of the activations (normalisation after tanh), then dropout that keeps the
    mean.
    """
    stack = hidden_layers((6,), new_seeds(0), dropout=0.2)
    stack.build((None, 4))
    x = np.random.default_rng(1).normal(size=(4000, 4)).astype("float32")
    kernel, bias = (np.asarray(w, "float64") for w in stack.layers[0].weights)
    h = np.tanh(x @ kernel + bias)
    truth = (h - h.mean(0)) / np.sqrt(h.var(0) + stack.layers[1].epsilon)
    out = np.asarray(stack(x, training=True), "float64")
    dropped = out == 0
    assert dropped.mean() == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / out.size))
    np.testing.assert_allclose(out[~dropped], truth[~dropped] / 0.8, rtol=1e-3, atol=1e-3)


def test_no_hidden_layers_is_the_identity():
    stack = hidden_layers((), new_seeds(0))
    x = np.float32([[1, 2, 3]])
    assert np.array_equal(stack(x, training=True), x) and not stack.weights and not stack.losses


def test_head_is_linear():
    layer = head(3, new_seeds(0), "top", bias=0.7)
    layer.build((None, 5))
    kernel, bias = (np.asarray(w, "float64") for w in layer.weights)
    x = np.random.default_rng(0).normal(0, 10, (4, 5)).astype("float32")
    assert bias == pytest.approx(0.7)
    np.testing.assert_allclose(layer(x), x @ kernel + bias, rtol=1e-5, atol=1e-5)
    assert not layer.losses


# ---- penalties


def penalty(kernels, l1=5e-4, l2=5e-4):
    kernels = [np.asarray(k, "float64") for k in kernels]
    return sum(l1 * np.abs(k).sum() + l2 * (k**2).sum() for k in kernels)


def dense_kernels(stack):
    return [layer.kernel for layer in stack.layers if isinstance(layer, layers.Dense)]


@pytest.mark.parametrize(
    "posterior, prior",
    [
        ("point", "none"),
        ("gaussian", "normal"),
        ("iaf", "normal"),
        ("gaussian", "mixture"),
        ("gaussian", "vamp"),
        ("iaf", "vamp"),
        ("hierarchical", "hvamp"),
    ],
)
def test_penalty_is_on_hidden_kernels_only(posterior, prior):
    settings = dict(
        n_latent=4,
        hidden=(9, 6),
        n_pseudo_inputs=3,
        n_flow_steps=2,
        flow_hidden=(8, 7),
        l1=2e-3,
        l2=3e-3,
    )
    network = build_network(Architecture(posterior, prior, **settings), 11)
    # heads, biases and norms are far from 0 too
    scramble(network)
    kernels = dense_kernels(network.encoder) + dense_kernels(network.decoder.body)
    assert [tuple(k.shape) for k in kernels] == [(11, 9), (9, 6), (4, 6), (6, 9)]
    if posterior == "iaf":
        flow = [
            layer.kernel
            for made in network.posterior.flow.steps
            for layer in (*made.inner, *made.context)
        ]
        assert [tuple(k.shape) for k in flow] == [(4, 8), (8, 7), (6, 8), (6, 7)] * 2
        kernels += flow
    # the hidden layers of q(z1|x, z2) and p(z1|z2)
    if prior == "hvamp":
        levels = [network.posterior.first.body.kernel, network.prior.first.body.kernel]
        assert [tuple(k.shape) for k in levels] == [(6 + 2, 6), (2, 6)]
        kernels += levels
    assert len(network.losses) == len(kernels)
    assert float(sum(network.losses)) == pytest.approx(penalty(kernels, 2e-3, 3e-3), rel=1e-5)


def test_initial_penalty_at_full_width():
    """With 19,986 genes and the paper's widths it starts at about 52, small beside thousands of
    nats a cell.
    """
    encoder = hidden_layers((512, 256), new_seeds(0))
    decoder = hidden_layers((256, 512), new_seeds(1))
    encoder.build((None, 19986)), decoder.build((None, 128))
    assert 50 < float(sum(encoder.losses + decoder.losses)) < 54


# ---- bounds


def test_soft_bound():
    a = np.linspace(-500, 500, 4001)
    bounded = np.asarray(soft_bound(a.astype("float32")), "float64")
    assert (np.diff(bounded) >= 0).all() and (np.diff(bounded)[1900:2100] > 0).all()
    np.testing.assert_array_equal(bounded, -bounded[::-1])
    assert np.abs(bounded).max() <= 20 * (1 + 1e-6)
    np.testing.assert_allclose(bounded, a / np.sqrt(1 + (a / 20) ** 2), rtol=1e-5)
    np.testing.assert_allclose(soft_bound(np.float32([-1e6, 0, 1e6])), [-20, 0, 20], rtol=1e-6)
    np.testing.assert_allclose(soft_bound(np.float32([1e6]), limit=3.0), 3, rtol=1e-6)
    assert float(soft_bound(np.float32(1e-3))) == pytest.approx(1e-3, rel=1e-6)  # slope 1 at 0


@given(st.floats(-(2.0**60), 2.0**60, width=32))
def test_soft_bound_never_leaves(a):
    assert abs(float(soft_bound(np.float32(a)))) <= min(20.0001, abs(a) * 1.00001)


# ---- decoder


def decoder(seed=0, n_genes=9, n_latent=4, **settings):
    made = Decoder(n_genes, new_seeds(seed), **(dict(hidden=(6, 8)) | settings))
    made.build((None, n_latent))
    return made


Z = np.random.default_rng(5).normal(size=(7, 4)).astype("float32")
NO_SIZE = np.zeros((7, 1), "float32")


@pytest.mark.parametrize("hidden", [(6, 8), ()])
@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_decoder(hidden, dispersion):
    made = decoder(hidden=hidden, dispersion=dispersion)
    scramble(made)
    log_size = np.linspace(-2, 1, 7, dtype="float32")[:, None]
    log_mean, log_theta = (np.asarray(v, "float64") for v in made(Z, log_size))
    h = forward(made.body, Z.astype("float64"))

    def linear(layer):
        return h @ np.asarray(layer.kernel, "float64") + np.asarray(layer.bias)

    def bound(a):
        return a / np.sqrt(1 + (a / 20) ** 2)

    assert log_mean.shape == (7, 9)
    np.testing.assert_allclose(
        log_mean, bound(linear(made.log_rate)) + log_size, rtol=1e-4, atol=1e-4
    )
    if dispersion == "gene-cell":
        assert log_theta.shape == (7, 9)
        np.testing.assert_allclose(
            log_theta, bound(linear(made.log_dispersion)), rtol=1e-4, atol=1e-4
        )
    else:
        theta = np.asarray(made.gene_dispersion, "float64")
        np.testing.assert_allclose(
            np.broadcast_to(log_theta, (7, 9)), np.tile(bound(theta), (7, 1)), rtol=1e-5
        )


def test_size_factor_moves_the_log_mean_and_nothing_else():
    made = decoder()
    scramble(made)
    (mean_a, theta_a), (mean_b, theta_b) = made(Z, NO_SIZE), made(Z, NO_SIZE + 2.5)
    np.testing.assert_allclose(np.asarray(mean_b) - np.asarray(mean_a), 2.5, atol=1e-5)
    assert np.array_equal(theta_a, theta_b)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_training_reaches_the_dropout(part):
    "In training two passes differ, in inference they do not: the flag is handed down."
    network = build_network(Architecture("point", "none", n_latent=4, hidden=(20,)), 11)
    if part == "encoder":

        def run(training):
            return np.asarray(network.encode(counts(7, 11), training)[0])
    else:

        def run(training):
            return np.asarray(network.decoder(Z, NO_SIZE, training=training)[0])

    assert not np.array_equal(run(True), run(True))
    assert np.array_equal(run(False), run(False))


def test_gene_dispersion_is_one_trained_number_a_gene():
    made = decoder(dispersion="gene")
    assert tuple(made.gene_dispersion.shape) == (9,)
    assert any(v is made.gene_dispersion for v in made.trainable_variables)
    per_gene, per_cell = (
        sum(v.size if hasattr(v, "size") else np.prod(v.shape) for v in m.trainable_variables)
        for m in (made, decoder())
    )
    # the second head's kernel; its bias is the number
    assert per_cell - per_gene == 8 * 9


def test_linear_decoder():
    "Without hidden layers the rate (before the bound) is an affine function of z."
    made = decoder(hidden=())

    def unbound(v):
        return v / np.sqrt(1 - (v / 20) ** 2)

    log_mean = unbound(np.asarray(made(Z, NO_SIZE)[0], "float64"))
    between = unbound(np.asarray(made((Z[:1] + Z[1:2]) / 2, NO_SIZE[:1])[0], "float64"))
    np.testing.assert_allclose(between[0], log_mean[:2].mean(0), atol=1e-5)
    assert not made.losses


def test_a_plain_decoder_is_its_dense_layers_alone():
    "tanh of an affine function, and the same in training: no normalisation, dropout or penalty."
    made = decoder(plain=True)
    h = Z
    for layer in made.body.layers:
        assert isinstance(layer, keras.layers.Dense)
        h = np.tanh(h @ np.asarray(layer.kernel) + np.asarray(layer.bias))
    kernel, bias = (np.asarray(w) for w in made.log_rate.get_weights())
    expected = h @ kernel + bias
    expected = expected / np.sqrt(1 + (expected / 20) ** 2)
    for training in (False, True):
        found = np.asarray(made(Z, NO_SIZE, training=training)[0])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not made.losses and len(made.body.layers) == 2
    # the same seeds give the same first weights with and without
    for one, other in zip(dense_kernels(made.body), dense_kernels(decoder().body), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_heads_carry_no_penalty():
    made = decoder()
    assert float(sum(made.losses)) == pytest.approx(penalty(dense_kernels(made.body)), rel=1e-5)


def test_decoder_stays_in_bounds():
    made = decoder(hidden=())
    for v in made.weights:
        v.assign(np.full(v.shape, 1e4))
    for v in made(Z, NO_SIZE):
        assert np.isfinite(np.asarray(v)).all() and np.abs(np.asarray(v)).max() <= 20.0001


def test_unknown_dispersion():
    with pytest.raises(ValueError, match="'cell'.*'gene-cell' or 'gene'"):
        Decoder(3, new_seeds(0), dispersion="cell")


# ---- seeds


def test_seeds():
    def take(seed):
        return [next(s) for s in [new_seeds(seed)] for _ in range(200)]

    assert take(0) == take(0) != take(1)
    assert len(set(take(0))) == 200 and all(isinstance(s, int) and 0 <= s < 2**31 for s in take(0))


@pytest.mark.parametrize("posterior, prior", [("point", "none"), ("iaf", "vamp")])
def test_seed_decides_all_weights(posterior, prior):
    a = Architecture(
        posterior,
        prior,
        n_latent=4,
        hidden=(9, 6),
        n_pseudo_inputs=3,
        n_flow_steps=2,
        flow_hidden=(8, 7),
    )
    one, same, other = (build_network(a, 11, seed).get_weights() for seed in (3, 3, 4))
    assert all(np.array_equal(u, v) for u, v in zip(one, same, strict=True))
    # not masks, biases, zeros, ones
    random = [u.std() > 0 and not np.isin(u, (0, 1, 1.5)).all() for u in one]
    assert sum(random) >= 6
    assert not any(np.array_equal(u, v) for u, v, r in zip(one, other, random) if r)
    shapes = {}
    for u, r in zip(one, random):
        if r:
            assert not any(np.array_equal(u, v) for v in shapes.setdefault(u.shape, []))
            shapes[u.shape].append(u)


def test_initial_weights_are_glorot_uniform():
    kernel = np.asarray(decoder(n_latent=300, hidden=(200,)).body.layers[0].kernel, "float64")
    limit = np.sqrt(6 / 500)
    assert np.abs(kernel).max() <= limit
    assert stats.kstest(kernel.ravel() / limit, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]
    network = build_network(
        Architecture(
            "iaf",
            "vamp",
            n_latent=4,
            hidden=(5,),
            n_pseudo_inputs=2,
            n_flow_steps=1,
            flow_hidden=(4,),
        ),
        6,
    )
    network(counts(4, 6), training=True)
    after = np.random.get_state()
    assert np.array_equal(before[0], after[1]) and before[1] == after[2]


def test_same_seed_same_noise_and_dropout():
    a = Architecture(n_latent=4, hidden=(9, 6))
    one, same, other = (
        np.asarray(build_network(a, 11, seed)(counts(5, 11), training=True)) for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    network = build_network(a, 11)
    # fresh noise at each call
    assert not np.array_equal(network(counts(5, 11)), network(counts(5, 11)))
    assert ops.shape(network(counts(5, 11))[0]) == (5,)
