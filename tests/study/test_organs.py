"The study that comes with the package, files, and labels."

import hashlib
import re
from importlib import resources

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from vampsc import organs
from vampsc.organs import OrganError

DATA = resources.files("vampsc") / "data"


@pytest.fixture(scope="module")
def pancreas():
    return organs.load("pancreas")


def test_pancreas(pancreas):
    assert (
        pancreas.shape == (1937, 20_125)
        and pancreas.X.format == "csr"
        and pancreas.X.dtype == np.float32
    )
    assert pancreas.obs["cell_type"].nunique() == 14 and not pancreas.obs["cell_type"].isna().any()
    assert pancreas.X.data.min() >= 1 and (pancreas.X.data == np.round(pancreas.X.data)).all()
    assert pancreas.obs_names.is_unique and pancreas.var_names.is_unique


def test_pancreas_is_the_published_one(pancreas, shared_data):
    reference = ad.read_h5ad(shared_data / "pancreas_baron_human1.h5ad")
    assert (sparse.csr_matrix(reference.X) != pancreas.X).nnz == 0
    assert list(reference.obs_names) == list(pancreas.obs_names) and list(
        reference.var_names
    ) == list(pancreas.var_names)
    assert list(reference.obs["cell_type"].astype(str)) == list(
        pancreas.obs["cell_type"].astype(str)
    )


@pytest.mark.parametrize("name", ["pancreas", "Pancreas", "baron-2016-human1"])
def test_names(name, pancreas):
    assert (organs.load(name).X != pancreas.X).nnz == 0


def test_table():
    table = organs.table()
    assert list(table) == [
        "organ",
        "study",
        "cells",
        "labels",
        "access",
        "licence",
        "in_paper",
        "here",
        "reference",
    ]
    embedded = table[table["access"] == "embedded"]
    assert list(embedded["study"]) == ["baron-2016-human1"] and embedded["here"].all()
    assert organs.load("pancreas").n_obs == embedded["cells"].iloc[0]


def test_sources():
    path = DATA / "SOURCES.md"
    if not path.is_file():
        pytest.skip("no SOURCES.md beside the data")
    stated = dict(
        re.findall(r"^\| `([\w.]+)` \|.*`([0-9a-f]{64})`", path.read_text(encoding="utf-8"), re.M)
    )
    assert set(stated) == {p.name for p in DATA.iterdir() if p.name.endswith((".h5ad", ".gz"))}
    for name, digest in stated.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest


# ---- files


