"Files and matrices in which a pointer, an index, a value or the length of a list is wrong."

import os
import sys
import tarfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata.io import sparse_dataset
from scipy import sparse

import vampsc
from vampsc import organs, readers
from vampsc.counts import Counts, CountsError, check_counts
from vampsc.genes import (
    DamagedError,
    GeneSpace,
    GeneSpaceError,
    check_sparse,
    csr_float32,
    matrix_of,
    pointers_of,
)
from vampsc.organs import OrganError
from vampsc.readers import ReaderError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import flip_bits  # noqa: E402

COUNTS = flip_bits.COUNTS
CELLS = flip_bits.CELLS
GENES = flip_bits.GENES
FORMS = "csr", "csc"


def set_at(values, at, value):
    values[at] = value
    return values


# What is wrong: (array, change of it, words of the message)
WRONG = {
    "begins late": ("indptr", lambda v: set_at(v, 0, 2), "indptr begins with 2 instead of 0"),
    "falls": ("indptr", lambda v: set_at(v, 3, 0), r"indptr falls from \d+ to 0 in (row|column) 2"),
    "negative": (
        "indptr",
        lambda v: set_at(v, 3, -1),
        r"indptr falls from \d+ to -1 in (row|column) 2",
    ),
    "beyond the entries": (
        "indptr",
        lambda v: set_at(v, 3, 10**6),
        r"indptr falls from 1000000 to \d+ in (row|column) 3",
    ),
    "ends beyond": (
        "indptr",
        lambda v: set_at(v, -1, v[-1] + 1),
        r"indptr ends with \d+, but there are \d+ entries",
    ),
    "ends early": (
        "indptr",
        lambda v: set_at(v, -1, v[-1] - 1),
        r"indptr ends with \d+, but there are \d+ entries",
    ),
    "too short": (
        "indptr",
        lambda v: v[:-1],
        r"indptr is of shape \(\d+,\), but \d+ (row|column)s need",
    ),
    "fewer indices": ("indices", lambda v: v[:-1], r"data has \d+ entries but indices \d+"),
    "fewer values": ("data", lambda v: v[:-1], r"data has \d+ entries but indices \d+"),
    "one beyond": (
        "indices",
        lambda v: set_at(v, 5, 60),
        r"1 of its (row|column) indices lie outside .*indices\[5\] is 60",
    ),
    "far beyond": (
        "indices",
        lambda v: set_at(v, 5, 10**9),
        r"1 of its (row|column) indices lie outside",
    ),
    "before the first": (
        "indices",
        lambda v: set_at(v, 5, -1),
        r"1 of its (row|column) indices lie outside .*indices\[5\] is -1",
    ),
}


def damaged(form, wrong):
    "The cells, whose matrix was damaged after scipy had made it."
    adata = flip_bits.cells_of(form)
    array, change, words = WRONG[wrong]
    setattr(adata.X, array, change(getattr(adata.X, array).copy()))
    return adata, words


def damaged_file(form, wrong, folder, suffix):
    "The same in a file."
    adata = flip_bits.cells_of(form)
    path = folder / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    array, change, words = WRONG[wrong]
    values = change(getattr(adata.X, array).copy())
    if suffix == "h5ad":
        replace_in_hdf5(path, f"X/{array}", values)
    else:
        replace_in_zarr(path, array, values)
    return path, words


def replace_in_hdf5(path, name, values):
    with h5py.File(path, "a") as file:
        kept = dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(kept)


def replace_in_zarr(path, array, values):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="a", use_consolidated=False)["X"]
    kept = dict(group[array].attrs)
    del group[array]
    group.create_array(array, data=values).attrs.update(kept)
    zarr.consolidate_metadata(str(path))


