"""The notebooks of the open questions, executed with small models."""

import html
import re
import sys
import textwrap

import nbformat
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier

from vampsc import beyond, metrics, organs, study

SMALL = dict(max_epochs=1, n_genes=60, hidden="8", n_latent=4, n_pseudo_inputs=10, jobs=1)
OWN = {
    "units": {"steps": 6, "other_models": "iaf", "n_genes": 60, "causes": True},
    "kl_weight": {"weights": "1,1e-4"},
    "active_units": {"samples": "2,10", "heavier": "10"},
    "pseudo_inputs": {"sizes": "10,20"},
    "differences": {"repetitions": 2},
    "denoise": {"others": "plain_ae", "python": sys.executable},
    "perturbation": {"types": "beta,alpha"},
    "peers": {"methods": "vae,vamp", "python": sys.executable},
    "integrate": {"methods": "pca,vae_batch", "python": sys.executable},
    "truth": {"n_cells": "300", "n_dims": "2", "depths": "1", "n_fresh": 50, "others": False},
}
UNKNOWN = {"units": ["max_epochs"], "active_units": ["n_pseudo_inputs"]}
# These are also executed for a data set without labels. Those with one seed give no interval.
MIXED = ("pseudo_inputs", "peers")
SEEDS = {"kl_weight": "0", "pseudo_inputs": "0", "peers": "0"}
JUDGED_BY = {
    "units": "active_units",
    "denoise": "poisson",
    "perturbation": "explained",
    "integrate": "batch_mixing",
}
SHOWN_FOR = {"perturbation": "blood_kang_stim_2k"}


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    "Cells are told apart by 10 trees instead of 100, which take a fifth of a page's time."

    def forest(n_estimators, **settings):
        return RandomForestClassifier(n_estimators // 10, **settings)

    monkeypatch.setattr(metrics, "RandomForestClassifier", forest)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A file of cells with labels, and one of the same without."
    folder = tmp_path_factory.mktemp("cells")
    cells = organs.load("pancreas")[::4].copy()
    cells.obs["condition"] = np.where(np.arange(cells.n_obs) % 2, "stim", "ctrl")
    cells.write_h5ad(folder / "some cells.h5ad")
    del cells.obs["cell_type"]
    cells.write_h5ad(folder / "bare.h5ad")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("beyond")


def summary(notebook):
    "What a page says at its top, and what it says of each data set, as Markdown."
    said = [
        o["data"]["text/markdown"]
        for c in notebook.cells
        for o in c.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    ]
    first = next(i for i, text in enumerate(said) if text.startswith("- **Question:**"))
    return said[first], said[first + 1]


def lines_of(text, width=88):
    "How many lines a list in Markdown takes on the page."
    return sum(
        len(textwrap.wrap(line.removeprefix("- ").replace("*", ""), width))
        for line in text.splitlines()
    )


@pytest.mark.parametrize("question", beyond.QUESTIONS)
def test_pages_say_in_ten_lines_question_result_and_how_sure(question):
    short, _ = summary(nbformat.read(study.TEMPLATE.with_name(f"{question}.ipynb"), 4))
    assert [line.split(":")[0] for line in short.splitlines()] == [
        "- **Question",
        "- **Result",
        "- **How sure",
    ] and lines_of(short) <= 10
    assert SHOWN_FOR.get(question, "pancreas") in html.unescape(short)


@pytest.mark.parametrize("question", beyond.QUESTIONS)
def test_the_answer_of_a_page_has_the_numbers_of_its_run(question):
    "Six sentences at most, and each number with a decimal point is in an output of the page."
    page = nbformat.read(study.TEMPLATE.with_name(f"{question}.ipynb"), 4)
    answers = [cell.source for cell in page.cells if cell.id == "md-answer"]
    if not answers:
        pytest.skip("its results have no answer in words yet")
    said = re.sub(r"\([^)]*\)", "", answers[0].removeprefix("**In short.** "))
    assert len(re.findall(r"[.?!](?:\s|$)", said)) <= 6
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if "data" in output]
    shown = "\n".join(str(v) for d in data for kind, v in d.items() if kind.startswith("text/"))
    known = set(re.findall(r"\d+\.\d+", shown))
    assert set(re.findall(r"\d+\.\d+", answers[0])) <= known


