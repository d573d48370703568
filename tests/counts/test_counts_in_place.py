"Counts that stay where they are, in memory or in a file, beside the matrix that a copy would give."

import tempfile
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from vampsc import models, organs
from vampsc.counts import Batches, Counts, CountsError, check_counts, counts_of
from vampsc.genes import GeneSpace


def poisson(n=50, genes=30, seed=0):
    X = np.random.default_rng(seed).poisson(0.5, (n, genes)).astype("float32")
    X[:, 0] += 1
    return X


# dropped, moved and added up
WHERE = np.random.default_rng(1).permutation(np.r_[np.arange(20), np.full(6, -1), 3, 3, 7, 0])


def truth(X):
    out = np.zeros((len(X), 25), "float32")
    for j, place in enumerate(WHERE):
        if place >= 0:
            out[:, place] += X[:, j]
    return out


def stored(X, form, place, folder):
    "The counts in memory, or backed by an h5ad or zarr file."
    data = ad.AnnData(form(X))
    if place == "memory":
        return data.X
    folder = Path(tempfile.mkdtemp(dir=folder))
    if place == "h5ad":
        data.write_h5ad(folder / "cells.h5ad")
        return ad.read_h5ad(folder / "cells.h5ad", backed="r").X
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    data.write_zarr(folder / "cells.zarr")
    matrix = zarr.open(str(folder / "cells.zarr"), mode="r")["X"]
    return ad.io.sparse_dataset(matrix) if form is sparse.csr_matrix else matrix


@pytest.mark.parametrize(
    "form, place",
    [(f, p) for f in (np.asarray, sparse.csr_matrix) for p in ("memory", "h5ad", "zarr")]
    + [(sparse.csc_matrix, "memory"), (sparse.csc_matrix, "h5ad")],
)
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint16"])
def test_every_way_of_reading_is_the_matrix(form, place, dtype, tmp_path):
    X = poisson()
    counts, same = (
        Counts(stored(X.astype(dtype), form, place, tmp_path), *more) for more in ((WHERE, 25), ())
    )
    assert ("file" in repr(counts)) == (place != "memory" and form is not sparse.csc_matrix)
    for c, expected in ((counts, truth(X)), (same, X)):
        assert c.shape == expected.shape and len(c) == 50
        assert np.array_equal(c.toarray(), expected) and np.array_equal(c.totals, expected.sum(1))
        for cells in ([3], [9, 10, 11, 3, 3], np.arange(50), [49, 0], []):
            cells = np.array(cells, int)
            assert (
                np.array_equal(c.dense(cells), expected[cells])
                and c.dense(cells).dtype == np.float32
            )
            assert (
                np.array_equal(c[cells].toarray(), expected[cells]) and c[cells].dtype == np.float32
            )
        assert np.array_equal(c[10:20].toarray(), expected[10:20])
        for cells in ([-1, 4, -50], np.arange(50) % 3 == 0, slice(4, None, 7)):
            cells = cells if isinstance(cells, slice) else np.array(cells)
            assert np.array_equal(c.dense(cells), expected[cells]) and np.array_equal(
                c[cells].toarray(), expected[cells]
            )
        with pytest.raises(IndexError):
            c.dense(np.array([50]))
        assert np.array_equal(c.columns(np.array([-1])).toarray(), expected[:, [-1]])
        keep = np.array([2, 3, 17, 24])
        assert np.array_equal(c.columns(keep).dense(np.arange(50)), expected[:, keep])
        assert np.array_equal(c.columns(keep).totals, expected[:, keep].sum(1))
        assert np.array_equal(np.concatenate(list(Batches(c, batch_size=7))), expected)


def test_memory_is_shared():
    X = sparse.csr_matrix(poisson())
    counts = Counts(X, WHERE, 25)
    assert all(np.shares_memory(c[:].data, X.data) for c in (Counts(X), Counts(Counts(X)[:])))
    assert np.shares_memory(counts.source.csr.data, X.data)


