"Counts: every layout gives the same matrix, every fault is named, and batches are the rows of the matrix."
import warnings

import anndata as ad
import keras
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import sparse

from vampsc.counts import Batches, CountsError, Split, check_counts, counts_matrix, split_cells


def poisson(n=40, genes=30, seed=0, mean=1.5):
    X = np.random.default_rng(seed).poisson(mean, (n, genes)).astype("float32")
    X[:, 0] += 1                                                       # no empty cell
    return X


# ---- one form

@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16", "float32", "float64"])
def test_layouts(form, dtype):
    X = poisson()
    data = ad.AnnData(form(X.astype(dtype)))
    kept = data.X.copy()
    for cells, expected in ((data, X), (data[5:20], X[5:20]), (data[::-2, 3:], X[::-2, 3:])):
        out = counts_matrix(cells)
        assert out.format == "csr" and out.dtype == np.float32 and out.has_sorted_indices
        assert np.array_equal(out.toarray(), expected)
    assert abs(data.X - kept).max() == 0 and data.X.dtype == dtype


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_backed_and_layer(form, tmp_path):
    X = poisson()
    data = ad.AnnData(form(X), layers={"twice": form(2 * X)})
    data.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert np.array_equal(counts_matrix(backed).toarray(), X)
    assert np.array_equal(counts_matrix(backed[3:9]).toarray(), X[3:9])
    backed.file.close()
    assert np.array_equal(counts_matrix(data, "twice").toarray(), 2 * X)
    assert form is not sparse.csr_matrix or np.shares_memory(counts_matrix(data).data, data.X.data)


def test_unsorted_and_double_entries():
    messy = sparse.csr_matrix((np.array([1., 2, 4], "float32"), [2, 0, 2], [0, 3]), shape=(1, 3))
    assert counts_matrix(ad.AnnData(messy)).toarray().tolist() == [[2, 0, 5]]
    assert messy.indices.tolist() == [2, 0, 2] and messy.data.tolist() == [1, 2, 4]


# ---- are these counts?

@pytest.mark.parametrize("value, words", [(-1, "1 values are negative"), (-0.5, "negative"), (np.nan, "NaN"), (np.inf, "infinite"),
                                          (-np.inf, "infinite"), (1e300, "too large for float32")])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("cell, gene", [(0, 0), (17, 12), (39, 29)])
def test_one_bad_value_anywhere(value, words, form, cell, gene):
    X = poisson().astype("float64")
    X[cell, gene] = value
    with pytest.raises(CountsError, match=words) as error:
        check_counts(form(X), names=[f"c{i}" for i in range(40)], genes=[f"g{j}" for j in range(30)])
    assert f"cell c{cell}, gene g{gene}" in str(error.value) and "\n" not in str(error.value)


def per_cell(X, target): return X * (target / X.sum(1, keepdims=True))


@pytest.mark.parametrize("genes", [60, 400])
@pytest.mark.parametrize("transform", [np.log1p, lambda X: np.log1p(per_cell(X, 1e4)), lambda X: np.log2(1 + per_cell(X, 1e6)),
                                       lambda X: np.log1p(np.minimum(X, 1)), lambda X: np.log10(1 + per_cell(X, 1e4))])
def test_logarithms_refused(transform, genes):
    with pytest.raises(CountsError, match="log-transformed.*layer='counts'"):
        check_counts(sparse.csr_matrix(transform(poisson(60, 400, mean=0.5).astype("float64"))[:, :genes]))


@pytest.mark.parametrize("values, hint", [
    (lambda X, rng: per_cell(X, 1e4), "normalised"), (lambda X, rng: 2.5 * X, "normalised"),
    (lambda X, rng: np.maximum(50 * X - rng.uniform(0, 1, X.shape), 0), "estimated"),
    (lambda X, rng: rng.uniform(10, 700, X.shape), "estimated"), (lambda X, rng: rng.uniform(10, 7000, X.shape), "estimated")])
