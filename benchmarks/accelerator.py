"""Speed on a GPU, and the paper's training to its end.

    KERAS_BACKEND=jax python benchmarks/accelerator.py [--batch 128 512 2048]
        [--precision float32 mixed_bfloat16]
    KERAS_BACKEND=jax python benchmarks/accelerator.py --train pancreas blood.h5ad --out runs

Without --train: cells per second of the four models on the embedded pancreas, all genes, the median
over epochs after the first, which compiles; writes accelerator.csv. With --train: each model is
trained with the `paper` profile until it stops by itself, on the embedded pancreas or h5ad files of
raw counts, all genes of the gene space, and kept in a folder of --out beside training.csv; what is
there already is not trained again.
"""

import argparse
import datetime
import sys
import time
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import keras
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from vampsc import kernels, models, organs, training  # noqa: E402

NAMES = ("AE", "VAE", "IAF", "VAMP")


def device():
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return (
        tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
        if gpus
        else "CPU"
    )


class Epochs(keras.callbacks.Callback):
    """Seconds of each epoch; its mean loss is asked for at its end, so the device has finished by
    then.
    """

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        float(logs["loss"])
        self.seconds.append(time.perf_counter() - self.start)


def rate(name, adata, batch, precision, steps, epochs):
    "Cells per second."
    model = getattr(models, name)(adata, precision=precision)
    training.compile_network(model.network, 5e-5)
    clock = Epochs()
    cells = np.arange(batch * steps) % model.X.shape[0]
    model.network.fit(
        training._Inputs(model.X, cells, batch, shuffle=True),
        epochs=1 + epochs,
        callbacks=[clock],
        verbose=0,
        shuffle=False,
    )
    return {
        "model": name,
        "batch": batch,
        "precision": precision,
        "cells per second": len(cells) / np.median(clock.seconds[1:]),
        "counts on the device": kernels.fits_on_device(model.X),
    }


def trained(name, data, out):
    """A model trained as in the paper and kept in out: how long that took, how many epochs, and how
    good it is.
    """
    adata = ad.read_h5ad(data) if Path(data).suffix == ".h5ad" else organs.load(data)
    model = getattr(models, name)(adata)
    start = time.perf_counter()
    model.train("paper")
    seconds = time.perf_counter() - start
    model.save(out / Path(data).stem / name, overwrite=True)
    test = model.split.test
    bound = (
        {}
        if name == "AE"
        else {
            "elbo": model.get_elbo(indices=test)["elbo"],
            "marginal": model.get_marginal_ll(indices=test)["marginal_ll"],
        }
    )
    return {
        "data": Path(data).stem,
        "model": name,
        "seconds": seconds,
        "epochs": len(model.history),
        "loss": model.get_reconstruction_error(indices=test)["per_gene"],
        **bound,
    }


def written(rows, path):
    "The rows so far, in a csv with the date and what they were made with."
    made = (
        f"{device()}, keras {version('keras')} on {keras.backend.backend()}"
        f" {version(keras.backend.backend())}"
    )
    pd.DataFrame(rows).assign(date=datetime.date.today().isoformat(), device=made).to_csv(
        path, index=False, float_format="%.6g"
    )
    print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)


def train(given):
    table = given.out / "training.csv"
    given.out.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    for data in given.train:
        for name in given.models:
            if any(row["data"] == Path(data).stem and row["model"] == name for row in rows):
                continue
            rows.append(trained(name, data, given.out))
            written(rows, table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--precision", nargs="+", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    for name, default in (("steps", 50), ("epochs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--train", nargs="+", metavar="DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    given = parser.parse_args()
    rows = []
    if given.train:
        return train(given)
    adata = organs.load("pancreas")
    for batch in given.batch:
        for precision in given.precision:
            for name in given.models:
                rows.append(rate(name, adata, batch, precision, given.steps, given.epochs))
                written(rows, HERE / "accelerator.csv")


if __name__ == "__main__":
    main()
