"""Runs, tables, the command line and the organ notebook."""
import json

import nbformat
import numpy as np
import papermill
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

from vampsc import metrics, models, organs, study, training

TINY = dict(max_epochs=2, n_genes=200)
ARGUMENTS = ["--max-epochs", "2", "--n-genes", "200"]


@pytest.fixture(scope="module")
def adata(): return organs.load("pancreas")


@pytest.fixture(scope="module")
def runs(adata, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    profile = training.get_profile("quick", **TINY)
    return [study.run(adata, m, out, profile, label_key="cell_type", progress=False) for m in ("ae", "vae", "iaf", "vamp")]


def test_a_run_is_recorded_whole(runs):
    for run in runs:
        assert {p.name for p in run.folder.iterdir()} == {"config.json", "history.csv", "latent.npy", "metrics.json", "model"}
        assert run.folder.name == f"{run.name}-seed0" and len(run.history) == 2
        z = np.load(run.folder / "latent.npy")
        assert z.shape == (1937, 128)
        assert run.metrics["asw"] == pytest.approx(metrics.silhouette(z, organs.load("pancreas").obs["cell_type"]), abs=1e-6)


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
    assert iaf["pcs95"] < iaf["pcs95_10_samples"] and iaf["active_units"] <= iaf["active_units_10_samples"]
    assert "pcs95_10_samples" not in runs[1].metrics


def test_a_finished_run_is_read_back_and_another_configuration_is_not(runs, adata, monkeypatch):
    out, profile = runs[0].folder.parent, training.get_profile("quick", **TINY)
    trained = []
    monkeypatch.setattr(study, "_train_and_record", lambda *a: trained.append(a))
    again = study.run(adata, "ae", out, profile, label_key="cell_type", progress=False)
    assert not trained and again.metrics == runs[0].metrics
    study.run(adata, "ae", out, training.get_profile(profile, learning_rate=1e-3), label_key="cell_type")
    other = adata.copy()
    other.X.data[0] += 1
    study.run(other, "ae", out, profile, label_key="cell_type")
    study.run(adata, "ae", out, profile, seed=1, label_key="cell_type")
    assert len(trained) == 3


def test_an_interrupted_run_does_not_look_finished(adata, tmp_path, monkeypatch):
    profile = training.get_profile("quick", **TINY)
    monkeypatch.setattr(study, "judge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): study.run(adata, "ae", tmp_path, profile, progress=False)
    monkeypatch.undo()
    assert np.isfinite(study.run(adata, "ae", tmp_path, profile, progress=False).metrics["test_loss_per_gene"])


def test_table_and_findings(runs):
    table = study.table(runs)
    assert list(table.index) == ["AE", "VAE", "IAF", "VAMP"] and np.isfinite(table["test loss per gene"]).all()
    assert np.isnan(table.loc["AE", "ELBO"]) and study.show_table(table).loc["AE", "ELBO"] == "-"
    best = table["ELBO"].idxmax()
    assert any(f"best first: {best} " in s for s in study.findings(table))


def test_unlabelled_cells_have_no_silhouette(adata, tmp_path):
    run = study.run(adata, "vae", tmp_path, training.get_profile("quick", **TINY), progress=False)
    assert "asw" not in run.metrics and "ASW cell type" not in study.table([run])


def invoke(*words): return CliRunner().invoke(study.app, [str(w) for w in words], catch_exceptions=True)


def test_command_line_fit_embed_list(adata, tmp_path):
    done = invoke("fit", "pancreas", "--model", "vae", "--out", tmp_path / "runs", "--label-key", "cell_type", *ARGUMENTS)
    assert done.exit_code == 0, done.output
    assert "test loss per gene" in done.output
    adata[:50].copy().write_h5ad(tmp_path / "few.h5ad")
    done = invoke("embed", tmp_path / "runs" / "vae-seed0", tmp_path / "few.h5ad", "--out", tmp_path / "out.h5ad")
    assert done.exit_code == 0, done.output
    embedded = organs.load(tmp_path / "out.h5ad")
    whole = np.load(tmp_path / "runs" / "vae-seed0" / "latent.npy")
    assert np.allclose(embedded.obsm["X_vae"], whole[:50], atol=1e-4)
    assert "pancreas" in invoke("organs", "list").output


@pytest.mark.parametrize("words, message", [
    (["fit", "pancras"], "pancreas"), (["fit", "pancreas", "--model", "vampire"], "'vampire'"),
    (["fit", "pancreas", "--label-key", "celltype"], "celltype"), (["fit", "pancreas", "--profile", "fast"], "'fast'"),
    (["embed", "nowhere", "pancreas"], "nowhere"), (["fit", "absent.h5ad"], "absent.h5ad"),
])
def test_command_line_errors_are_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vampsc", *words])
    with pytest.raises(SystemExit) as stop: study.main()
    text = str(stop.value)
    assert text.startswith("vampsc: ") and message in text and "\n" not in text


NOTEBOOK = study.TEMPLATE


def execute(tmp_path, **parameters):
    out = tmp_path / "report.ipynb"
    papermill.execute_notebook(str(NOTEBOOK), str(out), {"out": str(tmp_path / "run"), **TINY, **parameters},
                               kernel_name="python3", progress_bar=False)
    return nbformat.read(out, 4)


def texts(notebook):
    return "\n".join(str(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for c in notebook.cells
                     if c.cell_type == "code" for o in c.outputs)


def test_organ_notebook_writes_table_metrics_figures_and_page(tmp_path):
    page = study.report(tmp_path / "run", models="ae,vamp", **TINY)
    folder = tmp_path / "run"
    assert {"metrics.json", "table.csv", "umap.png", "covariance.png", "curves.png", "report.ipynb", "report.html"} <= {
        p.name for p in folder.iterdir()}
    written = json.loads((folder / "metrics.json").read_text())
    assert set(written) == {"ae", "vamp"} and np.isfinite(written["vamp"]["test_elbo"])
    html = page.read_text()
    assert html.count("data:image/png") >= 3 and "PCs for 95 %" in html and "import" not in html.split("<body")[1][:2000]
    notebook = nbformat.read(folder / "report.ipynb", 4)
    assert "silhouette" in texts(notebook).lower()
    assert not any(o.output_type == "stream" and o.name == "stderr" for c in notebook.cells if c.cell_type == "code"
                   for o in c.outputs)


def test_organ_notebook_on_data_without_gene_names(shared_data, tmp_path):
    notebook = execute(tmp_path, data=str(shared_data / "kidney_young_top2000.h5ad"), models="vae", gene_space=None)
    assert "PCs for 95 %" in texts(notebook)


def test_organ_notebook_on_sorted_blood(shared_data, tmp_path):
    notebook = execute(tmp_path, data=str(shared_data / "blood_zheng_facs.h5ad"), models="vamp")
    assert "PCs for 95 %" in texts(notebook)


@pytest.mark.parametrize("parameters, message", [
    (dict(modles="vae"), "'modles' is not known"), (dict(organ="pancras"), "pancreas"),
    (dict(label_key="celltype"), "celltype"), (dict(models="vae,gan"), "'gan'"), (dict(profile="slow"), "'slow'"),
])
def test_organ_notebook_stops_with_one_line(tmp_path, parameters, message):
    with pytest.raises(papermill.PapermillExecutionError) as stop: execute(tmp_path, **parameters)
    assert message in stop.value.evalue and "\n" not in stop.value.evalue.strip()


def test_organ_notebook_refuses_data_that_are_no_counts(adata, tmp_path):
    logged = adata[:200].copy()
    logged.X = sp.csr_matrix(np.log1p(logged.X.toarray()))
    logged.write_h5ad(tmp_path / "logged.h5ad")
    with pytest.raises(ValueError, match="log-transformed"): study.report(tmp_path / "run", data=str(tmp_path / "logged.h5ad"))
    with pytest.raises(ValueError, match="'modles' is not known"): study.report(tmp_path / "run", modles="vae")


def test_report_command_prints_the_table_and_the_paths(runs, tmp_path, monkeypatch):
    "The notebook itself is run by the test above; here the words that follow it."
    def finished(out, **parameters):
        assert parameters["max_epochs"] == 7
        out.mkdir()
        study.table(runs).to_csv(out / "table.csv")
        (out / "report.html").write_text("page")
        return out / "report.html"
    monkeypatch.setattr(study, "report", finished)
    done = invoke("report", "pancreas", "--out", tmp_path / "run", "--max-epochs", 7)
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("VAMP", "PCs for 95 %", "ELBO", "table.csv", "report.html"))
    assert "nan" not in done.output
