"""The compiled path: equal to the plain one in values, gradients and steps, safe in memory, and
chosen as told.
"""

import keras
import mpmath
import numpy as np
import pytest
from keras import ops

from vampsc import kernels, models, networks, organs, training
from vampsc.likelihood import nb_log_prob_sum

if keras.backend.backend() != "tensorflow":
    pytest.skip("the compiled kernels are TensorFlow's", allow_module_level=True)
import tensorflow as tf  # noqa: E402
from autodiff import gradients  # noqa: E402


@pytest.fixture(scope="module")
def adata():
    "100 cells, and the 400 genes that are expressed most."
    cells = organs.load("pancreas")[:100]
    return cells[:, np.sort(np.argsort(-np.asarray(cells.X.sum(0)).ravel())[:400])].copy()


@pytest.fixture(scope="module")
def batch():
    "32 cells and 4,025 genes, among them many that are hardly expressed."
    return organs.load("pancreas")[:32, ::5].X.toarray()


def twin(x, a, b):
    return nb_log_prob_sum(
        x, networks.soft_bound(a) + ops.log(networks.size_factors(x)), networks.soft_bound(b)
    )


def fast(x, a, b):
    return kernels.nb_log_prob_of_heads(
        tf.constant(x), tf.constant(a), tf.constant(b), networks.HEAD_BOUND, networks.TARGET_SUM
    )


def heads(shape, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(-1, 3 * spread, shape).astype("float32"),
        rng.normal(0, 2 * spread, shape).astype("float32"),
    )


@pytest.mark.parametrize("spread", [0.3, 1, 10])
@pytest.mark.parametrize("loss", ["mean", "sum", "weighted"])
def test_values_and_gradients_on_real_cells(batch, spread, loss):
    "The mean takes the derivatives as they lie; other losses scale them."
    a, b = heads(batch.shape, spread=spread)
    weight = {
        "mean": np.full(len(batch), -1 / len(batch)),
        "sum": np.ones(len(batch)),
        "weighted": np.linspace(-1, 2, len(batch)),
    }[loss].astype("float32")
    one = np.asarray(fast(batch, a, b))
    other = np.asarray(twin(batch, a, b))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for p, q in zip(
        gradients(lambda a, b: fast_of(batch, a, b) * weight, a, b),
        gradients(lambda a, b: twin(batch, a, b) * weight, a, b),
    ):
        scale = np.abs(weight)[:, None]
        assert np.all(np.abs(p - q) <= 2e-5 * np.abs(q) + 2e-5 * scale)


def fast_of(x, a, b):
    return kernels.nb_log_prob_of_heads(
        tf.constant(x), a, b, networks.HEAD_BOUND, networks.TARGET_SUM
    )


def test_the_mean_needs_no_second_pass(batch, monkeypatch):
    def never(*_):
        raise AssertionError("derivatives were scaled")

    monkeypatch.setattr(kernels, "_scaled", never)
    a, b = heads(batch.shape)
    gradients(lambda a, b: -ops.mean(fast_of(batch, a, b)), a, b)
    with pytest.raises(Exception, match="derivatives were scaled"):
        gradients(lambda a, b: fast_of(batch, a, b), a, b)


def test_one_dispersion_per_gene(batch):
    a = heads(batch.shape)[0]
    b = heads(batch.shape[1:])[1]
    np.testing.assert_allclose(fast(batch, a, b), twin(batch, a, b), rtol=1e-5)
    p, q = (gradients(lambda b: f(batch, tf.constant(a), b), b)[0] for f in (fast_of, twin))
    assert p.shape == b.shape and np.allclose(p, q, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1023), (2, 1024), (5, 1025), (4, 2500)])
@pytest.mark.parametrize("density", [0, 0.1, 1])
def test_shapes_and_densities(shape, density):
    rng = np.random.default_rng(1)
    x = (rng.poisson(4, shape) * (rng.random(shape) < density)).astype("float32")
    x[:, 0] += 1
    a, b = heads(shape)
    np.testing.assert_allclose(fast(x, a, b), twin(x, a, b), rtol=2e-5, atol=1e-4)
    for p, q in zip(*(gradients(lambda a, b: f(x, a, b), a, b) for f in (fast_of, twin))):
        np.testing.assert_allclose(p, q, rtol=2e-4, atol=1e-4)


def exact(x, m, r):
    "The negative binomial and its derivatives by log mu and log theta in 50 digits."
    with mpmath.workdps(50):
        x, m, r = (mpmath.mpf(float(v)) for v in (x, m, r))
        mu = mpmath.exp(m)
        theta = mpmath.exp(r)
        value = (
            mpmath.loggamma(x + theta)
            - mpmath.loggamma(theta)
            - mpmath.loggamma(x + 1)
            + x * (m - mpmath.log(mu + theta))
            + theta * (r - mpmath.log(mu + theta))
        )
        by_m = theta * (x - mu) / (theta + mu)
        by_r = theta * (
            mpmath.digamma(x + theta)
            - mpmath.digamma(theta)
            + r
            - mpmath.log(mu + theta)
            + (mu - x) / (theta + mu)
        )
        return float(value), float(by_m), float(by_r)


