"""What the tests share."""

import gc
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import settings

# The first call of a compiled function is slow, whatever the example; on a server a failure must
# repeat.
# JAX compiles anew for every shape, so that examples of many shapes are dear there.
# `pytest --hypothesis-profile=thorough` tries more of them.
settings.register_profile(
    "vampsc",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=6 if os.environ.get("KERAS_BACKEND") == "jax" else 30,
)
settings.register_profile("thorough", settings.get_profile("vampsc"), max_examples=200)
settings.load_profile("vampsc")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


# Where files are tested side by side, those that take longest begin first, so that none is left
# alone at the end.
LONGEST = (
    "test_question_pages",
    "test_study",
    "test_beyond",
    "test_models",
    "test_cli",
    "test_persistence",
    "test_resume",
    "test_own_data",
    "test_batches",
    "test_pipeline",
    "test_names_in_pages",
    "test_devices",
    "test_two_processes",
)


# Where our code meets the libraries: data and files, networks and their training, compiled kernels,
# notebooks, figures, commands. At the
# oldest versions only these files are tested (`--libraries`); arithmetic, our own files, servers
# and words are the same with any version.
AT_THE_LIBRARIES = (
    "test_counts",
    "test_counts_in_place",
    "test_intake",
    "test_genes",
    "test_features",
    "test_organs",
    "test_readers",
    "test_own_data",
    "test_own_cells",
    "test_models",
    "test_training",
    "test_environment",
    "test_persistence",
    "test_study",
    "test_cli",
    "test_figures",
    "test_metrics",
    "test_likelihood",
    "test_kernels",
    "test_networks",
    "test_posteriors",
    "test_pipeline",
    "test_readme",
    "test_versions",
    "test_door",
    "test_memory",
    "test_rows",
    "test_devices",
)


# What is built upon the models, and what surrounds them. A change of a chapter up to 14 seldom
# breaks it, and it takes longer than all the rest, so `make test` leaves it to `make test-all`.
OF_STUDIES = (
    "test_beyond",
    "test_damaged",
    "test_downloads_hostile",
    "test_environment",
    "test_names_in_pages",
    "test_names_with_braces",
    "test_overwriting",
    "test_own_data",
    "test_peers",
    "test_pipeline",
    "test_precision",
    "test_question_pages",
    "test_read_only",
    "test_registry",
    "test_registry_hostile",
    "test_responses",
    "test_study",
    "test_tables",
    "test_tools",
    "test_transfer_command",
    "test_two_processes",
    "test_unlabelled",
    "test_uses",
    "test_warned_in_time",
)


def pytest_addoption(parser):
    parser.addoption(
        "--libraries",
        action="store_true",
        help="only what may differ with the versions of the libraries",
    )


# Of the cases of one test, those of other models or settings call the same functions of the
# libraries. At the oldest versions these stand for all; where a case is a file of another kind,
# every case is tested.
MODELS_OF_ALL_PARTS = ("VAE", "VAMPIAF")
OTHER_MODELS = {"AE", "IAF", "VAMP", "MOG", "HVAMP"}
KINDS_OF_FILES = ("test_readers", "test_counts", "test_intake", "test_genes", "test_organs")


def is_of_another_model(item):
    "Is this a test's case of a model that has no part which VAE and VAMPIAF have not?"
    case = item.callspec.id if hasattr(item, "callspec") else ""
    return not OTHER_MODELS.isdisjoint(case.split("-"))


def for_the_oldest(items):
    "The tests that meet the libraries, with few of their cases."
    seen = set()
    for item in items:
        name = item.path.stem
        if name not in AT_THE_LIBRARIES:
            continue
        case = item.callspec.id if hasattr(item, "callspec") else ""
        test = (name, item.function.__name__)
        if name in KINDS_OF_FILES or test not in seen or case in MODELS_OF_ALL_PARTS:
            yield item
        seen.add(test)


# before tests are chosen by their markers
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.stem in OF_STUDIES:
            item.add_marker("study")
        if is_of_another_model(item):
            item.add_marker("other_model")
    if config.getoption("--libraries"):
        wanted = list(for_the_oldest(items))
        chosen = set(wanted)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = wanted
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


def pytest_collection_finish(session):
    """What was imported stays: the collector need not look through it again and again.

    To trace a function makes many objects that live for a while. With Python's own thresholds a
    tenth of the tests' time goes into looking for garbage among them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


# Tests of the compiled functions themselves: these are compiled as for users.
OF_COMPILED_FUNCTIONS = (
    "test_kernels",
    "test_precision",
    "test_resume",
    "test_steps",
    "test_traced",
    "test_training",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request):
    """Elsewhere TensorFlow does not rearrange the functions that it compiles. That takes a tenth of
    the tests' time, and changes results in the last digits only.
    """
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None:
        quickly = request.path.stem not in OF_COMPILED_FUNCTIONS
        options = {"disable_meta_optimizer": quickly}
        tensorflow.config.optimizer.set_experimental_options(options)


@pytest.fixture
def notebooks_here(monkeypatch):
    "Pages are executed in this process, where TensorFlow is already imported."
    import notebooks
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", notebooks.execute_here)


@pytest.fixture
def one_process(monkeypatch):
    "Runs of other methods are done in this process, too."
    import notebooks

    from vampsc import peers

    monkeypatch.setattr(peers, "_call", notebooks.call_here)


# A server ends what takes too long, and then nothing is known at all. On a slow machine tests that
# would begin after this moment, in seconds since 1970, are skipped instead, and counted.
UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > UNTIL:
        pytest.skip("it would have begun after the moment in TESTS_UNTIL")


@pytest.fixture(scope="session")
def shared_data():
    "The folder of larger data sets that the project does not ship."
    if not SHARED.is_dir():
        pytest.skip("needs the data sets in ../shared/data, which the project does not ship")
    return SHARED
