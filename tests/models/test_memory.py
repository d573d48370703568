"""What is left in memory of a model that nobody holds any more."""

import gc
import weakref

import keras
import pytest

from vampsc import kernels, models, organs

SMALL = dict(n_genes=100, n_latent=3, hidden=(8,))


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:60].copy()


def left(make):
    "The names of the parts that outlive a model: its network and its counts."
    model = make()
    parts = {"network": weakref.ref(model.network), "counts": weakref.ref(model.X)}
    del model
    gc.collect()
    return {name for name, part in parts.items() if part() is not None}


@pytest.mark.slow
def test_counts_and_network_go_with_the_model(adata):
    def trained():
        return models.VAE(adata, **SMALL).train(max_epochs=1, progress=False)

    def used():
        model = trained()
        # so many draws are compiled as a whole
        model.get_elbo(n_mc_samples=30)
        model.get_normalized_expression()
        return model

    assert left(lambda: models.VAE(adata, **SMALL)) == set()
    assert left(trained) == set()
    assert (
        left(lambda: models.VAE(adata, **SMALL).train(max_epochs=2, kl_warmup=1, progress=False))
        == set()
    )
    assert left(used) == set()


def test_counts_go_where_training_ended_early(adata):
    def interrupted():
        model = models.VAE(adata, **SMALL)
        with pytest.raises(FloatingPointError):
            model.train(max_epochs=2, learning_rate=1e30, progress=False)
        return model

    assert left(interrupted) == set()


def dense_copies(shape):
    "How many arrays of this shape TensorFlow holds."
    import tensorflow as tf

    # type() and not isinstance: among all objects are proxies of what is gone, whose class cannot
    # be read
    tensors = [o for o in gc.get_objects() if issubclass(type(o), tf.Tensor)]
    return sum(hasattr(o, "numpy") and o.shape == shape for o in tensors)


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="TensorFlow does not free what its functions know",
)
@pytest.mark.parametrize("resident", [kernels.MAX_DENSE_BYTES, 0])
def test_no_copy_of_the_counts_stays(adata, monkeypatch, resident):
    "Neither the dense one of small data nor the sparse one of large data."
    monkeypatch.setattr(kernels, "MAX_DENSE_BYTES", resident)
    sparse = []

    class Watched(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            sparse.extend(map(weakref.ref, self.model.reader.references))

    model = models.VAE(adata, **SMALL)
    shape = model.X.shape
    gc.collect()
    before = dense_copies(shape)
    model.train(max_epochs=1, progress=False, callbacks=[Watched()])
    del model
    gc.collect()
    assert dense_copies(shape) == before
    assert len(sparse) == (resident == 0) and all(ref() is None for ref in sparse)
