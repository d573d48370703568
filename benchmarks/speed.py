"""Cells per second of a training step on this machine: vampsc, scvi-tools and a naive Keras model
of the same shape.

    python benchmarks/speed.py [--rounds 7] [--steps 16] [--batch 128 512]
        writes speed.csv and speed.png

Data: the embedded pancreas on all 20,120 genes. Shape: (512, 256, 128, 256, 512) with two output
heads. scvi-tools' SCVI with n_hidden=512, n_layers=2, n_latent=128, nb, gene-cell, has layers of
512 and a third head, which it computes also for nb: one more large product in eight. The naive
model has Keras' defaults, which on a CPU means no XLA. Each contestant trains by its own loop in a
process of its own, data loading included, and is timed by its median step after the first four.
Rounds are interleaved: each contestant runs a few steps, then the next, and so on; the table holds
medians over rounds of the rates and of their ratios.
"""

# before TensorFlow: both bring an LLVM, and only in this order do they get along
# isort: off
import scvi
# isort: on

import argparse
import datetime
import logging
import multiprocessing
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import keras
import lightning
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from keras import layers, ops

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from vampsc import counts, kernels, models, organs, training  # noqa: E402


class Clock:
    """Cells per second by the median step, the first four left out: memory and caches are warming
    up.
    """

    def __init__(self, batch):
        self.batch, self.times = batch, []

    def tick(self):
        self.times.append(time.perf_counter())

    @property
    def rate(self):
        return self.batch / np.median(np.diff(self.times[3:]))


class KerasClock(Clock, keras.callbacks.Callback):
    def __init__(self, batch):
        keras.callbacks.Callback.__init__(self)
        Clock.__init__(self, batch)

    def on_train_batch_end(self, step, logs=None):
        self.tick()


class LightningClock(Clock, lightning.pytorch.Callback):
    def on_train_batch_end(self, *args):
        self.tick()


def ours(name, adata, batch, steps):
    model = getattr(models, name)(adata)
    training.compile_network(model.network, 2e-3)

    def run():
        data = counts.Batches(
            model.X, np.arange(batch * steps) % model.X.shape[0], batch, shuffle=True
        )
        clock = KerasClock(batch)
        model.network.fit(data, epochs=1, callbacks=[clock], verbose=0, shuffle=False)
        return clock.rate

    return run


def plain(name, *size):
    "The same model by Keras operations and automatic differentiation alone."
    os.environ["VAMPSC_PATH"] = "plain"
    kernels._chosen = "plain"
    return ours(name, *size)


def naive(adata, batch, steps):
    "The paper's VAE as one would type it: lgamma, dense, Keras' own Adam and regularisers."
    X = models.VAE(adata).X
    n = X.shape[1]
    init = dict(kernel_regularizer=keras.regularizers.L1L2(5e-4, 5e-4), activation="tanh")

    def block(h, units):
        return layers.Dropout(0.2)(layers.BatchNormalization()(layers.Dense(units, **init)(h)))

    x = keras.Input((n,))
    h = block(
        block(layers.Lambda(lambda x: ops.log1p(1e4 * x / ops.sum(x, -1, keepdims=True)))(x), 512),
        256,
    )
    mean = layers.Dense(128)(h)
    log_var = layers.Dense(128)(h)
    z = layers.Lambda(lambda p: p[0] + ops.exp(p[1] / 2) * keras.random.normal(ops.shape(p[0])))(
        [mean, log_var]
    )
    h = block(block(z, 256), 512)
    model = keras.Model(x, [layers.Dense(n)(h), layers.Dense(n)(h), mean, log_var])

    class Naive(keras.Model):
        def __init__(self):
            super().__init__()
            # so that its weights are trained
            self.inner = model

        def call(self, x, training=False):
            return model(x, training=training)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            a, b, mean, log_var = y_pred
            mu = ops.exp(ops.clip(a, -15, 15)) * ops.sum(x, -1, keepdims=True) / 1e4
            theta = ops.exp(ops.clip(b, -15, 15))
            log_p = (
                tf.math.lgamma(x + theta)
                - tf.math.lgamma(theta)
                - tf.math.lgamma(x + 1)
                + x * ops.log(mu / (mu + theta))
                + theta * ops.log(theta / (mu + theta))
            )
            kl = 0.5 * ops.sum(mean**2 + ops.exp(log_var) - 1 - log_var, -1)
            return ops.mean(kl - ops.sum(log_p, -1)) + sum(model.losses)

    trained = Naive()
    trained.compile(optimizer=keras.optimizers.Adam(5e-5))

    def run():
        clock = KerasClock(batch)
        trained.fit(
            counts.Batches(X, np.arange(batch * steps) % X.shape[0], batch, shuffle=True),
            epochs=1,
            callbacks=[clock],
            verbose=0,
            shuffle=False,
        )
        return clock.rate

    return run


