"""The readers, each on files in the layout of its studies, and the registry that says which study
takes which.
"""

import gzip
import importlib.util
import inspect
import tarfile
import tomllib
import tracemalloc
import warnings
import zipfile
from importlib import resources

import h5py
import layouts
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from vampsc import readers
from vampsc.readers import (
    FORMULAS,
    READERS,
    ReaderError,
    read_labels,
    read_table,
    recover_counts,
    rounded_counts,
)

REGISTRY = tomllib.loads(
    (resources.files("vampsc") / "data" / "organs.toml").read_text(encoding="utf-8")
)["study"]
SOURCES = {
    (study["name"], source["name"]): source for study in REGISTRY for source in study["source"]
}
HAS_RDATA = importlib.util.find_spec("rdata") is not None
needs_rdata = pytest.mark.skipif(not HAS_RDATA, reason="needs the optional package rdata")
EACH = [
    pytest.param(*key, marks=needs_rdata if source["reader"] == "seurat" else ())
    for key, source in SOURCES.items()
]


def read(study, source, files):
    return READERS[SOURCES[study, source]["reader"]](
        files, **SOURCES[study, source].get("settings", {})
    )


def same(adata, truth):
    "Is this exactly what the files hold?"
    assert adata.X.format == "csr" and adata.X.dtype == np.float32 and adata.X.has_canonical_format
    assert list(adata.obs_names) == list(truth.counts.index) and list(adata.var_names) == list(
        truth.counts.columns
    )
    assert np.array_equal(adata.X.toarray(), truth.counts.to_numpy().astype("float32"))
    assert ("ensembl" in adata.var) == (truth.ensembl is not None)
    if truth.ensembl:
        assert list(adata.var["ensembl"]) == truth.ensembl
    assert adata.uns["counts"].startswith(truth.said)
    for name, values in truth.obs.items():
        assert list(adata.obs[name].astype(str)) == values
    return True


# ---- each layout is read as what was written


@pytest.mark.parametrize("study, source", EACH)
def test_each_source(study, source, tmp_path):
    files, truth = layouts.write(study, source, tmp_path)
    adata = read(study, source, files)
    entry = SOURCES[study, source]
    assert same(adata, truth) and (truth.cell_type is None) == (entry["cell_type"] == "")
    for column, values in ((entry["cell_type"], truth.cell_type), (entry["donor"], truth.donor)):
        if column:
            assert list(adata.obs[column].astype(str)) == list(values)


@pytest.mark.parametrize("study, source", EACH)
def test_names_are_those_of_the_registry(study, source, tmp_path):
    files, _ = layouts.write(study, source, tmp_path)
    entry = SOURCES[study, source]
    if "files" in entry:
        assert {role: path.name for role, path in files.items()} == {
            role: f["name"] for role, f in entry["files"].items()
        }
    assert set(tmp_path.iterdir()) == set(files.values())