def test_extremes_against_fifty_digits():
    logs = np.r_[np.log(10.0) * np.arange(-6, 9), -20, 20].astype("float32")
    x, m, r = (
        v.ravel()
        for v in np.meshgrid(np.float32([0, 0.5, 1, 2, 10, 1e3, 1e5]), logs, logs, indexing="ij")
    )
    out = np.empty(len(x), "f")
    by_m = np.empty((len(x), 1), "f")
    by_r = np.empty((len(x), 1), "f")
    # A cell of one gene: without a bound (curve 0), and with x as its own size factor taken out of
    # the head.
    size = np.where(x > 0, x, 1).astype("f")
    head = (m - np.log(size)).astype("f")
    # the kernel's size is the sum of x; a second gene would blur it
    for i in range(len(x)):
        if x[i] == 0:
            continue
        kernels._nb(
            x[i : i + 1, None],
            head[i : i + 1, None],
            r[i : i + 1, None],
            np.float32(1),
            np.float32(0),
            np.float32(1),
            out[i : i + 1],
            by_m[i : i + 1],
            by_r[i : i + 1],
        )
    used = x > 0
    seen = (head + np.log(size)).astype("f")
    truth = np.array([exact(*p) for p in zip(x[used], seen[used], r[used])])
    # log_size and the head add up in float32
    slack = 4e-7 * np.abs(seen[used]).clip(1) * np.abs(truth[:, 1])
    assert np.all(
        np.abs(out[used] - truth[:, 0]) <= 1e-5 * np.maximum(1, np.abs(truth[:, 0])) + slack
    )
    assert np.isfinite(by_m[used]).all() and np.isfinite(by_r[used]).all()


def test_the_terms_of_zeros_against_fifty_digits():
    logs = np.r_[np.log(10.0) * np.arange(-6, 9), -20, 20].astype("float32")
    m, r = (v.ravel().copy() for v in np.meshgrid(logs, logs, indexing="ij"))
    work, value, by_m, by_r = np.empty((4, len(m)), "f"), *(np.empty_like(m) for _ in range(3))

    kernels._at_zeros(
        np.zeros_like(m),
        m,
        r,
        np.float32(0),
        np.float32(0),
        np.float32(1),
        *work,
        value,
        by_m,
        by_r,
    )
    truth = np.array([exact(0, *p) for p in zip(m, r)]).T
    for got, true in zip((value, by_m, by_r), truth):
        np.testing.assert_allclose(got, true, rtol=5e-6, atol=1e-12)


def test_not_a_number_is_not_hidden(batch):
    a, b = heads(batch.shape)
    a[3, 17] = np.nan
    assert np.isnan(np.asarray(fast(batch, a, b))).nonzero()[0].tolist() == [3]
    a, b = heads(batch.shape)
    b[5, np.flatnonzero(batch[5])[0]] = np.nan
    assert np.isnan(np.asarray(fast(batch, a, b))).nonzero()[0].tolist() == [5]


def trained(adata, name, path, steps=4, **settings):
    with kernels.use_path(path):
        model = getattr(models, name)(adata, n_genes=300, n_latent=6, hidden=(32, 16), **settings)
        training.compile_network(model.network, 1e-2)
        model.before = model.network.get_weights()
        losses = [
            model.network.train_on_batch(model.X.dense((np.arange(64) + 20 * i) % 100))
            for i in range(steps)
        ]
        evaluated = model.network.test_on_batch(model.X[:].toarray())
    return model, np.ravel(losses), np.ravel(evaluated)


SMALL = {
    "VAMP": dict(n_pseudo_inputs=9),
    "VAMPIAF": dict(n_pseudo_inputs=9, flow_hidden=(16,), n_flow_steps=2),
    "HVAMP": dict(n_pseudo_inputs=9),
    "IAF": dict(flow_hidden=(16, 16), n_flow_steps=2),
}