def scvi_tools(adata, batch, steps):
    data = models.VAE(adata)
    import anndata as ad

    cells = ad.AnnData(data.X[np.arange(batch * steps) % data.X.shape[0]])
    scvi.settings.verbosity = 40
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.model.SCVI.setup_anndata(cells)

    def run():
        # a model of its own each time: trained again, it can run into NaN
        clock = LightningClock(batch)
        model = scvi.model.SCVI(
            cells,
            n_hidden=512,
            n_layers=2,
            n_latent=128,
            gene_likelihood="nb",
            dispersion="gene-cell",
        )
        model.train(
            max_epochs=1,
            batch_size=batch,
            train_size=1.0,
            accelerator="cpu",
            callbacks=[clock],
            enable_progress_bar=False,
            logger=False,
            check_val_every_n_epoch=None,
        )
        return clock.rate

    return run


def bare_products(adata, batch, steps):
    """Only the matrix products of a VAE's step, forward and backward, on random numbers: what
    cannot be saved.
    """
    n = models.VAE(adata).X.shape[1]
    shapes = [(n, 512), (512, 256), (256, 256), (128, 256), (256, 512), (512, n), (512, n)]
    pairs = [
        (tf.random.normal((batch, i)), tf.random.normal((i, o)), tf.random.normal((batch, o)))
        for i, o in shapes
    ]

    @tf.function
    def step():
        total = 0.0
        for k, (x, w, g) in enumerate(pairs):
            total += tf.reduce_sum((x @ w)[0]) + tf.reduce_sum(tf.matmul(x, g, transpose_a=True)[0])
            # none to the counts
            if k:
                total += tf.reduce_sum(tf.matmul(g, w, transpose_b=True)[0])
        return total

    def run():
        clock = Clock(batch)
        for _ in range(steps):
            float(step())
            clock.tick()
        return clock.rate

    return run


CONTESTANTS = {
    **{f"vampsc {name}": (ours, name) for name in ("AE", "VAE", "IAF", "VAMP")},
    "vampsc VAE, plain path": (plain, "VAE"),
    "scvi-tools": (scvi_tools,),
    "naive Keras": (naive,),
    "bare matrix products": (bare_products,),
}


def contest(name, batch, steps, orders, answers):
    """A process of its own, so that idle threads of one library do not slow another: warm up, then
    a round when told.
    """
    function, *settings = CONTESTANTS[name]
    run = function(*settings, organs.load("pancreas"), batch, steps)
    run()
    answers.put("ready")
    while orders.get():
        answers.put(run())


def measured(names, rounds, steps, batch):
    "Cells per second: a row for each round, a column for each contestant."
    context = multiprocessing.get_context("spawn")
    contestants = {}
    for name in names:
        orders = context.Queue()
        answers = context.Queue()
        context.Process(
            target=contest, args=(name, batch, steps, orders, answers), daemon=True
        ).start()
        answers.get(timeout=600)
        contestants[name] = orders, answers

    def rate(name):
        contestants[name][0].put(True)
        return contestants[name][1].get(timeout=600)

    rates = pd.DataFrame([{name: rate(name) for name in names} for _ in range(rounds)])
    for orders, _ in contestants.values():
        orders.put(False)
    return rates


def summary(rates, batch):
    "Medians of the rates, and medians over rounds of the ratios."

    # time beside name's
    def times(name):
        return rates.rdiv(rates[name], axis=0).median() if name in rates else np.nan

    table = pd.DataFrame(
        {
            "batch": batch,
            "cells per second": rates.median().round(1),
            "speed beside scvi-tools": 1 / times("scvi-tools"),
            "speed beside naive Keras": 1 / times("naive Keras"),
            "time beside vampsc VAE": times("vampsc VAE"),
            "time beside bare products": times("bare matrix products"),
        }
    )
    return table.rename_axis("contestant")


def versions():
    names = ("tensorflow", "keras", "numba", "scvi-tools", "torch")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{n} {version(n)}" for n in names)])


def plotted(table):
    "A bar for each contestant, a panel for each size of minibatch."
    groups = list(table.groupby("batch"))
    figure, axes = plt.subplots(
        1, len(groups), figsize=(5 * len(groups), 3.2), sharey=True, squeeze=False
    )
    for axis, (batch, rows) in zip(axes[0], groups):
        rates = rows["cells per second"].iloc[::-1]
        colors = [
            "C0" if n.startswith("vampsc") else "#bbbbbb" if n.startswith("bare") else "C1"
            for n in rates.index
        ]
        axis.bar_label(axis.barh(rates.index, rates, color=colors), fmt=" %.0f")
        axis.set(title=f"minibatches of {batch}", xlabel="cells per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(HERE / "speed.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rounds", 7), ("steps", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    given = parser.parse_args()
    tables = []
    for batch in given.batch:
        steps = max(9, given.steps * 128 // batch)
        tables.append(summary(measured(given.only, given.rounds, steps, batch), batch))
        print(tables[-1].to_string(float_format="%.2f"), flush=True)
    table = pd.concat(tables).assign(
        date=datetime.date.today().isoformat(), cpu=f"{os.cpu_count()} cores", versions=versions()
    )
    if given.only == list(CONTESTANTS):
        table.to_csv(HERE / "speed.csv", float_format="%.4g")
        plotted(table)


if __name__ == "__main__":
    main()
