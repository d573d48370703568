"""Files as other writers leave them, in memory and backed: number types, zarr folders, h5ad of any
age; and what `embed` makes of them.
"""

import json
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from vampsc import cli, files, genes, organs
from vampsc.counts import Counts, EmptyCellsError, checked_counts, where_counts_may_be
from vampsc.genes import GeneSpace, native, raw_of
from vampsc.models import VAE, load

zarr = pytest.importorskip("zarr", reason="zarr is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2", "ignore:.*without encoding metadata", "ignore:Consolidated metadata"
)

X = np.random.default_rng(0).poisson(1.0, (60, 30)).astype("float32")
X[:, 0] += 1
NAMES = [f"g{j}" for j in range(30)]
TYPES = {
    "unsigned 64-bit": dict(data="uint64", indices="uint64", indptr="uint64"),
    "big-endian": dict(data=">f4", indices=">i4", indptr=">i8"),
    "half precision": dict(data="float16"),
    "big-endian integers": dict(data=">i2"),
    "as usual": {},
}


def cells(form=sparse.csr_matrix):
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", "b"] * 30)}, index=[f"c{i}" for i in range(60)]
    )
    return ad.AnnData(form(X), obs, pd.DataFrame(index=NAMES))


def full(form=sparse.csr_matrix):
    "Counts in a layer and in raw, half of them in X, and something in all other places."
    adata = cells(form)
    adata.raw = adata.copy()
    adata.layers["counts"] = form(X)
    adata.layers["dense"] = X
    adata.X = form(X / 2)
    adata.obsm["X_pca"] = np.ones((60, 2))
    adata.obsp["near"] = sparse.csr_matrix(np.eye(60))
    adata.varm["loadings"] = np.ones((30, 2))
    adata.uns["note"] = "x"
    return adata


def written(adata, path):
    adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


def retyped(path, types, places=("X", "layers/counts", "raw/X")):
    "The matrices of an .h5ad file in other number types."
    with h5py.File(path, "r+") as file:
        for node in (file[place] for place in places if place in file):
            parts = (
                {part: node[part] for part in types}
                if isinstance(node, h5py.Group)
                else {None: node}
                if "data" in types
                else {}
            )
            for part, old in parts.items():
                group, name = (node, part) if part else (node.parent, node.name.rsplit("/", 1)[1])
                values = old[:]
                attributes = dict(old.attrs)
                del group[name]
                group.create_dataset(name, data=values.astype(types[part or "data"])).attrs.update(
                    attributes
                )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A model that is saved, and its folder; what it has learnt does not matter."
    path = tmp_path_factory.mktemp("model") / "m"
    VAE(cells(), gene_space=None, hidden=(8,), n_latent=2).save(path)
    return path


def embed(*words):
    done = CliRunner().invoke(cli.app, ["embed", *map(str, words)], catch_exceptions=False)
    return done.exit_code, done.output


