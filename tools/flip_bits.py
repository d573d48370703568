"""What becomes of a file in which one bit is wrong? Nothing may end the process, or pass for counts
that it does not hold.

    # 200 flips of each array of each kind of file: some 10 minutes
    python tools/flip_bits.py
    python tools/flip_bits.py --flips 20       # quicker
    python tools/flip_bits.py loom "10x h5"    # of these kinds of file alone
    # of any bit of a compressed file instead, its structure included
    python tools/flip_bits.py --anywhere

Small files of every kind are written without compression, so that a flip reaches the numbers, and
read in every way that there is. A flip is
    refused  : one line of ours says what is wrong
    valid    : what the flipped arrays hold are counts all the same (but for the last digits), and
        just these were read
    warned   : values that are no whole numbers, with the warning that says so
    misread  : something else was read than the arrays hold, or they hold no counts
    foreign  : an error of a library came through, or one of several lines
    crashed  : the process ended, or took over 20 seconds, as HDF5 itself does for some wrong
        structures
The exit status is 1 if there is one of the last three. Flips are read in forked processes, one for
as many as it survives.
"""

import argparse
import io
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from vampsc import organs, readers
from vampsc.counts import checked_counts
from vampsc.genes import GeneSpace, csr_float32

OUTCOMES = ("refused", "valid", "warned", "misread", "foreign", "crashed")
BAD = OUTCOMES[3:]
COUNTS = np.random.default_rng(3).poisson(0.6, (60, 30))
COUNTS[:, 0] += 1  # no cell is empty
CELLS = [f"cell{i}" for i in range(60)]
GENES = [f"gene{j}" for j in range(30)]
SECONDS = 20  # for the reading of one file
PARTS = ("data", "indices", "indptr")


class Kind(NamedTuple):
    """A kind of file: write(folder, compressed) gives its path and {array: its values}; ways of
    reading it, path -> AnnData.

    form : "csr" or "csc" of the matrix, or "dense" (genes, cells).
    """

    write: object
    ways: tuple
    form: str


# ---- files


def cells_of(form):
    "The cells as an AnnData, whose matrix is of a form."
    X = sparse.csr_matrix(COUNTS.astype("float32")).asformat(form)
    return anndata.AnnData(X, pd.DataFrame(index=CELLS), pd.DataFrame(index=GENES))


def arrays_of(X):
    return {part: getattr(X, part) for part in PARTS}


def h5ad(form):
    def write(folder, compressed):
        adata = cells_of(form)
        adata.write_h5ad(folder / "x.h5ad", compression="gzip" if compressed else None)
        return folder / "x.h5ad", arrays_of(adata.X)

    return write


def zarr_folder(folder, compressed):
    import zarr

    adata = cells_of("csr")
    adata.write_zarr(folder / "x.zarr")
    if compressed:
        return folder / "x.zarr", arrays_of(adata.X)
    group = zarr.open_group(str(folder / "x.zarr"), mode="a", use_consolidated=False)["X"]
    for part, values in arrays_of(adata.X).items():
        kept = dict(group[part].attrs)
        del group[part]
        group.create_array(part, data=values, chunks=values.shape, compressors=None)
        group[part].attrs.update(kept)
    zarr.consolidate_metadata(str(folder / "x.zarr"))
    return folder / "x.zarr", arrays_of(adata.X)


def tenx(folder, compressed):
    X = sparse.csr_matrix(COUNTS.astype("int32"))
    arrays = {
        "data": X.data,
        "indices": X.indices.astype("int64"),
        "indptr": X.indptr.astype("int64"),
    }
    with h5py.File(folder / "x.h5", "w") as file:
        group = file.create_group("matrix")
        for part, values in arrays.items():
            group.create_dataset(part, data=values, compression="gzip" if compressed else None)
        group["shape"] = np.array(X.shape[::-1], "int32")
        group["barcodes"] = np.array(CELLS, "S")
        features = {"id": GENES, "name": GENES, "feature_type": ["Gene Expression"] * len(GENES)}
        for name, values in features.items():
            group[f"features/{name}"] = np.array(values, "S")
    return folder / "x.h5", arrays


def loom(folder, compressed):
    matrix = COUNTS.T.astype("float32")
    with h5py.File(folder / "x.loom", "w") as file:
        file.create_dataset("matrix", data=matrix, compression="gzip" if compressed else None)
        for name in ("Gene", "Accession"):
            file[f"row_attrs/{name}"] = np.array(GENES, "S")
        file["col_attrs/CellID"] = np.array(CELLS, "S")
    return folder / "x.loom", {"data": matrix}


def triplets(folder, compressed):
    entries = [f"{j + 1} {i + 1} {COUNTS[i, j]}" for i, j in zip(*np.nonzero(COUNTS))]
    header = ["%%MatrixMarket matrix coordinate integer general", f"30 60 {len(entries)}"]
    parts = {
        "matrix.mtx": [*header, *entries],
        "barcodes.tsv": CELLS,
        "features.tsv": [f"{name}\t{name}\tGene Expression" for name in GENES],
    }
    with tarfile.open(folder / "x.tar", "w") as archive:
        for name, lines in parts.items():
            packed = io.BytesIO(gzipped("\n".join(lines)))
            member = tarfile.TarInfo(f"one_{name}.gz")
            member.size = len(packed.getvalue())
            archive.addfile(member, packed)
    return folder / "x.tar", {}