@pytest.mark.parametrize("variant", ["A", "B", "C"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("study", ["Madissoon2020_oesophagus", "Madissoon2020_spleen"])
def test_integrality_decides(study, variant, dense, tmp_path):
    files, truth = layouts.write(study, "tissue-stability", tmp_path, variant=variant, dense=dense)
    assert same(read(study, "tissue-stability", files), truth)


@pytest.mark.parametrize("study", [s for s, source in SOURCES if source == "cellxgene"])
def test_cellxgene_without_raw(study, tmp_path):
    files, truth = layouts.write(study, "cellxgene", tmp_path, variant="B")
    assert same(read(study, "cellxgene", files), truth)


def test_raw_lacks_the_names(tmp_path):
    """Columns of var that raw does not have are taken from var; a gene that is only in raw keeps
    its identifier.
    """
    files, truth = layouts.write("Smillie2019", "cellxgene", tmp_path)
    (path,) = files.values()
    with h5py.File(path, "a") as file:
        del file["raw/var/feature_name"]
        file["raw/var"].attrs["column-order"] = [
            c for c in file["raw/var"].attrs["column-order"] if c != "feature_name"
        ]
    names = [*truth.counts.columns[:-4], *truth.ensembl[-4:]]
    assert list(read("Smillie2019", "cellxgene", files).var_names) == names


def test_the_older_raw(tmp_path):
    "AnnData 0.6 kept raw under raw.X and raw.var."
    files, truth = layouts.write("Madissoon2020_spleen", "tissue-stability", tmp_path)
    with h5py.File(files["counts"], "a") as file:
        for key in ("X", "var"):
            file.copy(file[key], f"raw.{key}")
        file["raw.X/data"][:] = sparse.csr_matrix(truth.counts.to_numpy()).data
    adata = read("Madissoon2020_spleen", "tissue-stability", files)
    assert adata.uns["counts"] == "as published" and np.array_equal(adata.X.toarray(), truth.counts)


def test_one_category_and_no_label(tmp_path):
    "A category may be a scalar in an old file, and a code -1 is a missing label."
    files, truth = layouts.write("Madissoon2020_spleen", "tissue-stability", tmp_path)
    with h5py.File(files["counts"], "a") as file:
        rows = file["obs"][:]
        rows["Celltypes"], rows["patient"][3] = 0, -1
        file["obs"][...] = rows
        del file["uns/Celltypes_categories"]
        file["uns/Celltypes_categories"] = b"only"
    obs = read("Madissoon2020_spleen", "tissue-stability", files).obs
    assert set(obs["Celltypes"]) == {"only"} and obs["patient"].isna().tolist() == [
        k == 3 for k in range(len(truth))
    ]


def test_features_that_are_no_genes(tmp_path):
    files, truth = layouts.write("10x2019_pbmc10k", "10x", tmp_path)
    with h5py.File(files["counts"], "a") as file:
        file["matrix/features/feature_type"][...] = [b"Gene Expression"] * 28 + [b"Antibody"] * 2
    adata = readers.tenx_h5(files)
    assert adata.shape == (36, 28) and np.array_equal(
        adata.X.toarray(), truth.counts.to_numpy()[:, :28]
    )


@pytest.mark.parametrize("block", [1, 7, 512])
def test_loom_in_blocks(block, tmp_path):
    files, truth = layouts.write("ICA2018_bonemarrow", "hca-dcp1", tmp_path)
    settings = SOURCES["ICA2018_bonemarrow", "hca-dcp1"]["settings"]
    assert same(readers.loom(files, **settings, block=block), truth)
    assert len(readers.loom(files)) == 36 and readers.loom(files, min_counts=100).n_obs < 36


def test_kinchen_without_minimum(tmp_path):
    files, truth = layouts.write("Kinchen2018", "hca-dcp1", tmp_path)
    more = set(readers.kinchen(files, min_counts=1).obs_names) - set(truth.counts.index)
    # too small a cell, and an empty droplet
    assert "id3" in more and "id1" not in more


# ---- whole numbers


def published(counts, name, totals=None):
    """Counts as a study would publish them so that the formula of this name undoes it, in single
    precision.
    """
    log, scaled = FORMULAS[name]
    X = counts.astype("float32")
    totals = X.sum(1) if totals is None else totals
    if scaled:
        X = (X / totals.astype("float32")[:, None] * np.float32(1e4)).astype("float32")
    return sparse.csr_matrix(np.log1p(X) if log else X), totals


def counts_of(seed, n=40, g=60, scale=1.0):
    rng = np.random.default_rng(seed)
    X = rng.negative_binomial(0.7, 0.7 / (0.7 + scale * rng.lognormal(0, 1, g)), (n, g))
    return X + (np.arange(g) == np.arange(n)[:, None] % g)  # no cell is empty


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("scale", [1, 30, 3000])
def test_each_formula(name, scale):
    for seed in range(5):
        counts = counts_of(seed, scale=scale)
        X, totals = published(counts, name)
        found, formula = recover_counts(X, totals)
        assert formula == name and np.array_equal(found.toarray(), counts)


@pytest.mark.parametrize("name", ["exp(X) - 1", "(exp(X) - 1) n / 10000"])
def test_large_counts(name):
    "Reads of Smart-seq2: exact up to 300,000, and off by one at most up to a million."
    counts = counts_of(0, scale=50)
    counts[:, 7] = np.geomspace(1e3, 1e6, len(counts)).astype(int)
    X, totals = published(counts, name)
    found, formula = recover_counts(X, totals)
    away = np.abs(found.toarray().astype(int) - counts)
    assert formula == name and not away[counts < 300_000].any() and away.max() <= 1


def test_totals_of_more_genes():
    counts = counts_of(3)
    totals = counts.sum(1) + np.random.default_rng(0).integers(0, 999, len(counts))
    X, _ = published(counts, "(exp(X) - 1) n / 10000", totals)
    assert np.array_equal(recover_counts(X, totals)[0].toarray(), counts)
    with pytest.raises(ReaderError, match=r"no counts.*X makes 0.0% whole"):
        recover_counts(X, counts.sum(1))


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from([*FORMULAS]),
    n=st.integers(3, 30),
    g=st.integers(8, 40),
    scale=st.floats(0.3, 300),
)
def test_any_counts(seed, name, n, g, scale):
    counts = counts_of(seed, n, g, scale)
    totals = counts.sum(1) + np.random.default_rng(seed).integers(0, 50, n)
    X, _ = published(counts, name, totals)
    if np.count_nonzero(counts) < 10:
        return  # too few to tell by
    found, _ = recover_counts(X, totals)
    assert np.array_equal(found.toarray(), counts)


KINDS = {
    "uniform": lambda rng, X: rng.uniform(0, 8, X.shape),
    "exponential": lambda rng, X: rng.exponential(1.0, X.shape),
    "other totals": lambda rng, X: np.log1p(1e4 * X / rng.uniform(5e3, 5e4, (len(X), 1))),
    "log2": lambda rng, X: np.log2(1 + X),
    "scaled": lambda rng, X: (X - X.mean(0)) / (X.std(0) + 0.1),
    "median": lambda rng, X: X / X.sum(1, keepdims=True) * 1713.5,
    "tiny": lambda rng, X: X / X.sum(1, keepdims=True) * 1e-3,
    "TPM": lambda rng, X: X * rng.lognormal(0, 1, X.shape[1]) * 1e3,
    "corrected": lambda rng, X: np.where(X, X + 0.3, 0),
    "huge": lambda rng, X: X * rng.uniform(1e5, 1e6, X.shape),
    "negative": lambda rng, X: -1.0 * X,
    "missing": lambda rng, X: np.where(rng.random(X.shape) < 0.1, np.nan, X),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_totals", [False, True])
def test_nothing_else_is_taken_for_counts(kind, with_totals):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X = KINDS[kind](rng, counts_of(seed).astype(float)).astype("float32")
        totals = rng.integers(1000, 30_000, len(X)) if with_totals else None
        with pytest.raises(ReaderError, match="no counts"):
            recover_counts(sparse.csr_matrix(X), totals)


@given(
    st.lists(st.floats(0.03125, 9, width=32), min_size=12, max_size=40), st.integers(500, 50_000)
)
def test_chance_gives_no_whole_numbers(values, total):
    values = [
        v
        for v in values
        if abs(np.expm1(v) - round(np.expm1(v))) > 0.011 and abs(v - round(v)) > 0.011
    ]
    if len(values) < 10 or total % 10_000 == 0:
        return
    away = [abs(f * total / 1e4 - round(f * total / 1e4)) for v in values for f in (v, np.expm1(v))]
    if min(away) < 0.05:
        return
    with pytest.raises(ReaderError):
        recover_counts(np.array([values]), [total])


def test_the_smallest_whole_numbers_are_taken():
    counts = counts_of(1)
    for total in (5000, 10_000, 20_000):
        totals = np.full(len(counts), total)
        for name in FORMULAS:
            X, _ = published(counts, name, totals)
            assert np.array_equal(recover_counts(X, totals)[0].toarray(), counts), (total, name)


def test_forms_of_the_matrix():
    counts = counts_of(2)
    for X in (
        counts,
        counts.astype("uint16"),
        sparse.csc_matrix(counts),
        sparse.csr_matrix(counts.astype("float64")),
        sparse.csr_array(counts),
    ):
        found, formula = recover_counts(X)
        assert formula == "X" and found.format == "csr" and found.dtype == np.float32
        assert np.array_equal(found.toarray(), counts)
    X = sparse.csr_matrix(counts.astype("float32"))
    assert recover_counts(X)[0].data is X.data or np.shares_memory(
        recover_counts(X)[0].data, X.data
    )
    X.data[3] = 0
    before = X.copy()
    assert recover_counts(X)[0].nnz == X.nnz - 1 and X.nnz == before.nnz
    assert recover_counts(sparse.csr_matrix((4, 5)))[1] == "X" and recover_counts(np.zeros((0, 5)))[
        0
    ].shape == (0, 5)


def test_one_bad_value_is_enough():
    "Numbers of a file that are counts are all whole; of recovered ones a thousandth may be off."
    X = sparse.csr_matrix(counts_of(0).astype("float32"))
    X.data[5] += 0.5
    with pytest.raises(ReaderError):
        recover_counts(X)
    logged, totals = published(counts_of(0, 200), "(exp(X) - 1) n / 10000")
    logged.data[5] += 0.1
    assert recover_counts(logged, totals)[1] == "(exp(X) - 1) n / 10000"
    logged.data[::300] += 0.1
    with pytest.raises(ReaderError):
        recover_counts(logged, totals)


def test_too_few_to_tell_by():
    few = np.log1p([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    with pytest.raises(ReaderError, match="9 values are too few to tell by"):
        recover_counts(few)
    assert recover_counts(np.vstack([few, np.log1p([[1, 0, 0]])]))[1] == "exp(X) - 1"
    assert recover_counts([[1.0, 2]])[1] == "X"


def test_blocks(monkeypatch):
    counts = counts_of(4)
    counts[[0, 5, 6]] = 0
    X, totals = published(counts, "(exp(X) - 1) n / 10000", counts.sum(1) + 1)
    pieces = readers._value_blocks
    for size in (1, 17, 1000):
        monkeypatch.setattr(
            readers, "_value_blocks", lambda X, totals, size=size: pieces(X, totals, size)
        )
        assert np.array_equal(recover_counts(X, totals)[0].toarray(), counts)


@pytest.mark.parametrize("labels", [256, 4096])
def test_rounded(labels):
    counts = np.minimum(counts_of(0, scale=0.6), 30)
    X = sparse.csr_matrix(-labels * np.log1p(-counts / labels))
    found, share = rounded_counts(X)
    assert np.array_equal(found.toarray(), np.rint(X.toarray())) and share > 0.9
    with pytest.raises(ReaderError, match="nearly whole"):
        rounded_counts(X.log1p())
    X.data[::6] += 0.3
    with pytest.raises(ReaderError, match="below 3.5, only 8[0-9]"):
        rounded_counts(X)


def test_counts_are_preferred_to_what_is_normalised(tmp_path):
    "Where raw holds no counts but X does, they are found even if normalised values would do."
    files, truth = layouts.write("Popescu2019", "authors", tmp_path)
    with h5py.File(files["counts"], "a") as file:
        for key in ("X", "var"):
            file.copy(file[key], f"raw/{key}")
        file["raw/X/data"][:] = np.log1p(0.37 * file["X/data"][:])
    adata = READERS["h5ad"](files, normalised=True)
    assert adata.uns["counts"] == "as published" and np.array_equal(adata.X.toarray(), truth.counts)


def test_normalised_is_said(tmp_path):
    files, _ = layouts.write("Stewart2019", "cellgeni", tmp_path)
    with pytest.raises(ReaderError, match="Mature_Full_v2.1.h5ad: these are no counts"):
        READERS["h5ad"](files, ensembl="ID")


def test_the_normalised_liver_is_refused(tmp_path):
    files, _ = layouts.write("MacParland2018", "authors", tmp_path, values="normalised")
    with pytest.raises(
        ReaderError,
        match="GSE115469_Data.csv.gz: these are no counts, and no formula.*another source",
    ):
        read("MacParland2018", "authors", files)


# ---- text


def text(tmp_path, content, name="t.txt"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


@pytest.mark.parametrize(
    "header",
    [
        "a\tb\tc",
        "gene\ta\tb\tc",
        '"a"\t"b"\t"c"',
        '""\t"a"\t"b"\t"c"',
        "\ufeffgene\ta\tb\tc",
        "\ufeffa\tb\tc",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_headers(header, end, last, tmp_path):
    rows = [header, "g1\t0\t1\t20", '"g,2"\t1e+05\t0\t3.0', "g3\t0\t0\t0"]
    X, cells, genes = read_table(text(tmp_path, end.join(rows) + end * last))
    assert cells == ["a", "b", "c"] and genes == ["g1", "g,2", "g3"] and X.format == "csr"
    assert X.toarray().tolist() == [[0, 1e5, 0], [1, 0, 0], [20, 3, 0]]


@pytest.mark.parametrize(
    "row, words",
    [
        ("g\t1\t2", " .g.: 2 numbers instead of 3"),
        ("g\t1\t2\t3\t4", " .g.: 4 numbers instead of 3"),
        ("g\t1\t\t3", "empty field .number 2 "),
        ("g\t1\t2\t", "empty field .number 3 "),
        ("g", "1 numbers instead of 3"),
        ("g\t1\tx\t3", " .g.: 'x' is no number .number 2 of the row"),
        ("g\t1\t-2\t3", "'-2' is no count"),
        ("g\t1\tinf\t3", "'inf' is no count"),
        ("g\t1\t1_0\t3", "'1_0' is no number"),
        ("g\t1,5\t2\t3", "'1,5' is no number"),
    ],
)
def test_bad_rows(row, words, tmp_path):
    with pytest.raises(ReaderError, match=f"^bad.txt, line 3.*{words}"):
        read_table(text(tmp_path, f"a\tb\tc\nf\t0\t0\t1\n{row}\nh\t1\t1\t1\n", "bad.txt"))


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty"),
        ("a\tb\n", "no rows"),
        ("a\tb\tc\td\ng\t1\t2\n", "line 2: 2 numbers below a header of 4"),
        ("  <!doctype HTML>\n", "web page"),
        (b"\x1f\x8b\x08\0\0", "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
        ("x\n\n", "no rows"),
    ],
)
def test_no_table(content, words, tmp_path):
    for reader in (read_table, read_labels):
        with pytest.raises(ReaderError, match=f"^t.txt.*({words}|fields below|no rows)"):
            reader(text(tmp_path, content))


def test_no_gene_in_common(tmp_path):
    files = {"a": text(tmp_path, "x\ng1\t1\n", "a.txt"), "b": text(tmp_path, "x\ng2\t1\n", "b.txt")}
    with pytest.raises(ReaderError, match="a and b have no gene in common"):
        READERS["tables"](files)
    text(tmp_path, "x\ty\ng2\t1\t4\ng1\t0\t3\ng1\t5\t6\n", "b.txt")
    text(tmp_path, "x\ng1\t1\ng0\t7\ng1\t2\n", "a.txt")
    both = READERS["tables"](files)
    assert list(both.obs_names) == ["a_x", "b_x", "b_y"] and list(both.var_names) == ["g1", "g1"]
    assert both.X.toarray().tolist() == [[1, 2], [0, 5], [3, 6]]


def test_joined_by_symbol_if_one_has_no_identifiers(tmp_path):
    files, _ = layouts.write("James2020", "covid19-atlas", tmp_path)
    other, _ = layouts.write("Popescu2019", "authors", tmp_path)
    parts = {
        "a": READERS["h5ad"](files, totals="n_counts", ensembl="gene_ids"),
        "b": READERS["h5ad"](other),
    }
    both = readers._joined(parts)
    assert both.shape == (72, 30) and "ensembl" not in both.var
    assert both.uns["counts"] == "from (exp(X) - 1) n / 10000; as published"


def test_missing_values(tmp_path):
    with pytest.warns(UserWarning, match="t.txt: 3 missing values taken as 0"):
        X, _, _ = read_table(text(tmp_path, "a\tb\tc\nf\tNA\tNaN\t1\ng\t2\tnan\t0\n"))
    assert X.toarray().tolist() == [[0, 2], [0, 0], [1, 0]]


FIELDS = st.one_of(
    st.integers(0, 10**9), st.sampled_from([0, 0, 0, 0.5, 1e-3, 123.25, 1e15, 4 * 10**17])
)


@given(
    rows=st.lists(st.lists(FIELDS, min_size=4, max_size=4), min_size=1, max_size=8),
    sep=st.sampled_from("\t, "),
)
def test_any_table(tmp_path_factory, rows, sep):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    pd.DataFrame(rows, [f"g{k}" for k in range(len(rows))], list("abcd"), dtype=object).to_csv(
        path, sep=sep
    )
    X, cells, genes = read_table(path, sep)
    assert cells == list("abcd") and np.array_equal(
        X.toarray().T, np.array(rows, "float64").astype("float32")
    )


@pytest.mark.parametrize("wrap", ["plain", "gzip", "zip", "members"])
def test_wrapped(wrap, tmp_path):
    content = b"a\tb\ng1\t0\t7\n"
    path = tmp_path / "t.tsv"
    if wrap == "plain":
        path.write_bytes(content)
    elif wrap == "gzip":
        path.write_bytes(gzip.compress(content[:7]) + gzip.compress(content[7:]))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/._t", "x")
            for name in ["one/t.txt", "two.txt"][: 1 + (wrap == "members")]:
                archive.writestr(name, content)
    if wrap == "members":
        with pytest.raises(
            ReaderError, match=r"t.tsv holds 2 files instead of one \(one/t.txt, two.txt\)"
        ):
            read_table(path)
    else:
        assert read_table(path)[0].toarray().tolist() == [[0], [7]] and read_labels(path).shape == (
            1,
            2,
        )


def test_text_is_read_in_little_memory(tmp_path):
    "A table of 11 MB, packed: the reader needs a few lines of it and what comes out."
    rng = np.random.default_rng(0)
    wide = 20_000
    rows = 280
    lines = [
        b"g%d\t%s\n" % (g, b"\t".join(b"%d" % v for v in rng.poisson(0.02, wide)))
        for g in range(rows)
    ]
    path = text(
        tmp_path,
        gzip.compress(b"\t".join(b"c%d" % c for c in range(wide)) + b"\n" + b"".join(lines), 1),
    )
    tracemalloc.start()
    X, _, _ = read_table(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = X.data.nbytes + X.indices.nbytes + X.indptr.nbytes
    assert (
        X.shape == (wide, rows)
        and sum(map(len, lines)) > 11e6
        and peak < 4 * size + 60 * len(lines[0])
    )


@pytest.mark.parametrize(
    "content, words",
    [
        ("a\tb\nx\t1\ny\n", "line 3: 1 fields instead of 2"),
        ("a\tb\nx\t1\n\ny\t2\t3\n", "line 4: 3 fields instead of 2"),
        ("a\tb\tc\nx\t1\n", "line 2: 2 fields below a header of 3"),
        ("a\tb\n", "no rows"),
    ],
)
def test_bad_labels(content, words, tmp_path):
    with pytest.raises(ReaderError, match=f"^t.txt.*{words}"):
        read_labels(text(tmp_path, content))


def test_labels(tmp_path):
    path = text(tmp_path, 'cell,"kind, of","kind, of",n#\nc1,"T, CD4",x,01\nc2,NA,y,2 \n')
    told = read_labels(path, ",")
    assert list(told.columns) == ["kind, of", "n#"]
    assert told.loc["c1"].tolist() == ["T, CD4", "01"] and told.loc["c2"].tolist() == ["NA", "2 "]
    assert list(read_labels(path, ",", "n#").index) == ["01", "2 "]
    assert list(read_labels(path, ",", None).columns) == ["cell", "kind, of", "n#"]
    with pytest.raises(ReaderError, match="t.txt has no column 'Cell'; it has: cell, kind, of, n#"):
        read_labels(path, ",", "Cell")
    assert readers.labels_of(path, ["c2", "c9", "c2"], ",")["n#"].isna().tolist() == [
        False,
        True,
        False,
    ]
    text(tmp_path, "cell\tkind\nc1\tfirst\nc1\tagain\n")
    assert readers.labels_of(path, ["c1"])["kind"].tolist() == ["first"]
    with pytest.raises(
        ReaderError, match="t.txt knows none of the cells: they are called 'x1', its rows 'c1'"
    ):
        readers.labels_of(path, ["x1"])


# ---- wrong files

PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>\tPlease sign"
    b" in\t</body></html>\n"
)


def broken(path, how):
    "Spoil a file as downloads are spoiled."
    data = path.read_bytes()
    if how == "page":
        path.write_bytes(PAGE)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "other":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
    else:
        cut = len(data.rstrip(b"\0")) * 3 // 5
        # in the middle of a row
        if path.suffix == ".txt":
            cut = data.index(b"\t", data.rindex(b"\n", 0, cut)) + 1
        path.write_bytes(data[:cut])


@pytest.mark.parametrize("how", ["page", "empty", "gone", "other", "cut"])
@pytest.mark.parametrize("study, source", EACH)
def test_broken_files(study, source, how, tmp_path):
    "Whichever file of a study is broken, the message is one line with its name."
    for role in SOURCES[study, source].get("files", {"first": 0}):
        files, _ = layouts.write(study, source, tmp_path)
        path = files.get(role) or next(iter(files.values()))
        broken(path, how)
        with pytest.raises(ReaderError) as said, warnings.catch_warnings():
            # a library may have others about itself
            warnings.simplefilter("error", UserWarning)
            read(study, source, files)
        message = str(said.value)
        assert path.name in message and "\n" not in message and len(message) < 400, message
        words = {"page": "web page", "empty": "is empty", "gone": "no file"}.get(how)
        assert words is None or words in message, message


def test_other_layouts(tmp_path):
    "A file of one format given to the reader of another."
    h5, _ = layouts.write("10x2019_pbmc10k", "10x", tmp_path)
    loom, _ = layouts.write("ICA2018_cordblood", "hca-dcp1", tmp_path)
    h5ad, _ = layouts.write("Popescu2019", "authors", tmp_path)
    tar, _ = layouts.write("Liao2020", "geo", tmp_path)
    for reader, files, words in [
        ("h5ad", h5, "is no .h5ad file: it holds matrix"),
        ("h5ad", loom, "is no .h5ad file"),
        ("tenx_h5", loom, "no file of Cell Ranger 3"),
        ("tenx_h5", h5ad, "no file of Cell Ranger 3.*it holds X"),
        ("loom", h5, "is no loom file .* it lacks row_attrs/Gene"),
        ("mtx_tar", h5, "pbmc_10k.*damaged"),
        ("table", tar, "GSE131685_RAW.tar"),
        ("loom", tar, "GSE131685_RAW.tar is damaged"),
    ]:
        with pytest.raises(ReaderError, match=words):
            READERS[reader](files)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"totals": "n_count"},
            "smillie19_epi.processed.h5ad has no column 'n_count'; it has: CellType, n_counts",
        ),
        ({"symbols": "name"}, "no column 'name'; it has: none"),
        ({"where": {"organ": "colon"}}, "no column 'organ'"),
        ({"where": {"CellType": "Neuron"}}, "smillie19_epi.processed.h5ad: no cell where"),
        ({}, "these are no counts"),
    ],
)
def test_settings_that_do_not_fit(settings, words, tmp_path):
    files, _ = layouts.write("Smillie2019", "covid19-atlas", tmp_path)
    with pytest.raises(ReaderError, match=words):
        READERS["h5ad"](files, **{"totals": "n_counts", **settings} if settings else {})


def test_settings_of_loom(tmp_path):
    files, _ = layouts.write("ICA2018_cordblood", "hca-dcp1", tmp_path)
    with pytest.raises(ReaderError, match="does not say 'organ' of its cells; it says: .*barcode"):
        READERS["loom"](files, {"organ": "x"})
    with pytest.raises(ReaderError, match="homo_sapiens.loom: no cell where"):
        READERS["loom"](files, {"derived_organ_parts_label": "umbilical"})


def test_kinchen_refuses(tmp_path):
    files, _ = layouts.write("Kinchen2018", "hca-dcp1", tmp_path)
    files["healthy"].write_text("Cell\tCluster\nx\ty\n")
    with pytest.raises(
        ReaderError, match="^hc_meta.*has no column 'Barcode'; it has: Cell, Cluster"
    ):
        READERS["kinchen"](files)
    files["healthy"].write_text("Barcode\tCluster\nACGT-1\ty\n")
    with pytest.raises(ReaderError, match="^hc_meta.*knows none of the .* cells"):
        READERS["kinchen"](files)


def repacked(path, change):
    """A tar with its members changed: change(name, data) gives the new data, or None to leave it
    out.
    """
    with tarfile.open(path) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old]
    with tarfile.open(path, "w") as new:
        for name, data in members:
            if (data := change(name, data)) is not None:
                layouts.add(new, name, data)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda name, data: None if "kidney2_features" in name else data,
            "GSE131685_RAW.tar lacks GSM4145205_kidney2_features.tsv.gz",
        ),
        (
            lambda name, data: data[:-20] if "kidney2_matrix" in name else data,
            "GSE131685_RAW.tar, GSM4145205_kidney2_matrix.mtx.gz: .*fetch it again",
        ),
        (
            lambda name, data: gzip.compress(b"no matrix") if "kidney1_matrix" in name else data,
            "GSM4145204_kidney1_matrix.mtx.gz: ",
        ),
        (
            lambda name, data: gzip.compress(b"AAA-1\n") if "kidney3_barcodes" in name else data,
            "30 genes x 12 cells, but 30 features and 1 barcodes",
        ),
        (lambda name, data: None, "holds no SAMPLE_matrix.mtx.gz but nothing"),
    ],
)
def test_bad_triplets(change, words, tmp_path):
    files, _ = layouts.write("Liao2020", "geo", tmp_path)
    repacked(files["counts"], change)
    with pytest.raises(ReaderError, match=words):
        READERS["mtx_tar"](files)


