"""Several devices: two train as one does with the same batches.

on_devices.py runs in processes of its own.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from vampsc.devices import Sharing

SCRIPT = Path(__file__).parents[1] / "support" / "on_devices.py"
SECONDS = 400


def run(*commands, **environment):
    "What each of these runs of on_devices.py found. They run side by side, and end together."
    env = {
        k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.lower().endswith("_proxy")
    } | environment
    with tempfile.TemporaryDirectory() as folder:
        logs = [
            (open(f"{folder}/{i}.out", "w+"), open(f"{folder}/{i}.err", "w+"))
            for i in range(len(commands))
        ]
        runs = [
            subprocess.Popen(
                [sys.executable, SCRIPT, *map(str, c)], env=env, stdout=out, stderr=err
            )
            for c, (out, err) in zip(commands, logs)
        ]
        end = time.monotonic() + SECONDS
        # one that fails leaves the others waiting for it
        try:
            while (
                None in (codes := [r.poll() for r in runs])
                and not any(codes)
                and time.monotonic() < end
            ):
                time.sleep(0.2)
        finally:
            for r in runs:
                r.kill()
                r.wait()
        for code, (_, err) in zip(codes, logs):
            err.seek(0)
            assert not code, err.read()[-3000:]
        assert None not in codes, f"not ready after {SECONDS} s"
        for out, _ in logs:
            out.seek(0)
        return [json.loads(out.read().strip().splitlines()[-1]) for out, _ in logs]


def assert_same(one, two):
    for key in ("loss", "val_loss"):
        assert np.allclose(one[key], two[key], rtol=1e-4), key
    assert np.allclose(one["weights"], two["weights"], rtol=1e-3, atol=1e-4)
    assert np.allclose(one["latent"], two["latent"], rtol=1e-3, atol=1e-3)


def test_equal_parts_and_nothing_twice():
    cells = np.arange(131)
    parts = [Sharing(4, 2, k).part(cells) for k in range(2)]
    assert np.array_equal(np.concatenate(parts), cells[:128]) and len(parts[0]) == 64
    assert np.array_equal(Sharing().part(cells), cells)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch_size=100 .* 8 devices; take batch_size=104"):
        Sharing(8).check(100)
    with pytest.raises(ValueError, match="3 validation cells are too few for 4"):
        Sharing(4).check(8, validation=range(3))


# a process of its own: two devices must be there before TensorFlow starts
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def mirrored():
    return run(["tensorflow"])[0]


@slow
def test_two_replicas_train_as_one_device(mirrored):
    assert_same(mirrored["one"], mirrored["all"])


@slow
def test_the_cell_that_is_left_out_hardly_matters(mirrored):
    "Of 243 training and 30 validation cells, two devices leave out one training cell a pass."
    assert np.allclose(mirrored["one, uncut"]["loss"], mirrored["all"]["loss"], rtol=5e-3)


@slow
def test_with_noise_the_curves_differ_as_between_seeds(mirrored):
    """Over 12 seeds of the noise, the standard deviation of an epoch's loss was 1 % of it, on one
    device and on two.
    """
    assert np.allclose(np.mean(mirrored["noisy one"], 0), mirrored["noisy all"], rtol=0.04)


@slow
def test_a_weight_of_the_kl_term_that_rises_reaches_all_replicas(mirrored):
    """Less the two terms at that weight, the loss is the penalty, which hardly changes; the KL is
    some ten nats.
    """
    assert np.ptp(mirrored["noisy all, penalty"]) < 0.1 * mirrored["noisy all, penalty"][0] + 0.05


@slow
def test_replicas_draw_noise_and_dropout_of_their_own(mirrored):
    for first, second in mirrored["own draws"]:
        assert not np.allclose(first, second)
    # Keras; else separate_noise can go
    for first, second in mirrored["shared draws"]:
        assert np.allclose(first, second)


@slow
def test_errors_under_a_strategy_say_what_to_do(mirrored):
    assert "take batch_size=64" in mirrored["odd batch"]
    assert "make or load it within the scope" in mirrored["made outside"]


@slow
def test_two_processes_train_as_one_device(tmp_path):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed; pip install 'vampsc[jax]'")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    first, second = run(
        *(["jax", address, 2, rank] for rank in range(2)), FOLDER=str(tmp_path / "model")
    )
    assert first["first"] and not second["first"] and first["epochs"] == second["epochs"] == 4
    # noise and dropout too: on JAX they are drawn for the whole batch
    assert_same(first["one"], first["all"])
    assert (
        first["all"]["loss"] == second["all"]["loss"]
        and first["all"]["weights"] == second["all"]["weights"]
    )
    # written once, and whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
