"""Counts: every layout gives the same matrix, every fault is named, and batches are the rows of the
matrix.
"""

import warnings

import anndata as ad
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from vampsc.counts import (
    Batches,
    Counts,
    CountsError,
    Split,
    cell_positions,
    check_counts,
    check_split,
    checked_counts,
    counts_matrix,
    split_cells,
    where_counts_may_be,
)
from vampsc.genes import GeneSpace, GeneSpaceError


def poisson(n=40, genes=30, seed=0, mean=1.5):
    X = np.random.default_rng(seed).poisson(mean, (n, genes)).astype("float32")
    X[:, 0] += 1  # no empty cell
    return X


# ---- one form


@pytest.mark.parametrize(
    "form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array]
)
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
    messy = sparse.csr_matrix((np.array([1.0, 2, 4], "float32"), [2, 0, 2], [0, 3]), shape=(1, 3))
    assert counts_matrix(ad.AnnData(messy)).toarray().tolist() == [[2, 0, 5]]
    assert messy.indices.tolist() == [2, 0, 2] and messy.data.tolist() == [1, 2, 4]


# ---- are these counts?


@pytest.mark.parametrize(
    "value, words",
    [
        (-1, "1 values are negative"),
        (-0.5, "negative"),
        (np.nan, "NaN"),
        (np.inf, "infinite"),
        (-np.inf, "infinite"),
        (1e300, "too large for float32"),
    ],
)
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("cell, gene", [(0, 0), (17, 12), (39, 29)])
def test_one_bad_value_anywhere(value, words, form, cell, gene):
    X = poisson().astype("float64")
    X[cell, gene] = value
    with pytest.raises(CountsError, match=words) as error:
        check_counts(
            form(X), names=[f"c{i}" for i in range(40)], genes=[f"g{j}" for j in range(30)]
        )
    assert f"cell c{cell}, gene g{gene}" in str(error.value) and "\n" not in str(error.value)


def per_cell(X, target):
    return X * (target / X.sum(1, keepdims=True))


@pytest.mark.parametrize("genes", [60, 400])
@pytest.mark.parametrize(
    "transform",
    [
        np.log1p,
        lambda X: np.log1p(per_cell(X, 1e4)),
        lambda X: np.log2(1 + per_cell(X, 1e6)),
        lambda X: np.log1p(np.minimum(X, 1)),
        lambda X: np.log10(1 + per_cell(X, 1e4)),
    ],
)
def test_logarithms_refused(transform, genes):
    with pytest.raises(CountsError, match="log-transformed.*layer='counts'"):
        check_counts(
            sparse.csr_matrix(transform(poisson(60, 400, mean=0.5).astype("float64"))[:, :genes])
        )


def of_cells(n, genes, seed=0):
    "Counts of some 600 molecules a cell, whose genes differ a thousandfold."
    rng = np.random.default_rng(seed)
    shares = rng.lognormal(sigma=2, size=genes)
    mean = 600 * shares / shares.sum() * rng.lognormal(sigma=0.4, size=(n, 1))
    return rng.poisson(mean * rng.gamma(2, 0.5, (n, genes))).astype("float32")


@pytest.mark.parametrize(
    "log",
    [
        lambda X: np.log1p(per_cell(X, 1e4)),
        lambda X: np.log1p(per_cell(X, 1e6)),
        lambda X: np.log10(1 + per_cell(X, 1e6)),
    ],
)
def test_rounded_logarithms_are_noticed(log):
    X = of_cells(150, 800)
    rounded = np.round(log(X))
    with pytest.warns(UserWarning, match=r"logarithms that were rounded\?.*layer='counts'"):
        check_counts(sparse.csr_matrix(rounded))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_counts(sparse.csr_matrix(X))
        check_counts(sparse.csr_matrix(rounded[:99]))
        check_counts(sparse.csr_matrix(rounded[:, :499]))
    with pytest.warns(UserWarning) as caught:
        check_counts(sparse.csr_matrix(X * (10 / X.max())))  # scaled, and not whole
    assert len(caught) == 1 and "rounded" not in str(caught[0].message)


@pytest.mark.parametrize(
    "values, hint",
    [
        (lambda X, rng: per_cell(X, 1e4), "normalised"),
        (lambda X, rng: 2.5 * X, "normalised"),
        (lambda X, rng: np.maximum(50 * X - rng.uniform(0, 1, X.shape), 0), "estimated"),
        (lambda X, rng: rng.uniform(10, 700, X.shape), "estimated"),
        (lambda X, rng: rng.uniform(10, 7000, X.shape), "estimated"),
    ],
)
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
        for X in (
            poisson(),
            poisson().astype(int),
            sparse.csc_matrix(poisson()),
            np.ones((2, 2), bool),
        ):
            check_counts(X)


