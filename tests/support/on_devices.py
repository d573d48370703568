"""Trains on one device and on several in the same process, and prints what came out as one line of
JSON. See test_devices.

python on_devices.py tensorflow                         two logical CPU devices
python on_devices.py jax COORDINATOR NUMBER RANK        one of several processes
"""

import json
import os
import sys
from unittest import mock

kind = sys.argv[1]
process = sys.argv[2:]
os.environ |= {
    "KERAS_BACKEND": kind,
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
if kind == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
else:
    import jax

    jax.distributed.initialize(
        process[0], int(process[1]), int(process[2]), initialization_timeout=60
    )

import keras
import numpy as np

import vampsc
from vampsc import devices

# 243 for training, 30 for validation: no multiple of 64
CELLS = vampsc.organs.load("pancreas")[:303].copy()
SMALL = dict(n_genes=150, n_latent=4, hidden=(16,))


def train(model):
    return model.train(progress=False, max_epochs=3, batch_size=64, kl_warmup=2)


def outcome(model):
    weights = model.network.get_weights()
    h = model.history
    return {
        "loss": list(h["loss"]),
        "penalty": list(h["loss"] - h["reconstruction"] - h["kl_weight"] * h["kl"]),
        "val_loss": list(model.history["val_loss"]),
        "weights": [float(np.abs(w).sum()) for w in weights],
        "latent": np.abs(model.get_latent_representation()).sum(1, dtype="float64").tolist(),
    }


def on_one(make, cut=None, shift=0):
    "One device; cut: leave out the cells that so many devices would; shift: other noise."
    model = make()
    for v in model.network.variables:
        if v.path.endswith("seed_generator_state"):
            v.assign(v.value + np.array([1000 * shift, 0], v.dtype))
    with mock.patch.object(devices, "sharing", lambda: devices.Sharing(cut or 1)):
        return outcome(train(model))


def on_all(make):
    with devices.all_devices():
        model = train(make())
    return outcome(model)


def message(function, *arguments, **more):
    try:
        function(*arguments, **more)
    except ValueError as error:
        return str(error)
    return "no error"


def plain():
    return vampsc.AE(CELLS, dropout=0.0, **SMALL)


def noisy():
    return vampsc.VAE(CELLS, **SMALL)


if kind == "tensorflow":
    found = {"one": on_one(plain, cut=2), "one, uncut": on_one(plain), "all": on_all(plain)}
    found |= {
        "noisy one": [on_one(noisy, 2, shift)["loss"] for shift in range(3)],
        "noisy all": (of_all := on_all(noisy))["loss"],
        "noisy all, penalty": of_all["penalty"],
    }
    outside = plain()
    with devices.all_devices():
        model = noisy()
        found |= {
            "odd batch": message(model.train, batch_size=63),
            "made outside": message(outside.train),
        }
    strategy = model.network.distribute_strategy
    dropout = model.network.encoder.layers[-1]

    def draws():
        "What each replica draws: noise, and a dropout mask."

        def draw():
            return (
                keras.random.normal((8,), seed=model.network.noise_seed),
                dropout(tf.ones((1, 16)), training=True)[0],
            )

        return [
            [np.asarray(v).tolist() for v in strategy.experimental_local_results(drawn)]
            for drawn in strategy.run(tf.function(draw))
        ]

    found["shared draws"] = draws()
    with strategy.scope():
        devices.separate_noise(model.network)
    found["own draws"] = draws()
else:
    with devices.all_devices():
        model = train(noisy())
        found = {"all": outcome(model), "first": devices.is_first()}
        # alone: nobody waits for the others
        if devices.is_first():
            model.get_latent_representation(CELLS[:7].copy())
        # and on it goes, together
        model.train(progress=False, max_epochs=1, batch_size=64)
        found["epochs"] = len(model.history)
        model.save(os.environ["FOLDER"])
    if devices.is_first():
        found["one"] = on_one(noisy, cut=2)

print(json.dumps(found))