# ---- in memory


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("form", FORMS)
def test_in_memory(form, wrong):
    adata, words = damaged(form, wrong)
    space = GeneSpace("all", GENES)
    before = {name: getattr(adata.X, name).copy() for name in flip_bits.PARTS}
    for read in (csr_float32, lambda X: space.map(adata)):
        with pytest.raises(DamagedError, match=words):
            read(adata.X)
    for read in (Counts, check_counts):
        with pytest.raises(CountsError, match=words):
            read(adata.X)
    for read in (
        vampsc.VAE,
        lambda some: vampsc.VAE(some[::-1]),
        lambda some: vampsc.VAE(some[:, ::-1]),
    ):
        with pytest.raises((CountsError, GeneSpaceError), match=words):
            read(adata)
    for name, values in before.items():
        assert np.array_equal(getattr(adata.X, name), values)


@pytest.mark.parametrize("form", FORMS)
def test_any_integers_are_looked_at(form):
    X = flip_bits.cells_of(form).X
    for dtype in ("uint8", "int16", "uint32", ">i4", "uint64"):
        parts = X.data, X.indices.astype(dtype), X.indptr.astype("uint64")
        check_sparse(*parts, form, X.shape)
        parts[1][2] = 77
        with pytest.raises(DamagedError, match=r"indices\[2\] is 77"):
            check_sparse(*parts, form, X.shape)
    # a difference of these overflows
    fallen = np.int32([0, 2**31 - 1, -(2**31), X.nnz])
    with pytest.raises(DamagedError, match="falls"):
        check_sparse(X.data, X.indices, fallen, "csr", (3, 99))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_and_raw(form):
    broken, words = damaged(form, "falls")
    adata = flip_bits.cells_of("csr")
    adata.layers["counts"] = broken.X
    with pytest.raises((CountsError, GeneSpaceError), match=words):
        vampsc.VAE(adata[::-1], layer="counts")
    adata = flip_bits.cells_of("csr")
    adata.raw = broken
    with pytest.raises((CountsError, GeneSpaceError), match=words):
        vampsc.VAE(adata, use_raw=True)


@pytest.mark.parametrize("wrong", ["falls", "far beyond"])
def test_cells_are_not_taken_out_of_a_damaged_raw(wrong):
    "anndata takes them out of raw as soon as cells are chosen."
    model = vampsc.VAE(flip_bits.cells_of("csr"), n_latent=2, hidden=(8,), gene_space=None)
    broken, words = damaged("csc", wrong)
    adata = flip_bits.cells_of("csr")
    adata.raw = broken
    with pytest.raises(DamagedError, match=words):
        model.get_latent_representation(adata, indices=[5, 3])
    adata = flip_bits.cells_of("csr")
    adata.raw = damaged("csr", "falls")[0]
    with pytest.raises(DamagedError, match="falls"):
        vampsc.VAE(adata[:50], use_raw=True)


@pytest.mark.parametrize("wrong", ["falls", "far beyond", "before the first", "ends beyond"])
@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_damaged_file(form, wrong, tmp_path):
    path, words = damaged_file(form, wrong, tmp_path, "h5ad")
    for part in (
        np.s_[::-1],
        np.s_[[9, 5, 3]],
        np.s_[:, 3:20],
        np.s_[:, GENES[::-1]],
        np.s_[[9, 5], [3, 4]],
    ):
        with pytest.raises(DamagedError, match=words):
            matrix_of(ad.read_h5ad(path, backed="r")[part])


def test_a_file_that_was_right_and_is_written_to_is_looked_at_again(tmp_path):
    path, arrays = flip_bits.h5ad("csr")(tmp_path, False)
    adata = ad.read_h5ad(path, backed="r")
    for _ in range(2):
        assert np.array_equal(matrix_of(adata[:, GENES[::-1]]).toarray(), COUNTS[:, ::-1])
    adata.file.close()
    replace_in_hdf5(path, "X/indices", set_at(arrays["indices"].copy(), 5, 10**9))
    with pytest.raises(DamagedError, match="lie outside"):
        matrix_of(ad.read_h5ad(path, backed="r")[:, GENES[::-1]])


