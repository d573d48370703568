"""Donors as a covariate: a VAMP that is told each cell's donor beside one that is not, on any h5ad
with donors and cell types.

    python benchmarks/donors.py kang.h5ad --batch-key donor --label-key cell_type
        writes donors.csv and a figure

Same cells, split, seeds and profile. Silhouettes are of all cells, by donor (0: mixed) and by cell
type (higher is better); the ELBO is of the test cells.
"""

import argparse
import io
import sys
from pathlib import Path

import anndata as ad
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def trained(cells, key, seed, given):
    "The row of one model, and its embedding."
    from vampsc import VAMP, metrics

    model = VAMP(cells, batch_key=key, n_genes=given.genes, seed=seed).train(
        "quick", max_epochs=given.max_epochs
    )
    z = model.get_latent_representation()
    elbo = model.get_elbo(indices=model.split.test)
    return {
        "told": key or "nothing",
        "seed": seed,
        "ASW by donor": metrics.silhouette(z, cells.obs[given.batch_key]),
        "ASW by cell type": metrics.silhouette(z, cells.obs[given.label_key]),
        "kNN purity of cell types": metrics.knn_purity(z, cells.obs[given.label_key]),
        "kNN purity of donors": metrics.knn_purity(z, cells.obs[given.batch_key]),
        "ELBO": elbo["elbo"],
        "KL": elbo["kl"],
        "epochs": len(model.history),
        "seconds": model.history["seconds"].sum(),
    }, z


def draw(shown, labels, path):
    "A row of UMAPs for each kind of label, one above the other."
    from PIL import Image

    from vampsc import figures

    places = {name: figures.umap_coordinates(z) for name, z in shown.items()}
    rows = [
        Image.open(
            io.BytesIO(figures.umap_grid(shown, column, coordinates=places)._repr_png_())
        ).convert("RGB")
        for column in labels
    ]
    whole = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        whole.paste(row, (0, sum(r.height for r in rows[:i])))
    Path(path).parent.mkdir(exist_ok=True)
    whole.save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    for name, default in (
        ("batch-key", "donor"),
        ("label-key", "cell_type"),
        ("figure", HERE.parent / "nbs" / "images" / "kang_donors.png"),
    ):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=None)
    parser.add_argument("--genes", type=int, default=4000, help="so many variable genes, at most")
    given = parser.parse_args()
    cells = ad.read_h5ad(given.data)
    rows = []
    shown = {}
    for seed in range(given.seeds):
        for name, key in (("not told", None), ("told", given.batch_key)):
            row, z = trained(cells, key, seed, given)
            rows.append(row)
            if seed == 0:
                shown[
                    f"{name}: ASW {row['ASW by donor']:.3f} by donor, {row['ASW by cell type']:.3f}"
                    " by cell type"
                ] = z
            print(row, flush=True)
    pd.DataFrame(rows).to_csv(HERE / "donors.csv", index=False, float_format="%.5g")
    draw(shown, [cells.obs[column] for column in (given.batch_key, given.label_key)], given.figure)
    print(pd.DataFrame(rows).groupby("told").agg(["mean", "std"]).T.to_string())


if __name__ == "__main__":
    main()