def test_messages_name_cells_beyond_the_first_block(monkeypatch, tmp_path):
    monkeypatch.setattr(Counts.blocks, "__defaults__", (8,))
    names = [f"c{i}" for i in range(50)]
    symbols = [f"g{j}" for j in range(30)]
    for bad, words in (
        (np.nan, "2 values are NaN"),
        (-1, "2 values are negative"),
        (np.inf, "2 values are infinite"),
    ):
        X = poisson()
        X[[33, 41], 5] = bad
        for place in ("memory", "h5ad"):
            with pytest.raises(CountsError, match=f"{words}.*cell c33, gene g5"):
                check_counts(stored(X, sparse.csr_matrix, place, tmp_path), names, symbols)
            with pytest.raises(CountsError, match="cell 33, gene 5"):
                check_counts(stored(X, sparse.csr_matrix, place, tmp_path))
    X = poisson()
    X[[17, 45]] = 0
    with pytest.raises(CountsError, match=r"2 of 50 cells .*first: c17, c45\)"):
        check_counts(X, names)
    with pytest.raises(CountsError, match="log-transformed"):
        check_counts(np.log1p(poisson(200, 60)))
    counts = Counts(poisson(), WHERE, 25)
    check_counts(counts)
    assert counts.share == pytest.approx(truth(poisson()).sum() / poisson().sum())


def test_counts_that_were_changed_are_refused():
    "scanpy normalises in place; the model would go on with logarithms."
    adata = organs.load("pancreas")[:100].copy()
    model, of_a_copy = (
        models.VAE(a, n_genes=50, n_latent=2, hidden=(8,)) for a in (adata, adata.copy())
    )
    raw = adata.copy()
    before = model.get_elbo()["elbo"]
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    for verb in (model.train, model.get_elbo, model.get_latent_representation):
        with pytest.raises(ValueError, match=r"changed since.*adata.copy\(\)"):
            verb()
    assert model.get_elbo(raw)["elbo"] == before == of_a_copy.get_elbo()["elbo"]


def test_a_nan_in_a_gene_without_a_place_leaves_the_share():
    X = poisson()
    share = truth(X).sum() / X.sum()
    X[3, np.flatnonzero(WHERE == -1)[0]] = np.nan
    counts = Counts(X, WHERE, 25)
    check_counts(counts)
    assert counts.share == pytest.approx(share, abs=0.01)


def test_a_backed_file_gives_the_model_that_memory_gives(tmp_path):
    adata = organs.load("pancreas")[:200].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    one, other = (
        models.VAMP(a, n_genes=300, n_latent=4, hidden=(16,), n_pseudo_inputs=9)
        for a in (adata, backed)
    )
    assert "file" in repr(other.X) and one.genes == other.genes and one.mapping == other.mapping
    for model in (one, other):
        model.train(max_epochs=2, progress=False)
    np.testing.assert_array_equal(one.history["loss"], other.history["loss"])
    np.testing.assert_array_equal(
        one.get_latent_representation(), other.get_latent_representation(backed)
    )
    for part in (backed[5:60], adata[5:60]):
        np.testing.assert_array_equal(
            one.get_latent_representation(part),
            one.get_latent_representation(indices=np.arange(5, 60)),
        )
    with warnings.catch_warnings():
        # a library may have others about itself
        warnings.simplefilter("error", UserWarning)
        counts_of(backed, GeneSpace.load("gencode-48"))


def test_a_part_of_a_file_is_embedded_but_not_written_into(tmp_path):
    cells = organs.load("pancreas")[:60].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    part = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")[np.arange(60) % 2 == 0]
    model = models.VAE(part, n_genes=30, hidden=(4,), n_latent=2).train(steps=2, progress=False)
    with pytest.raises(ValueError, match="z = model.get_latent_representation"):
        model.embed(part)
    assert model.get_latent_representation(part).shape == (30, 2)
