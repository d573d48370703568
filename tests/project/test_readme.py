"""The README's example runs as printed, and each name in it exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.slow
def test_the_example_runs_as_printed(tmp_path):
    shown = (
        "\nimport matplotlib.pyplot as plt;"
        " plt.savefig('umap.png')\nprint(adata.obs['leiden'].nunique(), list(adata.obsm))"
    )
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLE + shown],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    clusters, slots = done.stdout.strip().splitlines()[-1].split(" ", 1)
    assert 5 <= int(clusters) <= 40 and "X_vamp" in slots and "X_umap" in slots
    assert (tmp_path / "umap.png").stat().st_size > 20_000 and (
        tmp_path / "runs/pancreas-vamp/model.json"
    ).exists()


def test_the_example_runs_on_less(tmp_path, monkeypatch):
    "The same lines in this process, with fewer cells, genes and epochs."
    monkeypatch.chdir(tmp_path)
    code = EXAMPLE
    for whole, less in (
        ('load("pancreas")', 'load("pancreas")[:100].copy()'),
        ("n_genes=2000", "n_genes=100"),
        ("max_epochs=30", "max_epochs=1, progress=False"),
    ):
        assert code.count(whole) == 1
        code = code.replace(whole, less)
    for step in (
        "organs.load",
        ".train(",
        "sc.pp.neighbors",
        "sc.tl.umap",
        "sc.tl.leiden",
        "sc.pl.umap",
        ".save(",
    ):
        assert step in code
    names = {}
    exec(code, names)
    plt.close("all")
    adata = names["adata"]
    assert {"X_vamp", "X_umap"} <= {*adata.obsm} and adata.obs["leiden"].notna().all()
    assert (tmp_path / "runs/pancreas-vamp/model.json").exists()


def test_every_command_of_the_readme_is_one():
    from vampsc import cli

    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands} | {
        g.name for g in cli.app.registered_groups
    }
    used = set(re.findall(r"^vampsc (\w+) ", README, re.M))
    assert used and used <= known


def test_every_name_of_the_readme_exists():
    import vampsc

    for name in re.findall(r"vampsc\.(\w+)", README):
        assert hasattr(vampsc, name), name
    for verb in re.findall(r"model\.(\w+)\(", README):
        assert hasattr(vampsc.VAMP, verb), verb