def gzipped(text):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(text.encode()) + packer.flush()


# ---- ways of reading


def in_memory(path):
    return organs.load(path)


def backed(path):
    return organs.load(path, backed=True)


def by_anndata(path):
    return (anndata.read_zarr if path.suffix == ".zarr" else anndata.read_h5ad)(path)


def backed_by_anndata(path):
    return anndata.read_h5ad(path, backed="r")


def some_cells(path):
    return by_anndata(path)[::-1]


def some_genes(path):
    return by_anndata(path)[:, GENES[::-1]]


def some_backed_cells(path):
    return backed_by_anndata(path)[np.arange(60)[::-1]]


def some_backed_genes(path):
    return backed_by_anndata(path)[:, GENES[::-1]]


def mapped(path):
    return anndata.AnnData(
        GeneSpace("all", GENES).map(by_anndata(path))[0], var=pd.DataFrame(index=GENES)
    )


def converted(path):
    return anndata.AnnData(csr_float32(by_anndata(path).X), var=pd.DataFrame(index=GENES))


def reader(read):
    def by_reader(path):
        return read({"counts": path})

    return by_reader


OF_USERS = (by_anndata, some_cells, some_genes, mapped, converted)
KINDS = {
    "h5ad": Kind(h5ad("csr"), (in_memory, *OF_USERS, reader(readers.h5ad)), "csr"),
    "h5ad, backed": Kind(
        h5ad("csr"), (backed, backed_by_anndata, some_backed_cells, some_backed_genes), "csr"
    ),
    "h5ad of columns": Kind(
        h5ad("csc"), (in_memory, backed, *OF_USERS, reader(readers.h5ad)), "csc"
    ),
    "zarr": Kind(zarr_folder, (in_memory, *OF_USERS), "csr"),
    "zarr, backed": Kind(zarr_folder, (backed,), "csr"),
    "10x h5": Kind(tenx, (reader(readers.tenx_h5),), "csr"),
    "loom": Kind(loom, (reader(readers.loom),), "dense"),
    "tar of triplets": Kind(triplets, (reader(readers.mtx_tar),), "csr"),
}


def used(adata):
    "The counts as a model takes them, by every way that it reads cells, (cells, genes) dense."
    space = GeneSpace.of(adata)
    counts, _ = checked_counts(adata, space)
    dense = counts.dense(slice(None))
    rows = counts[:].toarray()
    assert np.array_equal(dense, rows), "dense rows are not the sparse ones"
    order = (
        [GENES.index(name) for name in adata.var_names]
        if set(adata.var_names) == set(GENES)
        else range(dense.shape[1])
    )
    turned = np.empty_like(rows)
    turned[:, order] = rows
    return turned[::-1] if list(adata.obs_names) == CELLS[::-1] else turned


# ---- what arrays hold, by arithmetic of its own


def held(arrays, form):
    """The counts (cells, genes) that arrays hold, by the definition of each form; None where they
    hold none.
    """
    values = arrays["data"].astype("float64")
    with np.errstate(invalid="ignore"):
        nearest, step = np.rint(values), np.maximum(1e-6, 2e-7 * values)
    whole = np.isfinite(values) & (np.abs(values - nearest) <= step) & (nearest >= 1)
    if not (whole | (values == 0)).all():
        return None
    values = nearest
    if form == "dense":
        return values.T
    starts = arrays["indptr"].tolist()
    n_inner, n_outer = COUNTS.shape[::-1] if form == "csr" else COUNTS.shape
    if starts[0] != 0 or starts[-1] != len(values) or sorted(starts) != starts:
        return None
    found = np.zeros((n_outer, n_inner))
    for row in range(n_outer):
        for k in range(starts[row], starts[row + 1]):
            column = int(arrays["indices"][k])
            if not 0 <= column < n_inner:
                return None
            found[row, column] += values[k]
    return found if form == "csr" else found.T


# ---- flips


class Flip(NamedTuple):
    "A bit of a file, and what the arrays hold then; None: unknown, as in a compressed file."

    file: Path
    bit: int
    counts: object
    known: bool = True


