"""Would the tests notice? Slips that a person could make in the formulas of chapters 2 to 14, one
at a time.

    # all, by the test named beside each: some 3 minutes
    python tools/slips.py
    python tools/slips.py no-log-k gate-swapped    # these two
    python tools/slips.py --all                    # by all tests that `make test` runs: hours

Each slip is put into a copy of the package. It is caught when a test fails that passes on the
package as it is. The exit status is 1 if one is missed. Every run is a process of its own, forked
from one that has imported TensorFlow.
"""

import argparse
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONE_CORE = (
    "OMP_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
# slow to import, and no slip changes them
IMPORTED_ONCE = ["tensorflow", "scanpy", "hypothesis", "mpmath"]
# what `make test` takes of the tests
QUICK = re.search(r"^QUICK := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
# seconds for one run of the tests
LIMIT = 1800


class Slip(NamedTuple):
    """In vampsc/`module`, the text `old`, which is there once, becomes `new`; `test`, in tests/,
    must then fail.
    """

    name: str
    module: str
    old: str
    new: str
    test: str


SLIPS = [
    Slip(*slip)
    for slip in (
        # 2: likelihood, and its compiled twin of appendix A4
        (
            "counting-term-dropped",
            "likelihood.py",
            "- stirling_error(theta)\n        - stirling_error(x)",
            "- stirling_error(theta)",
            "counts/test_likelihood.py::test_against_scipy",
        ),
        (
            "poisson-lacks-a-logarithm",
            "likelihood.py",
            "- 0.5 * ops.log(2 * math.pi * x) - stirling_error(x)",
            "- stirling_error(x)",
            "counts/test_likelihoods.py::test_poisson_at_the_extremes",
        ),
        (
            "zeros-set-with-the-other-probability",
            "likelihood.py",
            "- ops.softplus(logit)",
            "- ops.softplus(-logit)",
            "counts/test_likelihoods.py::test_zero_inflated_is_a_mixture_of_zero_and_a_negative_binomial",
        ),
        (
            "a-zero-that-was-set-counts",
            "likelihood.py",
            "was_set * mu + (1 - was_set) * counted",
            "counted",
            "counts/test_likelihoods.py::test_the_rate_given_a_count_is_that_of_simulated_cells",
        ),
        (
            "mean-and-dispersion-swapped",
            "likelihood.py",
            "ops.softplus(m - r)",
            "ops.softplus(r - m)",
            "counts/test_likelihood.py::test_against_scipy",
        ),
        (
            "gradient-lacks-a-term",
            "likelihood.py",
            "- digamma_error(theta)) - far_theta",
            "- digamma_error(theta))",
            "counts/test_likelihood.py::test_non_integer_counts",
        ),
        (
            "compiled-counting-term-dropped",
            "kernels.py",
            "- _stirling_error(x[k])",
            "",
            "foundations/test_kernels.py::test_shapes_and_densities",
        ),
        (
            "compiled-penalties-swapped",
            "kernels.py",
            "l1 * total + l2 * squares",
            "l2 * total + l1 * squares",
            "foundations/test_kernels.py::test_one_step_of_adam_with_its_penalties_by_hand",
        ),
        (
            "compiled-size-without-log",
            "kernels.py",
            "_log(_sum(x[i]) / target_sum)",
            "_sum(x[i]) / target_sum",
            "foundations/test_kernels.py::test_shapes_and_densities",
        ),
        # 24: truth
        (
            "components-too-narrow",
            "truth.py",
            "np.square(scaled).sum(2) / 2",
            "np.square(scaled).sum(2)",
            "beyond/test_truth.py::test_log_p_is_that_of_a_grid",
        ),
        (
            "weights-without-the-proposal",
            "truth.py",
            "_log_likelihood(truth, x, expected, z) - log_r",
            "_log_likelihood(truth, x, expected, z)",
            "beyond/test_truth.py::test_log_p_is_that_of_a_grid",
        ),
        # 3: networks
        (
            "size-factors-of-1000",
            "networks.py",
            "TARGET_SUM = 1e4",
            "TARGET_SUM = 1e3",
            "parts/test_networks.py::test_log_normalise",
        ),
        (
            "no-log1p",
            "networks.py",
            "ops.log1p(counts",
            "(counts",
            "parts/test_networks.py::test_log_normalise",
        ),
        (
            "size-without-log",
            "networks.py",
            "soft_bound(a) + log_size",
            "soft_bound(a) + ops.exp(log_size)",
            "parts/test_networks.py::test_decoder",
        ),
        # 4: posteriors
        (
            "variance-for-deviation",
            "posteriors.py",
            "ops.exp(0.5 * log_var) * noise",
            "ops.exp(log_var) * noise",
            "parts/test_posteriors.py::test_log_q_is_the_density_at_the_sample",
        ),
        (
            "kl-sign-of-log-variance",
            "posteriors.py",
            "ops.expm1(log_var) - log_var",
            "ops.expm1(log_var) + log_var",
            "parts/test_posteriors.py::test_closed_kl_is_the_integral",
        ),
        (
            "variance-for-precision",
            "posteriors.py",
            "ops.exp(-log_var) + log_var",
            "ops.exp(log_var) + log_var",
            "parts/test_bounds.py::test_log_prob_of_the_posterior_is_that_of_its_draws",
        ),
        # 5: flows
        (
            "gate-swapped",
            "flows.py",
            "gate * z + (1.0 - gate) * m",
            "(1.0 - gate) * z + gate * m",
            "parts/test_flows.py::test_step_formula",
        ),
        (
            "order-not-reversed",
            "flows.py",
            "ops.flip(z, axis=-1)",
            "z",
            "parts/test_flows.py::test_order_is_reversed_between_steps",
        ),
        (
            "mask-off-by-one",
            "flows.py",
            "degrees[-1][:, None] < degrees[0]",
            "degrees[-1][:, None] <= degrees[0]",
            "parts/test_flows.py::test_masks",
        ),
        (
            "log-determinant-sign",
            "flows.py",
            "log_q - log_gate",
            "log_q + log_gate",
            "parts/test_flows.py::test_log_q_is_the_density_of_the_bent_sample",
        ),
        # 6: priors
        (
            "no-log-k",
            "priors.py",
            "-math.log(n)",
            "0.0",
            "parts/test_priors.py::test_copies_of_a_component_are_one_component",
        ),
        (
            "product-of-mixtures",
            "priors.py",
            "ops.logsumexp(gaussian_log_densities(z, means, log_vars) + log_weights, axis=-1)",
            (
                "sum(ops.logsumexp(gaussian_log_densities(*(v[:, d:d + 1] for v in (z, means,"
                " log_vars))) + log_weights, axis=-1) for d in range(means.shape[1]))"
            ),
            "parts/test_priors.py::test_sum_over_units_is_inside",
        ),
        (
            "draws-with-the-variance",
            "priors.py",
            "np.exp(0.5 * log_vars[k])",
            "np.exp(log_vars[k])",
            "parts/test_priors.py::test_sample_moments",
        ),
        # 7: the network; 10: inference; 13: models
        (
            "pseudo-inputs-in-training-mode",
            "assembly.py",
            "self.encode(u, conditions",
            "self.encode(u, True, conditions",
            "parts/test_priors.py::test_pseudo_inputs_pass_in_inference_mode_also_in_training",
        ),
        (
            "loss-at-the-mean",
            "assembly.py",
            "self.reconstruction(cells, z, training), self.kl(",
            "self.reconstruction(cells, parameters[0], training), self.kl(",
            "parts/test_bounds.py::test_log_weight_is_minus_the_terms",
        ),
        (
            "beta-on-the-reconstruction",
            "assembly.py",
            "reconstruction + (self.beta if y is None else y) * kl",
            "(self.beta if y is None else y) * reconstruction + kl",
            "counts/test_by_hand.py::test_the_loss_weighs_the_kl_term_and_it_alone",
        ),
        (
            "bound-without-log-n",
            "inference.py",
            "return first - np.log(n)",
            "return first",
            "parts/test_bounds.py::test_many_small_weights_are_not_lost",
        ),
        (
            "genes-by-test-cells",
            "models.py",
            "variable_genes(X, n_genes, train, seed)",
            "variable_genes(X, n_genes, None, seed)",
            "counts/test_by_hand.py::test_genes_are_chosen_by_the_training_cells",
        ),
        # 8: training
        (
            "stops-by-training-loss",
            "training.py",
            'EarlyStopping(\n            monitor="val_loss"',
            'EarlyStopping(\n            monitor="loss"',
            "counts/test_by_hand.py::test_the_rate_is_halved_and_training_ends_by_the_validation_loss",
        ),
        (
            "last-weights-kept",
            "training.py",
            "restore_best_weights=True",
            "restore_best_weights=False",
            "counts/test_by_hand.py::test_the_best_weights_come_back_though_the_last_epoch_was_worse",
        ),
        (
            "halves-an-epoch-late",
            "training.py",
            "Halving(profile.lr_patience or np.inf,",
            "Halving(profile.lr_patience + 1,",
            "counts/test_by_hand.py::test_the_rate_is_halved_and_training_ends_by_the_validation_loss",
        ),
        (
            "cosine-twice-as-high",
            "training.py",
            "(1 + np.cos(np.pi * epoch / self.epochs)) / 2",
            "1 + np.cos(np.pi * epoch / self.epochs)",
            "parts/test_training.py::test_the_learning_rate_falls_along_half_a_cosine",
        ),
        # 14: metrics
        (
            "active-above-0.1",
            "metrics.py",
            "def active_units_split_half(mean_a, mean_b, threshold=0.01)",
            "def active_units_split_half(mean_a, mean_b, threshold=0.1)",
            "models/test_metrics.py::test_units_are_active_above_a_variance_of_a_hundredth",
        ),
        (
            "plain-for-split-half",
            "metrics.py",
            "(a * b).mean(0)",
            "((a + b) / 2).var(0)",
            "models/test_metrics.py::test_split_half_is_unbiased",
        ),
        (
            "components-off-by-one",
            "metrics.py",
            "int(enough.argmax()) + 1",
            "int(enough.argmax())",
            "models/test_metrics.py::test_components_closed_forms",
        ),
        (
            "farthest-type-for-nearest",
            "metrics.py",
            "means.min(1)",
            "np.where(np.isinf(means), 0, means).max(1)",
            "models/test_metrics.py::test_silhouette_block_sizes",
        ),
        (
            "cell-its-own-neighbour",
            "metrics.py",
            "np.maximum(sizes[codes] - 1, 1)",
            "sizes[codes]",
            "models/test_metrics.py::test_silhouette_block_sizes",
        ),
    )
]


def changed(slip, text):
    """The text of the slip's module with the slip in it.

    ValueError unless what it changes is there once.
    """
    times = text.count(slip.old)
    if times != 1:
        raise ValueError(
            f"{slip.name}: {slip.old!r} is {times} times in vampsc/{slip.module} and must be there"
            " once; write its present wording into tools/slips.py."
        )
    return text.replace(slip.old, slip.new)


def copy_package(source, folder, slip=None):
    """Put source's package into the folder, with the slip if there is one; compiled kernels come
    along where valid.
    """
    shutil.copytree(source / "vampsc", folder / "vampsc", ignore=shutil.ignore_patterns("data"))
    (folder / "vampsc" / "data").symlink_to(ROOT / "vampsc" / "data")
    if slip:
        module = folder / "vampsc" / slip.module
        module.write_text(changed(slip, module.read_text(encoding="utf-8")), encoding="utf-8")


class Failures:
    "A pytest plugin that remembers what failed."

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(folder, arguments):
    """In a process of its own: run pytest on the package in the folder; what it said and what
    failed is left there.
    """
    with open(folder / "said", "w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    import vampsc

    if not Path(vampsc.__file__).is_relative_to(folder):
        sys.exit(f"imported {vampsc.__file__} instead of the copy")
    failures = Failures()
    status = pytest.main(arguments, [failures])
    (folder / "report.json").write_text(json.dumps([int(status), *failures.names]))


def outcome(context, folder, tests):
    """Of the package in the folder: (pytest's exit status, None if it did not end; the first failed
    test; seconds).
    """
    quiet = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    start = time.time()
    process = context.Process(target=run_tests, args=(folder, [*tests, *quiet]))
    process.start()
    process.join(LIMIT)
    process.kill()
    report = folder / "report.json"
    status, *failed = json.loads(report.read_text()) if report.exists() else [None]
    return status, next(iter(failed), None), time.time() - start


def server():
    "A context whose processes are forked from one that has imported what is slow, silently."
    # With CI, hypothesis draws the same examples each time and keeps none.
    os.environ.update(dict.fromkeys(ONE_CORE, "1"), KERAS_BACKEND="tensorflow", CI="true")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    shown = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.dup2(shown, 2)
    return context


def tests_of(slips, everything):
    "Arguments of pytest: of the slips' own tests, or of all, what `make test` takes."
    named = sorted({str(ROOT / "tests" / slip.test) for slip in slips})
    return [*([str(ROOT / "tests")] if everything else named), "-m", QUICK]


def judge(context, whole, slip, everything):
    """The outcome with the slip; whole is a folder with the package as it is, and the kernels that
    its tests compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        copy_package(whole, folder, slip)
        return outcome(context, folder, tests_of([slip], everything))


def missed(context, slips, jobs, everything=False):
    "The names of the slips that no test notices; a line for each slip is printed."
    names = []
    with tempfile.TemporaryDirectory() as whole, ThreadPoolExecutor(jobs) as workers:
        whole = Path(whole).resolve()
        copy_package(ROOT, whole)
        status, failed, seconds = outcome(context, whole, tests_of(slips, everything))
        if status != 0:
            said = (whole / "said").read_text(errors="replace")
            sys.exit(
                f"{said}\nThe package as it is does not pass the tests that should tell a slip:"
                f" {failed}"
            )
        print(f"{'the package as it is':32s} passes, {seconds:.0f} s", flush=True)
        found = workers.map(lambda slip: judge(context, whole, slip, everything), slips)
        for slip, (status, failed, seconds) in zip(slips, found):
            # without a failed test, pytest may have found none to run
            caught = failed or (status is None and "the tests did not end")
            print(f"{slip.name:32s} {caught or 'MISSED'}, {seconds:.0f} s", flush=True)
            if not caught:
                names.append(slip.name)
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of slips; none: all")
    parser.add_argument(
        "--all", action="store_true", help="run all tests not marked slow, instead of the one named"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="so many at a time"
    )
    chosen = parser.parse_args()
    if unknown := {*chosen.names} - {slip.name for slip in SLIPS}:
        sys.exit(
            f"no slip is named {' or '.join(sorted(unknown))}; there are"
            f" {', '.join(slip.name for slip in SLIPS)}"
        )
    slips = [slip for slip in SLIPS if not chosen.names or slip.name in chosen.names]
    names = missed(server(), slips, chosen.jobs, chosen.all)
    print(f"{len(slips) - len(names)} of {len(slips)} slips are caught")
    if names:
        sys.exit(f"missed: {', '.join(names)}; a test is wanting")


if __name__ == "__main__":
    main()
