"""How long until a model explains held-out cells as well as scvi-tools' SCVI does at its end?

    python benchmarks/time_to_quality.py [--data pancreas file.h5ad ...] [--models VAE VAMP]
        [--seeds 0 1 2] [--cores 1 2]

Data: the embedded pancreas, or raw counts in h5ad files; 1,000 variable genes, the same for all.
SCVI trains as it comes (10 latent units, a ZINB likelihood, up to 400 epochs), and in our shape
(one hidden layer of 128, 128 latent units, NB, no KL warm-up, its own early stopping). The models
here have that shape and the `quick` profile; a VAMP has 100 pseudo-inputs. All train on the same
cells.

The measure is the bound on log p(x) by importance sampling with 50 draws, in nats a cell, on the
validation cells. While a model here trains, its bound is taken some forty times, with the clock
stopped; `seconds_to_default` and `seconds_to_shape` say when it first reached the bound at which
the SCVI of that seed ended. Test cells are looked at once, by the finished models. Each trains in a
process of its own, one after the other. Writes time_to_quality.csv: a row for each data set, seed,
number of cores and model.
"""

import argparse
import datetime
import logging
import multiprocessing
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

SHAPE = dict(n_genes=1000, hidden=(128,), n_latent=128)
DRAWS = 50
# so often the bound is taken during a training
LOOKS = 40


def read(data):
    "The AnnData, by the name of an organ or of a file."
    from vampsc import organs

    return ad.read_h5ad(data) if Path(data).suffix == ".h5ad" else organs.load(data)


def made(name, data, seed):
    "An untrained model here."
    import vampsc

    pseudo_inputs = dict(n_pseudo_inputs=100) if "VAMP" in name else {}
    return getattr(vampsc, name)(read(data), seed=seed, **SHAPE, **pseudo_inputs)


def scvi_tools(in_our_shape, data, seed):
    "SCVI on the cells and genes of our VAE."
    import scvi

    ours = made("VAE", data, seed)
    split = ours.split
    scvi.settings.seed = seed
    scvi.settings.verbosity = 40
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cells = ad.AnnData(ours.X[:])
    scvi.model.SCVI.setup_anndata(cells)
    shape = (
        dict(n_latent=128, n_hidden=128, n_layers=1, gene_likelihood="nb") if in_our_shape else {}
    )
    how = (
        dict(early_stopping=True, plan_kwargs=dict(n_epochs_kl_warmup=None, n_steps_kl_warmup=None))
        if in_our_shape
        else {}
    )
    model = scvi.model.SCVI(cells, **shape)
    start = time.perf_counter()
    model.train(
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
        datasplitter_kwargs={"external_indexing": [split.train, split.validation, split.test]},
        **how,
    )
    seconds = time.perf_counter() - start

    def bound(indices):
        return float(
            model.get_marginal_ll(indices=indices, n_mc_samples=DRAWS, return_mean=False).mean()
        )

    return dict(
        seconds=seconds,
        epochs=model.trainer.current_epoch,
        validation=bound(split.validation),
        test=bound(split.test),
    )


def ours(name, data, seed, targets):
    "A model here. targets : dict from the name of a bound to its value."
    import keras

    model = made(name, data, seed)

    def bound(indices):
        return float(model.get_marginal_ll(indices=indices, n_mc_samples=DRAWS)["marginal_ll"])

    class Judge(keras.callbacks.Callback):
        paused = 0.0
        reached = {}

        def on_epoch_end(self, epoch, logs=None):
            if (epoch + 1) % max(1, self.params["epochs"] // LOOKS):
                return
            now = time.perf_counter()
            value = bound(model.split.validation)
            for target in targets:
                if value >= targets[target]:
                    self.reached.setdefault(target, now - begin - self.paused)
            self.paused += time.perf_counter() - now

    judge = Judge()
    begin = time.perf_counter()
    model.train("quick", progress=False, callbacks=[judge])
    seconds = time.perf_counter() - begin - judge.paused
    reached = {f"seconds_to_{target}": judge.reached.get(target, np.nan) for target in targets}
    return dict(
        seconds=seconds,
        epochs=len(model.history),
        validation=bound(model.split.validation),
        test=bound(model.split.test),
        **reached,
    )


def answer(pipe, function, arguments):
    pipe.send(function(*arguments))


def in_own_process(cores, function, *arguments):
    "What a function returns in a process of its own, on so many cores."
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = str(cores)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        sys.exit(f"{function.__name__}{arguments} ended without an answer")
    process.join()
    return result


def rows(data, models, seed, cores):
    "One seed on one data set: SCVI first, whose bounds are the targets."
    place = dict(data=Path(data).stem, seed=seed, cores=cores)
    theirs = {
        kind: in_own_process(cores, scvi_tools, kind == "shape", data, seed)
        for kind in ("default", "shape")
    }
    for kind, found in theirs.items():
        yield {**place, "model": f"SCVI, {kind}", **found}
    targets = {kind: found["validation"] for kind, found in theirs.items()}
    for name in models:
        yield {**place, "model": name, **in_own_process(cores, ours, name, data, seed, targets)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["pancreas"])
    parser.add_argument("--models", nargs="+", default=["VAE", "VAMP"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", default=str(HERE / "time_to_quality.csv"))
    given = parser.parse_args()
    done = []
    for data in given.data:
        for seed in given.seeds:
            for cores in given.cores:
                for row in rows(data, given.models, seed, cores):
                    done.append(
                        {
                            **row,
                            "date": datetime.date.today().isoformat(),
                            "scvi_tools": version("scvi-tools"),
                        }
                    )
                    print(done[-1], flush=True)
                    pd.DataFrame(done).to_csv(given.out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