def flips_of(array, kind, path, arrays, n, rng):
    "n flips of an array's bits in the file at path."
    file, start = place_of(path, arrays[array].tobytes())
    for bit in rng.choice(8 * arrays[array].nbytes, n, replace=n > 8 * arrays[array].nbytes):
        flipped = bytearray(arrays[array].tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        values = np.frombuffer(bytes(flipped), arrays[array].dtype).reshape(arrays[array].shape)
        yield Flip(file, 8 * start + int(bit), held({**arrays, array: values}, kind.form))


def place_of(path, content):
    "The file, and where in it, that holds these bytes."
    for file in files_of(path):
        start = file.read_bytes().find(content)
        if start >= 0:
            return file, start
    raise ValueError(f"{path.name} does not hold the array as it is")


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def flips_anywhere(path, n, rng):
    "n flips of any bits."
    files = files_of(path)
    sizes = np.array([file.stat().st_size for file in files])
    for k in rng.choice(len(files), n, p=sizes / sizes.sum()):
        yield Flip(files[k], int(rng.integers(8 * sizes[k])), None, known=False)


# ---- outcomes


def outcome(path, way, flip):
    "One of OUTCOMES but the last, and a word about it."
    # HDF5 knows a file again while it is still open
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / path.name
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy(path, copy)
        flipped = copy / flip.file.relative_to(path)
        content = bytearray(flipped.read_bytes())
        content[flip.bit // 8] ^= 1 << flip.bit % 8
        flipped.write_bytes(content)
        return judged(copy, way, flip)


def judged(path, way, flip):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = used(way(path))
        except (ValueError, TypeError, OSError) as error:
            return ("refused" if is_ours(error) else "foreign"), repr(error)
        except Exception as error:
            return "foreign", repr(error)
    said = [str(w.message) for w in caught if "whole numbers" in str(w.message)]
    if (
        flip.counts is not None
        and found.shape == flip.counts.shape
        and np.allclose(found, flip.counts, rtol=1e-6, atol=0)
    ):
        return "valid", ""
    if said:
        return "warned", said[0]
    if flip.known:
        return "misread", f"{np.argwhere(found != COUNTS)[:3].tolist()}"
    whole = np.isfinite(found).all() and (found >= 0).all()
    return ("valid" if whole else "misread"), ""


def is_ours(error):
    """Is this an error of the package's, in one line?

    Those of anndata that a user meets before us do not count here.
    """
    return type(error).__module__.startswith("vampsc") and "\n" not in str(error)


def outcomes(path, way, flips):
    "[(outcome, word)] of all flips, in forked processes that go on where one ended."
    found = []
    while len(found) < len(flips):
        begun = len(found)
        told, tells = os.pipe()
        child = os.fork()
        if not child:
            tell(tells, path, way, flips[begun:])
        os.close(tells)
        with open(told, encoding="utf-8") as lines:
            found += [tuple(line.rstrip("\n").split("\t", 1)) for line in lines]
        status = os.waitpid(child, 0)[1]
        if len(found) < len(flips):
            found.append(("crashed", f"status {os.waitstatus_to_exitcode(status)}"))
    return found


def tell(pipe, path, way, flips):
    "In a forked process: write one line for each flip, and end."
    # what glibc says of a crash
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    for flip in flips:
        signal.alarm(SECONDS)
        kind, word = outcome(path, way, flip)
        os.write(pipe, f"{kind}\t{' '.join(word.split())[:300]}\n".encode())
    os._exit(0)


# ---- table


def rows(name, n, seed=0, anywhere=False, ways=None):
    """(array, way, {outcome: how many}, {outcome: a word about the first}) of a kind of file.

    n : flips of each array. anywhere : of any bits of a compressed file instead. ways : only the
        first so many.
    """
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        path, arrays = kind.write(Path(folder), anywhere)
        for array in ("anywhere",) if anywhere else arrays:
            rng = np.random.default_rng([seed, len(name), len(array)])
            flips = list(
                flips_anywhere(path, n, rng)
                if anywhere
                else flips_of(array, kind, path, arrays, n, rng)
            )
            for way in kind.ways[:ways]:
                if not np.array_equal(used(way(path)), COUNTS):
                    raise ValueError(f"{name} is not read as it is")
                found = outcomes(path, way, flips)
                yield (
                    array,
                    way.__name__,
                    {known: sum(kind == known for kind, _ in found) for known in OUTCOMES},
                    dict(reversed(found)),
                )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all if none is named"
    )
    parser.add_argument("--flips", type=int, default=200, help="of each array (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anywhere", action="store_true", help="flip any bit of a compressed file")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.kinds if name not in KINDS]
    if unknown:
        parser.error(f"no kind is called {unknown[0]!r}; there are {', '.join(KINDS)}")
    print(
        f"{'file':16} {'array':9} {'read by':18}" + "".join(f"{name:>9}" for name in OUTCOMES),
        flush=True,
    )
    bad = 0
    for name in asked.kinds or KINDS:
        for array, way, number, words in rows(
            name, asked.flips, asked.seed, asked.anywhere, 1 if asked.anywhere else None
        ):
            print(
                f"{name:16} {array:9} {way:18}" + "".join(f"{number[kind]:9}" for kind in OUTCOMES),
                flush=True,
            )
            bad += show(number, words)
    return int(bad > 0)


def show(number, words):
    "Print a word about each bad outcome; how many there are."
    for kind in BAD:
        if number[kind]:
            print(f"    {kind}: {words[kind]}", flush=True)
    return sum(number[kind] for kind in BAD)


if __name__ == "__main__":
    sys.exit(main())
