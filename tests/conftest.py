"""What the tests share."""
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")       # before anything imports TensorFlow
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import settings

# The first call of a compiled function is slow, whatever the example; on a server a failure must repeat.
# JAX compiles anew for every shape, so that examples of many shapes are dear there.
# `pytest --hypothesis-profile=thorough` tries more of them.
settings.register_profile("vampsc", deadline=None, derandomize=bool(os.environ.get("CI")),
                          max_examples=12 if os.environ.get("KERAS_BACKEND") == "jax" else 30)
settings.register_profile("thorough", settings.get_profile("vampsc"), max_examples=200)
settings.load_profile("vampsc")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


# Where files are tested side by side, those that take longest begin first, so that none is left alone at the end.
LONGEST = ("test_study", "test_beyond", "test_models", "test_cli", "test_persistence", "test_resume", "test_own_data", "test_batches", "test_pipeline",
           "test_names_in_pages", "test_devices", "test_two_processes")


# What is the same with any version of the libraries: arithmetic, our own files, servers, processes and words. At the oldest versions,
# these files are left out (`--libraries`).
OUR_OWN = ("test_resume", "test_steps", "test_registry", "test_registry_hostile", "test_peers", "test_damaged", "test_flows", "test_tools",
           "test_read_only", "test_downloads", "test_downloads_hostile", "test_traced", "test_bounds", "test_files", "test_two_processes",
           "test_priors", "test_properties", "test_book", "test_slips", "test_overwriting", "test_by_hand", "test_names_in_pages")


def pytest_addoption(parser):
    parser.addoption("--libraries", action="store_true", help="only what may differ with the versions of the libraries")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--libraries"):
        ours = [item for item in items if item.path.stem in OUR_OWN]
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item.path.stem not in OUR_OWN]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def shared_data():
    "The folder of larger data sets that the project does not ship."
    if not SHARED.is_dir(): pytest.skip("needs the data sets in ../shared/data, which the project does not ship")
    return SHARED
