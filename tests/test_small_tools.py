"""Small tools that others are made of: number types of matrices, marks of cells, callbacks, a quiet
log, a column, a path.
"""

import logging

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from anndata.io import sparse_dataset
from scipy import sparse

from vampsc import counts, downloads, genes, models, saving, training

DENSE = np.array([[0, 2, 0], [1, 0, 3]], "float32")


def big_endian(matrix):
    return type(matrix)(
        (matrix.data.astype(">f4"), matrix.indices, matrix.indptr), shape=matrix.shape
    )


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_sparse_of_reads_any_number_types(tmp_path, kind):
    matrix = sparse.csr_matrix(DENSE) if kind == "csr" else sparse.csc_matrix(DENSE)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"] = matrix.data.astype("float16")
        file["indices"] = matrix.indices.astype(">u8")
        file["indptr"] = matrix.indptr.astype("uint64")
        found = genes.sparse_of(file, kind, DENSE.shape)
    assert found.format == kind and found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), DENSE)


def test_native_sparse_leaves_what_is_native_as_it_is():
    matrix = sparse.csr_matrix(DENSE)
    assert genes.native_sparse(matrix) is matrix
    coordinates = sparse.coo_matrix(DENSE)
    assert genes.native_sparse(coordinates) is coordinates
    matrix.indices = matrix.indices.astype("int64").astype(">i8")
    found = genes.native_sparse(matrix)
    assert found.indices.dtype.isnative
    np.testing.assert_array_equal(found.toarray(), DENSE)


def test_marks_know_cells_by_name_and_total(tmp_path):
    X = counts.Counts(sparse.csr_matrix(DENSE))
    X.names = pd.Index(["a", "b"])
    X.totals = np.array([2.0, 4.0])
    marks = saving.CellMarks.of(X)
    (tmp_path / "cells.npz").write_bytes(marks.to_bytes())
    marks = saving.CellMarks.load(tmp_path / "cells.npz")
    assert marks.places_in(X).tolist() == [0, 1]

    X.names = pd.Index(["b", "a"])
    X.totals = np.array([4.0, 2.0])
    assert marks.places_in(X).tolist() == [1, 0]
    X.totals = np.array([4.0, 3.0])
    with pytest.raises(
        ValueError, match="1 of the model's 2 cells have other counts .*first: a, 2 then and 3 now"
    ):
        marks.places_in(X)


def test_callbacks_are_keras():
    stops = keras.callbacks.TerminateOnNaN()
    assert training.checked_callbacks(stops) == training.checked_callbacks((stops,)) == [stops]
    assert training.checked_callbacks(None) == []
    with pytest.raises(TypeError, match="must be Keras callbacks.*not 3"):
        training.checked_callbacks([3])
    with pytest.raises(ValueError, match="save_weights_only=True"):
        training.checked_callbacks(keras.callbacks.ModelCheckpoint("x.keras"))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow")
def test_only_the_message_about_tracing_is_left_out():
    import tensorflow as tf

    heard = []

    class Listener(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    listener = Listener()
    tf.get_logger().addHandler(listener)
    try:
        with training.quiet_about_tracing():
            tf.get_logger().warning("5 out of the last 5 calls triggered tf.function retracing")
            tf.get_logger().warning("another warning")
        tf.get_logger().warning("6 calls triggered tf.function retracing")
    finally:
        tf.get_logger().removeHandler(listener)
    assert heard == ["another warning", "6 calls triggered tf.function retracing"]


def test_a_column_by_its_name():
    obs = pd.DataFrame([[1, 2, 3]], columns=["donor", 7, 7])
    assert counts.column_of(obs, "donor").tolist() == [1]
    with pytest.raises(
        counts.CountsError, match="no column 'lab' for the batches; there are donor, 7"
    ):
        counts.column_of(obs, "lab", " for the batches")
    with pytest.raises(counts.CountsError, match="2 columns of obs are called 7"):
        counts.column_of(obs, 7)


def test_paths_of_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert downloads.user_path("~/runs") == tmp_path / "runs"
    with pytest.raises(TypeError, match="a path must be text or a Path, not 5"):
        downloads.user_path(5)
    with pytest.raises(ValueError, match="the path is empty"):
        downloads.user_path("")


def test_a_model_is_saved_with_the_marks_of_its_cells(tmp_path):
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(3, (20, 6)).astype("float32") + 1)
    model = models.AE(adata, gene_space=None, hidden=(4,), n_latent=2)
    assert isinstance(model, saving.Persistence)
    model.save(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == set(saving.FILES)


def test_pointers_of_a_matrix_in_a_file(tmp_path):
    AnnData(sparse.csr_matrix(DENSE)).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        matrix = sparse_dataset(file["X"])
        assert genes.pointers_of(matrix).tolist() == sparse.csr_matrix(DENSE).indptr.tolist()
        file["X/indptr"][1] = 99
        with pytest.raises(genes.DamagedError, match="indptr falls from 99"):
            genes.pointers_of(matrix)
