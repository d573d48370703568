"""What a training step costs on JAX beside TensorFlow, on one core of a CPU.

    python benchmarks/backends.py [--rounds 3] [--sizes 1000 2000]        writes backends.csv

Data, models and what is timed are those of `step.py`: the median epoch of `train`, validation
included, the compiling before it left out. Every measurement is a process of its own, in turns; the
table has medians over rounds, in milliseconds of processor time for a step.
"""

import argparse
import os
from datetime import date

import pandas as pd
from step import HERE, SIZES, in_own_process, train

MODELS = ["VAE", "VAMP", "IAF", "VAMPIAF"]
BACKENDS = ["tensorflow", "jax"]
ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


def of_a_backend(backend, model, genes):
    "Milliseconds of processor time for a step."
    os.environ["KERAS_BACKEND"] = backend  # read by the new process
    return in_own_process(train, model, genes, False)[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000], choices=list(SIZES))
    a = parser.parse_args()
    os.environ.update(ONE_CORE)
    rows = []
    for _ in range(a.rounds):
        for genes in a.sizes:
            for model in MODELS:
                for backend in BACKENDS:
                    ms = of_a_backend(backend, model, genes)
                    rows.append(dict(genes=genes, model=model, backend=backend, ms=ms))
                    print(rows[-1], flush=True)
    table = pd.DataFrame(rows).pivot_table("ms", ["genes", "model"], "backend", "median")
    table = table[BACKENDS].assign(rounds=a.rounds, date=date.today().isoformat())
    table.round(2).to_csv(HERE / "backends.csv")
    print(table)


if __name__ == "__main__":
    main()
