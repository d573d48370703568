"""Folders that cannot be written, or are full: what is there is used, what has to be written says
so, and kernels run without a cache.
"""

import ctypes
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
from server import Server

resource = pytest.importorskip("resource", reason="limits and rights as under Unix")
ROOT = Path(__file__).resolve().parents[2]

PREPARE = """
import sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore", ".*(chained_assignment|Pandas).*")
from vampsc import downloads, genes, organs
downloads.RETRY_SECONDS = 0.0
def said(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try: answer = function()
        except OSError as error: answer = f"{type(error).__name__}: {error}"
        except ValueError as error: answer = f"{type(error).__name__}: {error}"
    print(answer, *[w.message for w in found if "cannot be written" in str(w.message)], sep=" | ")
"""


@pytest.fixture
def place(tmp_path):
    "A folder; what is closed in it is open at the end."
    yield tmp_path
    open_again(tmp_path)


def as_others():
    """In a child, before it starts: the superuser gives up the right to write where nobody may
    (Linux: CAP_DAC_OVERRIDE, out of the bounding set).
    """
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@pytest.fixture
def server():
    with Server().running() as server:
        yield server


def run(code, place, before=as_others, **settings):
    "What a process prints for which rights hold."
    env = {**os.environ, "VAMPSC_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=before,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def close(folder):
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def open_again(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def fill(server, place, monkeypatch, load):
    "A study in the cache, as its owner fetched it; perhaps also read."
    from vampsc import organs

    files, _ = layouts.write("Enge2017", "cellxgene", place / "published")
    monkeypatch.setenv("VAMPSC_CACHE", str(place / "cache"))
    monkeypatch.setenv("VAMPSC_ORGANS", str(place / "own.toml"))
    (place / "own.toml").write_text(
        "\n".join(
            [
                "[[study]]",
                'name = "mine"',
                'organ = "skin"',
                "[[study.source]]",
                'reader = "h5ad"',
                'settings = { symbols = "feature_name", ensembl = "index" }',
                *[
                    f'files.{role} = {{ name = "{role}.h5ad", urls ='
                    f' ["{server.address}/{role}.h5ad"] }}'
                    for role in files
                ],
            ]
        )
    )
    for role, path in files.items():
        server.files[f"/{role}.h5ad"] = path.read_bytes()
    if load:
        organs.load("mine", progress=False)
    else:
        organs.obtain(organs.registry()["mine"], progress=False)
    shutil.rmtree(place / "published")


LOAD = "said(lambda: organs.load('mine', progress=False).shape)\n"
BACKED = "said(lambda: organs.load('mine', progress=False, backed=True).shape)"


@pytest.mark.parametrize("loaded", [True, False])
def test_a_study_in_a_cache_that_cannot_be_written(loaded, server, place, monkeypatch):
    fill(server, place, monkeypatch, loaded)
    asked = len(server.asked)
    (record,) = (place / "cache").rglob("checksums.json")
    record.unlink()  # even that cannot be written anew
    close(place / "cache")
    found = run(PREPARE + LOAD + BACKED, place)
    first, backed = found.splitlines()
    assert first.startswith("(") and len(server.asked) == asked
    words = (
        "cells-.*h5ad cannot be written .Permission denied.*is read anew each time.*VAMPSC_CACHE"
    )
    assert bool(re.search(words, first)) == (not loaded)
    assert (
        "OrganError" in backed
        and "cannot be written (Permission denied), and backed=True leaves the cells there"
        in backed
        and "VAMPSC_CACHE" in backed
    )


def test_what_has_to_be_fetched_names_the_variable(server, place):
    server.files["/f"] = b"x"
    (place / "cache").mkdir()
    for folder in (".", "new"):
        close(place / "cache")
        found = run(
            PREPARE + f"said(lambda: downloads.fetch({server.address + '/f'!r},"
            f" downloads.cache_folder({folder!r}, 'f'), progress=False))",
            place,
        )
        assert (
            found.startswith("DownloadError: ")
            and "Permission denied" in found
            and "VAMPSC_CACHE names another folder" in found
        )
        assert str(place / "cache") in found and len(found.splitlines()) == 1


def test_a_gene_space_in_a_cache_that_cannot_be_written(server, place):
    lines = [
        f'1\tx\tgene\t1\t2\t.\t+\t.\tgene_id "ENSG{k:011d}"; gene_name "G{k}"; gene_biotype'
        ' "protein_coding";\n'
        for k in range(5)
    ]
    folder = place / "cache" / "genes"
    folder.mkdir(parents=True)
    (folder / "Homo_sapiens.GRCh38.97.gtf.gz").write_bytes(gzip.compress("".join(lines).encode()))
    close(place / "cache")
    code = "said(lambda: len(genes.GeneSpace.load('ensembl-97')))"
    found = run(PREPARE + code, place)
    open_again(place)
    assert (
        found.startswith("5 | ")
        and "ensembl-97.csv cannot be written (Permission denied)" in found
        and "VAMPSC_CACHE" in found
    )
    (folder / "ensembl-97.csv").write_text("id;symbol\nENSG")
    close(place / "cache")
    assert run(PREPARE + code, place).startswith("5 | ")


# ---- the kernels' machine code

KERNEL = """
import numpy as np
from vampsc import kernels
w, g, m, v = (np.ones(4, "float32") for _ in range(4))
F = np.float32
kernels._adam_stretch(w, g, m, v, F(0.1), F(0.1), F(0.1), F(1e-7), F(0), F(0), F(-np.inf))
print(kernels.dense_rows(np.ones(2), np.array([0, 1]), np.array([0, 1, 2]), np.array([1]), np.array([0, 1]), 2), round(float(w[0]), 3))
"""  # noqa: E501
RIGHT = "[[0. 1.]] 0.9"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cache", "file"])
def test_kernels_where_nothing_can_be_kept(where, place):
    (place / "cache").mkdir()
    (place / "file").write_text("")
    close(place)
    assert run(KERNEL, place, NUMBA_CACHE_DIR=str(place / where)) == RIGHT


def no_long_files():
    """In a child, before it starts: no file is longer than 1,000 bytes, and to write more is an
    error.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.slow
def test_kernels_on_a_full_disk(place):
    "The small index can be written, the machine code cannot."
    assert run(KERNEL, place, no_long_files, NUMBA_CACHE_DIR=str(place)) == RIGHT
    assert not list(place.rglob("*.nbc"))


@pytest.mark.slow
def test_kernels_whose_code_was_damaged(place):
    assert run(KERNEL, place, NUMBA_CACHE_DIR=str(place)) == RIGHT
    for kind in ("*.nbi", "*.nbc"):
        damaged = list(place.rglob(kind))
        for path in damaged:
            path.write_bytes(path.read_bytes()[:40])
        assert run(KERNEL, place, NUMBA_CACHE_DIR=str(place)) == RIGHT
        # they are kept anew
        assert damaged and all(path.stat().st_size > 40 for path in damaged)