# ---- number types


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("backed", [False, True])
def test_number_types(kind, form, backed, tmp_path):
    path = retyped(written(full(form), tmp_path / "a.h5ad"), TYPES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for settings, truth in ((dict(layer="counts"), X), (dict(use_raw=True), X)):
            adata = organs.load(path, backed, **settings)
            counts, _ = checked_counts(adata, GeneSpace.of(adata), **settings)
            assert np.array_equal(counts[:].toarray(), truth) and np.array_equal(
                counts.dense(np.array([3, 0, 59])), truth[[3, 0, 59]]
            )
    path = retyped(written(cells(form), tmp_path / "b.h5ad"), TYPES[kind])
    adata = organs.load(path, backed)
    counts, _ = checked_counts(adata, GeneSpace.of(adata))
    assert (
        np.array_equal(counts[:].toarray(), X)
        and counts[:].dtype == np.float32
        and adata.obs["kind"].tolist() == ["a", "b"] * 30
    )
    assert "layer='counts'" in where_counts_may_be(
        organs.load(tmp_path / "a.h5ad", backed, "counts"), "dense"
    )


@pytest.mark.parametrize("kind", ["unsigned 64-bit", "big-endian"])
def test_number_types_in_memory(kind):
    "As anndata itself reads them."
    for form in (sparse.csr_matrix, sparse.csc_matrix):
        matrix = form(X)
        matrix.indices = matrix.indices.astype(TYPES[kind]["indices"])
        matrix.indptr = matrix.indptr.astype(TYPES[kind]["indptr"])
        before = matrix.indices.copy()
        counts = Counts(matrix)
        assert np.array_equal(counts[:10].toarray(), X[:10]) and np.array_equal(
            counts.dense(np.arange(60)), X
        )
        assert matrix.indices.dtype == before.dtype and np.array_equal(matrix.indices, before)
    assert native(np.arange(3)).dtype == np.arange(3).dtype and native(
        np.arange(3, dtype=">f8")
    ).dtype == np.dtype("float64")


def test_number_types_of_a_zarr_folder(tmp_path):
    path = written(full(), tmp_path / "a.zarr")
    group = zarr.open_group(str(path), mode="r+", use_consolidated=False)
    for place in ("layers/counts", "raw/X"):
        values = group[place]["data"][:].astype("float16")
        del group[place]["data"]
        (
            group[place].create_array("data", data=values)
            if hasattr(group, "create_array")
            else group[place].create_dataset("data", data=values)
        )
    zarr.consolidate_metadata(str(path))
    for backed in (False, True):
        for settings in (dict(layer="counts"), dict(use_raw=True)):
            adata = organs.load(path, backed, **settings)
            assert np.array_equal(
                checked_counts(adata, GeneSpace.of(adata), **settings)[0][:].toarray(), X
            )


@pytest.mark.parametrize("kind", ["big-endian", "half precision"])
def test_embed_of_number_types(kind, model, tmp_path):
    path = retyped(written(cells(), tmp_path / "a.h5ad"), TYPES[kind])
    truth = load(model).get_latent_representation(cells())
    for flags in ((), ("--backed",)):
        assert embed(model, path, "--out", tmp_path / f"{len(flags)}.npy", *flags)[0] == 0
        assert np.allclose(np.load(tmp_path / f"{len(flags)}.npy"), truth, atol=1e-5)


# ---- zarr folders that stay where they are


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_a_backed_zarr_folder_has_all_that_is_in_it(form, tmp_path):
    path = written(full(form), tmp_path / "a.zarr")
    there = organs.load(path, True, "counts")
    here = organs.load(path, False, "counts")
    for part in ("obsm", "obsp", "varm", "uns", "layers"):
        assert set(getattr(there, part)) == set(getattr(here, part))
    assert (
        there.obs.equals(here.obs)
        and there.var.equals(here.var)
        and list(there.raw.var_names) == NAMES
    )
    for adata in (there, here):
        space = GeneSpace.of(adata)
        for settings in (dict(layer="counts"), dict(layer="dense"), dict(use_raw=True)):
            assert np.array_equal(checked_counts(adata, space, **settings)[0][:].toarray(), X)
            assert np.array_equal(
                checked_counts(adata[[7, 3]], space, **settings)[0][:].toarray(), X[[7, 3]]
            )
    if form is not sparse.csc_matrix:
        assert (
            "file" in Counts(there.layers["counts"]).source.place
            and "file" in Counts(raw_of(there).X).source.place
        )
    assert "layer='counts'" in where_counts_may_be(
        there
    ) and "adata.raw (use_raw=True)" in where_counts_may_be(there)


def test_a_backed_zarr_folder_without_X(tmp_path):
    adata = full()
    adata.X = None
    path = written(adata, tmp_path / "a.zarr")
    there = organs.load(path, True, "counts")
    assert there.X is None and np.array_equal(
        checked_counts(there, GeneSpace.of(there), "counts")[0][:].toarray(), X
    )
    with pytest.raises(organs.OrganError, match="has no X .layers: counts, dense."):
        organs.load(path, True)


@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray])
@pytest.mark.parametrize("flags", [(), ("--backed",)])
def test_embed_keeps_all_of_a_zarr_folder(form, flags, model, tmp_path, monkeypatch):
    adata = full(form)
    adata.layers["half"] = adata.X
    adata.X = form(X)
    path = written(adata, tmp_path / "a.zarr")
    code, said = embed(model, path, "--out", tmp_path / "e.h5ad", *flags)
    assert code == 0, said
    found = ad.read_h5ad(tmp_path / "e.h5ad")
    truth = ad.read_zarr(path)
    assert (
        set(found.obsm) == {"X_pca", "X_vae"}
        and found.uns["note"] == "x"
        and set(found.obsp) == {"near"}
        and set(found.varm) == {"loadings"}
    )

    def dense(matrix):
        return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)

    for a, b in (
        (found.X, truth.X),
        (found.raw.X, truth.raw.X),
        *((found.layers[k], truth.layers[k]) for k in ("counts", "dense", "half")),
    ):
        assert type(a) is type(b) and np.array_equal(dense(a), dense(b))
    assert found.obs.equals(truth.obs) and found.raw.var.equals(truth.raw.var)
    assert np.allclose(
        found.obsm["X_vae"], load(model).get_latent_representation(cells()), atol=1e-5
    )


