"""Many steps in one compiled call: the numbers are those of a plain loop."""

import keras
import numpy as np
import pandas as pd
import pytest

from vampsc import counts, kernels, models, training

BACKEND = keras.backend.backend()
SMALL = dict(n_genes=40, hidden=(8,), n_latent=4)
PRESETS = {
    "AE": {},
    "VAMP": {"n_pseudo_inputs": 6},
    "VAMPIAF": {"n_pseudo_inputs": 6, "n_flow_steps": 2, "flow_hidden": (8,)},
    "HVAMP": {"n_pseudo_inputs": 6},
}


class EachStep(keras.callbacks.Callback):
    "Somebody's callback that looks at each step."

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


@pytest.fixture(scope="module")
def adata():
    import anndata as ad

    rng = np.random.default_rng(0)
    cells = ad.AnnData(rng.poisson(3 * rng.gamma(1, 1, (113, 60))).astype("float32"))
    cells.var_names = [f"g{i}" for i in range(60)]
    cells.obs["donor"] = pd.Categorical(np.where(rng.random(113) < 0.5, "a", "b"))
    return cells


def trained(adata, name, monkeypatch, steps, callbacks=(), **settings):
    "A model of three epochs, so many steps a call; what each call was handed."
    calls = []
    monkeypatch.setattr(kernels, "steps_at_once", lambda *network: steps)
    given = training._Inputs.__getitem__

    def watch(self, i):
        item = given(self, i)
        calls.append((self.shuffle, self.epoch, item[0]))
        return item

    # 97 = 3 x 32 + 1: the last is of 33 cells
    split = counts.Split(np.arange(97), np.arange(97, 107), np.arange(107, 113))
    with monkeypatch.context() as patch:
        patch.setattr(training._Inputs, "__getitem__", watch)
        model = getattr(models, name)(adata, gene_space=None, split=split, **{**SMALL, **settings})
        model.train(
            max_epochs=3,
            batch_size=32,
            progress=False,
            callbacks=callbacks,
            learning_rate=1e-2,
            **({"kl_warmup": 2} if name != "AE" else {}),
        )
    return model, calls


def history(model):
    return model.history.drop(columns="seconds")


# The loop does not depend on the model, and JAX compiles for seconds; on TensorFlow the kernels of
# the likelihood, the penalty and the flow run inside it.
CASES = [("VAMP", 2)] + [("AE", 50), ("VAMPIAF", 50), ("HVAMP", 50)] * (BACKEND == "tensorflow")


@pytest.mark.parametrize("name, steps", CASES)
def test_the_same_numbers_as_step_by_step(adata, name, steps, monkeypatch):
    one, _ = trained(adata, name, monkeypatch, 1, **PRESETS[name])
    many, calls = trained(adata, name, monkeypatch, steps, **PRESETS[name])
    # XLA fuses a loop in another way
    same = dict(rtol=0, atol=0) if BACKEND == "tensorflow" else dict(rtol=2e-4)
    pd.testing.assert_frame_equal(history(one), history(many), **same)
    for a, b in zip(one.network.get_weights(), many.network.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    items = [len(item[0]) for shuffled, epoch, item in calls if shuffled and epoch == 2]
    assert items == ([64, 33] if steps == 2 else [97])


@pytest.mark.parametrize("encode_batch", [False, True] if BACKEND == "tensorflow" else [True])
def test_batches_of_cells_reach_each_step(adata, encode_batch, monkeypatch):
    how = dict(batch_key="donor", encode_batch=encode_batch, n_pseudo_inputs=6)
    one, _ = trained(adata, "VAMP", monkeypatch, 1, **how)
    many, _ = trained(adata, "VAMP", monkeypatch, 50, **how)
    np.testing.assert_allclose(
        one.history["val_loss"],
        many.history["val_loss"],
        rtol=0 if BACKEND == "tensorflow" else 2e-4,
    )


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="elsewhere, such counts are handed on minibatch by minibatch"
)
def test_counts_too_many_to_be_kept_dense(adata, monkeypatch):
    one, _ = trained(adata, "VAE", monkeypatch, 50)
    monkeypatch.setattr(kernels, "MAX_DENSE_BYTES", 100)
    many, calls = trained(adata, "VAE", monkeypatch, 50)
    np.testing.assert_allclose(
        one.history["val_loss"],
        many.history["val_loss"],
        rtol=0 if BACKEND == "tensorflow" else 2e-4,
    )


def test_who_looks_at_each_step_sees_each(adata, monkeypatch):
    watcher = EachStep()
    model, calls = trained(adata, "VAE", monkeypatch, 50, callbacks=[watcher])
    assert len(watcher.losses) == 9
    other, _ = trained(adata, "VAE", monkeypatch, 50)
    np.testing.assert_allclose(
        model.history["loss"], other.history["loss"], rtol=0 if BACKEND == "tensorflow" else 2e-4
    )


def test_epoch_k_sees_each_cell_once_in_order_k(adata, monkeypatch):
    _, calls = trained(adata, "VAE", monkeypatch, 2)
    for epoch in (1, 2):
        seen = np.concatenate([item[0] for shuffled, k, item in calls if shuffled and k == epoch])
        assert sorted(seen) == list(range(97)) and list(seen) != sorted(seen)
    assert list(seen) == list(np.random.default_rng([0, 2]).permutation(np.arange(97)))


@pytest.mark.parametrize("single_last, expected", [(False, [1, 3, 3, 4]), (True, [1, 3, 4, 4])])
def test_number_of_minibatches(single_last, expected):
    found = [
        int(kernels.number_of_minibatches(np.int32(n), 32, single_last)) for n in (32, 96, 97, 98)
    ]
    assert found == expected


def test_a_call_takes_less_where_a_step_takes_more():
    few, many = (kernels.steps_at_once(n, 128) for n in (40_000_000, 400_000))
    assert few == 1 and 50 < many < 1000


def test_what_training_needs_is_not_kept(adata, monkeypatch):
    model, _ = trained(adata, "VAE", monkeypatch, 50)
    assert model.network.reader is None and model.network.train_function is None


def test_what_is_looked_at():
    assert training.watches_steps(EachStep()) and not training.watches_steps(
        keras.callbacks.Callback()
    )
    assert not training.watches_steps(training.Progress("VAE"))
    assert training.watches_steps(keras.callbacks.LambdaCallback(on_train_batch_end=print))
    assert not training.watches_steps(keras.callbacks.LambdaCallback(on_epoch_end=print))


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="elsewhere, counts too many to be kept dense have no reader"
)
def test_a_reading_lets_go(adata, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_DENSE_BYTES", 0)
    reader = kernels.minibatch_reader(counts.Counts(adata.X), 32)
    assert isinstance(reader, kernels.MinibatchReader) and len(reader.references) == 1
    reader.release()
    assert reader.references == []


def test_compiled_steps_are_forgotten(adata):
    network = models.VAE(adata, gene_space=None, **SMALL).network
    network.train_function = network.reader = kernels.MinibatchReader(32, None)
    training.forget_compiled(network)
    assert network.train_function is None and network.reader is None
