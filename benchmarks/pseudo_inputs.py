"""What fewer pseudo-inputs cost and save: ELBO and time of VAE-VAMPs with different K.

    python benchmarks/pseudo_inputs.py [--K 500 250 100 50] [--seeds 0 1] [--epochs 30]
        [--genes 4000]
        writes pseudo_inputs.csv

Data: the embedded pancreas. `difference`: ELBO on the test cells less that of the first K with the
same seed, in nats per cell. A VAE of the same settings is the last row of each seed, without K.
"""

import argparse
import datetime
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from vampsc import models, organs  # noqa: E402


class Seconds(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(time.perf_counter() - self.start)


def judged(model, epochs):
    "Median seconds of an epoch, validation included, and the ELBO on the test cells."
    clock = Seconds()
    model.train("quick", max_epochs=epochs, progress=False, callbacks=[clock])
    return (
        np.median(clock.epochs[1:]),
        model.get_elbo(indices=model.split.test, n_mc_samples=25)["elbo"],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--K", type=int, nargs="+", default=[500, 250, 100, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    for name, default in (("epochs", 30), ("genes", 4000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows = []
    adata = organs.load("pancreas")
    for seed in given.seeds:
        first = None
        for k in [*given.K, None]:
            settings = {"n_genes": given.genes, "seed": seed}
            model = (
                models.VAMP(adata, n_pseudo_inputs=k, **settings)
                if k
                else models.VAE(adata, **settings)
            )
            seconds, elbo = judged(model, given.epochs)
            first = elbo if first is None else first
            rows.append(
                {
                    "seed": seed,
                    "K": k,
                    "seconds per epoch": seconds,
                    "ELBO": elbo,
                    "difference": elbo - first,
                }
            )
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    table = pd.DataFrame(rows).assign(
        genes=given.genes, epochs=given.epochs, date=datetime.date.today().isoformat()
    )
    table.to_csv(HERE / "pseudo_inputs.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
