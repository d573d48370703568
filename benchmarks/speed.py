"""Cells per second of a training step on this machine: vampsc, scvi-tools and a naive Keras model of the same shape.

    python benchmarks/speed.py [--rounds 5] [--steps 8] [--batch 128]        writes speed.csv

Data: the embedded pancreas on all 20,120 genes. Shape: (512, 256, 128, 256, 512) with two output heads; scvi-tools'
SCVI with n_hidden=512, n_layers=2, n_latent=128, nb, gene-cell. Each contestant runs by its own training loop, data
loading included; the clock runs from the end of the second batch. Rounds are interleaved; the table holds medians.
"""
import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

import keras
import lightning
import numpy as np
import pandas as pd
import scvi
import tensorflow as tf
from keras import layers, ops

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from vampsc import counts, models, organs, training  # noqa: E402


class Clock:
    "Cells per second between the second batch and the last."
    def __init__(self, batch): self.batch, self.times = batch, []

    def tick(self): self.times.append(time.perf_counter())

    @property
    def rate(self): return self.batch * (len(self.times) - 2) / (self.times[-1] - self.times[1])


class KerasClock(Clock, keras.callbacks.Callback):
    def __init__(self, batch, steps):
        keras.callbacks.Callback.__init__(self)
        Clock.__init__(self, batch)
        self.steps = steps

    def on_train_batch_end(self, step, logs=None): self.tick()


class LightningClock(Clock, lightning.pytorch.Callback):
    def on_train_batch_end(self, *args): self.tick()


def ours(name, adata, batch, steps, **settings):
    model = getattr(models, name)(adata, **settings)
    model.network.compile(optimizer=training.FusedAdam(2e-3), jit_compile=False)
    def run():
        data = counts.Batches(model.X, model.split.train[:batch * steps], batch, shuffle=True)
        clock = KerasClock(batch, steps)
        model.network.fit(data, epochs=1, callbacks=[clock], verbose=0, shuffle=False)
        return clock.rate
    return run


def naive(adata, batch, steps):
    "The paper's VAE as one would type it: lgamma, dense, Keras' own Adam and regularisers."
    X = models.VAE(adata).X
    n, init = X.shape[1], dict(kernel_regularizer=keras.regularizers.L1L2(5e-4, 5e-4), activation="tanh")
    def block(h, units): return layers.Dropout(0.2)(layers.BatchNormalization()(layers.Dense(units, **init)(h)))
    x = keras.Input((n,))
    h = block(block(layers.Lambda(lambda x: ops.log1p(1e4 * x / ops.sum(x, -1, keepdims=True)))(x), 512), 256)
    mean, log_var = layers.Dense(128)(h), layers.Dense(128)(h)
    z = layers.Lambda(lambda p: p[0] + ops.exp(p[1] / 2) * keras.random.normal(ops.shape(p[0])))([mean, log_var])
    h = block(block(z, 256), 512)
    model = keras.Model(x, [layers.Dense(n)(h), layers.Dense(n)(h), mean, log_var])

    class Naive(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = model                                                     # so that its weights are trained

        def call(self, x, training=False): return model(x, training=training)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            a, b, mean, log_var = y_pred
            mu, theta = ops.exp(ops.clip(a, -15, 15)) * ops.sum(x, -1, keepdims=True) / 1e4, ops.exp(ops.clip(b, -15, 15))
            log_p = (tf.math.lgamma(x + theta) - tf.math.lgamma(theta) - tf.math.lgamma(x + 1)
                     + x * ops.log(mu / (mu + theta)) + theta * ops.log(theta / (mu + theta)))
            kl = 0.5 * ops.sum(mean**2 + ops.exp(log_var) - 1 - log_var, -1)
            return ops.mean(kl - ops.sum(log_p, -1)) + sum(model.losses)

    trained = Naive()
    trained.compile(optimizer=keras.optimizers.Adam(5e-5), jit_compile=False)
    def run():
        clock = KerasClock(batch, steps)
        trained.fit(counts.Batches(X, np.arange(batch * steps), batch, shuffle=True), epochs=1, callbacks=[clock],
                    verbose=0, shuffle=False)
        return clock.rate
    return run


def scvi_tools(adata, batch, steps):
    data = models.VAE(adata)
    import anndata as ad
    cells = ad.AnnData(data.X[:batch * steps].copy())
    scvi.settings.verbosity = 40
    scvi.model.SCVI.setup_anndata(cells)
    def run():
        clock = LightningClock(batch)               # a model of its own each time: trained again, it can run into NaN
        model = scvi.model.SCVI(cells, n_hidden=512, n_layers=2, n_latent=128, gene_likelihood="nb", dispersion="gene-cell")
        model.train(max_epochs=1, batch_size=batch, train_size=1.0, accelerator="cpu", callbacks=[clock],
                    enable_progress_bar=False, logger=False, check_val_every_n_epoch=None)
        return clock.rate
    return run


def bare_products(adata, batch, steps):
    "Only the matrix products of a VAE's step, forward and backward, on random numbers: what cannot be saved."
    n = 20_120
    shapes = [(n, 512), (512, 256), (256, 256), (128, 256), (256, 512), (512, 2 * n)]
    pairs = [(tf.random.normal((batch, i)), tf.random.normal((i, o)), tf.random.normal((batch, o))) for i, o in shapes]
    @tf.function
    def step():
        total = 0.0
        for k, (x, w, g) in enumerate(pairs):
            total += tf.reduce_sum((x @ w)[0]) + tf.reduce_sum(tf.matmul(x, g, transpose_a=True)[0])
            if k: total += tf.reduce_sum(tf.matmul(g, w, transpose_b=True)[0])      # none to the counts
        return total
    def run():
        clock = Clock(batch)
        for _ in range(steps): float(step()); clock.tick()
        return clock.rate
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rounds", 5), ("steps", 8), ("batch", 128)): parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    adata, size = organs.load("pancreas"), (given.batch, given.steps)
    contestants = {"vampsc VAE": ours("VAE", adata, *size), "vampsc IAF": ours("IAF", adata, *size),
                   "vampsc VAMP": ours("VAMP", adata, *size), f"scvi-tools {version('scvi-tools')}": scvi_tools(adata, *size),
                   "naive Keras": naive(adata, *size), "bare matrix products": bare_products(adata, *size)}
    for run in contestants.values(): run()                                          # compile, warm up
    rates = pd.DataFrame([{name: run() for name, run in contestants.items()} for _ in range(given.rounds)])
    table = pd.DataFrame({"cells per second": rates.median(), "times the naive": (rates.div(rates["naive Keras"], axis=0)).median(),
                          "times scvi-tools": rates.div(rates.filter(like="scvi").iloc[:, 0], axis=0).median()})
    table.to_csv(HERE / "speed.csv", index_label="contestant", float_format="%.3g")
    print(table.to_string(float_format="%.3g"))


if __name__ == "__main__": main()
