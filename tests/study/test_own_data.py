"""A study of the user's own data ends with its page: Tables 1 and 2 and the figures, and a sentence
where the paper has nothing to be set beside them.
"""

import json
import shutil

import anndata as ad
import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from vampsc import study, tables, training

TINY = dict(gene_space=None, hidden=(8,), n_latent=3)
ONE_EPOCH = training.get_profile("quick", max_epochs=1)


def cells(n=60, genes=40, labels=True, seed=0):
    "Made-up counts of three kinds of cells."
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 3
    rates = (rng.gamma(0.5, 2.0, (3, genes)) + 0.2)[kind]
    obs = pd.DataFrame(
        {"cell_type": [f"t{k}" for k in kind]} if labels else {}, index=[f"c{i}" for i in range(n)]
    )
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rates).astype("float32") + np.eye(n, genes, dtype="float32")),
        obs,
        pd.DataFrame(index=[f"g{j}" for j in range(genes)]),
    )


def trained(folder, *models, seeds=(0,), labels=True):
    adata = cells(labels=labels)
    for model in models:
        for seed in seeds:
            study.run(
                adata,
                model,
                folder,
                ONE_EPOCH,
                seed,
                "cell_type" if labels else None,
                progress=False,
                **TINY,
            )
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder of two models' runs, as `vampsc fit --out` leaves it; its name is the organ's."
    return trained(tmp_path_factory.mktemp("study") / "mine", "ae", "vae")


def copied(own, folder, model="vae", labels=True):
    """The VAE's run as that of another model, or of cells without labels: what tables read, without
    training again.
    """
    shutil.copytree(own / "vae-seed0", folder / f"{model}-seed0")
    for name, change in (
        ("config.json", {"model": model}),
        ("metrics.json", {} if labels else {"asw": None, "n_labelled": None}),
    ):
        path = folder / f"{model}-seed0" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if not labels:
        of_cells = folder / f"{model}-seed0" / "cells.csv"
        pd.read_csv(of_cells, index_col="cell")[["split"]].to_csv(of_cells)
    return folder


def page_of(folder):
    """What the cells of the notebook's tables show, run here one after the other, without a kernel
    and figures.
    """
    seen = []
    names = {"runs": str(folder), "organs": None, "covariance_of": None}
    sources = {
        cell.id: cell.source
        for cell in nbformat.read(tables.TEMPLATE, 4).cells
        if cell.cell_type == "code"
    }
    exec(sources["setup"], names)
    names["display"] = lambda *shown: seen.extend(getattr(s, "data", s) for s in shown)
    exec("folder" + sources["check-parameters"].partition("\nfolder")[2], names)
    for name in (
        "table-1",
        "table-1-others",
        "table-2",
        "table-2-others",
        "beside",
        "orders",
        "verdicts-over-organs",
        "verdicts",
        "co-variation",
    ):
        source = sources[name]
        if name in ("table-1", "table-2"):
            source = source.replace("tables.show(", "display(tables.show(") + ")"
        exec(source, names)
    return "\n".join(map(str, seen))


def test_tables_of_own_data_in_a_folder_of_their_own(own):
    "The real thing, with a kernel and all figures."
    page = tables.make(own.parent)
    words = page.read_text()
    assert (
        "The paper has no numbers for mine: its organs are blood," in words
        and words.count("<img") == 2
    )
    written = {p.name for p in own.parent.iterdir()}
    assert {
        "table1.csv",
        "table2.csv",
        "beside_the_paper.csv",
        "verdicts.csv",
        "figure1.png",
        "figure2.png",
        "tables.ipynb",
    } <= written
    table = pd.read_csv(own.parent / "table1.csv")
    of_runs = [study.read_run(own / f"{m}-seed0").metrics["active_units"] for m in ("ae", "vae")]
    assert list(table["organ"]) == ["mine", "mine"] and list(table["active_units"]) == of_runs
    assert len(pd.read_csv(own.parent / "beside_the_paper.csv")) == 0


def test_the_folder_that_fit_leaves_is_an_organ(own, monkeypatch):
    runs, problems = tables.gather(own)
    assert (
        list(runs["organ"]) == ["mine", "mine"]
        and list(runs["model"]) == ["AE", "VAE"]
        and not problems
    )
    # 150 * 128 / sqrt(48)
    assert set(runs["why_not_at_its_end"]) == {"ended by max_epochs 1 after 1 of 2771 epochs"}
    assert (
        set(zip(runs["n_train"], runs["n_test"])) == {(48, 6)} and runs["test_cells"].nunique() == 1
    )
    monkeypatch.chdir(own)
    assert list(tables.gather(".")[0]["organ"]) == ["mine", "mine"]
    assert list(tables.gather(own.parent, "mine")[0]["model"]) == ["AE", "VAE"]


