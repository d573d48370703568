"""Training: the optimiser, the schedule and the history."""

import contextlib
import io
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from vampsc import models, organs, training
from vampsc.counts import Batches, Split


@pytest.fixture(scope="module")
def adata():
    "200 cells, and the 400 genes that are expressed most."
    cells = organs.load("pancreas")[:200]
    return cells[:, np.sort(np.argsort(-np.asarray(cells.X.sum(0)).ravel())[:400])].copy()


def small(adata, **more):
    return models.VAE(adata, n_genes=200, n_latent=4, hidden=(16, 8), **more)


def test_the_paper_profile_has_the_papers_numbers():
    paper = training.PROFILES["paper"]
    assert (paper.learning_rate, paper.lr_patience, paper.patience, paper.n_genes) == (
        5e-5,
        10,
        100,
        None,
    )


@pytest.mark.long
def test_fused_adam_makes_the_steps_of_adam_on_a_real_model(adata):
    weights = []
    for optimizer in (training.FusedAdam(1e-3), keras.optimizers.Adam(1e-3)):
        model = small(adata, dropout=0.0)
        network = model.network
        x = model.X[:64].toarray()
        network.compile(optimizer=optimizer, jit_compile=False)
        for _ in range(5):
            network.train_on_batch(x)
        weights.append(network.get_weights())
    # Where a gradient is rounding noise, Adam makes a full step of it, in whatever direction: these
    # few weights may differ.
    for fused, plain in zip(*weights):
        assert (
            np.isclose(fused, plain, atol=2e-5).mean() > 0.999
            and np.abs(fused - plain).max() <= 5 * 2e-3
        )


def test_fused_adam_counts_steps_and_takes_a_new_learning_rate():
    w = keras.Variable(np.ones(3, "float32"))
    optimizer = training.FusedAdam(0.1)
    optimizer.apply([tf.ones(3)], [w])
    # Adam's first step is the rate
    assert int(optimizer.iterations) == 1 and np.allclose(w, 0.9, atol=1e-4)
    optimizer.learning_rate = 0.0
    optimizer.apply([tf.ones(3)], [w])
    assert np.allclose(w, 0.9, atol=1e-4)


def test_learning_rate_halves_and_training_stops_without_improvement(adata):
    model = small(adata)
    profile = training.Profile(learning_rate=1e-12, lr_patience=2, patience=6, max_epochs=50)
    history = model.train(profile, progress=False).history
    # nothing is learnt at this rate, so it stops early
    assert 6 < len(history) < 50
    rates = history["learning_rate"].to_numpy()
    assert set(np.round(rates[1:] / rates[:-1], 3)) == {0.5, 1.0}


def test_the_best_weights_come_back(adata):
    model = small(adata)

    class Spoil(keras.callbacks.Callback):
        "After the third epoch, the weights go bad, as if training had diverged."

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                self.best = [w.copy() for w in self.model.get_weights()]

        def on_epoch_begin(self, epoch, logs=None):
            if epoch >= 3:
                self.model.optimizer.learning_rate = 1e-9  # no way back
                for w in self.model.decoder.trainable_variables:
                    w.assign(w * 0.7)

    spoil = Spoil()
    model.train(max_epochs=5, batch_size=32, progress=False, callbacks=[spoil])
    best = int(model.history["val_loss"].idxmin())
    assert best == 3
    kernel = model.network.decoder.log_rate.kernel.numpy()
    assert any(kernel.shape == w.shape and np.array_equal(kernel, w) for w in spoil.best)


@pytest.fixture(scope="module")
def watched(adata):
    """A run of three epochs: the model, what Progress printed, and of each item that was read,
    whether in order of training, and of which epoch.
    """
    seen = []
    plain = training._Inputs.__getitem__
    out = io.StringIO()

    def read(batches, b):
        seen.append((batches.shuffle, batches.epoch))
        return plain(batches, b)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(training._Inputs, "__getitem__", read)
        model = small(adata).train(
            max_epochs=3, progress=False, callbacks=[training.Progress("VAE", every=0.0)]
        )
    return model, out.getvalue().splitlines(), seen