def test_not_whole_numbers_warn_once(values, hint):
    X = values(poisson(60, 400).astype("float64"), np.random.default_rng(0))
    X[:, 0] = np.where(X.sum(1) > 0, X[:, 0], 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_counts(X)
    stored = X[X > 0].astype("float32")
    assert len(caught) == 1 and hint in str(caught[0].message)
    assert f"{np.mean(stored != np.round(stored)):.1%}" in str(caught[0].message)


def test_good_counts_pass_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for X in (poisson(), poisson().astype(int), sparse.csc_matrix(poisson()), np.ones((2, 2), bool)): check_counts(X)


def test_empty_cells_and_nothing():
    X = poisson()
    X[[7, 30]] = 0
    with pytest.raises(CountsError, match=r"2 of 40 cells .*first: n7, n30\).*sc.pp.filter_cells"):
        check_counts(X, names=[f"n{i}" for i in range(40)])
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(CountsError, match=f"{shape[0]} cells x {shape[1]} genes"): check_counts(np.zeros(shape))


# ---- split

@given(st.integers(10, 3000), st.integers(0, 2**32 - 1), st.sampled_from([(0.1, 0.1), (0, 0.2), (0.3, 0), (0.25, 0.5)]))
def test_split(n, seed, shares):
    split = split_cells(n, seed, *shares)
    parts = split.train, split.validation, split.test
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n)) and all((np.diff(p) > 0).all() for p in parts)
    assert all(abs(len(p) - n * share) <= 0.5 for p, share in zip(parts[1:], shares))
    assert split == split_cells(n, seed, *shares) == Split.from_dict(split.to_dict())
    assert n < 50 or split != split_cells(n, seed + 1, *shares)


@pytest.mark.parametrize("n, shares, words", [(9, (0.1, 0.1), "9 cells"), (100, (-0.1, 0.1), "shares"), (100, (0.5, 0.5), "shares"),
                                              (10, (0.5, 0.4), "leave 1 of 10")])
def test_split_refuses(n, shares, words):
    with pytest.raises(CountsError, match=words): split_cells(n, 0, *shares)


# ---- batches

@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(0, 5))
def test_batches_are_rows(n, size, shuffle, epoch):
    X = poisson(60)
    chosen = np.random.default_rng(n).choice(60, n, replace=False)
    batches = Batches(sparse.csr_matrix(X), chosen, batch_size=size, shuffle=shuffle, seed=3)
    batches.epoch = epoch
    items, cells = [batches[b] for b in range(len(batches))], [batches.cells(b) for b in range(len(batches))]
    assert all(x.dtype == np.float32 and type(x) is np.ndarray and np.array_equal(x, X[c]) for x, c in zip(items, cells))
    assert sorted(np.concatenate(cells)) == sorted(chosen) and all(len(c) == size for c in cells[:-1])
    assert shuffle or np.array_equal(np.concatenate(cells), chosen)
    if shuffle and size > 1: assert n == 1 or len(cells[-1]) > 1
    with pytest.raises(IndexError): batches[len(batches)]


def test_order_depends_on_seed_and_epoch_only():
    X = poisson(200)
    def order(seed, epoch):
        batches = Batches(X, shuffle=True, seed=seed)
        batches.epoch = epoch
        return batches.order.tolist()

    walked = Batches(X, shuffle=True, seed=5)
    for epoch in range(3):
        assert walked.order.tolist() == order(5, epoch)
        walked.on_epoch_end()
    orders = [order(s, e) for s in range(3) for e in range(3)]
    assert len(set(map(tuple, orders))) == 9


def test_last_batch_of_one_cell():
    X = poisson(9)
    assert [len(b) for b in Batches(X, batch_size=4)] == [4, 4, 1]
    assert [len(b) for b in Batches(X, batch_size=4, shuffle=True)] == [4, 5]
    assert [len(b) for b in Batches(X, [3], batch_size=4, shuffle=True)] == [1]


@pytest.mark.parametrize("wrong, words", [(dict(indices=[40]), "0 to 39"), (dict(indices=[-1]), "0 to 39"), (dict(indices=[0.5]), "positions"),
                                          (dict(indices=np.ones(3, bool)), "mask"), (dict(batch_size=0), "batch_size=0")])
def test_batches_refuse(wrong, words):
    with pytest.raises(CountsError, match=words): Batches(poisson(), **wrong)


class Seen(keras.callbacks.Callback):
    "Sets the epoch of the batches and notes which cells fit asks for."
    def __init__(self, batches):
        super().__init__()
        self.batches, self.epochs, self.get = batches, [], batches.cells
        batches.cells = self.note
    def note(self, b):
        if self.epochs: self.epochs[-1].update({b: tuple(self.get(b))})
        return self.get(b)
    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch
        self.epochs.append({})


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 2])
def test_in_fit(workers, first):
    def new(): return Batches(poisson(33), batch_size=8, shuffle=True, seed=2, workers=workers)
    batches = new()
    seen = Seen(batches)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((30,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss=None)
    model.compute_loss = lambda x=None, y=None, y_pred=None, *args, **kwargs: keras.ops.mean(y_pred**2)
    loss = model.fit(batches, initial_epoch=first, epochs=4, shuffle=False, verbose=0, callbacks=[seen]).history["loss"]
    assert len(loss) == 4 - first and np.isfinite(loss).all()
    for epoch, cells in zip(range(first, 4), seen.epochs, strict=True):
        fresh = new()
        fresh.epoch = epoch
        assert cells == {b: tuple(fresh.cells(b)) for b in range(4)}
