"""One epoch on 100,000 cells that stay in their file, by a process that may not have more than 4 GB
of memory.

    python benchmarks/limited_memory.py [--cells 100000] [--limit 4] [--folder FOLDER]
        writes limited_memory.csv

The file (100,000 cells x 19,986 genes, made of the embedded pancreas's cells as in scale.py) is
opened with backed="r". The process is limited by RLIMIT_DATA: all private memory it may write to,
touched or not, so more than what is resident. It makes a VAE of the paper's shape, trains an epoch
with a checkpoint, embeds all cells, judges the embedding by a silhouette and saves the model. As a
check that the limit bites, a second process reads the same file into memory and is refused.
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from scale import HERE, write_cells

GENES = 19_986


def work(path, folder, backed):
    "What the limited process does; prints its figures as JSON."
    import anndata as ad
    import numpy as np

    import vampsc

    begin = time.perf_counter()
    step = {}

    def took(name):
        nonlocal begin
        now = time.perf_counter()
        step[f"{name}, s"] = round(now - begin, 1)
        begin = now

    model = vampsc.VAE(ad.read_h5ad(path, backed="r" if backed else None))
    took("reading and checking")
    model.train(max_epochs=1, progress=False, checkpoint=Path(folder) / "checkpoint")
    took("an epoch")
    z = model.get_latent_representation()
    took("embedding")
    halves = np.random.default_rng(0).integers(2, size=len(z))
    # arbitrary halves: no separation
    assert abs(vampsc.metrics.silhouette(z, halves)) < 0.01
    took("silhouette")
    model.save(Path(folder) / "model", overwrite=True)
    took("saving")
    print(
        json.dumps(
            {
                "cells": len(z),
                "genes of the model": len(model.genes),
                "loss": model.history["loss"].iloc[0],
                **step,
                "peak resident, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


def limited(limit, *words):
    "Run this script's `work` in a process of its own, with so many GiB."
    size = int(limit * 2**30)
    return subprocess.run(
        [sys.executable, __file__, "--work", *map(str, words)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--limit", type=float, default=4, help="GiB")
    parser.add_argument(
        "--folder", help="where to write the cells, some 15 KB each; a temporary folder by default"
    )
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(*given.work[:2], given.work[2] == "backed")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "cells.h5ad"
        write_cells(path, given.cells, n_genes=GENES)
        done = limited(given.limit, path, folder, "backed")
        refused = limited(given.limit, path, folder, "in memory")
    if done.returncode:
        sys.exit(f"failed with a limit of {given.limit} GiB:\n{done.stderr[-3000:]}")
    row = {
        "limit, GiB": given.limit,
        **json.loads(done.stdout.splitlines()[-1]),
        "in memory": (
            "runs too"
            if refused.returncode == 0
            else f"refused: {refused.stderr.strip().splitlines()[-1][:80]}"
        ),
        "date": datetime.date.today().isoformat(),
    }
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    pd.DataFrame([row]).to_csv(HERE / "limited_memory.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