def test_large_matrices_are_copied_in_parts(tmp_path):
    group = zarr.open_group(str(written(full(), tmp_path / "a.zarr")), mode="r")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        for name in ("counts", "dense"):
            cli._copy_matrix(group["layers"][name], file, name, most=70)
        assert np.array_equal(file["dense"][:], X) and np.array_equal(
            file["counts/data"][:], sparse.csr_matrix(X).data
        )
        assert dict(file["dense"].attrs)["encoding-type"] == "array" and list(
            file["counts"].attrs["shape"]
        ) == [60, 30]


# ---- h5ad of any age


def of_old(path):
    "As anndata before 0.7 wrote it: tables as one dataset each, categories in uns."
    with h5py.File(path, "w") as file:
        file["X"] = X
        file["obs"] = np.array(
            [(f"c{i}".encode(), i % 2) for i in range(60)], dtype=[("index", "S10"), ("kind", "i4")]
        )
        file["var"] = np.array([(name.encode(),) for name in NAMES], dtype=[("index", "S10")])
        file["obsm"] = np.array(
            [((i, 1.0), i) for i in range(60)], dtype=[("X_pca", "f8", (2,)), ("time", "f8")]
        )
        file["uns/kind_categories"] = np.array([b"a", b"b"])
    return path


def bare(path):
    written(cells(), path)
    with h5py.File(path, "r+") as file:
        del file["obsm"]
    return path


