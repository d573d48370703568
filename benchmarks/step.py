"""What a training step costs beside its bare matrix products, from 1,000 genes to all.

    python benchmarks/step.py [--cores 1] [--rounds 3] [--sizes 1000 2000]        writes step.csv

Data: the embedded pancreas. Each model trains through `train`, with validation and all that a
user's run has around its steps, in two ways: as it is, with many steps in one compiled call where
the network is small, and with a callback that looks at each step, which makes each a call of its
own. Bare products are those of one step, forward and backward, by TensorFlow. Every measurement is
a process of its own, in turns; the table has medians over rounds of the median epoch, in
milliseconds of processor and of wall time.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# genes: the model's settings, and the epochs that are timed
SIZES = {
    1000: (dict(hidden=(128,), n_latent=128, n_pseudo_inputs=100), 12),
    2000: (dict(hidden=(256, 128), n_latent=128, n_pseudo_inputs=100), 8),
    4000: (dict(), 4),
    20120: (dict(), 3),
}
MODELS = ["VAE", "VAMP", "IAF"]
BATCH = 128


def made(name, genes):
    "An untrained model of that size."
    import vampsc
    from vampsc import organs

    settings = dict(SIZES[genes][0])
    if "VAMP" not in name:
        settings.pop("n_pseudo_inputs", None)
    return getattr(vampsc, name)(
        organs.load("pancreas"), n_genes=None if genes == 20120 else genes, **settings
    )


def train(name, genes, every_step):
    "(ms of processor time, ms of wall time) of a step: the median epoch."
    import keras

    times = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            times.append((time.process_time(), time.perf_counter()))

    class Watching(Clock):
        def on_train_batch_end(self, batch, logs=None):
            pass

    model = made(name, genes)
    model.train(
        "quick",
        max_epochs=SIZES[genes][1],
        progress=False,
        callbacks=[Watching() if every_step else Clock()],
    )
    steps = -(-len(model.split.train) // BATCH)
    return [1000 * float(x) / steps for x in np.median(np.diff(times, axis=0), axis=0)]


def products(name, genes):
    "The same of the matrix products alone."
    import tensorflow as tf

    network = made(name, genes).network
    kernels = [
        v
        for v in network.trainable_variables
        if len(v.shape) == 2 and "pseudo_inputs" not in v.path
    ]
    n_pseudo_inputs = sum(
        v.shape[0] for v in network.trainable_variables if "pseudo_inputs" in v.path
    )
    parts = []
    for i, kernel in enumerate(kernels):
        in_encoder = (
            "encoder" in kernel.path
            or "posterior/mean" in kernel.path
            or "posterior/log_var" in kernel.path
        )
        rows = BATCH + (n_pseudo_inputs if in_encoder else 0)
        x, g = (tf.random.normal((rows, width)) for width in kernel.shape)
        parts.append((x, tf.convert_to_tensor(kernel.value), g, i > 0 or n_pseudo_inputs > 0))

    @tf.function
    def step():
        found = []
        for x, w, g, needs_input_gradient in parts:
            found += [x @ w, tf.matmul(x, g, transpose_a=True)]
            if needs_input_gradient:
                found.append(tf.matmul(g, w, transpose_b=True))
        return [tf.reduce_sum(product[0]) for product in found]

    times = []
    for _ in range(30):
        step()
        times.append((time.process_time(), time.perf_counter()))
    return [1000 * float(x) for x in np.median(np.diff(times[3:], axis=0), axis=0)]


def answer(pipe, function, arguments):
    pipe.send(function(*arguments))


def in_own_process(function, *arguments):
    "What a function returns in a process of its own."
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(there, function, arguments))
    process.start()
    result = here.recv()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--models", nargs="+", default=MODELS)
    a = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = str(a.cores)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    rows = []
    for genes in a.sizes:
        for _ in range(a.rounds):
            for name in a.models:
                found = dict(
                    many=in_own_process(train, name, genes, False),
                    each=in_own_process(train, name, genes, True),
                    bare=in_own_process(products, name, genes),
                )
                row = {
                    f"{what}_{kind}_ms": value
                    for what, pair in found.items()
                    for kind, value in zip(("cpu", "wall"), pair)
                }
                rows.append(dict(genes=genes, model=name, cores=a.cores, **row))
                print(rows[-1], flush=True)
    table = (
        pd.DataFrame(rows)
        .groupby(["genes", "model", "cores"], sort=False)
        .median()
        .round(2)
        .reset_index()
    )
    out = HERE / "step.csv"
    if out.exists():
        known = pd.read_csv(out)
        key = ["genes", "model", "cores"]
        new = table.set_index(key).index
        table = pd.concat([known[~known.set_index(key).index.isin(new)], table])
    table.to_csv(out, index=False)


if __name__ == "__main__":
    main()
