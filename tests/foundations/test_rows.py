"""Dense rows of a sparse matrix: in one pass on the host, and on JAX's device."""

import anndata as ad
import keras
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from vampsc import counts, kernels, models, organs

BACKEND = keras.backend.backend()
needs_jax = pytest.mark.skipif(BACKEND != "jax", reason="counts stay on the device only under JAX")


@pytest.fixture
def X():
    return sp.random(50, 30, 0.2, "csr", dtype="float32", random_state=0)


def readers(X):
    X = counts.Counts(X)
    return [kernels.row_reader(X, on_device=False)] + (
        [kernels.row_reader(X, on_device=True)] if BACKEND == "jax" else []
    )


def test_rows_are_the_matrix(X):
    # and cells without a count
    X = sp.vstack([X, sp.csr_matrix((2, 30), dtype="float32")], format="csr")
    for rows in ([3, 0, 49, 3], [51], [51, 50], np.arange(52)):
        for read in readers(X):
            np.testing.assert_array_equal(np.asarray(read(np.array(rows))), X[rows].toarray())


def test_entries_that_stand_twice_add_up():
    twice = sp.csr_matrix((np.float32([1, 2, 5]), [1, 1, 2], [0, 2, 3]), shape=(2, 3))
    for read in readers(twice):
        np.testing.assert_array_equal(np.asarray(read(np.array([0, 1]))), [[0, 3, 0], [0, 0, 5]])


def test_a_matrix_without_counts():
    for read in readers(sp.csr_matrix((4, 3), dtype="float32")):
        assert not np.asarray(read(np.array([1, 2]))).any()


def test_the_device_is_refused_elsewhere(X):
    if BACKEND == "jax":
        pytest.skip("this is JAX")
    assert not kernels.fits_on_device(X)
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        kernels.row_reader(X, on_device=True)


@needs_jax
def test_a_processor_is_no_device(X):
    assert not kernels.fits_on_device(X)


@needs_jax
def test_training_from_the_device_is_training_from_the_host(monkeypatch):
    import jax

    adata = organs.load("pancreas")[:300]
    histories = []
    for on_device in (False, True):
        monkeypatch.setattr(kernels, "fits_on_device", lambda X: on_device)
        model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
        assert isinstance(counts.Batches(model.X)[0], jax.Array) == on_device
        histories.append(model.train(max_epochs=2, progress=False).history["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)


@needs_jax
def test_the_device_holds_one_copy_and_that_of_its_genes(X):
    all_genes = counts.Counts(X)
    read = kernels.row_reader(all_genes, on_device=True)
    assert kernels.row_reader(all_genes, on_device=True) is read
    fewer = kernels.row_reader(all_genes.columns(np.arange(5)), on_device=True)
    np.testing.assert_array_equal(np.asarray(fewer(np.array([7]))), X[[7], :5].toarray())


def test_memory_is_used_again_only_when_free():
    first = kernels._aligned((1000, 1000))
    place = first.ctypes.data
    part = first[3:4]
    assert place % 64 == 0 and kernels._aligned((1000, 1000)).ctypes.data != place
    del first
    # `part` still lies there
    assert kernels._aligned((1000, 1000)).ctypes.data != place
    del part
    assert kernels._aligned((1000, 1000)).ctypes.data == place
    # more than are kept
    held = [kernels._aligned((1000, 1000)) for _ in range(40)]
    assert len({a.ctypes.data for a in held}) == 40
    for n in range(20):
        kernels._aligned((1000, 1001 + n))
    assert len(kernels._memory.kept) <= 8


def test_batches_that_are_held_do_not_change(X):
    X = sp.random(64, 20_000, 0.1, "csr", dtype="float32", random_state=1)
    held = [batch for batch in counts.Batches(X, batch_size=16)] * 2 + [
        batch for batch in counts.Batches(X, batch_size=16)
    ]
    for k, batch in enumerate(held):
        np.testing.assert_array_equal(batch, X[16 * (k % 4) : 16 * (k % 4 + 1)].toarray())


@pytest.fixture(scope="module")
def two_cells():
    X = sp.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], "float32"))
    return ad.AnnData(X, layers={"twice": 2 * X}, var=pd.DataFrame(index=list("abc")))


def test_rows_of_a_copy_on_the_device(two_cells):
    pytest.importorskip("jax")
    read = kernels.RowsOnDevice(two_cells.X)
    assert np.array_equal(np.asarray(read(np.array([1, 0, 1]))), two_cells.X[[1, 0, 1]].toarray())
