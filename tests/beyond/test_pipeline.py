"""The pipeline, as a user starts it: killed, called again, with an organ that fails, and once more
with nothing to do.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
pytestmark = pytest.mark.skipif(
    not SNAKEMAKE.exists(), reason="snakemake is not installed: pip install 'vampsc[pipeline]'"
)


def command(*config):
    return [
        SNAKEMAKE,
        "-s",
        ROOT / "workflow" / "Snakefile",
        "--cores",
        "2",
        "--config",
        "models=ae,vamp",
        "max_epochs=3",
        "n_genes=100",
        *config,
    ]


def call(folder, *config, options=()):
    return subprocess.run(
        [*command(*config), *options], cwd=folder, capture_output=True, text=True, timeout=900
    )


def wait_for(seen, child):
    for _ in range(6000):
        if seen():
            return
        assert child.poll() is None, "the pipeline ended before it was killed"
        time.sleep(0.05)
    raise AssertionError("nothing happened for five minutes")


@pytest.mark.slow
def test_killed_failed_finished_and_nothing_left(tmp_path):
    runs = tmp_path / "runs" / "quick"
    logs = ad.AnnData(
        np.log1p(np.random.default_rng(0).poisson(1, (30, 20))).astype("float32"),
        var=pd.DataFrame(index=[f"g{i}" for i in range(20)]),
    )
    logs.write_h5ad(tmp_path / "logs.h5ad")

    child = subprocess.Popen(
        command("organs=pancreas"),
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # cells, and the second run began
    wait_for(
        lambda: list(runs.glob("pancreas/*.done")) and len(list(runs.glob("pancreas/*.log"))) >= 3,
        child,
    )
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first = {p: p.stat().st_mtime_ns for p in runs.glob("pancreas/*/metrics.json")}
    assert first and not (runs / "tables.html").exists()

    # goes on, although an organ fails
    second = call(tmp_path, "organs=pancreas,logs.h5ad")
    assert second.returncode != 0
    assert re.search(r"vampsc: .*logs/ae-seed0 failed: .*look log-transformed", second.stderr)
    assert re.search(r"vampsc: .*logs/vamp-seed0 failed: .*look log-transformed", second.stderr)
    assert (
        "tries again what is missing" in second.stderr
        and (runs / "pancreas" / "report.html").exists()
    )
    assert not list(runs.glob("logs/*.done"))

    third = call(tmp_path, "organs=pancreas")
    assert third.returncode == 0, third.stderr
    # not repeated
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())
    assert (
        "reason: Missing output files: runs/quick/tables.html" in third.stderr
        and "rule run" not in third.stderr
    )
    assert {
        "table1.csv",
        "table2.csv",
        "tables.ipynb",
        "tables.html",
        "figure1.png",
        "figure2.png",
    } <= {p.name for p in runs.iterdir()}
    about = json.loads((runs / "pancreas" / "cells.json").read_text())
    assert about["n_cells"] == 1937 and about["cell_types"] == 14 and about["paper"] is False

    fourth = call(tmp_path, "organs=pancreas")
    assert fourth.returncode == 0 and "Nothing to be done" in fourth.stderr


@pytest.mark.parametrize(
    "config, words", [("organ=liver", "--config has no 'organ'; there are organs, models")]
)
def test_refused(config, words, tmp_path):
    done = call(tmp_path, config)
    assert done.returncode != 0 and words in done.stdout + done.stderr


def planned(folder, *config, options=()):
    done = call(folder, *config, options=["-n", *options])
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_whole_study_is_planned(tmp_path):
    plan = planned(tmp_path, "organs=paper", "seeds=0,1,2", "profile=paper", "threads=4")
    assert (
        re.search(r"^run +54$", plan, re.M)
        and re.search(r"^cells +9$", plan, re.M)
        and re.search(r"^tables +1$", plan, re.M)
    )
    # no more than there are
    assert "runs/paper/pancreas-paper/vamp-seed2" in plan and "threads: 2" in plan


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_what_a_run_needs(tmp_path):
    assert "gpu=1" not in planned(tmp_path, "organs=pancreas")
    plan = planned(tmp_path, "organs=pancreas", "gpu=1", "mem_mb=7000")
    assert "gpu=1" in plan and "mem_mb=7000" in plan


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_runs_go_side_by_side_as_memory_allows(tmp_path):
    # one core each
    assert "threads: 2" not in planned(tmp_path, "organs=pancreas", "mem_mb=10")
    assert "threads: 2" in planned(tmp_path, "organs=pancreas", "mem_mb=1000000000")
    # one run, and its report
    assert planned(tmp_path, "organs=pancreas", "models=ae", "mem_mb=10").count("threads: 2") == 2


# ---- the open questions


def ask(folder, *config, options=()):
    return subprocess.run(
        [
            SNAKEMAKE,
            "-s",
            ROOT / "workflow" / "Snakefile",
            "--cores",
            "2",
            "beyond",
            *options,
            "--config",
            *config,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_a_question_is_asked_again_when_it_is_another(tmp_path):
    cells = ad.read_h5ad(next((ROOT / "vampsc" / "data").glob("*.h5ad")))[::4].copy()
    cells.write_h5ad(tmp_path / "some.h5ad")
    cells.X = np.log1p(cells.X)
    cells.write_h5ad(tmp_path / "logs.h5ad")
    small = [
        "questions=labels",
        "max_epochs=1",
        "n_genes=60",
        "set=hidden=8 n_latent=4 n_pseudo_inputs=10",
    ]

    failed = ask(tmp_path, *small, "seeds=0,1", "organs=logs.h5ad")
    assert failed.returncode != 0 and re.search(
        r"vampsc: labels failed: .*look log-transformed", failed.stderr
    )
    assert "vampsc tables" not in failed.stderr

    done = ask(tmp_path, *small, "seeds=0,1", "organs=some.h5ad")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/beyond/labels.html").exists()
    raw = pd.read_csv(tmp_path / "runs/beyond/some/labels.csv")
    assert set(raw.seed) == {0, 1} and (raw.n_genes == 60).all()

    assert "Nothing to be done" in ask(tmp_path, *small, "seeds=0,1", "organs=some.h5ad").stderr
    again = ask(tmp_path, *small, "seeds=0,1,2", "organs=some.h5ad", options=["-n"])
    assert "reason: Updated input files: runs/beyond/.labels.asked" in again.stdout + again.stderr


@pytest.mark.slow
def test_what_the_questions_do_not_take_is_refused(tmp_path):
    plan = ask(tmp_path, "organs=pancreas", options=["-n"])
    assert re.search(r"^question +5$", plan.stdout + plan.stderr, re.M)
    from vampsc import beyond

    # which does not import them, to be quick
    assert (
        f"QUESTIONS = {beyond.QUESTIONS}".replace("'", '"')
        in (ROOT / "workflow" / "Snakefile").read_text()
    )
    for config, words in (
        ("questions=why", "question 'why' is not known; there are units, kl_weight"),
        ("batch_key=donor", "'batch_key' is for the study"),
        ("organs=a/x.h5ad,b/x.h5ad", "have one name"),
    ):
        done = ask(tmp_path, config, options=["-n"])
        assert done.returncode != 0 and words in done.stdout + done.stderr
