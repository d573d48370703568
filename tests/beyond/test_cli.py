"""The command line: what it prints, what it writes, and how it ends."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from vampsc import beyond, cli, figures, models, organs, study, training

TINY = ["--max-epochs", "2", "--n-genes", "200", "--no-umap"]


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words], catch_exceptions=False)


def vampsc(*words):
    return [sys.executable, "-c", "from vampsc.cli import main; main()", *map(str, words)]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    whole = organs.load("pancreas")[:100]
    most = np.argsort(-np.asarray(whole.X.sum(0)).ravel())[:400]
    cells = whole[:, np.sort(most)].copy()
    cells.obs["donor"] = np.array(["a", "b"])[np.arange(100) % 2]
    path = tmp_path_factory.mktemp("data") / "few.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    done = invoke(
        "fit",
        few,
        "--model",
        "vae",
        "--out",
        out,
        "--label-key",
        "cell_type",
        "--batch-key",
        "donor",
        *TINY,
    )
    assert (
        done.exit_code == 0 and "test loss per gene" in done.stdout and "written to" in done.stdout
    ), done.output
    assert "not trained to its end (ended by max_epochs 2 after 2 of" in done.stdout
    return out / "vae-seed0"


def test_fit_makes_so_many_steps(few, tmp_path):
    done = invoke(
        "fit",
        few,
        "--model",
        "ae",
        "--out",
        tmp_path,
        "--steps",
        3,
        "--no-umap",
        "--n-genes",
        200,
        "--json",
    )
    run = study.read_run(tmp_path / "ae-seed0")
    # of 80 cells, one minibatch each
    assert json.loads(done.stdout)["metrics"]["epochs"] == 3
    assert (
        run.config["training"]["steps"] == 3
        and run.history["learning_rate"].is_monotonic_decreasing
    )


def test_fit_as_json_is_one_object(few, run):
    done = invoke(
        "fit",
        few,
        "--model",
        "vae",
        "--out",
        run.parent,
        "--label-key",
        "cell_type",
        "--batch-key",
        "donor",
        *TINY,
        "--json",
    )
    result = json.loads(done.stdout)
    assert (
        result["folder"] == run.as_posix()
        and result["metrics"]["epochs"] == 2
        and result["metrics"]["n_cells"] == 100
    )


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "none.h5ad"],
        ["transfer", "run", "none.zarr"],
        ["embed", "run", "none.h5ad", "--out", "a.h5ad"],
        ["label", "run", "pancreas", "--reference", "none.h5ad"],
        ["differences", "run", "none.h5ad", "--group1", "alpha"],
    ],
    ids=lambda words: words[0],
)
def test_a_missing_file_is_named_before_tensorflow_starts(words, tmp_path):
    lines = [
        "import sys",
        "from vampsc import cli",
        f"sys.argv = {['vampsc', *words]!r}",
        "try:",
        "    cli.main()",
        "finally:",
        "    print('tensorflow' in sys.modules, 'anndata' in sys.modules)",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 1 and ran.stdout.split() == ["False", "False"]
    assert ran.stderr.startswith("vampsc: no file 'none.")


@pytest.mark.slow
def test_fit_writes_a_picture_and_an_h5ad_and_says_what_is_there(few, tmp_path):
    words = ["fit", few, "--model", "mog", "--out", tmp_path, "--n-latent", 3, "--h5ad"]
    words += [
        "--likelihood",
        "zinb",
        "--n-pseudo-inputs",
        7,
        "--batch-key",
        "donor",
        "--encode-batch",
        *TINY[:-1],
    ]
    done = invoke(*words)
    folder = tmp_path / "mog-seed0"
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "judged by obs['cell_type']" in lines and f"written to {folder}" in lines
    best = json.loads((folder / "metrics.json").read_text())["best_epoch"]
    assert f"weights of epoch {best}, the best on the validation cells" in lines
    assert any(line.startswith("not trained to its end (ended by max_epochs ") for line in lines)
    for picture in ("umap.png", "umap_batches.png"):
        assert plt.imread(folder / picture).std() > 0.01
    assert study.read_run(folder).cells["batch"].tolist() == ["a", "b"] * 50
    assert 0 < study.read_run(folder).metrics["batch_mixing"] < 1.5
    embedded = ad.read_h5ad(folder / "embedded.h5ad")
    np.testing.assert_array_equal(embedded.obsm["X_mog"], np.load(folder / "latent.npy"))
    assert embedded.shape == (100, 400)
    settings = study.read_run(folder).config["settings"]
    assert settings["likelihood"] == "zinb"
    assert (settings["n_latent"], settings["n_pseudo_inputs"], settings["encode_batch"]) == (
        3,
        7,
        True,
    )
    again = invoke(*words)
    assert f"already there: {folder}" in again.stdout.splitlines()


def test_encode_batch_needs_a_batch_key(few, tmp_path):
    done = invoke("fit", few, "--out", tmp_path, "--encode-batch", *TINY)
    assert done.exit_code == 1 and "--encode-batch needs --batch-key" in done.stderr


def test_fit_takes_covariates(few, tmp_path):
    "Two columns of names and one of numbers; the page names them; other values are another run."
    adata = ad.read_h5ad(few)
    adata.obs["sex"] = ["f", "m", "m", "f"] * 25
    adata.obs["age"] = np.arange(100.0)
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    words = ["fit", path, "--model", "vae", "--out", tmp_path, "--no-umap", *TINY]
    words += ["--categorical-covariate-keys", "sex,donor", "--continuous-covariate-keys", "age"]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    run = study.read_run(tmp_path / "vae-seed0")
    assert dict(study.settings_of(run))["covariates"] == "sex, donor, age"
    assert models.load(run.folder / "model").architecture.n_covariates == 5
    adata.obs["age"] = adata.obs["age"].to_numpy()[::-1]
    adata.write_h5ad(path)
    done = invoke(*words)
    assert done.exit_code == 1 and "covariate age" in done.stderr


def test_without_labels_it_is_said(few, run, tmp_path):
    words = ["fit", few, "--model", "ae", "--out", tmp_path, "--label-key", "none", *TINY]
    assert "not judged by cell types; --label-key names their column" in invoke(*words).stdout


def test_one_labelled_cell_labels_all(few, run, tmp_path):
    cells = ad.read_h5ad(few)
    cells.obs["cell_type"] = ["beta", *[None] * (cells.n_obs - 1)]
    cells.write_h5ad(tmp_path / "one.h5ad")
    line = ["label", run, few, "--reference", tmp_path / "one.h5ad", "--out", tmp_path / "t.csv"]
    done = invoke(*line, "--json")
    assert done.exit_code == 0, done.output
    assert "accuracy_of_reference" not in json.loads(done.stdout)


def test_labels_and_differences_are_tables(few, run, tmp_path):
    cells = ad.read_h5ad(few)
    cells[:20].write_h5ad(tmp_path / "new.h5ad")
    out = tmp_path / "labels.csv"
    line = ["label", run, tmp_path / "new.h5ad", "--reference", few, "--out", out]
    done = invoke(*line, "--json")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out, index_col=0)
    assert list(table.index) == list(cells.obs_names[:20])
    said = json.loads(done.stdout)
    assert said["labels"] == table["label"].value_counts().to_dict() and said["n_cells"] == 20
    accuracy = models.load(run / "model").label_accuracy("cell_type", cells)["accuracy"]
    assert said["accuracy_of_reference"] == pytest.approx(accuracy.to_dict())
    again = invoke(*line)
    assert again.exit_code == 1 and "--overwrite" in again.output
    assert "are right\n" in invoke(*line, "--overwrite").output

    kinds = cells.obs["cell_type"].value_counts().index[:2]
    out = tmp_path / "differences.csv"
    groups = ["--group1", kinds[0], "--group2", kinds[1], "--sample-key", "donor"]
    done = invoke("differences", run, few, *groups, "--fdr", "0.1", "--out", out)
    assert done.exit_code == 0 and f"{kinds[0]} vs {kinds[1]}: " in done.stdout, done.output
    table = pd.read_csv(out, index_col=0)
    assert len(table) == 200 and {"lfc_mean", "proba_de", "is_de_fdr_0.1"} <= {*table}
    assert table["is_de_fdr_0.1"].any() or "0 genes; nearest" in done.stdout


@pytest.mark.parametrize(
    "words, named",
    [
        (["label", "RUN", "FEW"], "--reference"),
        (["label", "RUN", "FEW", "--reference", "FEW", "--label-key", "cell_typ"], "cell_typ"),
        (["differences", "RUN", "FEW", "--group1", "nobody"], "nobody"),
        (["differences", "RUN", "FEW", "--groupby", "kind"], "kind"),
        (["differences", "RUN", "FEW", "--delta", "-1"], "delta"),
    ],
)
def test_groups_that_are_not_there_are_named(words, named, few, run, tmp_path):
    places = {"RUN": run, "FEW": few}
    done = invoke(*(places.get(word, word) for word in words), "--out", tmp_path / "t.csv")
    assert done.exit_code == 1 and named in done.output and not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("ending", [".h5ad", ".csv", ".npy"])
def test_embed(few, run, tmp_path, ending):
    whole = np.load(run / "latent.npy")
    out = tmp_path / f"new/embedded{ending}"
    done = invoke(
        "embed", run, few, "--out", out, "--json", *(["--backed"] if ending == ".csv" else [])
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said.pop("genes").startswith("200 of the data's 400 genes have a place in gencode-48")
    assert said == {
        "out": out.as_posix(),
        "key": "X_vae",
        "n_cells": 100,
        "n_latent": 128,
        "n_empty": 0,
    }
    if ending == ".h5ad":
        written = ad.read_h5ad(out)
        before = ad.read_h5ad(few)
        z = written.obsm["X_vae"]
        assert (written.X != before.X).nnz == 0 and written.obs.equals(before.obs)
    if ending == ".csv":
        table = pd.read_csv(out, index_col="cell")
        z = table.to_numpy()
        assert list(table.index) == list(organs.load(few).obs_names)
    if ending == ".npy":
        z = np.load(out)
    assert np.allclose(z, whole, atol=1e-4) and os.listdir(out.parent) == [out.name]


def test_an_existing_file_is_replaced_only_on_request(few, run, tmp_path):
    before = few.read_bytes()
    refused = invoke("embed", run, few, "--out", few)
    assert (
        refused.exit_code == 1
        and "exists; choose another --out, or --overwrite" in refused.stderr
        and few.read_bytes() == before
    )
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(before)
    assert (
        invoke("embed", run, copy, "--out", copy, "--overwrite").exit_code == 0
        and "X_vae" in ad.read_h5ad(copy).obsm
    )


def test_sample(run, tmp_path):
    done = invoke("sample", run, "--n", 50, "--out", tmp_path / "s.h5ad", "--batch", "b")
    assert done.exit_code == 0 and "50 cells written" in done.stdout
    cells = ad.read_h5ad(tmp_path / "s.h5ad")
    assert cells.shape == (50, 200) and set(cells.obs["donor"]) == {"b"}
    assert np.array_equal(
        cells.X.toarray(), models.load(run / "model").sample_prior(50, batch="b").X.toarray()
    )


def test_report_of_runs(run, monkeypatch):
    """UMAP, which compiles itself for seconds, is tested with the figures: here the first two units
    stand in for it.
    """
    monkeypatch.setattr(figures, "umap_coordinates", lambda z, *_: np.asarray(z)[:, :2])
    done = invoke("report", run.parent, "--json")
    assert (
        json.loads(done.stdout) == {"page": (run.parent / "report.html").as_posix()}
        and "VAE" in (run.parent / "report.html").read_text()
    )


def test_report_of_data_prints_the_table_and_the_paths(run, tmp_path, monkeypatch):
    "The notebook itself is run by test_study; here the words that follow it."

    def finished(out, overwrite, **parameters):
        assert parameters["max_epochs"] == 7 and parameters["organ"] == "pancreas"
        out.mkdir()
        study.table([study.read_run(run)]).to_csv(out / "table.csv")
        (out / "report.html").write_text("page")
        return out / "report.html"

    monkeypatch.setattr(study, "report", finished)
    done = invoke("report", "pancreas", "--out", tmp_path / "run", "--max-epochs", 7)
    assert done.exit_code == 0 and all(
        word in done.stdout for word in ("VAE", "PCs for 95 %", "ELBO", "table.csv", "report.html")
    )
    monkeypatch.setattr(study, "report", lambda out, overwrite, **parameters: out / "report.html")
    result = json.loads(invoke("report", "pancreas", "--out", tmp_path / "run", "--json").stdout)
    assert result["table"]["VAE"]["epochs"] == 2 and result["page"].endswith("report.html")


def test_organs_list():
    assert "pancreas" in invoke("organs", "list").stdout
    assert json.loads(invoke("organs", "list", "--json").stdout)[0]["organ"] == "pancreas"


def test_nan_is_null():
    assert cli._plain({"a": float("nan"), "b": [np.float32(1.5), np.int64(2)], "c": None}) == {
        "a": None,
        "b": [1.5, 2],
        "c": None,
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["fit", "pancras"], "pancreas"),
        (["fit", "pancreas", "--model", "vampire"], "'vampire'"),
        (["fit", "pancreas", "--label-key", "celltype"], "celltype"),
        (["fit", "pancreas", "--profile", "fast"], "'fast'"),
        (["fit", "pancreas", "--batch-key", "donor"], "donor"),
        (["fit", "pancreas", "--use-raw"], "raw"),
        (["embed", "nowhere", "pancreas"], "nowhere"),
        (["fit", "absent.h5ad"], "absent.h5ad"),
        (["report", "."], "no finished run"),
        (["embed", "nowhere", "pancreas", "--out", "z.xlsx"], ".h5ad, .csv, .npy"),
        (["sample", "nowhere"], "nowhere"),
        (["fit", "pancreas", "--out", "file/runs"], "file"),
        (["embed", "nowhere", "pancreas", "--out", "file/z.npy"], "file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    done = invoke(*words)
    assert (
        done.exit_code == 1
        and done.stdout == ""
        and sorted(os.listdir(tmp_path)) in (["file"], ["file", "runs"])
    )
    assert (
        done.stderr.startswith("vampsc: ")
        and message in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_wrong_usage_is_exit_code_2():
    for words in (
        ["fitt"],
        ["fit"],
        ["fit", "pancreas", "--max-epochs", "many"],
        ["fit", "pancreas", "--color"],
    ):
        assert invoke(*words).exit_code == 2


def test_divergence_is_exit_code_3(few, tmp_path):
    done = invoke("fit", few, "--out", tmp_path, "--learning-rate", 1e30, *TINY)
    assert done.exit_code == 3 and "try a smaller learning_rate" in done.stderr


def test_an_interrupted_run_is_exit_code_130_and_the_same_command_goes_on(
    few, tmp_path, monkeypatch
):
    begin = training.Record.on_epoch_begin

    def stop(record, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        begin(record, epoch, logs)

    words = [
        "fit",
        few,
        "--model",
        "ae",
        "--out",
        tmp_path,
        "--n-genes",
        200,
        "--max-epochs",
        3,
        "--no-umap",
        "--json",
    ]
    with monkeypatch.context() as stopping:
        stopping.setattr(training.Record, "on_epoch_begin", stop)
        done = invoke(*words)
    run = tmp_path / "ae-seed0"
    assert done.exit_code == 130 and done.stdout == "" and "the same call goes on" in done.stderr, (
        done.stderr[-2000:]
    )
    # epochs this short may be over before the next writing
    assert (
        len(training.read_checkpoint(run / "checkpoint")[0]["rows"]) in (0, 1, 2)
        and not (run / "metrics.json").exists()
    )
    done = invoke(*words)
    assert (
        done.exit_code == 0
        and json.loads(done.stdout)["metrics"]["epochs"] == 3
        and not (run / "checkpoint").exists()
    )


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_130(few, tmp_path):
    words = [
        "fit",
        few,
        "--model",
        "ae",
        "--out",
        tmp_path,
        "--n-genes",
        200,
        "--max-epochs",
        60,
        "--batch-size",
        16,
        "--json",
    ]

    # also where the tests run in the background of a shell
    def heeds():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        vampsc(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds
    )
    run = tmp_path / "ae-seed0"
    end = time.time() + 120
    while not (run / "checkpoint").exists() and time.time() < end:
        time.sleep(0.02)
    while len(training.read_checkpoint(run / "checkpoint")[0]["rows"]) < 2 and time.time() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "the same call goes on" in err, err[-2000:]
    assert not (run / "metrics.json").exists()
    done = invoke(*words)
    assert (
        done.exit_code == 0
        and json.loads(done.stdout)["metrics"]["epochs"] > 2
        and not (run / "checkpoint").exists()
    ), done.stderr[-2000:]


SAYS_WHAT_WAS_IMPORTED = """
import atexit, sys
atexit.register(lambda: print("heavy:", {"tensorflow", "keras"} & {*sys.modules}))
from vampsc.cli import main
main()
"""


def test_help_teaches_and_is_quick():
    def seconds():
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime

    start = seconds()
    done = subprocess.run(
        [sys.executable, "-c", SAYS_WHAT_WAS_IMPORTED, "--help"], capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and seconds() - start < 5
        and all(
            c in done.stdout for c in ("fit", "embed", "sample", "report", "organs", "Exit codes")
        )
    )
    assert done.stdout.endswith("heavy: set()\n")
    for command in ("fit", "embed", "sample", "report"):
        assert f"vampsc {command} " in invoke(command, "--help").stdout
    assert invoke("--version").stdout.startswith("vampsc 0.")


def test_organs_fetch(tmp_path, monkeypatch):
    about = json.loads(invoke("organs", "fetch", "pancreas", "--json").stdout)
    assert (
        about["n_cells"] == 1937
        and about["studies"] == {"baron-2016-human1": 1937}
        and about["paper"] is False
    )
    assert (
        "1,937 cells x 20,125 genes, 1,937 of them labelled with 14 cell types"
        in invoke("organs", "fetch", "pancreas").stdout
    )
    monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path))
    monkeypatch.setenv("VAMPSC_MIRRORS", "https://=http://127.0.0.1:9/")
    monkeypatch.setattr("vampsc.downloads.RETRY_SECONDS", 0.0)
    done = invoke("organs", "fetch", "Lake2019")
    assert done.exit_code == 1 and re.match(
        r"vampsc: study Lake2019 cannot be had.*no connection to 127.0.0.1:9.*by hand", done.stderr
    )


def test_organs_list_says_size_labels_access_and_licence():
    lines = invoke("organs", "list").stdout.splitlines()
    row = next(line for line in lines if "Kinchen2018" in line)
    assert "9,281" in row and "14 types" in row and "authors, open" in row and "unknown" in row
    assert len(lines) == 23 and lines[0].split()[:6] == [
        "organ",
        "study",
        "cells",
        "labels",
        "access",
        "licence",
    ]


# ---- open questions


def test_beyond_hands_its_options_to_the_notebook(tmp_path, monkeypatch):
    seen = {}

    def made(question, out, **given):
        seen.update(given, question=question, out=out)
        return out / "kl_weight.html"

    monkeypatch.setattr(beyond, "make", made)
    done = invoke(
        "beyond",
        "kl_weight",
        "--organs",
        "a.h5ad,b.h5ad",
        "--seeds",
        "0,1",
        "--out",
        tmp_path,
        "--jobs",
        3,
        "--profile",
        "quick",
        "--set",
        "weights=1,1e-3",
        "--set",
        "n_latent=16",
        "--json",
    )
    assert done.exit_code == 0 and json.loads(done.stdout) == {
        "page": f"{tmp_path.as_posix()}/kl_weight.html"
    }
    assert seen == dict(
        question="kl_weight",
        out=tmp_path,
        organs="a.h5ad,b.h5ad",
        seeds="0,1",
        profile="quick",
        label_key="auto",
        jobs=3,
        weights="1,1e-3",
        n_latent=16,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "words, said",
    [
        (["why"], "question 'why' is not known"),
        (["both", "--set", "n_latent"], "--set n_latent: a value is missing"),
        (
            ["both", "--set", "seeds=0,1"],
            "--set seeds: this has an option of its own, --seeds 0,1.",
        ),
        (["kl_weight", "--set", "wieghts=1"], "parameter 'wieghts' is not known"),
        (["both", "--organs", "pancras"], "did you mean pancreas"),
    ],
)
def test_beyond_names_what_is_wrong(words, said, tmp_path):
    done = invoke("beyond", *words, "--out", tmp_path)
    assert done.exit_code == 1 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_result_is_printed_as_json_alone_or_as_text(capsys):
    for as_json in (True, False):
        with cli.printing(as_json) as results:
            print("training")
            results.append(({"asw": float("nan"), "out": Path("a/b")}, "all is well"))
        out, err = capsys.readouterr()
        if as_json:
            assert json.loads(out) == {"asw": None, "out": "a/b"} and err == "training\n"
        else:
            assert out == "training\nall is well\n" and not err


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("bad"), 1),
        (OSError("gone"), 1),
        (FloatingPointError("nan"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes_and_one_line(error, code, capsys):
    @cli.with_exit_code
    def command():
        raise error

    with pytest.raises(typer.Exit) as stopped:
        command()
    assert stopped.value.exit_code == code
    said = capsys.readouterr().err
    assert said.startswith("vampsc: ") and said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    @cli.with_exit_code
    def command():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


def test_options_show_their_defaults_where_they_have_one():
    assert cli.option(3, "words").show_default and not cli.option(None, "words").show_default
    assert cli.option(3, "words").default == 3 and cli.flag("--json", "words").default is False