def without_attributes(path):
    written(full(), path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.copy("raw/X", "X")
        file["obsm"].attrs.clear()
    return path


# which this test reads
@pytest.mark.filterwarnings("ignore:.*very old version of AnnData")
@pytest.mark.parametrize(
    "make, others", [(of_old, {"X_pca", "time"}), (bare, set()), (without_attributes, {"X_pca"})]
)
@pytest.mark.parametrize("flags", [(), ("--backed",)])
def test_embed_into_a_file_of_any_age(make, others, flags, model, tmp_path):
    path = make(tmp_path / "a.h5ad")
    code, said = embed(model, path, "--out", tmp_path / "e.h5ad", *flags)
    assert code == 0, said
    found = ad.read_h5ad(tmp_path / "e.h5ad")
    assert set(found.obsm) == {"X_vae", *others} and found.obs["kind"].tolist() == ["a", "b"] * 30
    assert np.allclose(
        found.obsm["X_vae"], load(model).get_latent_representation(cells()), atol=1e-5
    )
    if make is of_old:
        assert found.obsm["X_pca"][:, 0].tolist() == list(range(60)) and found.obsm[
            "time"
        ].ravel().tolist() == list(range(60))
    with h5py.File(tmp_path / "e.h5ad") as file:
        assert (
            file["obsm"].attrs["encoding-type"] == "dict"
            and file["obsm"].attrs["encoding-version"] == "0.1.0"
        )


# ---- cells without a count, on the command line


@pytest.mark.parametrize("ending", [".npy", ".csv", ".h5ad"])
@pytest.mark.parametrize("flags", [(), ("--backed",)])
def test_embed_with_drop_empty(ending, flags, model, tmp_path):
    counts = np.column_stack([X, np.ones(60)])
    counts[[5, 9], :30] = 0
    adata = ad.AnnData(
        sparse.csr_matrix(counts.astype("float32")),
        cells().obs,
        pd.DataFrame(index=[*NAMES, "other"]),
    )
    path = written(adata, tmp_path / "a.h5ad")
    out = tmp_path / f"e{ending}"
    code, said = embed(model, path, "--out", out, *flags)
    assert (
        code == 1
        and "2 of 60 cells have no counts in the 30 genes used (first: c5, c9)" in said
        and "--drop-empty" in said
        and not out.exists()
    )
    code, said = embed(model, path, "--out", out, "--drop-empty", *flags)
    assert (
        code == 0
        and "2 cells (first: c5) without a count in the model's genes: their rows are NaN" in said
    )
    assert "30 of the data's 31 genes have a place in own genes (30 genes)" in said
    z = (
        np.load(out)
        if ending == ".npy"
        else (
            pd.read_csv(out, index_col="cell").to_numpy()
            if ending == ".csv"
            else ad.read_h5ad(out).obsm["X_vae"]
        )
    )
    assert np.flatnonzero(np.isnan(z).any(1)).tolist() == [5, 9] and np.isnan(z[[5, 9]]).all()
    full_cells = np.setdiff1d(np.arange(60), [5, 9])
    assert np.allclose(
        z[full_cells], load(model).get_latent_representation(cells()[full_cells]), atol=1e-5
    )


def test_embed_of_nothing_but_empty_cells(model, tmp_path):
    path = written(
        ad.AnnData(np.zeros((20, 30), "float32"), var=pd.DataFrame(index=NAMES)),
        tmp_path / "a.h5ad",
    )
    code, said = embed(model, path, "--drop-empty", "--out", tmp_path / "e.npy")
    assert code == 1 and "none of 20 cells has a count in the model's 30 genes" in said


def test_fit_with_drop_empty(monkeypatch, capsys):
    "The training itself is another test's: here, which cells it is given."
    adata = cells()
    given = []

    def train(data):
        given.append(list(data.obs_names))
        empty = [3, 4] if len(given) == 1 else [0] if len(given) == 2 else []
        if empty:
            raise EmptyCellsError("no counts", empty)
        return data

    done, used = cli._without_empty(adata, train)
    assert (
        done is used
        and list(done.obs_names) == [f"c{i}" for i in range(60) if i not in (0, 3, 4)]
        and len(given) == 3
    )
    assert capsys.readouterr().err.splitlines() == [
        "2 cells (first: c3) without a count in the genes used: left out",
        "1 cell (first: c0) without a count in the genes used: left out",
    ]
    with pytest.raises(EmptyCellsError):
        cli._without_empty(
            adata, lambda data: (_ for _ in ()).throw(EmptyCellsError("all", range(60)))
        )


def test_embed_reports_the_genes_as_json(model, tmp_path):
    code, said = embed(
        model, written(cells(), tmp_path / "a.h5ad"), "--out", tmp_path / "e.npy", "--json"
    )
    result = json.loads(said)
    assert (
        code == 0
        and result["n_empty"] == 0
        and result["genes"].startswith("30 of the data's 30 genes have a place in own genes")
    )


def test_what_is_none_in_a_zarr_folder(model, tmp_path):
    "anndata may write raw and X that are None as an empty array marked as null."
    path = written(cells(), tmp_path / "a.zarr")
    group = zarr.open_group(str(path), mode="r+", use_consolidated=False)
    if "raw" in group:
        del group["raw"]
    ad.io.write_elem(group, "raw", None)
    zarr.consolidate_metadata(str(path))
    for flags in ((), ("--backed",)):
        assert embed(model, path, "--out", tmp_path / f"{len(flags)}.h5ad", *flags)[0] == 0
        assert ad.read_h5ad(tmp_path / f"{len(flags)}.h5ad").raw is None
    del group["X"]
    group["layers"] if "layers" in group else group.create_group("layers")
    ad.io.write_elem(group["layers"], "counts", sparse.csr_matrix(X))
    ad.io.write_elem(group, "X", None)
    zarr.consolidate_metadata(str(path))
    there = organs.load(path, True, "counts")
    assert (
        there.X is None
        and there.raw is None
        and np.array_equal(Counts(there.layers["counts"])[:].toarray(), X)
    )


def test_a_file_is_there_whole_or_the_folder_is_named(tmp_path):
    files.write_atomic(tmp_path / "a", "one")
    files.write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="nowhere"):
        files.write_atomic(tmp_path / "nowhere" / "a", "one")


OF_TWO_CELLS = np.array([[0, 2, 0], [1, 0, 3]], "float32")


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_sparse_of_reads_any_number_types(tmp_path, kind):
    matrix = sparse.csr_matrix(OF_TWO_CELLS) if kind == "csr" else sparse.csc_matrix(OF_TWO_CELLS)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"] = matrix.data.astype("float16")
        file["indices"] = matrix.indices.astype(">u8")
        file["indptr"] = matrix.indptr.astype("uint64")
        found = genes.sparse_of(file, kind, OF_TWO_CELLS.shape)
    assert found.format == kind and found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), OF_TWO_CELLS)


def test_native_sparse_leaves_what_is_native_as_it_is():
    matrix = sparse.csr_matrix(OF_TWO_CELLS)
    assert genes.native_sparse(matrix) is matrix
    coordinates = sparse.coo_matrix(OF_TWO_CELLS)
    assert genes.native_sparse(coordinates) is coordinates
    matrix.indices = matrix.indices.astype("int64").astype(">i8")
    found = genes.native_sparse(matrix)
    assert found.indices.dtype.isnative
    np.testing.assert_array_equal(found.toarray(), OF_TWO_CELLS)
