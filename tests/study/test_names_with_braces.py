"""Names that would act in a shell or in a format reach the commands as they are: columns, files and
folders with spaces, quotes, braces and $().
"""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import sparse

ROOT = Path(__file__).resolve().parents[2]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
pytestmark = pytest.mark.skipif(
    not SNAKEMAKE.exists(), reason="snakemake is not installed: pip install 'vampsc[pipeline]'"
)
NAMES = [
    "cell type",
    "cell{type}",
    "{config[label_key]}'$(touch made-by-a-name)'",
    'say "kind"',
    "it's",
    "$(touch made-by-a-name)",
    "`touch made-by-a-name`",
    "a;touch made-by-a-name",
    "{{x}}",
    "{wildcards.organ}",
    "$HOME",
    "back\\slash",
    "Zelltyp_ä",
]
ALL = "".join(NAMES)


def snake(folder, *targets, options=(), **config):
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return subprocess.run(
        [
            SNAKEMAKE,
            *targets,
            "-s",
            ROOT / "workflow" / "Snakefile",
            "--cores",
            "1",
            "--configfile",
            "c.yaml",
            *options,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def write(path, column):
    kind = np.arange(60) % 2
    counts = np.random.default_rng(0).poisson(1 + 3.0 * kind[:, None], (60, 25))
    adata = ad.AnnData(
        sparse.csr_matrix(counts.astype("float32")),
        var=pd.DataFrame(index=[f"g{j}" for j in range(25)]),
    )
    adata.obs[column] = [f"t{k}" for k in kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path)
    return path


def test_words_of_the_commands(tmp_path):
    """What snakemake would run, given to a shell that prints the words: each name is one word, and
    as it was.
    """
    folder = tmp_path / "it's {a} $(touch made-by-a-name)"
    data = write(folder / "my {data}'s $(x).h5ad", "kind")
    done = snake(
        tmp_path,
        options=["-n", "-p"],
        organs=str(data),
        models="vae",
        label_key=ALL,
        batch_key="don{or} 'x'",
        out="o 'x' $(touch made-by-a-name)",
    )
    assert done.returncode == 0, done.stderr
    lines = [
        line.strip()
        for line in (done.stdout + done.stderr).splitlines()
        if "Shell command: " in line or " fit " in line or " report " in line
    ]
    seen = {}
    for line in lines:
        command = line.removeprefix("Shell command: ")
        command = command.split(" > ")[0]
        given = command.partition("OMP_NUM_THREADS=1 ")[2] or command
        script = f"set -- {given}\nprintf '%s\\0' \"$@\""
        words = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path
        ).stdout.split("\0")[:-1]
        if len(words) > 2:
            seen[words[1]] = words
    for command in ("fit", "report"):
        words = seen[command]
        given = dict(zip(words[3::2], words[4::2]))
        assert (
            words[2] == str(data)
            and given["--label-key"] == ALL
            and given["--batch-key"] == "don{or} 'x'"
        )
        assert given["--out"].startswith("o 'x' $(touch made-by-a-name)/my-data-s-x-")
    assert seen["tables"][2] == "o 'x' $(touch made-by-a-name)"
    assert not list(tmp_path.rglob("made-by-a-name"))


@pytest.mark.slow
def test_a_run_with_all_names_at_once(tmp_path):
    column = ALL.replace("/", "")
    data = write(tmp_path / "it's {a} $(touch made-by-a-name)" / 'my {data} "x".h5ad', column)
    done = snake(
        tmp_path,
        "o u't/my-data-x-/vae-seed0.done",
        organs=str(data),
        models="vae",
        label_key=column,
        out="o u't",
        max_epochs=1,
        n_genes=20,
        gene_space="none",
    )
    assert done.returncode == 0, done.stderr + "".join(
        p.read_text() for p in tmp_path.rglob("*.log")
    )
    run = tmp_path / "o u't" / "my-data-x-" / "vae-seed0"
    assert (
        set(pd.read_csv(run / "cells.csv")["label"]) == {"t0", "t1"}
        and column in yaml.safe_load((run / "config.json").read_text())["label_key"]
    )
    assert not list(tmp_path.rglob("made-by-a-name"))


def test_questions(tmp_path):
    done = snake(
        tmp_path,
        "beyond",
        options=["-n", "-p"],
        organs="pancreas",
        questions="both",
        label_key=ALL,
        set="weights=1,{x} 'a=b c'",
    )
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "runs" / "beyond" / ".both.asked").read_text()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {asked}"], capture_output=True, text=True
    ).stdout.split("\0")
    assert (
        words[words.index("--label-key") + 1] == ALL
        and "weights=1,{x}" in words
        and "a=b c" in words
    )


def test_what_the_pipeline_refuses(tmp_path):
    done = snake(tmp_path, options=["-n"], organs="pancreas", out="a{b}")
    assert (
        done.returncode != 0
        and "has braces, which snakemake takes for wildcards" in done.stdout + done.stderr
    )
    page = tmp_path / "mine" / "tables.html"
    page.parent.mkdir()
    page.write_text("mine")
    done = snake(tmp_path, organs="pancreas", out="mine")
    assert (
        done.returncode != 0
        and "mine/tables.html is there and was not written by vampsc" in done.stdout + done.stderr
        and page.read_text() == "mine"
    )
