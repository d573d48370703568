"""Is a model at its end where training stops? Ways of ending, compared on validation cells.

    python benchmarks/training_end.py [--data pancreas file.h5ad ...] [--models VAE VAMP]
        [--seeds 0] [--ends quick 30000]

Data: the embedded pancreas, or raw counts in h5ad files. Every model has 1,000 variable genes (or
all, where a file has fewer), one hidden layer of 128 and 128 latent units; a VAMP has 100
pseudo-inputs. `quick` is the profile of that name; `patience` stops by patience as `PATIENCE` below
says. A number stands for so many steps of `quick`, with a rate after an @, and a minibatch after a
further one: 2000@0.008@256.

Writes training_end.csv: a row for each data set, model, seed and end. Rows that are there are not
computed again. The bound on log p(x) is of the validation cells, by importance sampling with 50
draws, in nats a cell; an AE has its reconstruction loss there. Test cells are not looked at. Set
TF_NUM_INTRAOP_THREADS and OMP_NUM_THREADS to 1 to compare times on one core.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import anndata as ad
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

KEY = ["data", "model", "seed", "end"]
PATIENCE = dict(learning_rate=2e-3, lr_patience=3, patience=10, max_epochs=100)


def read(data):
    "The AnnData, by the name of an organ or of a file."
    from vampsc import organs

    return ad.read_h5ad(data) if Path(data).suffix == ".h5ad" else organs.load(data)


def profile(end):
    "The training.Profile of an end, by its name."
    from vampsc import training

    quick = training.get_profile("quick")
    if end == "quick":
        return quick
    if end == "patience":
        return training.Profile(**PATIENCE)
    steps, *rest = end.split("@")
    rate = float(rest[0]) if rest else quick.learning_rate
    batch = int(rest[1]) if rest[1:] else quick.batch_size
    return dataclasses.replace(quick, steps=int(steps), learning_rate=rate, batch_size=batch)


def judged(adata, name, seed, end):
    "Train one model; a dict of what validation cells say of it, and what it took."
    import vampsc
    from vampsc import metrics

    settings = dict(n_genes=min(1000, adata.n_vars), hidden=(128,), n_latent=128, seed=seed)
    if "VAMP" in name:
        settings["n_pseudo_inputs"] = 100
    model = getattr(vampsc, name)(adata, **settings)
    wall = time.perf_counter()
    cpu = time.process_time()
    model.train(profile(end), progress=False)
    row = dict(
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        epochs=len(model.history),
        steps=int(model.network.optimizer.iterations),
        best_epoch=int(model.history["val_loss"].idxmin()),
    )
    cells = model.split.validation
    if name == "AE":
        row["validation"] = -float(model.history["val_reconstruction"].min())
    else:
        row["validation"] = float(
            model.get_marginal_ll(indices=cells, n_mc_samples=50)["marginal_ll"]
        )
    latent = model.get_latent_representation()
    row["active_units"] = int(metrics.active_units(latent))
    if "cell_type" in adata.obs:
        row["knn_purity"] = float(metrics.knn_purity(latent, adata.obs["cell_type"]))
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["pancreas"])
    parser.add_argument("--models", nargs="+", default=["VAE", "VAMP"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ends", nargs="+", default=["patience", "quick", "30000"])
    parser.add_argument("--out", default=str(HERE / "training_end.csv"))
    a = parser.parse_args()
    out = Path(a.out)
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    for data in a.data:
        adata = read(data)
        for seed in a.seeds:
            for name in a.models:
                for end in a.ends:
                    place = dict(data=Path(data).stem, model=name, seed=seed, end=end)
                    if any(all(str(row[key]) == str(place[key]) for key in KEY) for row in rows):
                        continue
                    rows.append({**place, **judged(adata, name, seed, end)})
                    print(rows[-1], flush=True)
                    pd.DataFrame(rows).to_csv(out, index=False)


if __name__ == "__main__":
    main()
