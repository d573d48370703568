"""A run that is killed, interrupted or goes wrong: it goes on, or says where it stopped, and
nothing is lost.
"""

import functools
import multiprocessing
import random
import re
import resource
import shutil
import time
import warnings

import keras
import numpy as np
import pytest

from vampsc import models, organs, training

SMALL = dict(n_genes=150, n_latent=3, hidden=(8,), n_pseudo_inputs=8, n_flow_steps=2)
# Patience, not a number of steps: the same epochs whatever max_epochs is, so that longer and
# shorter runs can be compared.
HOW = dict(
    profile=training.Profile(
        learning_rate=2e-3, lr_patience=1, patience=10, max_epochs=100, batch_size=32
    ),
    progress=False,
)


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:100].copy()


@pytest.fixture(scope="module")
def whole(adata):
    "whole(epochs): a run that nothing troubled, each trained once."

    @functools.cache
    def run(epochs):
        return new(adata).train(max_epochs=epochs, **HOW)

    return run


@pytest.fixture(scope="module")
def after_one_epoch(adata, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "c"
    new(adata).train(max_epochs=1, checkpoint=path, **HOW)
    return path


@pytest.fixture
def begun(after_one_epoch, tmp_path):
    "A checkpoint after one epoch, which the test may spoil."
    return shutil.copy(after_one_epoch, tmp_path / "c")


def new(adata, kind="VAMP", **more):
    return models.PRESETS[kind](adata, **{**SMALL, **more})


def weights(model):
    return [np.array(w) for w in model.network.get_weights()]


def same(model, other):
    "To the last digit, the time taken left out."
    assert model.history.drop(columns="seconds").equals(other.history.drop(columns="seconds"))
    assert all(np.array_equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


class At(keras.callbacks.Callback):
    "Calls a function at the given batch of the given epoch (from 0), once."

    def __init__(self, epoch, batch, action):
        super().__init__()
        self.place = (epoch, batch)
        self.action = action

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.place:
            self.place = None
            self.action(self.model)


def interrupt(model):
    raise KeyboardInterrupt


# ---- going on


@pytest.mark.parametrize("kind", ["AE", "VAMP", "IAF", "HVAMP"])
def test_a_run_in_two_parts_equals_one(adata, tmp_path, kind):
    "It goes on from the file that lay there when the whole run began its third epoch."

    def keep(model):
        shutil.copy(tmp_path / "c", tmp_path / "kept")

    whole = new(adata, kind).train(
        max_epochs=4, checkpoint=tmp_path / "c", callbacks=[At(2, 0, keep)], **HOW
    )
    again = new(adata, kind).train(max_epochs=4, checkpoint=tmp_path / "kept", resume=True, **HOW)
    assert len(again.history) == 4
    same(again, whole)


@pytest.mark.long
def test_a_rising_weight_of_the_kl_term_goes_on(adata, tmp_path):
    "Interrupted while it rises, and again in the first epoch at the whole weight."
    how = dict(HOW, kl_warmup=3, max_epochs=6)
    whole = new(adata).train(**how)
    for cut in (1, 3):
        new(adata).train(
            **how, callbacks=[At(cut, 2, interrupt)], checkpoint=tmp_path / "c", resume=True
        )
    again = new(adata).train(**how, checkpoint=tmp_path / "c", resume=True)
    same(again, whole)
    assert again.history["kl_weight"].round(3).tolist() == [0, 0.333, 0.667, 1, 1, 1]


@pytest.mark.slow
def test_the_counters_and_the_learning_rate_go_on(adata, tmp_path):
    """With a learning rate that makes no progress, both the halvings and the stop come when they
    would have come.
    """
    how = dict(HOW, learning_rate=0.1, patience=3, max_epochs=40)
    whole = new(adata).train(**how)
    assert len(whole.history) < 40 and whole.history["learning_rate"].nunique() > 2
    for stop in (2, len(whole.history) - 1):
        path = tmp_path / f"{stop}"
        new(adata).train(**{**how, "max_epochs": stop}, checkpoint=path)
        same(new(adata).train(**how, checkpoint=path, resume=True), whole)
    # finished already
    same(new(adata).train(**how, checkpoint=path, resume=True), whole)


@pytest.mark.long
def test_a_falling_learning_rate_goes_on(adata, tmp_path):
    "The rate of an epoch follows from its number, also where the run is interrupted twice."
    how = dict(steps=84, batch_size=32, progress=False)
    whole = new(adata).train(**how)
    for epoch in (3, 11):
        if epoch == 3:
            new(adata).train(callbacks=[At(epoch, 1, interrupt)], checkpoint=tmp_path / "c", **how)
        else:
            new(adata).train(
                callbacks=[At(epoch, 0, interrupt)], checkpoint=tmp_path / "c", resume=True, **how
            )
    same(new(adata).train(checkpoint=tmp_path / "c", resume=True, **how), whole)
    assert len(whole.history) == 28 and whole.history["learning_rate"].is_monotonic_decreasing


@pytest.mark.long
def test_a_second_training_goes_on_too(adata, tmp_path):
    def keep(model):
        shutil.copy(tmp_path / "c", tmp_path / "kept")

    whole = new(adata).train(max_epochs=1, **HOW)
    whole.train(max_epochs=3, callbacks=[At(2, 0, keep)], checkpoint=tmp_path / "c", **HOW)
    same(new(adata).train(max_epochs=3, checkpoint=tmp_path / "kept", resume=True, **HOW), whole)
    assert len(whole.history) == 4


@pytest.mark.long
def test_with_batches_of_cells(adata, tmp_path):
    cells = adata.copy()
    cells.obs["donor"] = np.arange(len(cells)) % 3
    more = dict(batch_key="donor", encode_batch=True)
    whole = new(cells, **more).train(max_epochs=3, **HOW)
    new(cells, **more).train(max_epochs=1, checkpoint=tmp_path / "c", **HOW)
    same(
        new(cells, **more).train(max_epochs=3, checkpoint=tmp_path / "c", resume=True, **HOW), whole
    )


def test_without_a_file_resume_begins(adata, whole, tmp_path):
    same(new(adata).train(max_epochs=2, checkpoint=tmp_path / "c", resume=True, **HOW), whole(2))


def trained_to_the_end(folder, ready):
    "Runs in a process of its own. Twenty epochs, with a checkpoint."
    model = new(organs.load("pancreas")[:100].copy())
    ready.set()
    model.train(max_epochs=20, checkpoint=folder / "c", resume=True, **HOW)
    model.save(folder / "model", overwrite=True)


@pytest.mark.slow
def test_killed_at_five_random_moments(adata, tmp_path):
    """kill -9, five times in the course of 20 epochs; each time it goes on, and the end is that of
    an untroubled run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vampsc.models", "vampsc.organs", "tensorflow"])

    def start(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        ready = context.Event()
        process = context.Process(target=trained_to_the_end, args=(tmp_path / folder, ready))
        process.start()
        assert ready.wait(100)
        return process

    def next_write(process, folder):
        file = tmp_path / folder / "c"

        def written():
            return file.stat().st_mtime_ns if file.exists() else 0

        before = written()
        while written() == before and process.is_alive():
            time.sleep(0.002)

    def end(process):
        process.join(300)
        assert process.exitcode == 0

    process = start("whole")
    # how long things take here
    begun = time.time()
    next_write(process, "whole")
    startup = time.time() - begun
    begun = time.time()
    end(process)
    epoch = (time.time() - begun) / 20
    rng = random.Random(0)
    stopped = []
    for k in range(5):
        process = start("killed")
        # in the start, or in steps and writing
        if k % 3:
            next_write(process, "killed")
        time.sleep(rng.uniform(0, 4 * epoch if k % 3 else startup))
        process.kill()
        process.join()
        if (tmp_path / "killed" / "c").exists():
            stopped.append(len(training.read_checkpoint(tmp_path / "killed" / "c")[0]["rows"]))
    end(start("killed"))
    print("killed after epochs", stopped)
    assert stopped == sorted(stopped) and len(set(stopped)) > 1
    same(*(models.load(tmp_path / folder / "model", adata) for folder in ("killed", "whole")))


# ---- Ctrl-C


def test_ctrl_c_gives_a_usable_model(adata, whole, tmp_path, capsys):
    model = new(adata).train(
        max_epochs=4, callbacks=[At(2, 2, interrupt)], checkpoint=tmp_path / "c", **HOW
    )
    said = capsys.readouterr().out
    assert model.interrupted and len(model.history) == 2 and "interrupted after epoch 2" in said
    goes_on_after = int(re.search(r"resume=True\) goes on after epoch (\d+)", said)[1])
    assert np.isfinite(model.get_latent_representation()).all()
    assert all(np.array_equal(a, b) for a, b in zip(weights(model), weights(whole(2)), strict=True))
    begun = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    model.train(max_epochs=4, checkpoint=tmp_path / "c", resume=True, callbacks=[watch], **HOW)
    assert not model.interrupted and begun == list(range(goes_on_after, 4))
    same(model, whole(4))


def test_ctrl_c_in_the_first_epoch_leaves_the_start(adata, capsys):
    start = weights(new(adata))
    model = new(adata).train(max_epochs=2, callbacks=[At(0, 2, interrupt)], **HOW)
    said = capsys.readouterr().out
    assert "interrupted in the first epoch, the weights are as they were" in said
    assert (
        model.interrupted
        and model.history.empty
        and all(np.array_equal(a, b) for a, b in zip(weights(model), start))
    )


# ---- files


def test_settings_must_be_the_same(adata, begun):
    for model, how, name in (
        (
            new(adata),
            dict(HOW, learning_rate=1e-4),
            "learning_rate was 0.002 there and is 0.0001 now",
        ),
        (new(adata, seed=1), HOW, "seed was 0 there and is 1"),
        (new(adata, n_latent=5), HOW, "n_latent was 3"),
        (new(adata), dict(HOW, kl_warmup=1), "kl_warmup was None there and is 1 now"),
        (new(adata[:90]), HOW, "genes was"),
        (new(adata, "VAE"), HOW, "model was VAMP there and is VAE"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: {name}"):
            model.train(max_epochs=2, checkpoint=begun, resume=True, **how)
    with pytest.raises(ValueError, match="needs the checkpoint="):
        new(adata).train(resume=True)


def test_what_is_there_is_not_written_over(adata, begun, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    for file in (begun, notes):
        before = file.read_bytes()
        with pytest.raises(FileExistsError, match="resume=True goes on"):
            new(adata).train(max_epochs=1, checkpoint=file, **HOW)
        assert file.read_bytes() == before
    for resume in (True, False):
        with pytest.raises(IsADirectoryError):
            new(adata).train(max_epochs=1, checkpoint=tmp_path, resume=resume, **HOW)


@pytest.mark.long
def test_other_cells_labels_of_batches_and_origins_are_noticed(adata, tmp_path):
    cells = adata.copy()
    cells.obs["lab"] = np.where(np.arange(cells.n_obs) % 2, "a", "b")

    def go(cells, **how):
        return new(cells, batch_key="lab", **how).train(
            max_epochs=1, checkpoint=tmp_path / "c", resume=True, **HOW
        )

    model = go(cells)
    other = cells.copy()
    moved = cells.copy()
    split = model.split
    other.obs["lab"] = other.obs["lab"].to_numpy()[::-1]
    moved.X = moved.X[:, np.random.default_rng(0).permutation(moved.n_vars)]
    swapped = type(split)(split.train, split.test, split.validation)
    for wrong, how in ((other, {}), (moved, {}), (cells, {"split": swapped})):
        with pytest.raises(ValueError, match="belongs to another run"):
            go(wrong, **how)
    query = cells[:60].copy()
    model.transfer(query, max_epochs=1, checkpoint=tmp_path / "t", unfrozen=True, **HOW)
    with pytest.raises(ValueError, match="origin was"):
        new(cells, batch_key="lab").transfer(
            query, max_epochs=1, checkpoint=tmp_path / "t", resume=True, unfrozen=True, **HOW
        )


@pytest.mark.long
def test_a_time_limit_is_not_the_end(adata, tmp_path):
    "A callback that stops training, unlike early stopping, leaves a run that goes on."

    def stop(model):
        model.stop_training = True

    new(adata).train(max_epochs=4, callbacks=[At(1, 1, stop)], checkpoint=tmp_path / "c", **HOW)
    assert len(training.read_checkpoint(tmp_path / "c")[0]["rows"]) < 4
    assert (
        len(new(adata).train(max_epochs=4, checkpoint=tmp_path / "c", resume=True, **HOW).history)
        == 4
    )


def unchanged_or_refused(path, damaged, before):
    """Whether a file of these bytes is refused by its name; else it must hold what the sound one
    holds.
    """
    path.write_bytes(damaged)
    try:
        notes, arrays = training.read_checkpoint(path)
    except ValueError as error:
        return str(path) in str(error)
    assert notes == before[0] and all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(arrays, before[1], strict=True)
    )
    return False


def test_a_damaged_checkpoint_is_noticed(begun):
    whole = begun.read_bytes()
    before = training.read_checkpoint(begun)
    rng = np.random.default_rng(0)

    def flipped(at, bit):
        return whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]

    places = rng.integers(len(whole), size=200)
    noticed = [
        unchanged_or_refused(begun, whole[:at] if i % 2 else flipped(at, rng.integers(8)), before)
        for i, at in enumerate(places)
    ]
    assert sum(noticed) > 150
    # the end of a zip file's list
    for at in range(len(whole) - 100, len(whole)):
        unchanged_or_refused(begun, flipped(at, 4), before)


# ---- a whole file of another content


def without(name):
    def change(notes, arrays):
        del notes[name]

    return change


def noted(**values):
    def change(notes, arrays):
        notes.update(values)

    return change


def shorter(notes, arrays):
    del arrays[-3:]


def without_the_best(notes, arrays):
    del arrays[-notes["n_best"] :]
    notes["n_best"] = 0


def with_array(at, change):
    def put(notes, arrays):
        arrays[at] = change(arrays[at])

    return put


def counted(**values):
    def change(notes, arrays):
        notes["counters"][0].update(values)

    return change


# of the first layer: (150 genes, 8)
KERNEL = 1
OTHER_CONTENTS = [
    (without(name), f"it has no {name}")
    for name in ("identity", "earlier", "rows", "counters", "retried", "stopped", "n_best")
]
OTHER_CONTENTS += [
    (shorter, "it has .* arrays, and .* need"),
    (without_the_best, "n_best is 0, and the best weights"),
    (noted(n_best=1), "n_best is 1"),
    (noted(n_best=-1), "n_best is -1"),
    (noted(n_best="2"), "n_best is '2'"),
    (noted(stopped="no"), "stopped is 'no'"),
    (noted(rows=["a"]), "rows is not"),
    (noted(rows=[{"loss": "low", "val_loss": 1.0}]), "rows is not"),
    (noted(rows=[{"loss": 1.0}]), "rows is not"),
    (noted(counters=[]), "counters are not"),
    (counted(wait="3"), "counters are not"),
    (counted(model=3), "counters are not"),
    (with_array(KERNEL, np.transpose), r"kernel is float32 \(8, 150\) there"),
    (with_array(KERNEL, np.float64), "kernel is float64 .* there, and float32"),
    (with_array(KERNEL, lambda a: a * np.nan), "kernel is not finite"),
    (with_array(-1, lambda a: a * np.inf), "is not finite there"),
]


@pytest.mark.long
@pytest.mark.parametrize("change, words", OTHER_CONTENTS)
def test_a_whole_file_of_another_content_is_refused(adata, begun, change, words):
    notes, arrays = training.read_checkpoint(begun)
    change(notes, arrays)
    training.write_checkpoint(begun, notes, arrays)
    model = new(adata)
    start = weights(model)
    wanted = f"{begun} does not hold what a run needs to go on: .*{words}.*; name another"
    with pytest.raises(ValueError, match=wanted) as error:
        model.train(max_epochs=2, checkpoint=begun, resume=True, **HOW)
    assert "\n" not in str(error.value) and all(map(np.array_equal, weights(model), start))


def test_more_or_fewer_arrays_than_the_file_says_are_refused(begun):
    notes, arrays = training.read_checkpoint(begun)
    for n in (len(arrays) - 1, len(arrays) + 1, "all"):
        training.write_checkpoint(begun, {**notes, "arrays": n}, arrays)
        wanted = f"{begun} is damaged, or no checkpoint .it has {len(arrays)} arrays, not {n}"
        with pytest.raises(ValueError, match=wanted):
            training.read_checkpoint(begun)


def test_other_files_are_no_checkpoints(tmp_path):
    with open(tmp_path / "array", "wb") as file:
        np.save(file, np.zeros(3))
    with open(tmp_path / "list", "wb") as file:
        np.savez(file, notes=np.frombuffer(b"[1]", "uint8"))
    with open(tmp_path / "text", "wb") as file:
        np.savez(file, notes=np.frombuffer(b'{"format": "1"}', "uint8"))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path} is damaged, or no checkpoint"):
            training.read_checkpoint(path)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_stops_before_training(adata, tmp_path):
    began = []
    # bytes; the checkpoint needs more
    limit_files(20_000)
    try:
        with pytest.raises(OSError):
            new(adata).train(
                max_epochs=1, callbacks=[At(0, 0, began.append)], checkpoint=tmp_path / "c", **HOW
            )
    finally:
        limit_files(resource.RLIM_INFINITY)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError):
        new(adata).train(
            max_epochs=1,
            callbacks=[At(0, 0, began.append)],
            checkpoint=tmp_path / "file" / "c",
            **HOW,
        )
    assert not began and [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["file"]


def test_a_disk_that_fills_up_meanwhile_does_not_stop_a_run(adata, whole, tmp_path):
    try:
        with pytest.warns(UserWarning, match="could not be written"):
            model = new(adata).train(
                max_epochs=4,
                callbacks=[At(1, 0, lambda model: limit_files(20_000))],
                checkpoint=tmp_path / "c",
                **HOW,
            )
    finally:
        limit_files(resource.RLIM_INFINITY)
    same(model, whole(4))
    # the last that could be written
    assert len(training.read_checkpoint(tmp_path / "c")[0]["rows"]) == 1


# ---- NaN


def test_nan_is_named_and_tried_once_more(adata):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(
            FloatingPointError,
            match=(
                r"VAMP: the loss became (nan|inf) in epoch 1, first in .*, again; try a smaller"
                r" learning_rate"
            ),
        ):
            new(adata).train(max_epochs=3, learning_rate=1e30, **HOW)
    said = [str(w.message) for w in caught if "half the learning rate, 5e+29" in str(w.message)]
    assert len(said) == 1 and "first in the posterior's mean;" in said[0]


@pytest.mark.parametrize("retried", [False, True])
def test_an_older_file_says_only_whether_it_was_tried_again(adata, tmp_path, retried):
    how = dict(HOW, checkpoint=tmp_path / "c")
    new(adata).train(**how, max_epochs=2)
    notes, arrays = training.read_checkpoint(tmp_path / "c")
    training.write_checkpoint(tmp_path / "c", {**notes, "retried": retried}, arrays)
    assert training.read_checkpoint(tmp_path / "c")[0]["retried"] is retried
    assert len(new(adata).train(**how, max_epochs=3, resume=True).history) == 3


def spoil(model):
    model.encoder.layers[0].kernel.assign(model.encoder.layers[0].kernel * np.nan)


def test_after_one_nan_the_run_goes_on_at_half_the_rate(adata, tmp_path):
    with pytest.warns(
        UserWarning, match="epoch 3.*going on from epoch [012] at half the learning rate, 0.001"
    ):
        model = new(adata).train(
            **HOW | dict(lr_patience=10),
            max_epochs=5,
            callbacks=[At(2, 1, spoil)],
            checkpoint=tmp_path / "c",
        )
    assert len(model.history) == 5 and np.isfinite(model.history["loss"]).all()
    assert (
        sorted(set(model.history["learning_rate"].round(5))) == [1e-3, 2e-3]
        and model.history["learning_rate"].is_monotonic_decreasing
    )
    notes = training.read_checkpoint(tmp_path / "c")[0]
    assert notes["retried"] == 1 and len(notes["rows"]) == 5


def test_after_a_second_nan_the_rate_is_halved_again_and_a_third_ends_the_run(adata):
    spoilt = [At(1, 1, spoil), At(3, 1, spoil)]
    with pytest.warns(UserWarning, match="at half the learning rate, 0.0005"):
        model = new(adata).train(**HOW | dict(lr_patience=10), max_epochs=5, callbacks=spoilt)
    rates = model.history["learning_rate"]
    assert len(rates) == 5 and rates.is_monotonic_decreasing and rates.iloc[-1] < 0.0006
    spoilt = [At(1, 1, spoil), At(2, 1, spoil), At(3, 1, spoil)]
    with (
        pytest.warns(UserWarning, match="at half the learning rate"),
        pytest.raises(FloatingPointError, match="the loss became nan in epoch [34].*, again; try"),
    ):
        new(adata).train(**HOW | dict(lr_patience=10), max_epochs=5, callbacks=spoilt)


@pytest.mark.long
def test_a_jump_is_noticed(adata):
    def jump(model):
        model.decoder.log_rate.kernel.assign(model.decoder.log_rate.kernel * 500)

    with pytest.warns(
        UserWarning, match="the loss jumped from .* in epoch 3; going on from epoch [012]"
    ):
        assert (
            len(
                new(adata)
                .train(max_epochs=4, callbacks=[At(2, 0, jump)], progress=False, batch_size=32)
                .history
            )
            == 4
        )


@pytest.mark.parametrize(
    "layer, name", [("encoder", "posterior's mean"), ("log_rate", "decoder's log-rates")]
)
def test_the_first_bad_stage_is_named(adata, layer, name):
    network = new(adata).network
    which = network.encoder.layers[0] if layer == "encoder" else network.decoder.log_rate
    which.kernel.assign(which.kernel * np.nan)
    cells = np.ones((5, 150), "float32")
    assert (
        training.first_not_finite(network, cells, training=False)
        == f"the weights {which.kernel.path}"
    )
    stages = [
        stage for stage, value in network.stages(cells) if not np.isfinite(np.asarray(value)).all()
    ]
    assert stages[0] == f"the {name}"
    assert training.first_not_finite(new(adata).network, cells, training=True) is None


def test_a_run_that_max_epochs_ended_says_so(adata, capsys):
    model = models.VAE(adata, n_genes=30, hidden=(8,), n_latent=4).train(max_epochs=2)
    needed = training.get_profile("quick").needed_epochs(len(model.split.train), 8)
    words = f"VAE: ended by max_epochs after 2 of {needed} epochs, its numbers still change."
    assert needed > 2 and capsys.readouterr().out.splitlines()[-1] == words
    model.train(max_epochs=2, progress=False)
    model.train(steps=2)
    model.train(max_epochs=0)
    assert "ended by" not in capsys.readouterr().out
    # with patience nobody knows how many epochs it takes
    model.train("paper", max_epochs=1, learning_rate=1e-3)
    assert "before the validation loss stopped falling" in capsys.readouterr().out


def test_run_training_leaves_words_to_its_caller(adata, capsys):
    model = models.VAE(adata, n_genes=30, hidden=(8,), n_latent=4)
    run = models.run_training(model, training.get_profile("quick", max_epochs=1))
    assert run.ending().startswith("ended by max_epochs after 1 of") and len(model.history) == 1
    assert "ended by" not in capsys.readouterr().out