def edited(old, new):
    return lambda name, data: (
        gzip.compress(gzip.decompress(data).replace(old, new)) if "GSM2171885" in name else data
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            edited(b"total\t", b"total\t1\nmore\t"),
            "no_feature among the genes; its sums are not the last 6 rows",
        ),
        (edited(b"\tcount\n", b"\tcount\nnew\t1\n"), "other genes than"),
        (lambda name, data: None, "holds no files"),
        (
            lambda name, data: data[:-9] if "GSM2171885" in name else data,
            "GSE81547_RAW.tar, GSM2171885_1000000005.A01.csv.gz: ",
        ),
    ],
)
def test_bad_cell_files(change, words, tmp_path):
    files, _ = layouts.write("Enge2017", "geo", tmp_path)
    repacked(files["counts"], change)
    with pytest.raises(ReaderError, match=words):
        READERS["cell_files_tar"](files)


def test_bad_line_of_a_cell_file(tmp_path):
    files, truth = layouts.write("Enge2017", "geo", tmp_path)
    gene = truth.counts.columns[4].encode()
    old = b"\n" + gene + b"\t"
    new = b"\n" + gene + b"\tx"
    repacked(
        files["counts"], lambda name, data: gzip.compress(gzip.decompress(data).replace(old, new))
    )
    with pytest.raises(
        ReaderError, match="^GSE81547_RAW.tar, GSM2171880_1000000000.A01.csv.gz, line 6: not a gene"
    ):
        READERS["cell_files_tar"](files)