@pytest.mark.slow
@pytest.mark.parametrize("question", beyond.QUESTIONS)
def test_notebook_of_a_question(question, folder, files, notebooks_here, one_process):
    "What cannot be said of a data set is left out, of that one alone."
    given = {**SMALL, "seeds": SEEDS.get(question, "0,1"), **OWN.get(question, {})}
    for name in UNKNOWN.get(question, ()):
        del given[name]
    names = ["some cells.h5ad"] + ["bare.h5ad"] * (question in MIXED)
    page = beyond.make(
        question, folder, organs=",".join(str(files / name) for name in names), **given
    )
    seeds = {int(seed) for seed in given["seeds"].split(",")}

    for data_set in ["some-cells"] + ["bare"] * (question in MIXED):
        raw = pd.read_csv(folder / data_set / f"{question}.csv")
        assert set(raw.seed) == seeds
        assert (
            raw[raw.variant != "PCA"][JUDGED_BY.get(question, "test_nats_per_cell")].notna().all()
        )
    short, said = summary(nbformat.read(folder / f"{question}.ipynb", 4))
    assert "some-cells" in short and lines_of(short) <= 10
    assert "**some-cells" in said and ("bare" in said) == (question in MIXED)
    assert "nan" not in (short + said).lower()
    assert page.suffix == ".html" and "Summary" in page.read_text()
    # that is of the cells that the book shows
    assert "In short" not in page.read_text()
    assert "What one sees" not in page.read_text()
    if question == "peers":
        assert (
            "of our own models clearly better than the VAMP" in said and "peers clearly" not in said
        )
    tables = {
        "pseudo_inputs": "pseudo_inputs_components",
        "active_units": "active_units_by_samples",
        "linear_decoder": "linear_decoder_markers",
        "labels": "labels_judged",
        "differences": "differences_judged",
    }
    if question in tables:
        assert set(pd.read_csv(folder / "some-cells" / f"{tables[question]}.csv").seed) == seeds


@pytest.mark.slow
def test_batches_without_a_type_in_one_batch(files, tmp_path, notebooks_here, one_process):
    given = {**SMALL, "methods": "pca", "python": sys.executable, "one_batch": "False"}
    page = beyond.make("integrate", tmp_path, organs=str(files / "some cells.h5ad"), **given)
    raw = pd.read_csv(tmp_path / "some-cells" / "integrate.csv")
    assert len(raw) == 5 and not raw["type_in_one_batch"].any()
    assert "one_batch is False" in page.read_text()


@pytest.mark.slow
def test_questions_share_their_runs(folder):
    # a VAE of weight 1 has but this one folder
    assert len(list((folder / "some-cells").glob("vae/vae-seed*/metrics.json"))) == 2
    for variant, as_it_was_called in (("VAE", "VAE x 1"), ("VAMP", "VAMP x 1")):
        both, kl = (
            pd.read_csv(folder / "some-cells" / f"{q}.csv")
            .query("variant == @v and seed == 0")
            .test_nats_per_cell.tolist()
            for q, v in (("both", variant), ("kl_weight", as_it_was_called))
        )
        assert both == kl and len(both) == 1
    # real cells are judged once a seed
    assert len(list((folder / "some-cells" / "real").glob("*.json"))) == 2


def checked(question, **given):
    "Run the notebook's cells up to the check of its parameters, here and without a kernel."
    names = {}
    for cell in nbformat.read(study.TEMPLATE.with_name(f"{question}.ipynb"), 4).cells:
        lines = [line for line in cell.source.splitlines() if not line.startswith("get_ipython()")]
        if cell.cell_type == "code":
            exec("\n".join(lines), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(given)
        if cell.id == "check-parameters":
            return
    raise AssertionError("no check of the parameters")


@pytest.mark.slow
def test_wrong_questions_and_parameters_are_named(tmp_path, notebooks_here):
    with pytest.raises(ValueError, match="question 'why' is not known; there are units, kl_weight"):
        beyond.make("why", tmp_path)
    with pytest.raises(ValueError, match="parameter 'weihgts' is not known"):
        beyond.make("kl_weight", tmp_path, weihgts="1")
    with pytest.raises(ValueError, match="one_batch=no must be True or False"):
        beyond.make("integrate", tmp_path, one_batch="no")
    with pytest.raises(ValueError, match="-1 is below 0"):
        beyond.make("kl_weight", tmp_path, weights="1,-1")
    checked("kl_weight")
    for weights, words in (
        ("1", "at least one below 1 is needed"),
        ("10,1,0.1", "none above"),
        ("1,much", "weights: '1,much' is no list of numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            checked("kl_weight", weights=weights)
    with pytest.raises(ValueError, match="warmup: 20 is no share"):
        checked("kl_weight", warmup="0.5,20")


@pytest.mark.slow
def test_cells_without_labels(files, tmp_path, notebooks_here):
    given = {**SMALL, "max_epochs": 2, "seeds": "0"}
    page = beyond.make(
        "kl_weight",
        tmp_path / "out",
        organs=str(files / "bare.h5ad"),
        **given,
        weights="1,1e-4",
        warmup="0.1,1",
    )
    raw = pd.read_csv(tmp_path / "out" / "bare" / "kl_weight.csv")
    # both shares are one epoch of two
    assert "asw" not in raw and raw[raw.kl_warmup == 1].variant.tolist() == [
        "VAE, warm-up 1",
        "VAMP, warm-up 1",
    ]
    assert "bare, a weight that rises</strong> over 1 of 2 epochs" in page.read_text()
