"""Runs, tables, the page of a run and the organ notebook."""

import dataclasses
import functools
import json
import re
import resource
import shutil
import subprocess
import sys

import keras
import nbformat
import numpy as np
import papermill
import pytest
import scipy.sparse as sp

from vampsc import metrics, models, organs, study, training

TINY = dict(max_epochs=2, n_genes=200)


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:400].copy()


@pytest.fixture(scope="module")
def runs(adata, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    profile = training.get_profile("quick", **TINY)
    narrow = {"iaf": dict(flow_hidden=(16,), n_flow_steps=2)}
    return [
        study.run(
            adata, m, out, profile, label_key="cell_type", progress=False, **narrow.get(m, {})
        )
        for m in ("ae", "vae", "iaf", "vamp")
    ]


def test_a_run_is_recorded_whole(runs):
    for run in runs:
        assert {p.name for p in run.folder.iterdir()} == {
            "config.json",
            "history.csv",
            "latent.npy",
            "metrics.json",
            "model",
            "cells.csv",
        }
        assert run.folder.name == f"{run.name}-seed0" and len(run.history) == 2
        z = np.load(run.folder / "latent.npy")
        assert z.shape == (400, 128)
        assert run.metrics["asw"] == pytest.approx(
            metrics.silhouette(z, organs.load("pancreas").obs["cell_type"][:400]), abs=1e-6
        )


def test_numbers_of_a_run_are_those_of_its_saved_model(runs, adata):
    run = runs[3]
    model = models.load(run.folder / "model", adata)
    z = model.get_latent_representation()
    assert np.array_equal(z, run.embedding)
    assert run.metrics["active_units"] == metrics.active_units(z)
    assert run.metrics["pcs95"] == metrics.n_components(z)
    elbo = model.get_elbo(indices=model.split.test)
    assert run.metrics["test_elbo"] == elbo["elbo"] and run.metrics["test_kl"] == elbo["kl"]


def test_sampled_embeddings_are_judged_by_halves(runs):
    iaf = runs[2].metrics
    assert (
        iaf["pcs95"] < iaf["pcs95_10_samples"]
        and iaf["active_units"] <= iaf["active_units_10_samples"]
    )
    assert (
        0 <= iaf["co_variation_split_half"] <= 1
        and "co_variation_split_half" not in runs[1].metrics
    )
    assert "pcs95_10_samples" not in runs[1].metrics and "asw_split_half" not in runs[1].metrics


def test_findings_compare_silhouettes_without_noise(runs):
    iaf = runs[2].metrics
    vae = runs[1].metrics
    assert iaf["asw"] < iaf["asw_split_half"] < 1
    said = " ".join(study.findings(study.table(runs)))
    assert (
        f"IAF {iaf['asw_split_half']:.3f}" in said
        and f"VAE {vae['asw']:.3f}" in said
        and f"lowers it to {iaf['asw']:.3f}" in said
    )


def test_a_finished_run_is_read_back_and_another_configuration_is_not(runs, adata, monkeypatch):
    out = runs[0].folder.parent
    profile = training.get_profile("quick", **TINY)
    trained = []
    monkeypatch.setattr(study, "_train_and_record", lambda *a: trained.append(a))
    again = study.run(adata, "ae", out, profile, label_key="cell_type", progress=False)
    assert not trained and again.metrics == runs[0].metrics
    counts = adata.copy()
    names = adata.copy()
    counts.X.data[0] += 1
    names.obs["cell_type"] = names.obs["cell_type"].to_numpy()[::-1]
    changed = [
        (
            adata,
            {"profile": training.get_profile(profile, learning_rate=1e-3)},
            "learning_rate was",
        ),
        (counts, {}, "data was"),
        (names, {}, "labels was"),
        (adata, {"split": counts_split(adata)}, "split was None and is Split"),
    ]
    for cells, how, words in changed:
        with pytest.raises(FileExistsError, match=words):
            study.run(cells, "ae", out, **{"profile": profile, "label_key": "cell_type", **how})
    assert (
        study.run(adata, "AE", out, profile, label_key="cell_type").metrics == runs[0].metrics
        and not trained
    )
    study.run(adata, "ae", out, changed[0][1]["profile"], label_key="cell_type", overwrite=True)
    study.run(adata, "ae", out, profile, seed=1, label_key="cell_type")
    assert len(trained) == 2


def counts_split(adata):
    from vampsc import counts

    return counts.split_cells(adata.n_obs, 5)


def test_a_call_that_fails_leaves_a_finished_run(adata, tmp_path):
    profile = training.get_profile("quick", **TINY)
    few = adata[:200].copy()
    few.obs_names = [f"{i:05d}" for i in range(200)]
    run = study.run(few, "ae", tmp_path, profile, progress=False)
    assert list(run.cells.index) == list(few.obs_names)
    with pytest.raises(ValueError, match="typo"):
        study.run(few, "ae", tmp_path, profile, progress=False, batch_key="typo", overwrite=True)
    assert study.read_run(run.folder).metrics == run.metrics
    with pytest.raises(ValueError, match="at least 1"):
        study.run(few, "ae", tmp_path, training.get_profile(profile, max_epochs=0))
    (run.folder / "metrics.json").write_text("")
    with pytest.raises(ValueError, match=r"metrics.json is missing or damaged"):
        study.find_runs(tmp_path)
    with pytest.warns(UserWarning, match="run again now"):
        assert study.run(few, "ae", tmp_path, profile, progress=False).metrics["epochs"] == 2


@pytest.mark.slow
def test_a_page_gives_each_run_its_own_cells(adata, tmp_path, monkeypatch):
    profile = training.get_profile("quick", **TINY)
    study.run(adata[:200], "ae", tmp_path, profile, label_key="cell_type", progress=False)
    study.run(adata[200:350], "vae", tmp_path, profile, label_key="cell_type", progress=False)
    drawn = []
    grid = study.figures.umap_grid
    monkeypatch.setattr(
        study.figures,
        "umap_grid",
        lambda shown, labels: drawn.append((list(shown), len(labels))) or grid(shown, labels),
    )
    study.run_page(tmp_path)
    assert drawn == [(["AE"], 200), (["VAE"], 150)]


def test_an_interrupted_run_does_not_look_finished(adata, tmp_path, monkeypatch):
    profile = training.get_profile("quick", **TINY)
    monkeypatch.setattr(study, "judge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        study.run(adata, "ae", tmp_path, profile, progress=False)
    monkeypatch.undo()
    assert np.isfinite(
        study.run(adata, "ae", tmp_path, profile, progress=False).metrics["test_loss_per_gene"]
    )


def test_table_and_findings(runs):
    table = study.table(runs)
    assert (
        list(table.index) == ["AE", "VAE", "IAF", "VAMP"]
        and np.isfinite(table["test loss per gene"]).all()
    )
    assert np.isnan(table.loc["AE", "ELBO"]) and study.show_table(table).loc["AE", "ELBO ↑"] == "-"
    best = table["ELBO"].idxmax()
    assert any(f"best first: {best} " in s for s in study.findings(table))


def test_table_over_seeds(runs):
    other = [
        dataclasses.replace(
            r, config={**r.config, "seed": 1}, metrics={**r.metrics, "asw": r.metrics["asw"] + 0.2}
        )
        for r in runs[:3]
    ]
    mean = study.table([*runs, *other])
    std = study.table([*runs, *other], "std")
    assert list(mean.index) == ["AE", "VAE", "IAF", "VAMP"] and mean.loc[
        "AE", "ASW cell type"
    ] == pytest.approx(runs[0].metrics["asw"] + 0.1)
    assert std.loc["AE", "ASW cell type"] == pytest.approx(0.2 / np.sqrt(2)) and np.isnan(
        std.loc["VAMP", "ASW cell type"]
    )
    shown = study.show_table(mean, std)["ASW cell type ↑"]
    assert (
        shown["AE"] == f"{runs[0].metrics['asw'] + 0.1:.3f} ± 0.141"
        and shown["VAMP"] == f"{runs[3].metrics['asw']:.3f}"
    )


def test_settings_that_are_not_said_are_no_difference():
    one = {"model": "ae", "settings": {"layer": None, "use_raw": False, "batch_key": None}}
    assert study.difference(one, {"model": "ae", "settings": {}}) is None
    # as older versions wrote it
    assert (
        study.difference(
            {"training": {"patience": 6}}, {"training": {"patience": 6, "kl_warmup": 0}}
        )
        is None
    )
    assert (
        study.difference(
            {"training": {"patience": 6}}, {"training": {"patience": 6, "kl_warmup": 4}}
        )
        == "kl_warmup was 0 and is 4"
    )
    assert (
        study.difference(one, {"model": "ae", "settings": {"use_raw": True}})
        == "use_raw was None and is True"
    )


def test_labels_if_there_are_any(adata):
    assert (
        organs.label_key(adata) == "cell_type"
        and organs.label_key(adata, "other") == "other"
        and organs.label_key(adata, None) is None
    )
    none = adata[:5].copy()
    none.obs["cell_type"] = np.nan
    assert organs.label_key(none) is None


@pytest.mark.slow
def test_two_at_once_train_once(adata, tmp_path):
    adata[:300].copy().write_h5ad(tmp_path / "few.h5ad")
    line = [
        sys.executable,
        "-c",
        "from vampsc.cli import main; main()",
        "fit",
        "few.h5ad",
        "--model",
        "vae",
        "--no-umap",
        "--max-epochs",
        "8",
        "--n-genes",
        "100",
        "--json",
    ]
    both = [
        subprocess.Popen(
            line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert json.loads(said[0][0]) == json.loads(said[1][0])
    assert sum("epoch" in err or "is at it; waiting" in err for _, err in said) >= 1
    assert not (tmp_path / "runs" / "vae-seed0" / "checkpoint").exists()


def test_unlabelled_cells_have_no_silhouette(adata, tmp_path):
    run = study.run(adata, "vae", tmp_path, training.get_profile("quick", **TINY), progress=False)
    assert "asw" not in run.metrics and "ASW cell type" not in study.table([run])


def test_the_hash_of_a_file_is_that_of_its_cells(adata, tmp_path):
    few = adata[:100].copy()
    few.raw = few.copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    dense = few.copy()
    dense.X = dense.X.toarray()
    backed = organs.load(tmp_path / "few.h5ad", backed=True)
    assert len({study.data_hash(d) for d in (few, backed, dense)}) == 1
    assert study.data_hash(few, use_raw=True) == study.data_hash(few)
    assert study.data_hash(adata[:99]) != study.data_hash(few) != study.data_hash(few[:, ::-1])


def test_a_stopped_run_goes_on(adata, tmp_path, monkeypatch):
    """Ctrl-C in the second epoch of the first call; the second call ends as a run that was never
    stopped.
    """
    profile = training.get_profile("quick", **{**TINY, "max_epochs": 3})

    class CtrlC(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    train = functools.partial(models.run_training, callbacks=[CtrlC()])
    monkeypatch.setattr(models, "run_training", train)
    with pytest.raises(KeyboardInterrupt, match="stopped after epoch 1"):
        study.run(adata[:200], "vae", tmp_path, profile, progress=False)
    assert {p.name for p in (tmp_path / "vae-seed0").iterdir()} == {"checkpoint", "config.json"}
    monkeypatch.undo()
    went_on = study.run(adata[:200], "vae", tmp_path, profile, progress=False)
    whole = study.run(adata[:200], "vae", tmp_path / "whole", profile, progress=False)
    assert went_on.history.drop(columns="seconds").equals(
        whole.history.drop(columns="seconds")
    ) and np.array_equal(went_on.embedding, whole.embedding)
    assert not (went_on.folder / "checkpoint").exists()


def test_an_unfinished_run_goes_on_with_more_epochs_but_not_with_other_settings(adata, tmp_path):
    profile = training.get_profile("quick", **TINY)
    few = adata[:200]
    folder = tmp_path / "ae-seed0"
    folder.mkdir()
    models.AE(few, n_genes=profile.n_genes).train(
        profile, max_epochs=1, checkpoint=folder / "checkpoint", progress=False
    )
    # what a full disk leaves
    (folder / "config.json").write_text("")
    with pytest.raises(ValueError, match="learning_rate was .* remove it to begin anew"):
        study.run(
            few, "ae", tmp_path, training.get_profile(profile, learning_rate=1e-2), progress=False
        )
    first = training.read_checkpoint(folder / "checkpoint")[0]["rows"][0]
    longer = study.run(
        few, "ae", tmp_path, training.get_profile(profile, max_epochs=3), progress=False
    )
    assert len(longer.history) == 3 and longer.history["loss"].iloc[0] == pytest.approx(
        first["loss"], rel=1e-12
    )


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("limit, file", [(20_000, "model"), (2_000, "latent.npy")])
def test_a_full_disk_at_the_end_loses_no_training(adata, tmp_path, monkeypatch, limit, file):
    """The file that cannot be written is named; the same call, when there is room, ends without an
    epoch more.
    """
    few = adata[:200, np.sort(np.argsort(-np.asarray(adata[:200].X.sum(0)).ravel())[:100])].copy()
    profile = training.get_profile("quick", **TINY)
    settings = dict(
        profile=profile, progress=False, gene_space=None, n_genes=60, hidden=(8,), n_latent=4
    )
    folder = tmp_path / "ae-seed0"
    save = models.CountAutoencoder.save

    # before the model is saved, or after
    def full(model, *args, **kwargs):
        if file == "model":
            limit_files(limit)
        save(model, *args, **kwargs)
        limit_files(limit)

    monkeypatch.setattr(models.CountAutoencoder, "save", full)
    try:
        with pytest.raises(OSError, match=f"File too large.*{folder / file}"):
            study.run(few, "ae", tmp_path, **settings)
    finally:
        limit_files(resource.RLIM_INFINITY)
    monkeypatch.undo()
    assert (folder / "checkpoint").is_file() and not (folder / "metrics.json").exists()
    assert not list(folder.glob(".*.new"))
    kept = training.read_checkpoint(folder / "checkpoint")[0]["rows"]
    done = study.run(few, "ae", tmp_path, **settings)
    assert done.history["seconds"].tolist() == pytest.approx(
        [row["seconds"] for row in kept], rel=1e-12
    )


def test_cells_are_named_and_divided(runs, adata):
    cells = runs[0].cells
    assert (
        list(cells.index) == list(adata.obs_names)
        and (cells["label"] == adata.obs["cell_type"].astype(str)).all()
    )
    assert cells["split"].value_counts().to_dict() == {"train": 320, "validation": 40, "test": 40}


def test_labels_that_cannot_judge_are_refused_before_training(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_train_and_record", lambda *a: pytest.fail("trained"))
    few = adata[:50].copy()
    few.obs["one"] = "beta"
    with pytest.raises(ValueError, match="'one'"):
        study.run(few, "ae", tmp_path, label_key="one")


def test_batches_and_raw_are_part_of_a_run(adata, tmp_path):
    few = adata[:200].copy()
    few.raw, few.obs["lab"] = few.copy(), np.arange(200) % 2
    few.X = few.X * 0.5
    run = study.run(
        few,
        "vae",
        tmp_path,
        training.get_profile("quick", **TINY),
        progress=False,
        use_raw=True,
        batch_key="lab",
    )
    assert run.config["settings"]["batch_key"] == "lab" and models.load(
        run.folder / "model"
    ).batches == ["0", "1"]
    assert ("batches", "2 of lab") in study.settings_of(run)


# ---- the page of a run


def test_page_of_several_runs(runs):
    page = study.run_page(runs[0].folder.parent)
    text = page.read_text()
    assert (
        page.name == "report.html"
        and text.count('src="data:image/png;base64,') == 3
        and text.count("<img alt=") == 3
    )
    # a picture's letters may spell anything
    markup = re.sub(r"base64,[\w+/=]*", "", text).replace("http-equiv", "")
    assert "<script" not in markup and "http" not in markup
    for word in (
        "AE",
        "VAE",
        "IAF",
        "VAMP",
        "learning_rate 0.004",
        "320 for training",
        "PCs for 95 %",
        "Higher is better",
        "keras 3",
    ):
        assert word in text, word


def test_page_of_one_run_elsewhere(runs, tmp_path):
    page = study.run_page(runs[3].folder, tmp_path / "new" / "page.html")
    assert (
        "<td>VAMP<" in page.read_text().replace(' class="words"', "")
        and ">IAF<" not in page.read_text()
    )
    with pytest.raises(ValueError, match="holds no finished run"):
        study.run_page(tmp_path)


def test_names_are_escaped(runs, tmp_path):
    folder = shutil.copytree(runs[0].folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_key": "<b>&"}))
    assert "&lt;b&gt;&amp;" in study.run_page(folder).read_text()


NOTEBOOK = study.TEMPLATE


def execute(tmp_path, **parameters):
    out = tmp_path / "report.ipynb"
    papermill.execute_notebook(
        str(NOTEBOOK),
        str(out),
        {"out": str(tmp_path / "run"), **TINY, **parameters},
        kernel_name="python3",
        progress_bar=False,
    )
    return nbformat.read(out, 4)


def texts(notebook):
    return "\n".join(
        str(o.get("text", "") or o.get("data", {}).get("text/plain", ""))
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
    )


def test_organ_notebook_writes_table_metrics_figures_and_page(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    data = str(tmp_path / "cells.h5ad")
    page = study.report(tmp_path / "run", models="ae,vamp", data=data, **TINY)
    folder = tmp_path / "run"
    assert {
        "metrics.json",
        "table.csv",
        "umap.png",
        "covariance.png",
        "curves.png",
        "report.ipynb",
        "report.html",
    } <= {p.name for p in folder.iterdir()}
    written = json.loads((folder / "metrics.json").read_text())
    assert set(written) == {"ae-seed0", "vamp-seed0"} and np.isfinite(
        written["vamp-seed0"]["test_elbo"]
    )
    html = page.read_text()
    assert (
        html.count("data:image/png") >= 3
        and "PCs for 95 %" in html
        and "import" not in html.split("<body")[1][:2000]
    )
    notebook = nbformat.read(folder / "report.ipynb", 4)
    assert "silhouette" in texts(notebook).lower()
    assert not any(
        o.output_type == "stream" and o.name == "stderr"
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
    )


@pytest.mark.slow
def test_organ_notebook_on_data_without_gene_names(shared_data, tmp_path):
    notebook = execute(
        tmp_path, data=str(shared_data / "kidney_young_top2000.h5ad"), models="vae", gene_space=None
    )
    assert "PCs for 95 %" in texts(notebook)


@pytest.mark.slow
def test_organ_notebook_on_sorted_blood(shared_data, tmp_path):
    notebook = execute(tmp_path, data=str(shared_data / "blood_zheng_facs.h5ad"), models="vamp")
    assert "PCs for 95 %" in texts(notebook)


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(modles="vae"), "'modles' is not known"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (dict(organ="pancras"), "pancreas"),
                (dict(label_key="celltype"), "celltype"),
                (dict(models="vae,gan"), "'gan'"),
                (dict(profile="slow"), "'slow'"),
            )
        ),
    ],
)
def test_organ_notebook_stops_with_one_line(tmp_path, parameters, message, notebooks_here):
    with pytest.raises(papermill.PapermillExecutionError) as stop:
        execute(tmp_path, **parameters)
    assert message in stop.value.evalue and "\n" not in stop.value.evalue.strip()


@pytest.mark.slow
def test_organ_notebook_refuses_data_that_are_no_counts(adata, tmp_path, notebooks_here):
    logged = adata[:200].copy()
    logged.X = sp.csr_matrix(np.log1p(logged.X.toarray()))
    logged.write_h5ad(tmp_path / "logged.h5ad")
    with pytest.raises(ValueError, match="log-transformed"):
        study.report(tmp_path / "run", data=str(tmp_path / "logged.h5ad"))
    with pytest.raises(ValueError, match="'modles' is not known"):
        study.report(tmp_path / "run", modles="vae")


def test_compactness_of_an_exact_and_of_a_sampled_mean():
    rng = np.random.default_rng(0)
    z = np.c_[rng.normal(size=(500, 2)), np.zeros((500, 6))]
    assert study.compactness(None, z, None) == {"active_units": 2, "pcs95": 2}

    class Sampled:
        def get_latent_representation(self, n_mc_samples, seed):
            return z + rng.normal(size=z.shape) / np.sqrt(n_mc_samples)

    found = study.compactness(
        Sampled(), z, (z + 0.1 * rng.normal(size=z.shape), z + 0.1 * rng.normal(size=z.shape))
    )
    assert found["active_units"] == 2 and found["active_units_10_samples"] == 8
    assert found["pcs95"] == 2 and found["pcs95_10_samples"] > 2
    assert found["co_variation_split_half"] < 0.1
    # JSON has no NaN
    assert study.compactness(Sampled(), 0 * z, (0 * z, 0 * z))["co_variation_split_half"] is None


def test_a_finished_run_is_read_from_its_files_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "vae", "seed": 0}')
    (tmp_path / "metrics.json").write_text('{"pcs95": 3}')
    (tmp_path / "history.csv").write_text("epoch,loss\n1,5.0\n")
    (tmp_path / "cells.csv").write_text("cell,split\n007,train\n")
    np.save(tmp_path / "latent.npy", np.zeros((1, 2)))
    run = study.read_run(tmp_path)
    assert (
        isinstance(run, study.Run)
        and run.name == "vae"
        and run.metrics == {"pcs95": 3}
        and run.history.loc[1, "loss"] == 5
    )
    # names of digits keep their zeros
    assert run.embedding.shape == (1, 2) and list(run.cells.index) == ["007"]
    (tmp_path / "latent.npy").unlink()
    with pytest.raises(ValueError, match="latent.npy is missing or damaged"):
        study.read_run(tmp_path)


def test_unknown_parameters_are_named():
    study.refuse_unknown(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="'c' is not known; there are a, b"):
        study.refuse_unknown(["a", "c"], ["a", "b"])


def test_a_page_of_a_notebook(tmp_path):
    import nbformat

    markdown = nbformat.v4.new_markdown_cell
    code = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(
        cells=[
            markdown("# A title\n\n- skip_exec: true"),
            code("secret = 1"),
            markdown("**words**"),
            code(
                '#| fig-alt: "a dot"\nfigure',
                outputs=[nbformat.v4.new_output("display_data", {"image/png": "aGk="})],
            ),
        ]
    )
    nbformat.write(nb, tmp_path / "a.ipynb")
    page = study.to_html(tmp_path / "a.ipynb")
    text = page.read_text()
    assert page == tmp_path / "a.html" and "<strong>words</strong>" in text
    assert 'alt="a dot"' in text and "secret" not in text and "skip_exec" not in text


def test_evaluation_labels_are_the_columns_or_none():
    adata = organs.load("pancreas")[:50]
    key, labels = study.evaluation_labels(adata, "auto")
    assert key == "cell_type" and len(labels) == 50
    assert study.evaluation_labels(adata, None) == (None, None)


def test_an_embedding_is_judged_by_labels_alone():
    rng = np.random.default_rng(0)
    z = np.repeat([[0.0], [9.0]], 30, axis=0) + 0.1 * rng.normal(size=(60, 4))
    judged = study.judge_by_labels(z, np.repeat(["a", "b"], 30))
    assert judged["asw"] > 0.95 and judged["knn_purity"] == 1 and judged["n_labelled"] == 60