def test_bad_series(tmp_path):
    files, _ = layouts.write("Enge2017", "geo", tmp_path)
    layouts.packed(files["labels"], '!Series_title\t"x"\n')
    with pytest.raises(ReaderError, match="GSE81547_series_matrix.txt.gz is no series matrix"):
        READERS["cell_files_tar"](files)
    layouts.packed(files["labels"], '!Sample_title\t"x"\n"ID_REF"\t"GSM1"\t"GSM2"\n')
    with pytest.raises(ReaderError, match="1 values of 'title' for 2 samples"):
        READERS["cell_files_tar"](files)
    layouts.packed(files["labels"], '!Sample_title\t"x"\n"ID_REF"\t"GSM1"\n')
    with pytest.raises(ReaderError, match="knows none of the cells .the first is GSM2171880"):
        READERS["cell_files_tar"](files)


def test_values_of_one_key_in_two_lines(tmp_path):
    rows = [
        '"ID_REF"\t"a"\t"b"',
        '!Sample_characteristics_ch1\t"age: 3"\t"sex: f"',
        '!Sample_characteristics_ch1\t"sex: m"\t"age: 4"',
    ]
    told = readers.series_matrix(text(tmp_path, "\n".join(rows)))
    assert told["age"].tolist() == ["3", "4"] and told["sex"].tolist() == ["m", "f"]