@pytest.mark.slow
def test_real_trainings_that_patience_ended_test_claims(tmp_path):
    """Two seeds of VAE and IAF that stopped by themselves, and their verdicts; then one of them
    stopped by max_epochs.
    """
    adata = cells()
    flow = dict(n_flow_steps=1, flow_hidden=(8,))
    patient = training.get_profile("paper", learning_rate=0.02, patience=45, max_epochs=2000)
    for seed in (0, 1):
        study.run(
            adata, "vae", tmp_path / "liver", patient, seed, "cell_type", progress=False, **TINY
        )
        study.run(
            adata,
            "iaf",
            tmp_path / "liver",
            patient,
            seed,
            "cell_type",
            progress=False,
            **TINY,
            **flow,
        )
    runs, problems = tables.gather(tmp_path)
    assert runs["at_its_end"].all() and not problems and runs["epochs"].max() < 2000
    assert tables.test_ratio(runs) == 6 / 48
    iaf = runs[runs["model"] == "IAF"].iloc[0]
    recorded = study.read_run(iaf["folder"]).metrics
    assert (
        iaf["asw"] == recorded["asw_split_half"] != recorded["asw"]
        and not iaf["asw_noisy"]
        and not iaf["co_variation_noisy"]
    )
    assert (
        recorded["co_variation_split_half"] is None
        or iaf["co_variation"] == recorded["co_variation_split_half"]
    )
    judged = tables.verdicts(runs).set_index("claim")
    assert tables.UNTESTED not in set(judged["verdict"])
    cut = training.get_profile("paper", learning_rate=0.02, patience=45, max_epochs=3)
    study.run(
        adata,
        "iaf",
        tmp_path / "liver",
        cut,
        1,
        "cell_type",
        progress=False,
        overwrite=True,
        **TINY,
        **flow,
    )
    runs, _ = tables.gather(tmp_path)
    judged = tables.verdicts(runs).set_index("claim")
    assert any(
        "liver: not all runs were trained to their end (IAF: ended by max_epochs 3" in sentence
        for sentence in tables.caveats(runs)
    )
    assert judged.loc["The IAF has a lower test loss than the VAE", "verdict"] == tables.UNTESTED
    page = page_of(tmp_path)
    for words in ("not tested by this training", "agrees with the paper", "as claimed"):
        assert words in page


def test_an_organs_page_beside_its_runs_is_no_run(own):
    "`vampsc report` leaves a metrics.json in the folder of the organ."
    (own / "metrics.json").write_text("{}")
    try:
        runs, problems = tables.gather(own.parent)
    finally:
        (own / "metrics.json").unlink()
    assert len(runs) == 2 and not problems


def test_one_model_one_seed_no_cell_types(own, tmp_path):
    page = page_of(copied(own, tmp_path / "mine", labels=False).parent)
    assert (
        "The paper has no numbers for mine" in page
        and "VAE" in page
        and "what can be compared" not in page
    )


def test_a_model_that_the_paper_did_not_have(own, tmp_path):
    page = page_of(copied(own, tmp_path / "mine", "vampiaf").parent)
    for words in (
        "There is no run of AE, VAE, IAF, VAMP",
        "Models that the paper did not have:",
        "None of the claims can be looked at",
    ):
        assert words in page
    assert "VAMPIAF" in page


def test_verdicts_on_own_data_say_nothing_of_the_papers_organs(own):
    runs, _ = tables.gather(own.parent)
    judged = tables.verdicts(runs)
    over = tables.over_organs(judged)
    for table in (judged, over):
        left = tables.without_the_paper(table, runs)
        assert not {*left} & {*tables.OF_THE_PAPER} and {*tables.OF_THE_PAPER} & {*table}
        assert left["verdict"].equals(table["verdict"])
        # an organ of the paper among them keeps all
        both = pd.concat([runs, runs.assign(paper_organ="liver")])
        assert tables.without_the_paper(table, both) is table


def test_orders_of_nothing_has_its_columns():
    nothing = tables.orders(pd.DataFrame(columns=tables.BESIDE))
    assert len(nothing) == 0 and "what can be compared" in nothing and "pairs alike" in nothing


def test_sentences_where_there_is_nothing(own):
    runs, _ = tables.gather(own.parent)
    assert (
        "numbers for mine" in tables.why_nothing_beside(runs)
        and tables.why_no_verdict(tables.verdicts(runs)) is None
    )
    assert "liver has no run with a number" in tables.why_nothing_beside(
        runs.assign(paper_organ="liver", title="liver")
    )
    assert "None of the claims" in tables.why_no_verdict(
        tables.verdicts(runs[runs["model"] == "AE"])
    )


def test_own_data_beside_an_organ_of_the_papers(own, tmp_path):
    "Only the organ that the paper has is set beside it; the page says nothing else is missing."
    copied(own, tmp_path / "liver")
    (tmp_path / "mine").symlink_to(own)
    beside = tables.beside_the_paper(tables.gather(tmp_path)[0])
    assert set(beside["organ"]) == {"liver"} and set(tables.orders(beside)["organ"]) == {"liver"}