def test_a_damaged_layer_does_not_hide_where_counts_are():
    adata = flip_bits.cells_of("csr")
    adata.layers["broken"], adata.layers["counts"] = (
        damaged("csc", "far beyond")[0].X,
        adata.X.copy(),
    )
    adata.X = -adata.X
    with pytest.raises(CountsError, match=r"which may be in layer='counts'$"):
        vampsc.VAE(adata)


@pytest.mark.parametrize("form", FORMS)
def test_repeats_and_any_order_are_allowed(form, tmp_path):
    whole = flip_bits.cells_of(form).X
    order = np.concatenate(
        [np.arange(a, b)[::-1] for a, b in zip(whole.indptr[:-1], whole.indptr[1:])]
    )
    # Each count in two entries, in falling order.
    X = type(whole)(
        (np.repeat(whole.data[order] / 2, 2), np.repeat(whole.indices[order], 2), 2 * whole.indptr),
        shape=whole.shape,
    )
    adata = ad.AnnData(X, pd.DataFrame(index=CELLS), pd.DataFrame(index=GENES))
    adata.write_h5ad(tmp_path / "x.h5ad")
    for some in (
        adata,
        organs.load(tmp_path / "x.h5ad"),
        organs.load(tmp_path / "x.h5ad", backed=True),
    ):
        assert np.array_equal(Counts(some.X).dense(slice(None)), COUNTS) and np.array_equal(
            Counts(some.X)[:].toarray(), COUNTS
        )


def test_no_entries_and_no_cells():
    for shape in ((3, 4), (0, 4), (3, 0)):
        for make in (sparse.csr_matrix, sparse.csc_matrix):
            assert csr_float32(make(shape)).shape == shape


