"""What the paper's authors wrote in code that they published later, beside what is done here.

    python benchmarks/later_code.py [--data pancreas file.h5ad ...] [--seeds 0 1 2]

That code takes the mean of the loss over genes for the AE, and the sum for the VAEs; the penalties
of the AE's weights then weigh as many times more as there are genes. Its VAMP has two levels of 64
units (here `HVAMP`). Its pseudo-inputs begin nearly constant, at a hard sigmoid of values around
-0.05, and stay between 0 and 1; here they begin at cells, without an upper bound.

Each model has 1,000 variable genes (or all, where a file has fewer), one hidden layer of 128, 128
latent units and at most 100 pseudo-inputs, and is trained by `quick`. Writes later_code.csv, a row
for each data set, model and seed: the numbers of the paper's Tables 1 and 2, of all cells and of
the test cells. Rows that are there are not computed again.
"""

import argparse
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from training_end import read

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

ARMS = {
    "AE, sum over genes": ("AE", ""),
    "AE, mean over genes": ("AE", "mean"),
    "VAE": ("VAE", ""),
    "VAMP, from cells": ("VAMP", ""),
    "VAMP, nearly constant": ("VAMP", "constant"),
    "HVAMP, from cells": ("HVAMP", ""),
    "HVAMP, nearly constant": ("HVAMP", "constant"),
}
PENALTY = 5e-4


class Within(keras.constraints.Constraint):
    "Values between 0 and 1, as behind a hard sigmoid."

    def __call__(self, w):
        return keras.ops.clip(w, 0, 1)


def begin_nearly_constant(prior, seed):
    "Pseudo-inputs at a hard sigmoid of normal values, -0.05 with a standard deviation of 0.01."
    rng = np.random.default_rng(seed)
    start = -0.05 + 0.01 * rng.standard_normal(prior.pseudo_inputs.shape)
    prior.pseudo_inputs.assign(np.asarray(keras.ops.hard_sigmoid(start.astype("float32"))))
    prior.pseudo_inputs.constraint = Within()


def made(adata, arm, seed):
    "The untrained model of an arm."
    import vampsc

    name, other = ARMS[arm]
    n_genes = min(1000, adata.n_vars)
    settings = dict(n_genes=n_genes, hidden=(128,), n_latent=128, seed=seed)
    if "VAMP" in name:
        settings["n_pseudo_inputs"] = min(100, int(0.8 * adata.n_obs))
    if other == "mean":
        settings.update(l1=PENALTY * n_genes, l2=PENALTY * n_genes)
    model = getattr(vampsc, name)(adata, **settings)
    if other == "constant":
        begin_nearly_constant(model.network.prior, seed)
    return model


def judged(adata, arm, seed):
    "Train the model of an arm; its numbers of the paper's tables, as a dict."
    from vampsc import metrics

    model = made(adata, arm, seed)
    model.train(progress=False)
    z = model.get_latent_representation()
    row = dict(
        active_units=int(metrics.active_units(z)),
        pcs95=int(metrics.n_components(z)),
        asw=float(metrics.silhouette(z, adata.obs["cell_type"])),
        test_loss=float(model.get_reconstruction_error(indices=model.split.test)["per_gene"]),
        epochs=len(model.history),
        best_epoch=int(model.history["val_loss"].idxmin()),
    )
    if model.architecture.prior != "none":
        bound = model.get_marginal_ll(indices=model.split.test, n_mc_samples=50)
        row["bound"] = float(bound["marginal_ll"])
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["pancreas"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default=str(HERE / "later_code.csv"))
    a = parser.parse_args()
    out = Path(a.out)
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    for seed in a.seeds:
        for data in a.data:
            adata = read(data)
            for arm in ARMS:
                place = dict(data=Path(data).stem, model=arm, seed=seed)
                if any(all(row[key] == value for key, value in place.items()) for row in rows):
                    continue
                rows.append({**place, **judged(adata, arm, seed)})
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