def test_empty_cells_and_nothing():
    X = poisson()
    X[[7, 30]] = 0
    with pytest.raises(CountsError, match=r"2 of 40 cells .*first: n7, n30\).*X\[np.asarray"):
        check_counts(X, names=[f"n{i}" for i in range(40)])
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(CountsError, match=f"{shape[0]} cells x {shape[1]} genes"):
            check_counts(np.zeros(shape))


def test_genes_are_counted_in_blocks(monkeypatch):
    monkeypatch.setattr(Counts.blocks, "__defaults__", (7,))
    X = poisson(mean=0.05)
    for where in (None, np.r_[np.arange(1, 30), -1] - (np.arange(30) % 4 == 0)):
        counts = Counts(X.astype("int64"), where, 30)
        try:
            check_counts(counts)
        except CountsError:
            pass
        assert np.array_equal(counts.cells_with, (X > 0).sum(0))


@pytest.mark.parametrize("index", [30, 4000, -1])
@pytest.mark.parametrize("where", [None, np.arange(30)[::-1]])
def test_damaged_rows(index, where):
    X = sparse.csr_matrix(poisson())
    X.indices[-1] = index
    with pytest.raises(CountsError, match="column indices lie outside"):
        check_counts(Counts(X, where, 30))


@pytest.mark.parametrize("value, warns", [(2**24 - 1, False), (2**24 + 1, True)])
def test_counts_beyond_single_precision(value, warns):
    X = poisson().astype("int64")
    X[3, 4] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_counts(X)
    assert [("rounded" in str(w.message)) for w in caught] == [True] * warns


def test_where_counts_may_be():
    log = np.log1p(poisson())
    data = ad.AnnData(
        log.copy(),
        layers={
            "counts": sparse.csc_matrix(poisson()),
            "words": poisson().astype(str),
            "zero": 0 * log,
            "half": poisson() / 2,
        },
    )
    data.raw = ad.AnnData(poisson())
    assert where_counts_may_be(data) == "which may be in adata.raw (use_raw=True) or layer='counts'"
    assert where_counts_may_be(data, use_raw=True) == "which may be in layer='counts'"
    assert where_counts_may_be(data, layer="counts") == "which may be in adata.raw (use_raw=True)"
    assert where_counts_may_be(ad.AnnData(poisson(), layers={"log": log}), layer="log").startswith(
        "which may be in adata.X"
    )
    assert "no whole numbers in layer='log' either" in where_counts_may_be(
        ad.AnnData(log, layers={"log": log})
    )
    assert "no other layers and no raw" in where_counts_may_be(ad.AnnData(log))


def test_checked_counts_says_what_may_not_be_meant():
    X = poisson()
    names = [f"g{j}" for j in range(30)]
    space = GeneSpace("ten", names[:10])
    data = ad.AnnData(X)
    data.var_names = names
    X[:, 10:] *= 5

    def said(space, data):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            counts, report = checked_counts(data, space)
        return counts, report, " | ".join(str(w.message) for w in caught)

    counts, report, words = said(space, data)
    assert (
        np.array_equal(counts.toarray(), X[:, :10])
        and report.share_of_counts == pytest.approx(X[:, :10].sum() / X.sum())
        and report.unseen == 0
    )
    assert (
        "of the counts are in genes of ten" in words
        and " | " not in words
        and report == space.map(data)[1]
    )
    own = GeneSpace.of(data)
    assert (
        said(own, data)[2] == "" == said(own.subset([0, 3, 4]), data)[2]
        and "only 10 of the 30 genes of own genes" in said(own, data[:, :10])[2]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.obs_names = ["c"] * 20 + [f"c{i}" for i in range(20)]
    assert "more than once: 1 (first: c);" in said(own, data)[2]
    with pytest.raises(GeneSpaceError, match="layer='counts' and use_raw=True"):
        checked_counts(data, own, "counts", True)


# ---- which cells


@pytest.mark.parametrize(
    "indices",
    [None, slice(2, None, 3), [0, -1, 3, 3], np.arange(9) % 2 == 0, [], 4, np.uint8([8]), range(3)],
)
def test_cell_positions(indices):
    expected = (
        np.arange(9)
        if indices is None
        else np.atleast_1d(
            np.arange(9)[np.array(indices, int) if isinstance(indices, (list, range)) else indices]
        )
    )
    assert cell_positions(indices, 9).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "indices, words",
    [
        ([9], r"1 of 1 indices.*first: 9\).*9 cells, 0 to 8"),
        ([0, -10], "first: -10"),
        ([True], "9 entries, not 1"),
        ([0.0], "not 0.0"),
        (["c1"], "not 'c1'.*get_indexer"),
        ([None], "not None"),
    ],
)
def test_cell_positions_refuse(indices, words):
    with pytest.raises(CountsError, match=words):
        cell_positions(indices, 9)


# ---- split