def test_r_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdata", None)
    files, _ = layouts.write("Ramachandran2019", "edinburgh", tmp_path)
    with pytest.raises(ReaderError, match="tissue.rdata is a file of R's.*pip install rdata"):
        READERS["seurat"](files)


def test_objects_are_written_as_by_r():
    "What R 4 itself saves for test_s4 <- new('Person', name = 'Carlos', age = 28)."
    saved = (
        "00000402000000010004000900000007746573745f733400010319000004020000000100040009000000046e616d65000000"
        "100000000100040009000000064361726c6f73000004020000000100040009000000036167650000000e00000001403c0000"
        "0000000000000402000000010004000900000005636c61737300000210000000010004000900000006506572736f6e000004"
        "020000000100040009000000077061636b6167650000001000000001000400090000000a2e476c6f62616c456e76000000fe"
        "000000fe000000fe"
    )
    person = layouts.S4("Person", ".GlobalEnv", {"name": ["Carlos"], "age": np.array([28.0])})
    assert layouts.R().pairs({"test_s4": person}).hex() == saved


@needs_rdata
def test_other_objects_of_r(tmp_path):
    layouts.rdata(tmp_path / "x.rdata", numbers=np.array([1.0]), words=["a"])
    with pytest.raises(
        ReaderError, match="x.rdata holds no Seurat object of version 2 but numbers, words"
    ):
        READERS["seurat"]({"counts": tmp_path / "x.rdata"})


