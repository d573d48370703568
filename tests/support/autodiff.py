"""Derivatives by the backend's own automatic differentiation, in one form for all backends."""

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()


def tensors(arrays):
    return [ops.convert_to_tensor(np.asarray(a, "float32")) for a in arrays]


def gradients(function, *at):
    "The gradients of function(*at).sum() by each argument, float64 arrays."
    at = tensors(at)
    if BACKEND == "jax":
        import jax

        found = jax.grad(lambda *a: ops.sum(function(*a)), argnums=tuple(range(len(at))))(*at)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(at)
            total = ops.sum(function(*at))
        found = tape.gradient(total, at)
    else:
        pytest.skip(f"no gradients written for the {BACKEND} backend")
    return [np.asarray(g, "float64") for g in found]


def variable_gradients(function, variables):
    "The gradients of function().sum() by Keras variables."
    if BACKEND == "jax":
        import jax

        def total(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return ops.sum(function())

        found = jax.grad(total)([v.value for v in variables])
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            total = ops.sum(function())
        found = tape.gradient(total, [v.value for v in variables])
    else:
        pytest.skip(f"no gradients written for the {BACKEND} backend")
    return [np.asarray(g, "float64") for g in found]


def jacobian(function, z):
    """d out_i / d z_j within each cell (cells, out, in), float64, and what else function(z) = (out,
    *more) gives.
    """
    z = tensors([z])[0]
    if BACKEND == "jax":
        import jax

        found, more = jax.jacrev(
            lambda z: (lambda out, *more: (out, more))(*function(z)), has_aux=True
        )(z)
        found = np.asarray(found, "float64")[np.arange(len(z)), :, np.arange(len(z))]
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(z)
            out, *more = function(z)
        found = np.asarray(tape.batch_jacobian(out, z), "float64")
    else:
        pytest.skip(f"no Jacobians written for the {BACKEND} backend")
    return found, [np.asarray(v, "float64") for v in more]
