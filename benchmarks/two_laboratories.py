"""Blood cells of two laboratories in one file, for `vampsc beyond integrate`.

    python benchmarks/two_laboratories.py blood_kang_12k_1287g.h5ad blood_zheng_facs.h5ad out.h5ad

Kang et al. (2018) took blood cells of eight donors as they were and named them by clusters. Zheng
et al. (2017) sorted cells of one donor by surface markers. Written are the genes that both files
have, 2,000 cells of each file drawn at random, `obs["laboratory"]`, and `obs["cell_type"]`. Types
that only one of the files divides are put together, since types must mean the same in both.
"""

import argparse

import anndata as ad
import numpy as np

# a word of the file's own type: the type in both
TYPES = {
    "CD4": "CD4 T cells",
    "CD8": "CD8 T cells",
    "B cells": "B cells",
    "CD19": "B cells",
    "NK": "NK cells",
    "Monocyte": "Monocytes",
    "Dendritic": "Dendritic cells",
    "Megakaryocytes": "Megakaryocytes",
    "CD34": "CD34+ cells",
}


def type_in_both(name):
    "The type that a file's own type belongs to. KeyError where none is known."
    for word, kind in TYPES.items():
        if word in name:
            return kind
    raise KeyError(f"no type is known for {name!r}; known are names with {', '.join(TYPES)}")


def drawn(path, laboratory, n, rng):
    "n cells of a file, AnnData (n, its genes)."
    adata = ad.read_h5ad(path)
    n = min(n, adata.n_obs)
    cells = adata[np.sort(rng.choice(adata.n_obs, n, replace=False))]
    counts = ad.AnnData(cells.X.astype("float32"), var=adata.var[[]].copy())
    counts.obs_names = [f"{laboratory}:{name}" for name in cells.obs_names]
    counts.obs["laboratory"] = laboratory
    counts.obs["cell_type"] = [type_in_both(kind) for kind in cells.obs["cell_type"]]
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kang")
    parser.add_argument("zheng")
    parser.add_argument("out")
    parser.add_argument("--cells", type=int, default=2000, help="of each laboratory")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    parts = [
        drawn(path, laboratory, given.cells, rng)
        for path, laboratory in ((given.kang, "Kang"), (given.zheng, "Zheng"))
    ]
    both = ad.concat(parts, join="inner")
    both.write_h5ad(given.out)
    print(both.obs.groupby(["cell_type", "laboratory"]).size().unstack(fill_value=0))
    print(f"{both.n_obs:,} cells, {both.n_vars:,} genes in {given.out}")


if __name__ == "__main__":
    main()
