"""Parts that larger tests use without naming them."""

import functools

import anndata as ad
import keras
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import typer

from vampsc import (
    cli,
    counts,
    figures,
    genes,
    intake,
    kernels,
    models,
    organs,
    study,
    tables,
    training,
)


@pytest.fixture(scope="module")
def cells():
    X = sp.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], "float32"))
    return ad.AnnData(X, layers={"twice": 2 * X}, var=pd.DataFrame(index=list("abc")))


def test_values_and_matrix_of_x_and_of_a_layer(cells):
    assert genes.values_of(cells) is cells.X
    assert (genes.matrix_of(cells, "twice") != 2 * cells.X).nnz == 0 and genes.matrix_of(
        cells
    ).dtype == np.float32
    with pytest.raises(genes.GeneSpaceError, match="no layer 'thrice'.*twice"):
        genes.values_of(cells, "thrice")
    with pytest.raises(genes.GeneSpaceError, match="X is empty"):
        genes.matrix_of(ad.AnnData(obs=cells.obs, var=cells.var))


def test_counts_are_in_one_place():
    genes.check_places(None, True)
    genes.check_places("twice", False)
    with pytest.raises(genes.GeneSpaceError, match="two places"):
        genes.check_places("twice", True)


def test_a_report_with_counts_names_the_lost_genes_in_most_cells(cells):
    space = genes.GeneSpace("two", ids=["a", "b"], symbols=["a", "b"])
    where, report = genes.mapping(space, cells)
    told = genes.with_counts(report, where, np.array([1, 0, 1]), cells.var_names, share=4 / 6)
    assert isinstance(told, genes.MappingReport) and (
        told.n_data,
        told.recognised,
        told.missing,
    ) == (3, 2, 0)
    assert told.not_used == ("c",) and told.share_of_counts == 4 / 6
    # b has a column and no count
    assert told.unseen == 1


@pytest.mark.parametrize(
    "value, least, right",
    [
        (3, 0, True),
        (np.int64(3), 3, True),
        (2, 3, False),
        (2.0, 0, False),
        ("2", 0, False),
        (None, 0, False),
    ],
)
def test_whole_numbers(value, least, right):
    if right:
        assert counts.whole_number("n", value, least) == 3
    else:
        with pytest.raises(
            counts.CountsError, match=f"n must be a whole number of at least {least}"
        ):
            counts.whole_number("n", value, least)


def test_the_class_behind_the_presets():
    adata = organs.load("pancreas")[:60]
    small = dict(
        n_genes=50, n_latent=4, hidden=(8,), n_pseudo_inputs=5, n_flow_steps=1, flow_hidden=(8,)
    )
    plain = models.CountAutoencoder(adata, "iaf", "vamp", **small)
    preset = models.VAMPIAF(adata, **small)
    assert plain.architecture == preset.architecture
    assert np.array_equal(plain.get_latent_representation(), preset.get_latent_representation())
    with pytest.raises(ValueError, match="does not go with"):
        models.CountAutoencoder(adata, "point", "vamp")


def test_a_loss_that_jumps_or_is_no_number_ends_the_epoch():
    guard = training.Guard(lambda: [{"loss": 10.0}])
    guard.on_epoch_end(1, {"loss": 19.0, "val_loss": 1.0})
    with pytest.raises(training.Diverged, match="jumped from 10 to 21"):
        guard.on_epoch_end(1, {"loss": 21.0, "val_loss": 1.0})
    with pytest.raises(training.Diverged, match="validation loss became nan"):
        guard.on_epoch_end(1, {"loss": 9.0, "val_loss": np.nan})
    with pytest.raises(training.Diverged, match="became inf"):
        guard.on_train_batch_end(0, {"loss": np.inf})


@pytest.fixture
def small():
    return models.AE(organs.load("pancreas")[:60], n_genes=50, n_latent=4, hidden=(8,))


def test_an_epoch_is_recorded_with_rate_time_and_cells(small):
    training.compile_network(small.network, 0.25)
    record = training.Record(n_cells=48)
    logs = {}
    record.set_model(small.network)
    record.on_epoch_begin(2)
    record.on_epoch_end(2, logs)
    assert (
        logs["learning_rate"] == 0.25 and logs["cells_seen"] == 3 * 48 and 0 <= logs["seconds"] < 60
    )


def test_a_checkpoint_brings_weights_and_counters_back(small, tmp_path):
    training.compile_network(small.network, 1e-3)
    schedule = keras.callbacks.ReduceLROnPlateau()
    stopping = keras.callbacks.EarlyStopping()
    schedule.wait = 3
    stopping.wait = 4
    state = training.Checkpoint(small.network, schedule, stopping, tmp_path / "state")
    state.begin(resume=False)
    before = [w.copy() for w in small.network.get_weights()]
    small.network.set_weights([w + 1 for w in before])
    schedule.wait = stopping.wait = 0
    state.restore()
    assert all(map(np.array_equal, small.network.get_weights(), before)) and (
        schedule.wait,
        stopping.wait,
    ) == (3, 4)
    with pytest.raises(FileExistsError, match="resume=True"):
        training.Checkpoint(small.network, schedule, stopping, tmp_path / "state").begin(False)


