"""The average silhouette width beside scikit-learn's: time, memory and difference.

    python benchmarks/silhouette.py [--cells 50000] [--alone 200000] [--rounds 3]
        writes silhouette.csv

Cells: 128 units, 20 labels, Gaussian clouds that overlap. scikit-learn runs as it comes and with
n_jobs=-1; this package uses all cores. Rounds are interleaved, after a small one in which this
package compiles. `memory` is the process's largest resident memory above what it had before.
--alone: cells for this package only, once.
"""

import argparse
import datetime
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import silhouette_score

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from scale import Peak  # noqa: E402

from vampsc import metrics  # noqa: E402


def cells(n, units=128, labels=20, seed=0):
    "An embedding (n, units) in float32, as models give it, and its labels."
    rng = np.random.default_rng(seed)
    label = rng.integers(labels, size=n)
    return (rng.normal(size=(labels, units))[label] / 2 + rng.normal(size=(n, units))).astype(
        "float32"
    ), label


def timed(function, *arguments):
    start = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - start


def compared(n, rounds):
    """Both on the same cells: medians of the seconds and of their ratios, MiB of ours, the
    difference of the values.
    """
    z, labels = cells(n)
    double = z.astype("float64")
    contestants = {
        "seconds": lambda: metrics.silhouette(z, labels),
        "scikit-learn": lambda: silhouette_score(double, labels),
        "scikit-learn, all cores": lambda: silhouette_score(double, labels, n_jobs=-1),
    }
    metrics.silhouette(*cells(1000))
    peak = Peak()
    value, _ = timed(contestants["seconds"])
    memory = peak() / 2**20
    seconds = pd.DataFrame(
        [{name: timed(f)[1] for name, f in contestants.items()} for _ in range(rounds)]
    )
    faster = {
        f"times faster than {name}": (seconds[name] / seconds["seconds"]).median()
        for name in list(contestants)[1:]
    }
    return {
        "cells": n,
        **seconds.median(),
        **faster,
        "memory, MiB": memory,
        "difference": abs(value - contestants["scikit-learn"]()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("cells", 50_000), ("alone", 200_000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows = [compared(given.cells, given.rounds)]
    if given.alone:
        rows.append(
            {"cells": given.alone, "seconds": timed(metrics.silhouette, *cells(given.alone))[1]}
        )
    table = pd.DataFrame(rows).assign(
        date=datetime.date.today().isoformat(), versions=f"scikit-learn {version('scikit-learn')}"
    )
    print(table.to_string(index=False))
    table.to_csv(HERE / "silhouette.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