# ---- the registry


def test_studies():
    names = [study["name"] for study in REGISTRY]
    assert len(names) == len(set(names)) == 21
    assert {study["organ"] for study in REGISTRY} == {
        "blood",
        "bone",
        "colon",
        "esophagus",
        "kidney",
        "liver",
        "pancreas",
        "placenta",
        "spleen",
    }
    for study in REGISTRY:
        assert {
            "name",
            "organ",
            "title",
            "reference",
            "doi",
            "tissue",
            "assay",
            "cells",
            "cells_from",
            "labels",
            "licence",
            "in_paper",
            "source",
        } == set(study)
        assert (
            0 <= study["in_paper"] <= 1
            and study["cells"] >= 0
            and study["licence"]
            and study["cells_from"]
        )
        assert (study["labels"] > 0) == any(source["cell_type"] for source in study["source"])
        assert len({source["name"] for source in study["source"]}) == len(study["source"])


@pytest.mark.parametrize("study, source", SOURCES)
def test_sources(study, source):
    entry = SOURCES[study, source]
    known = {
        "name",
        "access",
        "note",
        "reader",
        "settings",
        "files",
        "cellxgene",
        "cell_type",
        "donor",
        "unlabelled",
        "drop",
        "rename",
    }
    assert set(entry) <= known and {"name", "access", "reader", "cell_type", "donor"} <= set(entry)
    assert ("files" in entry) != ("cellxgene" in entry)
    assert entry["access"] in ("open", "authors", "login", "retired") and entry["reader"] in READERS
    assert set(entry.get("settings", {})) <= set(
        list(inspect.signature(READERS[entry["reader"]]).parameters)[1:]
    )
    for file in entry.get("files", {}).values():
        assert set(file) == {"name", "urls"} and all(
            url.startswith(("https://", "http://")) for url in file["urls"]
        )
        assert sorted(file["urls"], key=lambda url: url.startswith("http://")) == file["urls"]
        assert len(set(file["urls"])) == len(file["urls"])
        assert file["urls"] or entry["access"] != "open"
    if "cellxgene" in entry:
        assert (
            set(entry["cellxgene"]) <= {"collection", "datasets", "tissue"}
            and len(entry["cellxgene"]["collection"]) == 36
        )
    assert (study, source) in layouts.WRITERS


def test_a_name_is_one_content():
    "Of a study, files of one name have the same addresses, whatever the order; across studies too."
    seen = {}
    for entry in SOURCES.values():
        for file in entry.get("files", {}).values():
            assert seen.setdefault(file["name"], set(file["urls"])) == set(file["urls"])