@pytest.mark.parametrize("name", ["AE", "VAE", "IAF", "VAMP", "VAMPIAF", "HVAMP"])
def test_the_fused_step_is_the_plain_step(adata, name):
    settings = SMALL.get(name, {})
    (one, losses, evaluated), (other, plain, plainly) = (
        trained(adata, name, path, **settings) for path in ("compiled", "plain")
    )
    assert kernels.adds_penalty_gradient(one.network.optimizer, traced=True)
    # the loss of a cell is some 900, the KL term some 5
    np.testing.assert_allclose(losses, plain, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(evaluated, plainly, rtol=1e-5, atol=2e-4)
    moved = 0
    begun = dict(zip((w.path for w in other.network.weights), other.before, strict=True))
    for v, w in zip(one.network.trainable_variables, other.network.trainable_variables):
        difference = np.abs(np.asarray(v.value) - np.asarray(w.value))
        # Adam can turn the sign of a gradient that is rounding alone
        assert difference.mean() < 2e-5, v.path
        moved += np.abs(np.asarray(v.value) - begun[w.path]).max() > 1e-3
    assert moved > 0.8 * len(one.network.trainable_variables)


def test_one_step_of_adam_with_its_penalties_by_hand():
    """In float64 from the formulas; the two penalties differ, so that they cannot be taken for each
    other.
    """
    rng = np.random.default_rng(0)
    w, g, m = rng.normal(0, 1, (3, 50)).astype("float32")
    v = rng.gamma(1.0, 1.0, 50).astype("float32")
    l1 = 0.3
    l2 = 0.07
    rate = 0.2
    low = -0.5
    gradient = g.astype("float64") + l1 * np.sign(w) + 2 * l2 * w
    first = 0.9 * m + 0.1 * gradient
    second = 0.999 * v + 0.001 * gradient**2
    moved = np.maximum(w - rate * first / (np.sqrt(second) + 1e-7), low)
    penalty = l1 * np.abs(w).sum(dtype="float64") + l2 * np.square(w).sum(dtype="float64")
    assert kernels._penalty(w, np.float32(l1), np.float32(l2)) == pytest.approx(penalty, rel=1e-5)
    kernels._adam_stretch(w, g, m, v, *map(np.float32, (rate, 0.1, 0.001, 1e-7, l1, l2, low)))
    for found, truth in ((m, first), (v, second), (w, moved)):
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
    assert (moved == low).any() and (moved > low).any()


def test_the_penalty_counts_in_value_and_step(adata):
    "With no likelihood to speak of, the weights must shrink as the penalty says."
    weak, strong = (trained(adata, "VAE", "compiled", l1=l, l2=l) for l in (0.0, 10.0))

    def size(model):
        return sum(
            np.abs(np.asarray(v.value)).sum()
            for v in model.network.trainable_variables
            if v.regularizer is not None
        )

    assert size(strong[0]) < 0.9 * size(weak[0])
    with kernels.use_path("compiled"):
        network = strong[0].network
        np.testing.assert_allclose(
            kernels.penalty(network.trainable_variables), sum(network.losses), rtol=1e-5
        )


def test_pseudo_inputs_stay_expressions(adata):
    model, _, _ = trained(adata, "VAMP", "compiled", steps=8, n_pseudo_inputs=9)
    pseudo = np.asarray(model.network.prior.pseudo_inputs.value)
    assert pseudo.min() == 0 and pseudo.max() > 0.1


def test_eager_steps_take_the_plain_way(adata):
    losses = []
    for eager in (False, True):
        model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
        training.compile_network(model.network, 1e-2)
        model.network.run_eagerly = eager
        losses.append([model.network.train_on_batch(model.X[:64].toarray()) for _ in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_arrays_given_to_a_network_are_not_written_to(adata):
    """The fused step works where the weights lie; what the user handed in or took out must not lie
    there.
    """
    model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
    given = model.network.get_weights()
    model.network.set_weights(given)
    copies = [w.copy() for w in given]
    held = tf.convert_to_tensor(model.network.trainable_variables[0].value)
    seen = held.numpy().copy()
    model.train(max_epochs=2, progress=False)
    for w, copy in zip(given, copies):
        np.testing.assert_array_equal(w, copy)
    np.testing.assert_array_equal(held.numpy(), seen)
    assert np.abs(model.network.get_weights()[0] - copies[0]).max() > 1e-4


def test_weights_given_between_epochs_are_not_written_to(adata):
    model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
    given = []

    class Give(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            given.append(self.model.get_weights())
            self.model.set_weights(given[-1])
            given.append([w.copy() for w in given[-1]])

    model.train(max_epochs=3, progress=False, callbacks=[Give()])
    for w, copy in zip(given[::2], given[1::2]):
        for p, q in zip(w, copy):
            np.testing.assert_array_equal(p, q)


def test_the_path_can_be_chosen(monkeypatch):
    assert kernels.compiled() and kernels.updates_in_place()
    with kernels.use_path("plain"):
        assert not kernels.compiled()
        with kernels.use_path("compiled"):
            assert kernels.compiled()
        assert not kernels.compiled()
    assert kernels.compiled()
    with pytest.raises(ValueError, match="auto, compiled, plain"):
        with kernels.use_path("fast"):
            pass
    monkeypatch.setattr(kernels, "_chosen", "quick")  # as VAMPSC_PATH=quick
    with pytest.raises(ValueError, match="VAMPSC_PATH"):
        kernels.compiled()


def test_functions_that_run_eagerly_are_not_remembered():
    kernels._shares_memory.cache_clear()
    tf.config.run_functions_eagerly(True)
    try:
        assert not kernels.updates_in_place()
    finally:
        tf.config.run_functions_eagerly(False)
    assert kernels.updates_in_place()


def test_several_devices_take_the_plain_path():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        assert not kernels.compiled()


def test_a_compiled_function_is_the_function():
    @kernels.jit()
    def twice(x):
        return 2 * x

    assert twice(3) == 6