@given(
    st.integers(10, 3000),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(0.1, 0.1), (0, 0.2), (0.3, 0), (0.25, 0.5)]),
)
def test_split(n, seed, shares):
    split = split_cells(n, seed, *shares)
    parts = split.train, split.validation, split.test
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n)) and all(
        (np.diff(p) > 0).all() for p in parts
    )
    assert all(abs(len(p) - n * share) <= 0.5 for p, share in zip(parts[1:], shares))
    assert split == split_cells(n, seed, *shares) == Split.from_dict(split.to_dict())
    assert n < 50 or split != split_cells(n, seed + 1, *shares)


@pytest.mark.parametrize(
    "n, shares, words",
    [
        (9, (0.1, 0.1), "at least 10 cells, and there are 9"),
        (100, (-0.1, 0.1), "shares"),
        (100, (0.5, 0.5), "shares"),
        (10, (0.5, 0.4), "leave 1 of 10"),
        (100.0, (0.1, 0.1), "number of cells must be a whole number.*not 100.0"),
        (100, (float("nan"), 0.1), "validation=nan.*shares"),
        (100, ("a", 0.1), "shares"),
        (100, (None, 0.1), "shares"),
    ],
)
def test_split_refuses(n, shares, words):
    with pytest.raises(CountsError, match=words):
        split_cells(n, 0, *shares)


@pytest.mark.parametrize("seed", [-1, 0.5, None, "0"])
def test_split_refuses_seed(seed):
    with pytest.raises(CountsError, match="seed must be a whole number of at least 0"):
        split_cells(20, seed)


def test_check_split():
    check_split(split_cells(20), 20)
    # some cells may be in no part
    check_split(Split(np.arange(5), np.array([7]), np.array([], int)), 20)
    for wrong, words in (
        (split_cells(21), "out of range"),
        (Split(np.arange(5), np.array([4]), np.array([4])), r"1 cells.*first: 4"),
        (Split(np.array([0]), np.array([1]), np.array([2])), "at least 2"),
        (([0, 1], [2], [3]), "not tuple"),
    ):
        with pytest.raises(CountsError, match=words):
            check_split(wrong, 20)


# ---- batches


@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(0, 5))
def test_batches_are_rows(n, size, shuffle, epoch):
    X = poisson(60)
    chosen = np.random.default_rng(n).choice(60, n, replace=False)
    batches = Batches(sparse.csr_matrix(X), chosen, batch_size=size, shuffle=shuffle, seed=3)
    batches.epoch = epoch
    items = [batches[b] for b in range(len(batches))]
    cells = [batches.cells(b) for b in range(len(batches))]
    assert all(
        x.dtype == np.float32 and type(x) is np.ndarray and np.array_equal(x, X[c])
        for x, c in zip(items, cells)
    )
    assert sorted(np.concatenate(cells)) == sorted(chosen) and all(
        len(c) == size for c in cells[:-1]
    )
    assert shuffle or np.array_equal(np.concatenate(cells), chosen)
    if shuffle and size > 1:
        assert n == 1 or len(cells[-1]) > 1
    with pytest.raises(IndexError):
        batches[len(batches)]


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


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(indices=[40]), "0 to 39"),
        (dict(indices=[3, -41]), "1 of 2 indices.*first: -41.*0 to 39"),
        (dict(indices=[0.5]), "positions"),
        (dict(indices=np.ones(3, bool)), "mask"),
        (dict(batch_size=0), "batch_size.*at least 1, not 0"),
        (dict(batch_size=8.0), "batch_size.*not 8.0"),
    ],
)
def test_batches_refuse(wrong, words):
    with pytest.raises(CountsError, match=words):
        Batches(poisson(), **wrong)


class Seen(keras.callbacks.Callback):
    "Sets the epoch of the batches and notes which cells fit asks for."

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.epochs = []
        self.get = batches.cells
        batches.cells = self.note

    def note(self, b):
        if self.epochs:
            self.epochs[-1].update({b: tuple(self.get(b))})
        return self.get(b)

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch
        self.epochs.append({})


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 2])
def test_in_fit(workers, first):
    def new():
        return Batches(poisson(33), batch_size=8, shuffle=True, seed=2, workers=workers)

    batches = new()
    seen = Seen(batches)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((30,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss=None)
    model.compute_loss = lambda x=None, y=None, y_pred=None, *args, **kwargs: keras.ops.mean(
        y_pred**2
    )
    loss = model.fit(
        batches, initial_epoch=first, epochs=4, shuffle=False, verbose=0, callbacks=[seen]
    ).history["loss"]
    assert len(loss) == 4 - first and np.isfinite(loss).all()
    for epoch, cells in zip(range(first, 4), seen.epochs, strict=True):
        fresh = new()
        fresh.epoch = epoch
        assert cells == {b: tuple(fresh.cells(b)) for b in range(4)}