def small(X=None, **obs):
    X = np.array([[1, 0, 3], [0, 2, 0]]) if X is None else X
    return ad.AnnData(
        X, obs=pd.DataFrame(obs, index=["a", "b"]), var=pd.DataFrame(index=list("xyz"))
    )


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("dtype", ["int64", "float64", "uint16"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_own_file(form, dtype, kind, tmp_path):
    X = small().X
    small(form(X.astype(dtype)), batch=["p", "q"]).write_h5ad(tmp_path / "own.h5ad")
    data = organs.load(kind(tmp_path / "own.h5ad"))
    assert (
        data.X.format == "csr"
        and data.X.dtype == np.float32
        and np.array_equal(data.X.toarray(), X)
    )
    assert list(data.obs["batch"]) == ["p", "q"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("pancras", "unknown organ or study 'pancras' .did you mean pancreas"),
        ("lung", "unknown.*'lung'"),
        ("", "no file"),
        ("liver:some", "after the organ comes paper or all, not 'some'"),
        ("pancreas+lung", "unknown.*'lung'"),
        ("{}/missing.h5ad", "no file '.*missing.h5ad'"),
        ("{}/counts.csv", "counts.csv' is not an .h5ad file.*scanpy"),
        ("{}/text.h5ad", "text.h5ad' cannot be read"),
        ("{}/hdf5.h5ad", "hdf5.h5ad'"),
        ("{}/nothing.h5ad", "0 cells x 3 genes"),
        ("{}", "no file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Element")
def test_refused(name, words, tmp_path):
    (tmp_path / "counts.csv").write_text("a,b\n1,2\n")
    (tmp_path / "text.h5ad").write_text("no hdf5")
    with h5py.File(tmp_path / "hdf5.h5ad", "w") as f:
        f["matrix/data"] = np.arange(3)
    small()[:0].copy().write_h5ad(tmp_path / "nothing.h5ad")
    with pytest.raises(OrganError, match=words) as error:
        organs.load(name.format(tmp_path))
    assert "\n" not in str(error.value)


def test_file_without_X(tmp_path):
    data = small()
    data.layers["counts"], data.X = data.X.copy(), None
    data.write_h5ad(tmp_path / "layer.h5ad")
    with pytest.raises(OrganError, match="counts"):
        organs.load(tmp_path / "layer.h5ad")


# ---- labels


def test_labels(pancreas):
    types = organs.labels(pancreas)
    assert (
        len(types) == 1937
        and len(types.categories) == 14
        and list(types) == list(pancreas.obs["cell_type"])
    )
    beta = organs.labels(pancreas[pancreas.obs["cell_type"] == "beta"])
    assert list(beta.categories) == ["beta"]
    assert organs.labels(small(kind=["t", np.nan]), "kind").codes.tolist() == [0, -1]
    assert list(
        organs.labels(small(kind=pd.Categorical(["t", "b"], ["u", "t", "b"])), "kind").categories
    ) == ["t", "b"]
    assert organs.labels(small(kind=[2, 1]), "kind").categories.tolist() == [1, 2]


@pytest.mark.parametrize("key", ["CellType", "celltype", "cell types", "Cell_Type", "cell.type"])
def test_label_key_missing(key):
    with pytest.raises(
        OrganError,
        match=rf"no column '{key}'.*it has: batch, cell_type. Did you mean 'cell_type'\?",
    ):
        organs.labels(small(batch=[1, 2], cell_type=["t", "b"]), key)


def test_label_key_without_guess():
    with pytest.raises(OrganError, match="it has: none. For cells without labels: label_key=None"):
        organs.labels(small())
    with pytest.raises(OrganError) as error:
        organs.labels(small(batch=[1, 2]), "annotation")
    assert "batch" in str(error.value) and "Did you mean" not in str(error.value)
    numbered = small(kind=["t", "b"])
    numbered.obs[3] = 1
    with pytest.raises(
        OrganError, match="no column 'annotation' in adata.obs; it has: kind, 3. For cells"
    ):
        organs.labels(numbered, "annotation")


def test_blank_labels_are_missing():
    kinds = organs.labels(
        ad.AnnData(
            np.eye(5),
            obs=pd.DataFrame(
                {"kind": pd.Categorical(["t", "", " \t", None, "b "], ["t", "", " \t", "b "])},
                index=list("abcde"),
            ),
        ),
        "kind",
    )
    # names are left as they are
    assert kinds.isna().tolist() == [False, True, True, True, False] and list(kinds.categories) == [
        "t",
        "b ",
    ]


@pytest.mark.parametrize(
    "values, categories",
    [
        ([True, False], [False, True]),
        ([1.5, np.nan], [1.5]),
        ([1, "a"], [1, "a"]),
        (pd.array(["t", pd.NA], "string"), ["t"]),
    ],
)
def test_labels_of_any_type(values, categories):
    assert list(organs.labels(small(kind=values), "kind").categories) == categories


@pytest.mark.parametrize(
    "values, words",
    [
        ([np.nan, np.nan], "column 'kind' of adata.obs: none of 2 cells has a label"),
        (["", " "], "none of 2 cells"),
        ([["t"], ["b"]], "holds no labels but lists"),
    ],
)
def test_labels_refused(values, words):
    with pytest.raises(OrganError, match=words):
        organs.labels(small(kind=values), "kind")


def test_two_columns_of_one_name():
    data = small(kind=["t", "b"], other=[1, 2])
    data.obs.columns = ["kind", "kind"]
    with pytest.raises(OrganError, match="2 columns of adata.obs are called 'kind'"):
        organs.labels(data, "kind")


@pytest.mark.filterwarnings("error::UserWarning")
def test_repeated_cell_names_are_left_to_the_model(tmp_path):
    data = small()
    data.obs_names = ["a", "b"]
    data.obs.index = pd.Index(["a", "a"])
    data.write_h5ad(tmp_path / "twice.h5ad")
    assert list(organs.load(tmp_path / "twice.h5ad").obs_names) == ["a", "a"]
