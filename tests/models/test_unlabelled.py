"""Labels that stand for none, such as "unknown": said by name, and left out where the user says so,
in Python, in a command, in a notebook.
"""

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from vampsc import genes, metrics, organs, study, training

TYPES = np.array(["alpha", "beta", "Unknown", "unassigned"])[np.arange(80) % 4]
KNOWN = np.arange(80) % 4 < 2


@pytest.fixture(scope="module")
def z():
    "Two types far apart, and cells without a type anywhere."
    rng = np.random.default_rng(0)
    at = {"alpha": -5.0, "beta": 5.0, "Unknown": 0.0, "unassigned": 0.0}
    return rng.normal(size=(80, 3)) + np.array([[at[t], 0, 0] for t in TYPES])


METRICS = {
    "silhouette": metrics.silhouette,
    "purity": metrics.knn_purity,
    "nmi": lambda z, labels, **more: metrics.nmi_ari(z, labels, **more)["nmi"],
    "split half": lambda z, labels, **more: metrics.silhouette_split_half(z, z, labels, **more),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(
    "words", ["unknown,unassigned", ["Unknown", "unassigned"], " UNKNOWN , unassigned"]
)
def test_words_are_left_out_where_the_user_says_so(z, metric, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert metric(z, TYPES, unlabelled=words) == pytest.approx(metric(z[KNOWN], TYPES[KNOWN]))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_labels_that_look_like_none_are_named(z, metric):
    with pytest.warns(UserWarning) as caught:
        as_types = metric(z, TYPES)
    said = "\n".join(str(w.message) for w in caught)
    for label in ("Unknown", "unassigned"):
        assert (
            f"20 of 80 cells are labelled '{label}', which counts as a cell type;"
            f" unlabelled='{label}'" in said
        )
    assert "--unlabelled 'Unknown'" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # that they are types was said
        for kept in ("", ()):
            assert metric(z, TYPES, unlabelled=kept) == as_types
    assert as_types < metric(z, TYPES, unlabelled="unknown,unassigned")


def test_ordinary_labels_say_nothing(z):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.silhouette(z, np.where(KNOWN, TYPES, "unknown function 3"))
        metrics.silhouette(z, pd.Categorical(np.where(KNOWN, TYPES, None)))
        metrics.silhouette(z, np.arange(80) % 3)


def test_a_word_that_no_cell_has_is_said(z):
    with pytest.warns(
        UserWarning,
        match=r"unlabelled='unasigned': no cell has that label \(did you mean 'unassigned'\?\)",
    ):
        metrics.silhouette(z, TYPES, unlabelled="unasigned")


@pytest.mark.parametrize("wrong", [3, [1], True])
def test_what_is_no_word_is_refused(z, wrong):
    with pytest.raises(TypeError, match="unlabelled must be words"):
        metrics.silhouette(z, TYPES, unlabelled=wrong)


def test_labels_of_an_anndata():
    adata = ad.AnnData(
        np.ones((80, 2), "float32"),
        pd.DataFrame({"cell_type": TYPES}, index=np.arange(80).astype(str)),
    )
    assert list(organs.labels(adata).categories) == ["Unknown", "alpha", "beta", "unassigned"]
    found = organs.labels(adata, unlabelled="unknown,unassigned")
    assert list(found.categories) == ["alpha", "beta"] and (found.codes < 0).sum() == 40
    assert (
        metrics.n_labelled(TYPES, "unknown") == 60
        and genes.missing_labels(TYPES, "unknown").sum() == 20
    )


# ---- the same in a run, a command and a notebook


def typed(n=120):
    "Two cell types by two sets of genes, and a third of the cells named unknown."
    rng = np.random.default_rng(0)
    X = rng.poisson(1, (n, 30))
    X[::3, :8] += rng.poisson(6, (len(X[::3]), 8))
    X[1::3, 8:16] += rng.poisson(6, (len(X[1::3]), 8))
    obs = pd.DataFrame(
        {"cell_type": np.array(["alpha", "beta", "unknown"])[np.arange(n) % 3]},
        index=[f"c{i}" for i in range(n)],
    )
    return ad.AnnData(X.astype("float32"), obs, pd.DataFrame(index=[f"g{j}" for j in range(30)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("unlabelled")
    typed().write_h5ad(at / "mine.h5ad")
    return at


BRIEF = training.get_profile("quick", max_epochs=2)
TINY = dict(gene_space=None, hidden=(8,), n_latent=3, progress=False)


def test_a_run(folder):
    adata = typed()
    with pytest.warns(UserWarning, match="40 of 120 cells are labelled 'unknown'"):
        plain = study.run(adata, "ae", folder / "plain", BRIEF, label_key="cell_type", **TINY)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*labelled 'unknown'")
        chosen = study.run(
            adata,
            "ae",
            folder / "chosen",
            BRIEF,
            label_key="cell_type",
            unlabelled="unknown",
            **TINY,
        )
    assert plain.metrics["n_labelled"] == 120 and chosen.metrics["n_labelled"] == 80
    assert chosen.metrics["asw"] == pytest.approx(
        metrics.silhouette(chosen.embedding, adata.obs["cell_type"], unlabelled="unknown")
    )
    assert set(chosen.cells["label"]) == {"alpha", "beta", ""}
    in_words = dict(study.settings_of(chosen))["labels"]
    assert in_words == "cell_type; 80 of 120 cells have one"
    with pytest.raises(FileExistsError, match="unlabelled was"):
        study.run(
            adata, "ae", folder / "chosen", BRIEF, label_key="cell_type", unlabelled="", **TINY
        )


def test_a_command(folder):
    from typer.testing import CliRunner

    from vampsc import cli

    line = [
        "fit",
        str(folder / "mine.h5ad"),
        "--model",
        "ae",
        "--gene-space",
        "none",
        "--no-umap",
        "--max-epochs",
        "1",
        "--label-key",
        "cell_type",
        "--json",
    ]
    done = CliRunner().invoke(
        cli.app, [*line, "--out", str(folder / "by command"), "--unlabelled", "unknown"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["metrics"]["n_labelled"] == 80


@pytest.mark.slow
def test_a_report(folder, notebooks_here):
    study.report(
        folder / "report",
        data=str(folder / "mine.h5ad"),
        models="ae",
        gene_space=None,
        max_epochs=1,
        unlabelled="unknown",
        keep_genes="g3,g4",
        n_genes=10,
    )
    assert study.read_run(folder / "report" / "ae-seed0").metrics["n_labelled"] == 80
    assert study.read_run(folder / "report" / "ae-seed0").config["settings"]["keep_genes"] == [
        "g3",
        "g4",
    ]