# ---- in files


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::UserWarning:zarr")
def test_file(form, suffix, wrong, tmp_path):
    path, words = damaged_file(form, wrong, tmp_path, suffix)
    with pytest.raises(OrganError, match=words) as error:
        organs.load(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises((OrganError, CountsError), match=words) as error:
        Counts(organs.load(path, backed=True).X)[:]
    assert path.name in str(error.value) and "\n" not in str(error.value)
    if suffix == "zarr":
        return
    with pytest.raises((CountsError, GeneSpaceError), match=words):
        vampsc.VAE(ad.read_h5ad(path, backed="r"))
    with pytest.raises(ReaderError, match=rf"x.h5ad: .*{words}"):
        readers.h5ad({"counts": path})


@pytest.mark.parametrize("place", ["layers/counts", "raw/X"])
@pytest.mark.parametrize("wrong", ["falls", "far beyond"])
def test_a_place_in_a_file_is_named(place, wrong, tmp_path):
    adata = flip_bits.cells_of("csr")
    adata.layers["counts"], adata.raw = adata.X.copy(), adata.copy()
    adata.write_h5ad(tmp_path / "x.h5ad")
    array, change, words = WRONG[wrong]
    replace_in_hdf5(tmp_path / "x.h5ad", f"{place}/{array}", change(getattr(adata.X, array).copy()))
    for settings in ({}, {"layer": "counts"}, {"use_raw": True}):
        with pytest.raises(
            OrganError, match=f"x.h5ad.*{place}: the sparse matrix is damaged: .*{words}"
        ):
            organs.load(tmp_path / "x.h5ad", **settings)


@pytest.mark.parametrize("wrong", WRONG)
def test_tenx(wrong, tmp_path):
    path, arrays = flip_bits.tenx(tmp_path, False)
    array, change, words = WRONG[wrong]
    replace_in_hdf5(path, f"matrix/{array}", change(arrays[array].copy()))
    with pytest.raises(ReaderError, match=f"^x.h5: the sparse matrix is damaged: {words}"):
        readers.tenx_h5({"counts": path})


@pytest.mark.parametrize(
    "kind, name, length, words",
    [
        (
            "tenx",
            "matrix/barcodes",
            59,
            "barcodes has 59 entries, but the matrix is 60 cells x 30 genes",
        ),
        ("tenx", "matrix/barcodes", 61, "barcodes has 61 entries"),
        ("tenx", "matrix/features/id", 29, "features/id has 29 entries"),
        ("tenx", "matrix/features/name", 31, "features/name has 31"),
        ("tenx", "matrix/features/feature_type", 31, "feature_type has 31"),
        (
            "loom",
            "col_attrs/CellID",
            59,
            "col_attrs/CellID has 59 entries, but the matrix is 60 cells x 30 genes",
        ),
        ("loom", "col_attrs/CellID", 61, "col_attrs/CellID has 61"),
        ("loom", "row_attrs/Gene", 29, "row_attrs/Gene has 29"),
        ("loom", "row_attrs/Gene", 31, "row_attrs/Gene has 31"),
        ("loom", "row_attrs/Accession", 31, "row_attrs/Accession has 31"),
    ],
)
def test_lists_of_wrong_length(kind, name, length, words, tmp_path):
    path, _ = getattr(flip_bits, kind)(tmp_path, False)
    replace_in_hdf5(path, name, np.array([f"n{k}" for k in range(length)], "S"))
    read = {"tenx": readers.tenx_h5, "loom": readers.loom}[kind]
    with pytest.raises(ReaderError, match=f"^{path.name}: .*{words}"):
        read({"counts": path})


@pytest.mark.parametrize("shape", [[30], [30, 61], [2**40, 60], [-1, 60], [30, 60, 1]])
def test_a_wrong_shape_of_tenx(shape, tmp_path):
    path, _ = flip_bits.tenx(tmp_path, False)
    replace_in_hdf5(path, "matrix/shape", np.array(shape))
    with pytest.raises(ReaderError, match="^x.h5"):
        readers.tenx_h5({"counts": path})


def test_a_loom_matrix_that_is_none(tmp_path):
    path, _ = flip_bits.loom(tmp_path, False)
    replace_in_hdf5(path, "matrix", COUNTS.ravel())
    with pytest.raises(ReaderError, match="^x.loom is an HDF5 file of another layout"):
        readers.loom({"counts": path})


@pytest.mark.parametrize("part, entries", [("obs", 59), ("var", 29)])
def test_a_reader_of_h5ad_compares_sizes(part, entries, tmp_path):
    flip_bits.cells_of("csr").write_h5ad(tmp_path / "x.h5ad")
    flip_bits.cells_of("csr")[1:, 1:].copy().write_h5ad(tmp_path / "fewer.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "a") as file, h5py.File(tmp_path / "fewer.h5ad") as fewer:
        del file[part]
        fewer.copy(part, file)
    with pytest.raises(
        ReaderError,
        match=rf"^x.h5ad: {part} has {entries} entries, but the matrix is 60 cells x 30 genes",
    ):
        readers.h5ad({"counts": tmp_path / "x.h5ad"})


@pytest.mark.parametrize("value", [-1, -(2**31) + 1])
def test_a_reader_refuses_what_is_negative(value, tmp_path):
    path, arrays = flip_bits.tenx(tmp_path, False)
    replace_in_hdf5(path, "matrix/data", set_at(arrays["data"].copy(), 5, value))
    with pytest.raises(ReaderError, match="^x.h5: these are no counts"):
        readers.tenx_h5({"counts": path})


def compressed_bytes(path, name):
    "Where the first compressed block of a dataset lies in its file."
    with h5py.File(path) as file:
        block = file[name].id.get_chunk_info(0)
        return block.byte_offset, block.size


@pytest.mark.parametrize("name", ["X/data", "X/indices", "X/indptr"])
def test_a_damaged_compressed_block(name, tmp_path):
    path, _ = flip_bits.h5ad("csr")(tmp_path, True)
    start, size = compressed_bytes(path, name)
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size // 2 + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(OrganError, match="^'x.h5ad' cannot be read as .h5ad: ") as error:
        organs.load(path)
    assert "\n" not in str(error.value)
    with pytest.raises((OrganError, CountsError), match="x.h5ad") as error:
        vampsc.VAE(organs.load(path, backed=True))
    assert "\n" not in str(error.value)
    with pytest.raises(ReaderError, match="^x.h5ad ") as error:
        readers.h5ad({"counts": path})
    assert "\n" not in str(error.value)


def test_a_tar_of_triplets_that_are_no_text(tmp_path):
    path, _ = flip_bits.triplets(tmp_path, True)
    members = {
        "one_matrix.mtx.gz": b"\xff\xfe",
        "one_features.tsv.gz": b"\xff\n",
        "one_barcodes.tsv.gz": b"\xff\n",
    }
    for name, content in members.items():
        with tarfile.open(path) as old:
            packed = {member.name: old.extractfile(member).read() for member in old}
        (tmp_path / name).write_bytes(flip_bits.gzipped(content.decode("latin-1")))
        with tarfile.open(tmp_path / "y.tar", "w") as archive:
            for other, data in packed.items():
                if other != name:
                    (tmp_path / other).write_bytes(data)
                archive.add(tmp_path / other, other)
        with pytest.raises(ReaderError, match="^y.tar, one_"):
            readers.mtx_tar({"counts": tmp_path / "y.tar"})


# ---- single bits


@pytest.mark.skipif(not hasattr(os, "fork"), reason="flips are read in forked processes")
@pytest.mark.parametrize("kind", [name for name in flip_bits.KINDS if name != "tar of triplets"])
# of forks beside threads: the children use none
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_single_bits(kind):
    for array, way, number, words in flip_bits.rows(kind, 20, seed=1, ways=1):
        assert sum(number[bad] for bad in flip_bits.BAD) == 0, f"{array} by {way}: {words}"
        assert sum(number.values()) == 20 and number["refused"] + number["warned"] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="flips are read in forked processes")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_crash_a_misreading_and_a_foreign_error_are_seen(tmp_path):
    path, arrays = flip_bits.tenx(tmp_path, False)
    flips = list(
        flip_bits.flips_of(
            "indptr", flip_bits.KINDS["10x h5"], path, arrays, 6, np.random.default_rng(0)
        )
    )
    before = path.read_bytes()
    read = readers.tenx_h5({"counts": path})

    def ends(path):
        os._exit(3)

    def other(path):
        return ad.AnnData(read.X + read.X, read.obs, read.var)

    def foreign(path):
        raise KeyError("of a library")

    for way, kind in ((ends, "crashed"), (other, "misread"), (foreign, "foreign")):
        assert {found for found, _ in flip_bits.outcomes(path, way, flips)} == {kind}
    assert path.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="flips are read in forked processes")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_tells(capfd):
    with pytest.raises(SystemExit):
        flip_bits.main(["sheet"])
    assert "no kind is called 'sheet'" in capfd.readouterr().err
    assert flip_bits.main(["10x h5", "--flips", "3"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[-6:] == list(flip_bits.OUTCOMES) and [
        line.split()[2] for line in lines[1:]
    ] == list(flip_bits.PARTS)


OF_TWO_CELLS = np.array([[0, 2, 0], [1, 0, 3]], "float32")


def test_pointers_of_a_matrix_in_a_file(tmp_path):
    ad.AnnData(sparse.csr_matrix(OF_TWO_CELLS)).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        matrix = sparse_dataset(file["X"])
        assert pointers_of(matrix).tolist() == sparse.csr_matrix(OF_TWO_CELLS).indptr.tolist()
        file["X/indptr"][1] = 99
        with pytest.raises(DamagedError, match="indptr falls from 99"):
            pointers_of(matrix)