def test_time_left_does_not_count_how_long_compiling_took(monkeypatch, capsys):
    clock = iter([0.0, 60.0, 62.0, 64.0])  # begin, and the end of each of three epochs
    monkeypatch.setattr(training.time, "time", lambda: next(clock))
    progress = training.Progress("VAE", every=1.0)
    progress.set_params({"epochs": 11, "steps": 1})
    progress.on_train_begin()
    for epoch in range(3):
        progress.on_epoch_begin(epoch)
        progress.on_epoch_end(epoch, {"loss": 2.0, "val_loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert ["left" in line for line in lines] == [False, True, True]
    assert [line.split(", at most ")[-1] for line in lines[1:]] == ["18 s left", "16 s left"]


def test_history_has_a_row_an_epoch(watched):
    history = watched[0].history
    assert list(history.index) == [1, 2, 3] and history.index.name == "epoch"
    assert {
        "loss",
        "reconstruction",
        "kl",
        "val_loss",
        "val_reconstruction",
        "val_kl",
        "learning_rate",
        "seconds",
        "cells_seen",
    } <= set(history)
    assert list(history["cells_seen"]) == [160, 320, 480]


def test_reported_losses_are_means_over_cells(adata):
    """Also with a short last batch: the validation reconstruction equals that of all validation
    cells at once.
    """
    model = small(adata)
    net = model.network
    cells = model.split.validation
    net.compile(optimizer=training.FusedAdam(1e-3), jit_compile=False)
    net.noise_seed = None
    fixed = np.random.default_rng(0).standard_normal((len(cells), 4)).astype("float32")
    net.call = lambda counts, training=False: net.terms(
        counts, np.zeros((1, 4), "float32"), None, training
    )
    logs = net.evaluate(Batches(model.X, cells, 60), verbose=0, return_dict=True)
    reconstruction, kl = net.terms(model.X[cells].toarray(), 0 * fixed, None)
    assert logs["reconstruction"] == pytest.approx(float(np.mean(reconstruction)), rel=1e-5)
    assert logs["kl"] == pytest.approx(float(np.mean(kl)), rel=1e-5)


def test_progress_says_losses_and_time_left(watched):
    out = watched[1]
    assert len(out) == 3 and out[0].startswith("VAE: epoch 1/3, loss ") and "s left" in out[1]


def test_a_loss_that_is_not_finite_stops_with_advice(adata):
    model = small(adata)
    model.network.decoder.log_rate.bias.assign(np.full(200, np.nan, "float32"))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        model.train(max_epochs=3, progress=False)


def test_epoch_k_sees_the_cells_in_order_k(watched):
    seen = watched[2]
    training_epochs = [epoch for shuffled, epoch in seen if shuffled]
    # one item holds all steps of an epoch
    counts = [training_epochs.count(k) for k in range(4)]
    # Keras looks at one for its shape
    assert counts[1:] == [1, 1, 0] and counts[0] - 1 in (0, 1)


# ---- a weight of the KL term that rises


def penalties(history, weight):
    return (history["loss"] - history["reconstruction"] - weight * history["kl"]).to_numpy()


def test_the_weight_rises_as_in_scvi_tools():
    """Reference: scvi.train._trainingplans._compute_kl_weight, 1.4.2 and 1.5.1, written out: weight
    epoch / n_epochs_kl_warmup, counted from 0, then the whole.
    """
    for epoch in range(7):
        assert training.rising_weight(epoch, 1.0, 5) == (epoch / 5 if epoch < 5 else 1.0)
    assert (
        training.rising_weight(3, 0.25, 6) == 0.125 and training.rising_weight(0, 0.25, 0) == 0.25
    )


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_each_epoch_is_trained_at_its_weight_and_validated_at_the_whole(adata, beta):
    history = (
        small(adata, beta=beta)
        .train(max_epochs=5, kl_warmup=3, batch_size=32, progress=False)
        .history
    )
    assert np.allclose(history["kl_weight"], beta * np.array([0, 1 / 3, 2 / 3, 1, 1]))
    assert (
        np.ptp(penalties(history, history["kl_weight"]))
        < 0.05
        < 0.5
        < np.ptp(penalties(history, beta))
    )
    assert (
        np.ptp(history["val_loss"] - history["val_reconstruction"] - beta * history["val_kl"])
        < 0.05
    )


@pytest.mark.long
def test_it_trains_as_with_a_weight_that_is_set_by_hand(adata):
    """Reference: a variable in the place of the network's beta, set before each epoch and, for the
    validation, to 1.
    """

    class ByHand(keras.callbacks.Callback):
        def set_model(self, network):
            self.beta = network.beta = tf.Variable(0.0)

        def on_epoch_begin(self, epoch, logs=None):
            self.beta.assign(min(epoch / 2, 1))

        def on_test_begin(self, logs=None):
            self.beta.assign(1.0)

    how = dict(max_epochs=3, batch_size=32, progress=False)
    ours = small(adata).train(kl_warmup=2, **how)
    other = small(adata).train(callbacks=[ByHand()], **how)
    for column in ("loss", "reconstruction", "kl", "val_loss", "val_kl"):
        assert np.allclose(ours.history[column], other.history[column], rtol=1e-5), column


def test_without_a_warm_up_nothing_is_different(adata):
    one, other = (
        small(adata).train(max_epochs=2, batch_size=32, progress=False, **how)
        for how in ({}, {"kl_warmup": 0})
    )
    assert "kl_weight" not in one.history and one.history.drop(columns="seconds").equals(
        other.history.drop(columns="seconds")
    )


def test_halving_and_stopping_wait_until_the_weight_is_whole(adata):
    """Nothing is learnt at this rate: without the warm-up the first halving came after epoch 3, and
    the end after 5.
    """
    profile = training.Profile(
        learning_rate=1e-12, lr_patience=2, patience=4, max_epochs=50, batch_size=32, kl_warmup=6
    )
    model = small(adata, dropout=0.0)
    model.network.noise_seed = None
    still = np.zeros((1, 4), "float32")
    # the same loss in each epoch
    model.network.call = lambda cells, training=False: model.network.terms(
        cells, still, None, training=False
    )
    history = model.train(profile, progress=False).history
    assert (
        list(np.flatnonzero(history["learning_rate"].to_numpy() < 1e-12 * 0.9)[:1] + 1)
        == [6 + 3 + 1]
        and len(history) == 6 + 5
    )


@pytest.mark.long
def test_the_best_weights_are_of_an_epoch_with_the_whole_weight(adata):
    """A model that knows its cells already is at its best in the first epoch, and made worse on
    purpose; that epoch is not the one that counts.
    """
    model = small(adata).train(max_epochs=30, batch_size=16, progress=False)
    known = keras.ops.convert_to_numpy(model.network.decoder.log_rate.kernel).copy()

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.decoder.log_rate.kernel.assign(-known)

    model.train(max_epochs=4, kl_warmup=3, learning_rate=1e-9, progress=False, callbacks=[Spoil()])
    last = model.history.tail(4)
    assert last["val_loss"].idxmin() == last.index[0]
    assert np.allclose(
        keras.ops.convert_to_numpy(model.network.decoder.log_rate.kernel), -known, atol=1e-4
    )


def test_a_loss_that_rises_with_the_weight_is_no_jump():
    rows = [
        {"loss": 100.0, "kl": 5000.0, "kl_weight": 0.0},
        {"loss": 300.0, "kl": 800.0, "kl_weight": 0.25},
    ]
    guard = training.Guard(lambda: rows)
    # at 0.5 they would have cost 2,600 and 500
    guard.on_epoch_end(2, {"loss": 900.0, "val_loss": 1.0, "kl_weight": 0.5})
    with pytest.raises(training.Diverged, match="from 500 to 1001"):
        guard.on_epoch_end(2, {"loss": 1001.0, "val_loss": 1.0, "kl_weight": 0.5})


def test_a_warm_up_must_leave_an_epoch_and_be_a_number(adata):
    with pytest.raises(
        ValueError, match=r"kl_warmup=100 leaves no epoch .* below the number of epochs, 100"
    ):
        training.get_profile("quick", kl_warmup=100, max_epochs=100)
    with pytest.raises(ValueError, match="kl_warmup"):
        training.get_profile("quick", kl_warmup=-1)
    with pytest.raises(ValueError, match="kl_warmup"):
        training.get_profile("quick", kl_warmup=2.5)
    assert training.get_profile("quick", kl_warmup=99, max_epochs=100).kl_warmup == 99
    assert all(p.kl_warmup == 0 for p in training.PROFILES.values())
    with pytest.raises(ValueError, match="below the number of epochs, 20"):
        small(adata).train(steps=40, kl_warmup=20, progress=False)


@pytest.mark.parametrize(
    "n_cells, steps, max_epochs, epochs",
    [
        (1280, 4000, None, 400),
        (1281, 4000, None, 364),
        (100, 50, None, 50),
        (1_000_000, 4000, None, 1),
        (1280, 4000, 30, 30),
        (1280, 10, 30, 1),
        (1600, "auto", None, 480),
        (1_000_000, "auto", None, 19),
        (1600, "auto", 30, 30),
    ],
)
def test_steps_are_whole_epochs(n_cells, steps, max_epochs, epochs):
    for batch_size in (128, 64) if steps == "auto" else (128,):
        profile = training.Profile(
            learning_rate=1e-3, steps=steps, max_epochs=max_epochs, batch_size=batch_size
        )
        assert profile.epochs(n_cells) == epochs


@pytest.mark.parametrize(
    "hidden, widest, epochs", [((), 0, 30), ((16, 64), 64, 30), ((256, 64), 256, 15)]
)
def test_wide_networks_train_for_fewer_steps(adata, hidden, widest, epochs):
    assert (
        training.widest_hidden(models.VAE(adata, n_genes=60, n_latent=4, hidden=hidden).network)
        == widest
    )
    # 150 * 128 / 640 = 30
    assert training.get_profile("quick").epochs(409_600, widest) == epochs


def test_a_wide_autoencoder_trains_for_fewer_steps_still(adata):
    quick = training.get_profile("quick")
    # 30 / 4, rounded
    assert (
        quick.epochs(409_600, 256, has_kl=False) == 8
        and quick.epochs(409_600, 128, has_kl=False) == 30
    )
    small_data = dict(n_genes=60, n_latent=4, hidden=(512,))
    # of 64 training cells, 150 * 128 / 8 = 2,400 without division
    for model, epochs in ((models.AE, 150), (models.VAE, 600)):
        cells = adata[:80]
        trained = model(
            cells, split=Split(np.arange(64), np.arange(64, 72), np.arange(72, 80)), **small_data
        )
        run = training.Run(trained.network, trained.X, trained.split, quick, progress=False)
        assert run.epochs == epochs


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="never end: give steps"):
        training.Profile(learning_rate=1e-3)
    with pytest.raises(ValueError, match="never end"):
        training.Profile(learning_rate=1e-3, patience=10, lr_patience=3)
    for wrong in (0, 2.5, "all"):
        with pytest.raises(ValueError, match="steps must be a whole number"):
            training.get_profile("quick", steps=wrong)
    with pytest.raises(ValueError, match="max_epochs must be a whole number"):
        training.get_profile("quick", max_epochs="auto")


def test_the_learning_rate_falls_along_half_a_cosine(adata):
    history = small(adata).train(max_epochs=4, learning_rate=1e-3, progress=False).history
    # (1 + cos 2a) / 2 = cos² a
    assert np.allclose(
        history["learning_rate"], 1e-3 * np.cos(np.pi * np.arange(4) / 8) ** 2, rtol=1e-5
    )


def test_patience_may_end_a_fixed_number_of_steps_before_its_time(adata):
    history = small(adata).train(steps=200, learning_rate=1e-12, patience=3, progress=False).history
    assert 3 < len(history) < 50


@pytest.mark.long
def test_after_a_loss_that_is_not_finite_the_curve_is_half_as_high_also_after_a_pause(
    adata, tmp_path
):
    class Spoil(keras.callbacks.Callback):
        """Once, in the third epoch, the validation loss is NaN; in the fourth somebody presses
        Ctrl-C.
        """

        def __init__(self):
            super().__init__()
            self.todo = {2: self.spoil, 3: self.stop}

        def on_epoch_begin(self, epoch, logs=None):
            self.todo.pop(epoch, lambda: None)()

        def spoil(self):
            self.model.decoder.log_rate.bias.assign(np.full(200, np.nan, "float32"))

        def stop(self):
            raise KeyboardInterrupt

    how = dict(
        max_epochs=6, learning_rate=1e-3, progress=False, checkpoint=tmp_path / "run.checkpoint"
    )
    with pytest.warns(UserWarning, match="at half the learning rate"):
        small(adata).train(callbacks=[Spoil()], **how)
    rates = small(adata).train(resume=True, **how).history["learning_rate"].to_numpy()
    share = np.round(rates / (1e-3 * np.cos(np.pi * np.arange(6) / 12) ** 2), 4)
    # from the epoch that was last kept
    assert set(share) == {1, 0.5} and share[0] == 1 and (share[2:] == 0.5).all()


def test_settings_of_older_runs_are_completed():
    older = {
        "learning_rate": 5e-5,
        "lr_patience": 10,
        "patience": 100,
        "max_epochs": 10_000,
        "batch_size": 64,
    }
    assert training.with_defaults(older) == {
        **older,
        "n_genes": None,
        "kl_warmup": 0,
        "steps": None,
        "beta_2": 0.999,
    }


def test_a_loss_that_jumps_or_is_no_number_ends_the_epoch():
    guard = training.Guard(lambda: [{"loss": 10.0}])
    guard.on_epoch_end(1, {"loss": 19.0, "val_loss": 1.0})
    with pytest.raises(training.Diverged, match="jumped from 10 to 21"):
        guard.on_epoch_end(1, {"loss": 21.0, "val_loss": 1.0})
    with pytest.raises(training.Diverged, match="validation loss became nan"):
        guard.on_epoch_end(1, {"loss": 9.0, "val_loss": np.nan})
    with pytest.raises(training.Diverged, match="became inf"):
        guard.on_train_batch_end(0, {"loss": np.inf})


@pytest.fixture
def small_ae():
    return models.AE(organs.load("pancreas")[:60], n_genes=50, n_latent=4, hidden=(8,))


def test_an_epoch_is_recorded_with_rate_time_and_cells(small_ae):
    training.compile_network(small_ae.network, 0.25)
    record = training.Record(n_cells=48)
    logs = {}
    record.set_model(small_ae.network)
    record.on_epoch_begin(2)
    record.on_epoch_end(2, logs)
    assert (
        logs["learning_rate"] == 0.25 and logs["cells_seen"] == 3 * 48 and 0 <= logs["seconds"] < 60
    )


def test_a_checkpoint_brings_weights_and_counters_back(small_ae, tmp_path):
    training.compile_network(small_ae.network, 1e-3)
    schedule = keras.callbacks.ReduceLROnPlateau()
    stopping = keras.callbacks.EarlyStopping()
    schedule.wait = 3
    stopping.wait = 4
    state = training.Checkpoint(small_ae.network, schedule, stopping, tmp_path / "state")
    state.begin(resume=False)
    before = [w.copy() for w in small_ae.network.get_weights()]
    small_ae.network.set_weights([w + 1 for w in before])
    schedule.wait = stopping.wait = 0
    state.restore()
    assert all(map(np.array_equal, small_ae.network.get_weights(), before)) and (
        schedule.wait,
        stopping.wait,
    ) == (3, 4)
    with pytest.raises(FileExistsError, match="resume=True"):
        training.Checkpoint(small_ae.network, schedule, stopping, tmp_path / "state").begin(False)


def test_a_training_run_ends_with_the_weights_of_its_best_epoch(small_ae):
    profile = training.get_profile("quick", max_epochs=3, batch_size=16)
    run = training.Run(small_ae.network, small_ae.X, small_ae.split, profile, progress=False).go()
    assert len(run.history) == 3 and not run.interrupted
    loss = small_ae.network.evaluate(
        training._Inputs(small_ae.X, small_ae.split.validation, 16), verbose=0, return_dict=True
    )["loss"]
    assert np.isclose(loss, run.history["val_loss"].min(), rtol=1e-4)


def test_the_state_before_a_bad_step_comes_back():
    adata = organs.load("pancreas")[:60]
    model = models.AE(adata, n_genes=50, n_latent=4, hidden=(8,))
    weight = model.network.decoder.log_rate.kernel
    batch = (model.X.dense(np.arange(10)),)
    examine = training.VariableRecorder(model.network.variables, [batch])
    examine.set_model(model.network)
    before = np.asarray(weight).copy()
    examine.on_train_batch_begin(0)
    weight.assign(np.full(weight.shape, np.nan))
    # the step itself was sound, its result was not
    assert examine.first_bad(model.network) == "the gradient"
    assert np.array_equal(np.asarray(weight), before)


def test_callbacks_are_keras():
    stops = keras.callbacks.TerminateOnNaN()
    assert training.checked_callbacks(stops) == training.checked_callbacks((stops,)) == [stops]
    assert training.checked_callbacks(None) == []
    with pytest.raises(TypeError, match="must be Keras callbacks.*not 3"):
        training.checked_callbacks([3])
    with pytest.raises(ValueError, match="save_weights_only=True"):
        training.checked_callbacks(keras.callbacks.ModelCheckpoint("x.keras"))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow")
def test_only_the_message_about_tracing_is_left_out():
    import tensorflow as tf

    heard = []

    class Listener(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    listener = Listener()
    tf.get_logger().addHandler(listener)
    try:
        with training.quiet_about_tracing():
            tf.get_logger().warning("5 out of the last 5 calls triggered tf.function retracing")
            tf.get_logger().warning("another warning")
        tf.get_logger().warning("6 calls triggered tf.function retracing")
    finally:
        tf.get_logger().removeHandler(listener)
    assert heard == ["another warning", "6 calls triggered tf.function retracing"]
