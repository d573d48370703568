"""Small parts that several modules use."""

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from vampsc import beyond, figures, files, genes, kernels, models, organs, saving, study, tables


def test_an_adata_is_one_or_the_remedy_is_named():
    genes.check_adata(organs.load("pancreas")[:2])
    with pytest.raises(TypeError, match="read the file first"):
        genes.check_adata("my.h5ad")


def test_a_file_is_there_whole_or_the_folder_is_named(tmp_path):
    files.write_whole(tmp_path / "a", "one")
    files.write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="nowhere"):
        files.write_whole(tmp_path / "nowhere" / "a", "one")


def test_a_saved_model_is_known_by_its_files(tmp_path):
    model = models.VAE(organs.load("pancreas")[:60], n_genes=20, hidden=(4,), n_latent=2)
    model.save(tmp_path / "model")
    assert saving.is_saved(tmp_path / "model") and not saving.is_saved(tmp_path)


def test_labels_to_judge_by_are_the_columns_or_none():
    adata = organs.load("pancreas")[:50]
    key, labels = study.labels_to_judge(adata, "auto")
    assert key == "cell_type" and len(labels) == 50
    assert study.labels_to_judge(adata, None) == (None, None)


def test_an_embedding_is_judged_by_labels_alone():
    rng = np.random.default_rng(0)
    z = np.repeat([[0.0], [9.0]], 30, axis=0) + 0.1 * rng.normal(size=(60, 4))
    judged = study.judge_by_labels(z, np.repeat(["a", "b"], 30))
    assert judged["asw"] > 0.95 and judged["knn_purity"] == 1 and judged["n_labelled"] == 60


def test_labels_of_a_figure_are_in_the_order_of_their_numbers():
    found = figures.categorical(["B 10", "B 2", None, "nan", "B 2"])
    assert list(found.cat.categories) == ["B 2", "B 10"] and found.isna().sum() == 2


def test_cells_of_a_panel_are_drawn_once_each():
    axis = matplotlib.figure.Figure().subplots()
    labels = pd.Series(["a", "b", None])
    figures.scatter_cells(axis, np.zeros((3, 2)), figures.categorical(labels))
    assert sum(len(c.get_offsets()) for c in axis.collections) == 3


def test_seeds_whose_models_saw_other_test_cells_are_named():
    runs = pd.DataFrame({"seed": [0, 0, 1, 1], "test_cells": ["x", "x", "y", "z"]})
    assert tables.tested_otherwise(runs) == [1]


def test_lists_on_the_command_line_are_checked():
    assert beyond.distinct(["a", "b"], "organs") == ["a", "b"]
    assert beyond.listed_seeds("0,3") == beyond.listed_seeds((0, 3)) == [0, 3]
    for wrong, message in (("0,0", "seeds: 0 is there twice"), ("x", "no list of whole numbers")):
        with pytest.raises(ValueError, match=message):
            beyond.listed_seeds(wrong)
    assert beyond.data_sets_of("pancreas", "auto") == {"pancreas": "pancreas"}
    said = beyond.failures_in_words(["a: b"] * 4, 9)
    assert said.startswith("4 of 9 runs failed: a: b; a: b; a: b; ...")


def test_a_compiled_function_is_the_function():
    @kernels.jit()
    def twice(x):
        return 2 * x

    assert twice(3) == 6