def test_a_training_run_ends_with_the_weights_of_its_best_epoch(small):
    profile = training.get_profile("quick", max_epochs=3, batch_size=16)
    run = training.Run(small.network, small.X, small.split, profile, progress=False).go()
    assert len(run.history) == 3 and not run.interrupted
    loss = small.network.evaluate(
        training._Inputs(small.X, small.split.validation, 16), verbose=0, return_dict=True
    )["loss"]
    assert np.isclose(loss, run.history["val_loss"].min(), rtol=1e-4)


def test_the_state_before_a_bad_step_comes_back():
    adata = organs.load("pancreas")[:60]
    model = models.AE(adata, n_genes=50, n_latent=4, hidden=(8,))
    weight = model.network.decoder.log_rate.kernel
    batch = (model.X.dense(np.arange(10)),)
    examine = training.Examine(model.network.variables, [batch])
    examine.set_model(model.network)
    before = np.asarray(weight).copy()
    examine.on_train_batch_begin(0)
    weight.assign(np.full(weight.shape, np.nan))
    # the step itself was sound, its result was not
    assert examine.first_bad(model.network) == "the gradient"
    assert np.array_equal(np.asarray(weight), before)


def test_a_picture_is_a_png():
    figure, axes = figures.panels(5)
    assert isinstance(figure, figures.Picture) and axes.shape == (5,)
    assert figure._repr_png_().startswith(b"\x89PNG")


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
    @cli.ends_well
    def command():
        raise error

    with pytest.raises(typer.Exit) as stopped:
        command()
    assert stopped.value.exit_code == code
    said = capsys.readouterr().err
    assert said.startswith("vampsc: ") and said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    @cli.ends_well
    def command():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


def test_options_show_their_defaults_where_they_have_one():
    assert cli.option(3, "words").show_default and not cli.option(None, "words").show_default
    assert cli.option(3, "words").default == 3 and cli.flag("--json", "words").default is False


def test_metrics_of_the_tables_are_described():
    assert {*tables.IN_TABLE_1, *tables.IN_TABLE_2} <= {*tables.METRICS}
    assert all(isinstance(m, tables.Metric) and m.digits >= 0 for m in tables.METRICS.values())


def test_a_summary_over_seeds():
    values = {name: [np.nan] * 3 for name in (*tables.IN_TABLE_1, *tables.IN_TABLE_2)} | {
        "pcs95": [11.0, 12.0, 13.0]
    }
    runs = pd.DataFrame(
        {
            "organ": "a",
            "title": "A",
            "model": "vae",
            "sampled": False,
            "units": 128,
            "seed": range(3),
            **values,
        }
    )
    row = tables.summarise(runs).set_index("metric").loc["pcs95"]
    # t with two degrees of freedom, sd 1
    half = 4.302653 / np.sqrt(3)
    assert np.allclose(
        [row["mean"], row["low"], row["high"], row["seeds"]], [12, 12 - half, 12 + half, 3]
    )


def test_a_table_as_text_and_as_html():
    table = tables.Html("<table><tr><td>a</td><td>b</td></tr></table>")
    assert table._repr_html_() == str(table) and repr(table) == " | a | b | "


def test_rows_of_a_copy_on_the_device(cells):
    pytest.importorskip("jax")
    read = kernels.RowsOnDevice(cells.X)
    assert np.array_equal(np.asarray(read(np.array([1, 0, 1]))), cells.X[[1, 0, 1]].toarray())


@pytest.mark.long
def test_variances_of_residuals_are_scanpys():
    "Also of a gene that no cell has, and of cells of which some have the same sum."
    X = organs.load("pancreas").X[:300, :2000]
    often = np.flatnonzero(np.asarray((X > 0).sum(0)).ravel() >= 3)
    ranked = sc.experimental.pp.highly_variable_genes(
        ad.AnnData(X[:, often]), n_top_genes=150, flavor="pearson_residuals", inplace=False
    )
    with_empty = sp.hstack([X[:, often], sp.csr_matrix((300, 1))], format="csr")
    variances = intake.residual_variances(with_empty)
    assert variances[-1] == 0
    np.testing.assert_allclose(variances[:-1], ranked["residual_variances"].to_numpy(), rtol=1e-6)
    assert np.array_equal(
        intake.variable_genes(X, 150), often[ranked["highly_variable"].to_numpy()]
    )


def test_residuals_are_computed_in_parts_that_fit_in_memory():
    rng = np.random.default_rng(0)
    share, of_cell = rng.random(70), rng.integers(1, 9, 40).astype(float)
    residuals = functools.partial(intake._residuals, theta=10.0, bound=2.0)
    r = residuals(0, np.outer(share, of_cell))
    for at_once in (1, 50, 10_000):
        sums = intake._sums_without_counts(share, of_cell, residuals, at_once)
        np.testing.assert_allclose(sums, [r.sum(1), (r**2).sum(1)])
