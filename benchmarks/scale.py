"""Memory and speed of training on many cells: counts in memory, and counts that stay in their h5ad
file.

    python benchmarks/scale.py [--cells 100000] [--rounds 5] [--steps 20] [--folder FOLDER]
        writes scale.csv

The cells are made of the embedded pancreas's: drawn with replacement, each count thinned binomially
to a random depth between 70 and 100 %, on the genes of the file, shuffled. Each contestant reads
the file, makes a VAE of the paper's shape and trains in a process of its own; rounds are
interleaved. `peak` is the process's largest resident memory above what it had after its imports,
`counts` the CSR matrix in memory, `model` weights, moments and gradients.
"""

import argparse
import datetime
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def write_cells(path, n, seed=0, block=2000, n_genes=None):
    """An h5ad file of n cells, made of real ones; written in blocks, so that this does not need the
    memory either.
    """
    from vampsc import organs

    real = organs.load("pancreas")
    rng = np.random.default_rng(seed)
    genes = rng.permutation(real.n_vars)[:n_genes]
    first = None
    for start in range(0, n, block):
        rows = real.X[rng.integers(real.n_obs, size=min(block, n - start))][:, genes]
        depth = np.repeat(rng.uniform(0.7, 1, rows.shape[0]), np.diff(rows.indptr))
        rows.data = rng.binomial(rows.data.astype(int), depth).astype("float32")
        rows.eliminate_zeros()
        if first is None:
            ad.AnnData(rows, var=real.var.iloc[genes]).write_h5ad(path)
            import h5py

            first = h5py.File(path, "r+")
        else:
            ad.io.sparse_dataset(first["X"]).append(rows)
    ad.io.write_elem(first, "obs", pd.DataFrame(index=[f"cell {i}" for i in range(n)]))
    first.close()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    "The largest resident memory since it was made, in bytes above the start."

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.start = resident()

    def __call__(self):
        lines = Path("/proc/self/status").read_text().splitlines()
        return (
            1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
            - self.start
        )


def contest(path, backed, batch, steps, orders, answers):
    "Read the file, train, and say cells per second when told; at the end the memory."
    import keras

    from vampsc import counts, models, training

    peak = Peak()
    model = models.VAE(ad.read_h5ad(path, backed="r" if backed else None))
    training.compile_network(model.network, 2e-3)

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.times = []

        def on_train_batch_end(self, step, logs=None):
            self.times.append(time.perf_counter())

    def run(seed):
        cells = np.random.default_rng(seed).choice(len(model.X), steps * batch, replace=False)
        clock = Clock()
        model.network.fit(
            counts.Batches(model.X, cells, batch, shuffle=True),
            callbacks=[clock],
            verbose=0,
            shuffle=False,
        )
        return batch / np.median(np.diff(clock.times[3:]))

    run(0)
    answers.put("ready")
    while seed := orders.get():
        answers.put(run(seed))
    answers.put(
        {
            "peak": peak(),
            "counts": 8 * model.X.nnz + 4 * len(model.X),
            "model": (
                4
                * 4
                * sum(
                    v.size if hasattr(v, "size") else int(np.prod(v.shape))
                    for v in model.network.trainable_variables
                )
            ),
        }
    )


def measured(path, batch, rounds, steps):
    "A row for each contestant."
    context = multiprocessing.get_context("spawn")
    contestants = {}
    for name, backed in (("in memory", False), ("backed", True)):
        queues = context.Queue(), context.Queue()
        context.Process(
            target=contest, args=(path, backed, batch, steps, *queues), daemon=True
        ).start()
        queues[1].get(timeout=1200)
        contestants[name] = queues

    def told(name, order):
        contestants[name][0].put(order)
        return contestants[name][1].get(timeout=600)

    rates = pd.DataFrame(
        [{name: told(name, seed) for name in contestants} for seed in range(1, rounds + 1)]
    )
    table = pd.DataFrame({name: told(name, 0) for name in contestants}).T / 2**20
    table["peak - model, as share of counts"] = (table["peak"] - table["model"]) / table["counts"]
    table["cells per second"] = rates.median()
    table["share of the rate in memory"] = rates.div(rates["in memory"], axis=0).median()
    return table.rename_axis("counts are").rename(
        columns={c: f"{c}, MiB" for c in ("peak", "counts", "model")}
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("cells", 100_000), ("rounds", 5), ("steps", 20), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--folder", help="where to write the cells, some 15 KB each; a temporary folder by default"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "cells.h5ad"
        write_cells(path, given.cells)
        table = measured(path, given.batch, given.rounds, given.steps).assign(
            cells=given.cells, date=datetime.date.today().isoformat()
        )
    print(table.to_string(float_format="%.2f"))
    table.to_csv(HERE / "scale.csv", float_format="%.4g")


if __name__ == "__main__":
    main()
