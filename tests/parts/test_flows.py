"""The inverse autoregressive flow against its own full Jacobian, by autodiff."""

import keras
import numpy as np
import pytest
from autodiff import jacobian
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from scipy import special, stats

from vampsc.assembly import Architecture, build_network
from vampsc.flows import (
    MADE,
    IAFPosterior,
    InverseAutoregressiveFlow,
    MaskedDense,
    iaf_step,
    made_masks,
)
from vampsc.networks import new_seeds

CONTEXT = 6


def draws(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("float32")


def scramble(layer, seed=0, scale=1.0):
    "Random weights everywhere but in the masks: also where a mask must hide them."
    rng = np.random.default_rng(seed)
    for w in layer.trainable_weights:
        width = w.shape[0] if len(w.shape) == 2 else 4
        w.assign(rng.normal(0, scale / np.sqrt(width), w.shape))


def flow(d, steps=1, hidden=(40, 40), seed=0, scrambled=True):
    made = InverseAutoregressiveFlow(d, new_seeds(seed), steps, hidden)
    made.build((None, d), (None, CONTEXT))
    if scrambled:
        scramble(made, seed)
    return made


# ---- masks


@pytest.mark.parametrize(
    "d, hidden",
    [(2, (3,)), (3, (4, 4)), (5, (4, 9)), (8, (40, 30)), (32, (320, 320)), (128, (320, 320))],
)
def test_masks(d, hidden):
    masks = made_masks(d, hidden)
    assert [m.shape for m in masks] == list(zip((d, *hidden), (*hidden, d)))
    assert all(m.dtype == np.float32 and np.isin(m, (0, 1)).all() for m in masks)
    paths = np.linalg.multi_dot([m.astype("float64") for m in masks])
    # Input i reaches output j for all i < j, and for no other: strictly triangular, and no
    # connection wasted.
    assert np.array_equal(paths > 0, np.triu(np.ones((d, d), bool), 1))


@given(st.integers(2, 20), st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_masks_of_any_shape(d, hidden):
    masks = [m.astype("float64") for m in made_masks(d, hidden)]
    paths = masks[0]
    for m in masks[1:]:
        paths = paths @ m
    # autoregressive whatever the widths
    assert not np.tril(paths).any()
    # see test_no_dead_units_in_narrow_layers
    if min(hidden) < d - 1:
        return
    # no dead unit: each is read, each reads
    for before, after in zip(masks, masks[1:]):
        assert before.any(0).all() and after.any(1).all()


@pytest.mark.parametrize("hidden", [(8, 4), (4, 4)])
def test_no_dead_units_in_narrow_layers(hidden):
    "Every input but the last reaches an output, every hidden unit is read."
    masks = made_masks(8, hidden)
    assert masks[0].any(1)[:-1].all() and all(m.any(1).all() for m in masks[1:])


def test_masks_are_the_same_each_time():
    assert all(map(np.array_equal, made_masks(7, (20, 20)), made_masks(7, (20, 20))))


@pytest.mark.parametrize("d", [0, 1])
def test_one_unit_is_refused(d):
    with pytest.raises(ValueError, match="at least 2"):
        made_masks(d, (4,))
    if d:
        with pytest.raises(ValueError, match="at least 2"):
            IAFPosterior(d, new_seeds(0))


def test_masked_dense():
    mask = np.triu(np.ones((4, 5), "float32"))
    layer = MaskedDense(mask, 3, bias=0.5, regularizer=keras.regularizers.L1L2(0.1, 0.2))
    kernel = np.asarray(layer.kernel, "float64")
    assert (kernel[mask == 0] == 0).all() and (kernel[mask == 1] != 0).all()
    assert float(sum(layer.losses)) == pytest.approx(
        0.1 * np.abs(kernel).sum() + 0.2 * (kernel**2).sum(), rel=1e-5
    )
    scramble(layer)
    z = draws(6, 4)
    kernel = np.asarray(layer.kernel, "float64") * mask
    np.testing.assert_allclose(layer(z), z @ kernel + np.asarray(layer.bias), rtol=1e-5, atol=1e-6)
    assert [w.path for w in layer.non_trainable_weights] == [layer.mask.path]


# ---- one step


@given(st.floats(-80, 80, width=32), st.floats(-5, 5, width=32), st.floats(-5, 5, width=32))
def test_step_formula(s, m, z):
    new, log_diagonal = iaf_step(*(np.full((1, 1), v, "float32") for v in (z, m, s)))
    assert float(new[0, 0]) == pytest.approx(
        special.expit(s) * z + special.expit(-s) * m, rel=1e-5, abs=1e-5
    )
    # no floor, no epsilon
    assert float(log_diagonal[0, 0]) == pytest.approx(special.log_expit(s), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("d", [2, 3, 8, 32, 128, 256])
def test_one_step_is_triangular(d):
    made = flow(d, hidden=(max(40, 2 * d),) * 2).steps[0]
    z = draws(5, d, scale=2)
    context = draws(5, CONTEXT, seed=1)

    def step(z):
        m, s = made(z, context)
        out, log_diagonal = iaf_step(z, m, s)
        return out, s, log_diagonal

    found, (s, log_diagonal) = jacobian(step, z)
    # exactly: unit i does not see z_j, j > i
    assert (found[:, *np.triu_indices(d, 1)] == 0).all()
    diagonal = np.diagonal(found, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal, special.expit(s), rtol=1e-5)
    np.testing.assert_allclose(log_diagonal, special.log_expit(s), rtol=1e-5)
    below = np.abs(found[:, *np.tril_indices(d, -1)]).max(0)
    # the earlier units are seen, but for idle relus
    assert (below > 0).mean() > 0.9


def test_gates_and_shifts_of_a_unit_see_the_earlier_units_only():
    made = flow(8).steps[0]
    z = draws(4, 8)
    context = draws(4, CONTEXT, seed=1)
    for output in (0, 1):
        found = jacobian(lambda z: (made(z, context)[output],), z)[0]
        assert (found[:, *np.triu_indices(8)] == 0).all() and (
            np.abs(found).max(0)[np.tril_indices(8, -1)] > 0
        ).all()


@pytest.mark.parametrize("d", [2, 8])
def test_every_unit_depends_on_the_context(d):
    "Unit 0 too, which sees nothing else: in its shift and in its gate."
    made = flow(d).steps[0]
    z = draws(5, d)
    context = draws(5, CONTEXT, seed=1)
    for output in (0, 1):
        found = jacobian(lambda context: (made(z, context)[output],), context)[0]
        assert (found != 0).all((0, 2)).all() and (found[:, 0] != 0).all()


def test_made_by_hand():
    "Masked kernels, relu, and the context added in every layer, the last included."
    made = flow(5, hidden=(7, 9)).steps[0]
    z = draws(4, 5)
    context = draws(4, CONTEXT, seed=1).astype("float64")
    h = z.astype("float64")
    for mask, layer, side in zip(made_masks(5, (7, 9)), made.inner, made.context):
        h = np.maximum(
            h @ (mask * np.asarray(layer.kernel))
            + np.asarray(layer.bias)
            + context @ np.asarray(side.kernel),
            0,
        )
    top = np.hstack([made_masks(5, (7, 9))[-1]] * 2) * np.asarray(made.outer.kernel, "float64")
    truth = (
        h @ top
        + np.asarray(made.outer.bias)
        + context @ np.asarray(made.outer_context.kernel)
        + np.asarray(made.outer_context.bias)
    )
    np.testing.assert_allclose(
        np.hstack(made(z, context.astype("float32"))), truth, rtol=1e-4, atol=1e-5
    )


def test_gates_start_open():
    "At z = 0 and without context the gate logit is its bias, between 1 and 2, and the shift is 0."
    m, s = flow(6, scrambled=False).steps[0](
        np.zeros((1, 6), "float32"), np.zeros((1, CONTEXT), "float32")
    )
    assert (np.asarray(m) == 0).all() and ((1 <= np.asarray(s)) & (np.asarray(s) <= 2)).all()


# ---- the whole flow


@pytest.mark.parametrize(
    "d, steps", [(d, steps) for d in (2, 3, 8, 32) for steps in (1, 2, 5)] + [(128, 2), (3, 9)]
)
def test_log_determinant_is_that_of_the_jacobian(d, steps):
    made = flow(d, steps)
    found, (log_det,) = jacobian(lambda z: made(z, draws(5, CONTEXT, seed=1)), draws(5, d, scale=2))
    sign, truth = np.linalg.slogdet(found)
    np.testing.assert_allclose(log_det, truth, rtol=1e-4, atol=1e-4 * steps)
    # Each of the steps - 1 reversals of d units has determinant (-1)^(d // 2).
    assert (sign == (-1) ** (d // 2 * (steps - 1))).all()
    assert log_det.std() > 1e-3  # it varies from cell to cell


def test_order_is_reversed_between_steps():
    "Two steps by hand: the second sees the units in reverse."
    made = flow(5, 2)
    z = draws(3, 5)
    context = draws(3, CONTEXT, seed=1)
    one, a = iaf_step(z, *made.steps[0](z, context))
    one = np.asarray(one)[:, ::-1].copy()
    two, b = iaf_step(one, *made.steps[1](one, context))
    out, log_det = made(z, context)
    np.testing.assert_allclose(out, two, atol=1e-6)
    # in the order of the units at the end
    by_unit = np.asarray(a)[:, ::-1] + np.asarray(b)
    np.testing.assert_allclose(log_det, by_unit.sum(1), rtol=1e-5)
    bent = made.transform(z, np.float32([[1, 2, 3, 4, 5]]) + 0 * z, context)
    np.testing.assert_allclose(bent[0], two, atol=1e-6)
    np.testing.assert_allclose(bent[1], np.arange(5, 0, -1) - by_unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d, steps", [(2, 1), (2, 5), (3, 2), (8, 5), (32, 2)])
def test_inverse(d, steps):
    made = flow(d, steps)
    z = draws(20, d)
    context = draws(20, CONTEXT, seed=1)
    # a step that nearly closes its gates has no inverse
    scramble(made, scale=0.4)
    forth = made(z, context)[0]
    np.testing.assert_allclose(made.inverse(forth, context), z, atol=1e-3)
    np.testing.assert_allclose(made(made.inverse(z, context), context)[0], z, atol=1e-3)
    assert np.abs(np.asarray(forth) - z).max() > 0.1


def test_cells_do_not_mix():
    made = flow(8, 3)
    z = draws(6, 8)
    context = draws(6, CONTEXT, seed=1)
    together = made(z, context)
    alone = made(z[2:3], context[2:3])
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a[2:3], b, rtol=1e-5, atol=1e-5)


# ---- the posterior


def posterior(d=4, steps=3, seed=0, hidden=(20, 20)):
    made = IAFPosterior(d, new_seeds(seed), steps, hidden)
    made.build((None, CONTEXT))
    return made


def test_log_q_is_the_density_of_the_bent_sample():
    """Change of variables from the noise itself: log N(noise) - log|det dz/dnoise|, all of it by
    autodiff.
    """
    made = posterior()
    h = draws(6, CONTEXT)
    noise = draws(6, 4, seed=1)
    scramble(made)
    found, (log_q,) = jacobian(lambda noise: made.sample(made(h), noise), noise)
    truth = stats.norm.logpdf(noise.astype("float64")).sum(1) - np.linalg.slogdet(found)[1]
    np.testing.assert_allclose(log_q, truth, rtol=1e-4, atol=5e-4)


def test_density_integrates_to_one():
    "q(z|x) in two dimensions, at every point of a grid, through the inverse."
    made = posterior(d=2, steps=2)
    scramble(made.flow, 4)
    made.mean.bias.assign([0.5, -0.3])
    h = draws(1, CONTEXT, seed=3)
    mean, log_var, _ = (np.asarray(p, "float64") for p in made(h))
    axis = np.linspace(-6, 6, 241)
    z = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype("float32")
    start = np.asarray(made.flow.inverse(z, np.repeat(h, len(z), 0)))
    log_det = np.asarray(made.flow(start, np.repeat(h, len(z), 0))[1], "float64")
    q = np.exp(stats.norm.logpdf(start, mean, np.exp(log_var / 2)).sum(1) - log_det)
    edge = np.abs(z).max(1) > 5.9
    assert q[edge].max() < 1e-4 * q.max()  # the grid holds all of it
    assert q.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=5e-3)


def test_parameters_are_the_base_gaussian_and_the_context():
    made = posterior()
    h = draws(6, CONTEXT)
    mean, log_var, context = made(h)
    assert np.array_equal(context, h) and not made.exact_mean
    np.testing.assert_allclose(mean, h @ np.asarray(made.mean.kernel), atol=1e-5)
    assert np.asarray(log_var).shape == (6, 4)


# ---- saved, loaded, trained


class Wrapped(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, shape):
        self.built = True


def test_density_at_a_given_point_is_not_that_of_the_base_gaussian():
    made = posterior()
    with pytest.raises(NotImplementedError, match="flow.inverse"):
        made.log_prob(draws(6, 4), made(draws(6, CONTEXT)))


def test_saved_and_loaded_weights_give_the_same_outputs(tmp_path):
    one, other = (Wrapped(posterior(d=5, seed=s)) for s in (0, 1))
    one.build(None), other.build(None)
    scramble(one)
    h = draws(6, CONTEXT)
    noise = draws(6, 5, seed=1)

    def outputs(model):
        return [np.asarray(v) for v in model.layer.sample(model.layer(h), noise)]

    assert not any(map(np.array_equal, outputs(one), outputs(other)))
    one.save_weights(tmp_path / "flow.weights.h5")
    other.load_weights(tmp_path / "flow.weights.h5")
    assert all(map(np.array_equal, outputs(one), outputs(other)))


def test_masks_travel_with_the_weights():
    "A model made with other masks (an older rule, say) is the saved one again after set_weights."
    one = MADE(4, new_seeds(0), (6, 6))
    other = MADE(4, new_seeds(1), (6, 6))
    for made in (one, other):
        made.build((None, 4), (None, CONTEXT))
    scramble(one)
    for layer in (*other.inner, other.outer):
        layer.mask.assign(1 - np.asarray(layer.mask))
    other.set_weights(one.get_weights())
    z = draws(5, 4)
    context = draws(5, CONTEXT)
    assert all(map(np.array_equal, one(z, context), other(z, context)))


@pytest.mark.long
def test_masked_weights_stay_zero_in_training():
    network = build_network(
        Architecture("iaf", n_latent=6, hidden=(12,), n_flow_steps=2, flow_hidden=(16, 16)), 10
    )
    network.compile(
        optimizer=keras.optimizers.Adam(1e-2), jit_compile=keras.backend.backend() == "jax"
    )
    layers = [layer for made in network.posterior.flow.steps for layer in (*made.inner, made.outer)]
    before = [np.asarray(layer.kernel).copy() for layer in layers]
    x = np.random.default_rng(0).poisson(2.0, (32, 10)).astype("float32") + np.eye(
        1, 10, dtype="float32"
    )
    for _ in range(5):
        network.train_on_batch(x)
    for layer, old in zip(layers, before):
        kernel = np.asarray(layer.kernel)
        mask = np.asarray(layer.mask)
        assert (kernel[mask == 0] == 0).all() and (mask == 0).any()
        assert (kernel[mask == 1] != old[mask == 1]).mean() > 0.9  # the others learn
    masks = [
        m
        for made in network.posterior.flow.steps
        for m in (lambda *a, b: (*a, np.hstack([b, b])))(
            *made_masks(6, (16, 16))[:-1], b=made_masks(6, (16, 16))[-1]
        )
    ]
    assert all(np.array_equal(layer.mask, m) for layer, m in zip(layers, masks, strict=True))


def test_seed_decides():
    one, same, other = (posterior(seed=s).get_weights() for s in (0, 0, 1))
    assert all(map(np.array_equal, one, same)) and not all(map(np.array_equal, one, other))
    assert ops.shape(posterior().flow.steps[0].outer.kernel) == (20, 8)
