"""Training: the optimiser, the schedule and the history."""
import keras
import numpy as np
import pytest
import tensorflow as tf

from vampsc import models, organs, training
from vampsc.counts import Batches


@pytest.fixture(scope="module")
def adata(): return organs.load("pancreas")


def small(adata, **more): return models.VAE(adata, n_genes=200, n_latent=4, hidden=(32, 16), **more)


def test_the_paper_profile_has_the_papers_numbers():
    paper = training.PROFILES["paper"]
    assert (paper.learning_rate, paper.lr_patience, paper.patience, paper.n_genes) == (5e-5, 10, 100, None)


def test_fused_adam_makes_the_steps_of_adam_on_a_real_model(adata):
    weights = []
    for optimizer in (training.FusedAdam(1e-3), keras.optimizers.Adam(1e-3)):
        network = small(adata, dropout=0.0).network
        x = small(adata).X[:64].toarray()
        network.compile(optimizer=optimizer, jit_compile=False)
        for _ in range(5): network.train_on_batch(x)
        weights.append(network.get_weights())
    # Where a gradient is rounding noise, Adam makes a full step of it, in whatever direction: these few weights may differ.
    for fused, plain in zip(*weights):
        assert np.isclose(fused, plain, atol=2e-5).mean() > 0.999 and np.abs(fused - plain).max() <= 5 * 2e-3


def test_fused_adam_counts_steps_and_takes_a_new_learning_rate():
    w = keras.Variable(np.ones(3, "float32"))
    optimizer = training.FusedAdam(0.1)
    optimizer.apply([tf.ones(3)], [w])
    assert int(optimizer.iterations) == 1 and np.allclose(w, 0.9, atol=1e-4)         # Adam's first step is the rate
    optimizer.learning_rate = 0.0
    optimizer.apply([tf.ones(3)], [w])
    assert np.allclose(w, 0.9, atol=1e-4)


def test_learning_rate_halves_and_training_stops_without_improvement(adata):
    model = small(adata)
    profile = training.Profile(learning_rate=1e-12, lr_patience=2, patience=6, max_epochs=50)
    history = model.train(profile, progress=False).history
    assert 6 < len(history) < 50                                    # nothing is learnt at this rate, so it stops early
    rates = history["learning_rate"].to_numpy()
    assert set(np.round(rates[1:] / rates[:-1], 3)) == {0.5, 1.0}


def test_the_best_weights_come_back(adata):
    model = small(adata)

    class Spoil(keras.callbacks.Callback):
        "After the third epoch, the weights go bad, as if training had diverged."
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2: self.best = [w.copy() for w in self.model.get_weights()]

        def on_epoch_begin(self, epoch, logs=None):
            if epoch >= 3:
                self.model.optimizer.learning_rate = 1e-9                     # no way back
                for w in self.model.decoder.trainable_variables: w.assign(w * 0.7)

    spoil = Spoil()
    model.train(max_epochs=5, progress=False, callbacks=[spoil])
    best = int(model.history["val_loss"].idxmin())
    assert best == 3
    kernel = model.network.decoder.log_rate.kernel.numpy()
    assert any(kernel.shape == w.shape and np.array_equal(kernel, w) for w in spoil.best)


def test_history_has_a_row_an_epoch(adata):
    history = small(adata).train(max_epochs=3, progress=False).history
    assert list(history.index) == [1, 2, 3] and history.index.name == "epoch"
    assert {"loss", "reconstruction", "kl", "val_loss", "val_reconstruction", "val_kl", "learning_rate", "seconds",
            "cells_seen"} <= set(history)
    assert list(history["cells_seen"]) == [1549, 3098, 4647]


def test_reported_losses_are_means_over_cells(adata):
    "Also with a short last batch: the validation reconstruction equals that of all validation cells at once."
    model = small(adata)
    net, cells = model.network, model.split.validation
    net.compile(optimizer=training.FusedAdam(1e-3), jit_compile=False)
    net.noise_seed = None
    fixed = np.random.default_rng(0).standard_normal((len(cells), 4)).astype("float32")
    net.call = lambda counts, training=False: net.terms(counts, np.zeros((1, 4), "float32"), None, training)
    logs = net.evaluate(Batches(model.X, cells, 60), verbose=0, return_dict=True)
    reconstruction, kl = net.terms(model.X[cells].toarray(), 0 * fixed, None)
    assert logs["reconstruction"] == pytest.approx(float(np.mean(reconstruction)), rel=1e-5)
    assert logs["kl"] == pytest.approx(float(np.mean(kl)), rel=1e-5)


def test_progress_says_losses_and_time_left(adata, capsys):
    training_lines = training.Progress("VAE", every=0.0)
    small(adata).train(max_epochs=2, progress=False, callbacks=[training_lines])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0].startswith("VAE: epoch 1/2, loss ") and "s left" in out[0]


def test_a_loss_that_is_not_finite_stops_with_advice(adata):
    model = small(adata)
    model.network.decoder.log_rate.bias.assign(np.full(200, np.nan, "float32"))
    with pytest.raises(FloatingPointError, match="learning_rate"): model.train(max_epochs=3, progress=False)


def test_epoch_k_sees_the_cells_in_order_k(adata, monkeypatch):
    seen, plain = [], training.Batches.__getitem__
    monkeypatch.setattr(training.Batches, "__getitem__", lambda self, b: (seen.append((self.shuffle, self.epoch)), plain(self, b))[1])
    small(adata).train(max_epochs=3, progress=False)
    training_epochs = [epoch for shuffled, epoch in seen if shuffled]
    n = -(-1549 // 128)
    counts = [training_epochs.count(k) for k in range(4)]
    assert counts[1:] == [n, n, 0] and counts[0] - n in (0, 2)           # Keras looks at two batches for their shape
