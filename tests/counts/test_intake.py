"""Odd and bad data through the front door: each works, and says what it did, or stops with one line
that says why.

`python tests/counts/test_intake.py` prints what each case says.
"""

import hashlib
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import keras
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vampsc
from vampsc import metrics, organs
from vampsc.counts import Split
from vampsc.genes import GeneSpace

HERE = Path(vampsc.__file__).resolve().parent
SMALL = dict(hidden=(8,), n_latent=2)
GENCODE = GeneSpace.load("gencode-48")


def clean_counts():
    """60 cells x 40 genes of the pancreas, neither rare nor the most expressed, whose symbols stand
    for one gene each.
    """
    pancreas = organs.load("pancreas")
    pancreas = pancreas[:, pancreas.var_names.isin(set(GENCODE.symbols) - GENCODE.ambiguous)]
    genes = np.sort(np.argsort(-np.asarray(pancreas.X.sum(0)).ravel())[60:100])
    cells = pancreas[np.linspace(0, pancreas.n_obs - 1, 60).astype(int), genes]
    return pd.DataFrame(cells.X.toarray(), [f"cell{i}" for i in range(60)], cells.var_names)


CLEAN = clean_counts()
COUNTS = CLEAN.to_numpy()
GENES = list(CLEAN.columns)
IDS = dict(zip(GENCODE.symbols, GENCODE.ids))
# 40 genes as a space of their own: small networks
PANEL = GeneSpace("panel", [IDS[g] for g in GENES], GENES)


def data(X=None, genes=GENES, cells=None, **more):
    X = sparse.csr_matrix(COUNTS) if X is None else X
    cells = list(CLEAN.index[: X.shape[0]]) if cells is None else cells
    return ad.AnnData(X, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=list(genes)), **more)


def edited(value, *where, dtype="float32"):
    X = COUNTS.astype(dtype)
    X[where] = value
    return X


def log_normalised(X=COUNTS):
    return np.log1p(X / X.sum(1, keepdims=True) * 1e4)


def backed(adata, folder):
    adata.write_h5ad(folder / "cells.h5ad")
    return ad.read_h5ad(folder / "cells.h5ad", backed="r")


def with_raw(adata, X):
    "adata with itself as raw, and X on its first 30 genes."
    adata.raw = adata.copy()
    adata = adata[:, :30].copy()
    adata.X = X[:, :30]
    return adata


def messy():
    """CSR whose columns are in no order, with each first entry in two halves and a zero that is
    stored.
    """
    data = []
    indices = []
    indptr = [0]
    for row in COUNTS:
        columns = np.flatnonzero(row)[::-1]
        data += [*row[columns], 1, -1 + 1]
        data[-2 - len(columns)] -= 1
        indices += [
            *columns,
            columns[0],
            np.flatnonzero(row == 0)[0] if (row == 0).any() else columns[0],
        ]
        indptr.append(len(data))
    return sparse.csr_matrix(
        (np.array(data, "float32"), np.array(indices, "int32"), indptr), shape=COUNTS.shape
    )


def damaged():
    X = sparse.csr_matrix(COUNTS)
    X.indices[7] = 4000
    return X


def dask_array():
    dask = pytest.importorskip("dask.array", reason="dask is not installed")
    return data(dask.from_array(COUNTS, chunks=(20, 40)))


def halved(names, keep=GENES[:20]):
    "The counts of 20 genes twice over: 20 + 20 columns, the second half under other names."
    return data(np.hstack([COUNTS[:, :20], COUNTS[:, :20]]), [*keep, *names])


@dataclass
class Case:
    """One input. make: (folder) -> AnnData. Works if counts, the matrix the model must see, is
    given; it then says `says` in a warning (nothing if empty) and `report` in the report of the
    mapping. Else it stops, and the message matches `says`.
    """

    make: Callable
    counts: object = None
    says: str = ""
    settings: dict = None
    report: str = ""
    error: type = ValueError


own = dict(gene_space=None)
panel = dict(gene_space=PANEL)
auto = dict(gene_space="auto")
unknown = [f"novel-{i}" for i in range(20)]
twice = [*GENES[:39], GENES[0]]
summed = COUNTS[:, :39].copy()
summed[:, 0] += COUNTS[:, 39]
padded = np.column_stack([summed, np.zeros(60)])
# each cell has a count of 1, as real cells do
ONES = edited(1, slice(None), 0)
half = edited(0, slice(None), slice(20, None))

CASES = {
    # layouts, types, places
    "plain counts": Case(lambda f: data(), COUNTS),
    "dense": Case(lambda f: data(COUNTS), COUNTS),
    "CSC": Case(lambda f: data(sparse.csc_matrix(COUNTS)), COUNTS),
    "sparse array": Case(lambda f: data(sparse.csr_array(COUNTS)), COUNTS),
    "int64": Case(lambda f: data(COUNTS.astype("int64")), COUNTS),
    "uint16 CSR": Case(lambda f: data(sparse.csr_matrix(COUNTS.astype("uint16"))), COUNTS),
    "float64": Case(lambda f: data(sparse.csr_matrix(COUNTS.astype("float64"))), COUNTS),
    "float16": Case(
        lambda f: data(np.minimum(COUNTS, 2048).astype("float16")), np.minimum(COUNTS, 2048)
    ),
    "booleans": Case(lambda f: data(COUNTS > 0), COUNTS > 0),
    "int8 that overflowed": Case(
        lambda f: data((40 * COUNTS).astype("int64").astype("int8")),
        says=r"\d+ values are negative \(first: cell cell\d+, gene \w+\)",
    ),
    "entries in no order, added up, zeros stored": Case(lambda f: data(messy()), COUNTS),
    "a view of cells and genes": Case(lambda f: data()[10:50, ::-1], COUNTS[10:50, ::-1]),
    "backed, CSR": Case(lambda f: backed(data(), f), COUNTS),
    "backed, dense": Case(lambda f: backed(data(COUNTS), f), COUNTS),
    "backed, CSC": Case(lambda f: backed(data(sparse.csc_matrix(COUNTS)), f), COUNTS),
    "a view of backed": Case(lambda f: backed(data(), f)[5:45], COUNTS[5:45]),
    "dask": Case(lambda f: dask_array(), COUNTS),
    "layer": Case(
        lambda f: data(log_normalised(), layers={"counts": COUNTS}),
        COUNTS,
        settings=dict(layer="counts"),
    ),
    "no such layer": Case(
        lambda f: data(layers={"counts": COUNTS}),
        says="no layer 'spliced'.*it has: counts",
        settings=dict(layer="spliced"),
    ),
    "no X": Case(
        lambda f: data(layers={"counts": COUNTS})._mutated(X=None),
        says="adata.X is empty: pass layer=; layers: counts",
    ),
    "raw": Case(lambda f: with_raw(data(), log_normalised()), COUNTS, settings=dict(use_raw=True)),
    "raw of a view": Case(
        lambda f: with_raw(data(), log_normalised())[[59, *range(40)]],
        COUNTS[[59, *range(40)]],
        settings=dict(use_raw=True),
    ),
    "raw, backed": Case(
        lambda f: backed(with_raw(data(), log_normalised()), f), COUNTS, settings=dict(use_raw=True)
    ),
    "no raw": Case(
        lambda f: data(),
        says="adata.raw is empty: leave out use_raw=True",
        settings=dict(use_raw=True),
    ),
    "raw and layer": Case(
        lambda f: with_raw(data(), log_normalised()),
        says="layer='counts' and use_raw=True.*one",
        settings=dict(use_raw=True, layer="counts"),
    ),
    # values
    "a negative value": Case(
        lambda f: data(edited(-3, 7, 2)),
        says=(
            rf"1 values are negative \(first: cell cell7, gene {GENES[2]}\).*no other layers and"
            r" no raw"
        ),
    ),
    "NaN": Case(
        lambda f: data(edited(np.nan, 59, 39)),
        says=rf"1 values are NaN \(first: cell cell59, gene {GENES[39]}\); replace",
    ),
    "NaN, backed": Case(
        lambda f: backed(data(sparse.csr_matrix(edited(np.nan, 59, 39))), f),
        says="1 values are NaN.*cell59",
    ),
    "infinite": Case(
        lambda f: data(edited(np.inf, slice(3, 5), 2)), says="2 values are infinite.*cell3"
    ),
    "too large for float32": Case(
        lambda f: data(edited(1e300, 0, 0, dtype="float64")),
        says="1 values are infinite .or too large",
    ),
    "larger than float32 counts": Case(
        lambda f: data(edited(2**24 + 1, 0, 0, dtype="int64")),
        edited(2**24, 0, 0),
        "largest value is 16,777,216.*rounded",
    ),
    "log-transformed": Case(
        lambda f: data(log_normalised()),
        says=r"log-transformed \(\d.*not whole numbers, the largest is.*no other layers",
    ),
    "log-transformed, counts in a layer": Case(
        lambda f: data(log_normalised(), layers={"counts": COUNTS, "half": COUNTS / 2}),
        says=r"log-trans.*in layer='counts' \(",
    ),
    "log-transformed, counts in raw": Case(
        lambda f: with_raw(data(), log_normalised()),
        says=r"log-transformed.*may be in adata.raw \(use_raw=True\)",
    ),
    "log-transformed layer, counts in X": Case(
        lambda f: data(layers={"norm": log_normalised()}),
        says=r"log-transformed.*may be in adata.X \(without",
        settings=dict(layer="norm"),
    ),
    "scaled": Case(
        lambda f: data((COUNTS - COUNTS.mean(0)) / COUNTS.std(0)),
        says=r"[\d,]+ values are negative.*residuals",
    ),
    "normalised": Case(
        lambda f: data(ONES / ONES.sum(1, keepdims=True) * 1e4),
        ONES / ONES.sum(1, keepdims=True) * 1e4,
        r"\d+.\d% of the non-zero values are not whole numbers: these look like normalised counts",
    ),
    "estimated": Case(
        lambda f: data(np.where(COUNTS > 3, COUNTS * 0.9371, COUNTS)),
        np.where(COUNTS > 3, COUNTS * 0.9371, COUNTS),
        "estimated or corrected",
    ),
    "cells without counts": Case(
        lambda f: data(edited(0, [3, 8], slice(None))),
        says=r"2 of 60 cells.*first: cell3, cell8\).*has_counts\(adata, None\)",
    ),
    "cells without counts in the gene space": Case(
        lambda f: halved(unknown)._mutated(X=np.hstack([edited(0, 4)[:, :20], COUNTS[:, :20]])),
        says=r"1 of 60 cells have no counts in the 40 genes used \(first: cell4\)",
        settings=panel,
    ),
    "genes without counts": Case(
        lambda f: data(half),
        half,
        settings=panel,
        report="20 genes of the space are in the data without a count in any cell",
    ),
    "masked": Case(
        lambda f: data()._mutated(X=np.ma.masked_equal(COUNTS, 1)),
        says=r"masked array with \d+ values masked.*filled\(0\)",
    ),
    "complex": Case(
        lambda f: data(COUNTS.astype("complex64")),
        says="real numbers, cells x genes, not ndarray.*complex64",
    ),
    "objects": Case(
        lambda f: data(COUNTS.astype(object)), says="real numbers.*type object.*astype"
    ),
    "words": Case(lambda f: data(COUNTS.astype(str)), says="real numbers.*type <U"),
    "a damaged file": Case(
        lambda f: data(damaged()),
        says="damaged: 1 of its column indices lie outside the 40 columns",
    ),
    "a damaged file, mapped": Case(
        lambda f: data(damaged()),
        says="damaged: 1 of its column indices lie outside the 40 columns",
        settings=panel,
    ),
    # cells
    "no cells": Case(lambda f: data()[:0], says="at least 10 cells, and there are 0"),
    "no genes": Case(lambda f: data(COUNTS[:, :0], []), says="has no genes"),
    "one cell": Case(lambda f: data()[:1], says="at least 10 cells, and there are 1"),
    "fewer cells than a batch": Case(lambda f: data()[:12], COUNTS[:12]),
    "cell names that repeat": Case(
        lambda f: data(cells=[f"c{i % 50}" for i in range(60)]),
        COUNTS,
        r"cells that occur more than once: 10 \(first: c0\).*obs_names_make_unique",
    ),
    # genes
    "gene names that repeat, own genes": Case(
        lambda f: data(genes=twice),
        says=rf"1 ids occur more than once \(first: {GENES[0]}\).*var_names_make_unique",
    ),
    "gene names that repeat, mapped": Case(
        lambda f: data(genes=twice),
        padded,
        settings=panel,
        report=rf"1 gene of the space is the sum of several columns \({GENES[0]}\)",
    ),
    "identifiers with versions": Case(
        lambda f: data(genes=[f"{IDS[g]}.{i}" for i, g in enumerate(GENES)]),
        COUNTS,
        settings=panel,
        report="40 by identifier, 0 by",
    ),
    "identifiers in a column": Case(
        lambda f: data(genes=map(str, range(40)))._mutated(column=[IDS[g] for g in GENES]),
        COUNTS,
        settings=panel,
        report="40 by identifier",
    ),
    "symbols in another order": Case(
        lambda f: data(COUNTS[:, ::-1], GENES[::-1]), COUNTS, settings=panel, report="40 by symbol"
    ),
    "synonyms are not guessed": Case(
        lambda f: data(genes=[*GENES[:38], "SYNONYM1", GENES[39].lower()]),
        edited(0, slice(None), [38, 39]),
        settings=panel,
        report=(
            r"2 genes of the data are not used \(SYNONYM1, \w+\)|2 genes of the data are not used"
            r" \(\w+, SYNONYM1\)"
        ),
    ),
    "an ambiguous symbol": Case(
        lambda f: data(genes=[*GENES[:39], "CD99"]),
        edited(0, slice(None), 39),
        report=r"Ambiguous symbols.*: 1 \(CD99\)",
        settings=dict(
            gene_space=GeneSpace("panel", [*PANEL.ids, "a", "b"], [*GENES, "CD99", "CD99"])
        ),
    ),
    "half of the genes": Case(
        lambda f: halved(unknown),
        half,
        settings=panel,
        report=(
            "they hold 50.0% of all counts. 20 genes of the data are not used.*20 genes of the"
            " space are missing"
        ),
    ),
    "most counts lost": Case(
        lambda f: halved(unknown)._mutated(X=np.hstack([COUNTS[:, :20], 9 * COUNTS[:, :20]])),
        half,
        r"only 10.0% of the counts.*novel-\d+",
        settings=panel,
    ),
    "few genes known": Case(
        lambda f: data(genes=[*GENES[:3], *(f"g{i}" for i in range(37))]),
        says=(
            r"only 3 of the data's 40 genes \(7.5%\) are known to gene space panel.*gene_space=None"
        ),
        settings=panel,
    ),
    "no gene known": Case(
        lambda f: data(genes=[f"ENSMUSG{i:011d}" for i in range(40)]),
        says="only 0 of the data's 40.*look like mouse genes.*gene_space=None",
        settings=panel,
    ),
    "mouse symbols": Case(
        lambda f: data(genes=[g.capitalize() for g in GENES]),
        COUNTS,
        "are known to gencode-48.*symbols of mouse or rat.*own genes",
        settings=auto,
    ),
    "numbers as names": Case(
        lambda f: data(genes=map(str, range(40))),
        COUNTS,
        "only 0 of the data's 40.*look like numbers.*own genes",
        settings=auto,
    ),
    "no such gene space": Case(
        lambda f: data(),
        says="unknown gene space or missing file 'gencode-47'",
        settings=dict(gene_space="gencode-47"),
    ),
    # not even an AnnData, and settings that do not fit the data
    "an array": Case(
        lambda f: COUNTS, says="adata must be an AnnData, not ndarray", error=TypeError
    ),
    "a data frame": Case(
        lambda f: CLEAN, says="adata must be an AnnData, not DataFrame", error=TypeError
    ),
    "a path": Case(lambda f: "cells.h5ad", says="not str: read the file first", error=TypeError),
    "adata.raw": Case(
        lambda f: with_raw(data(), COUNTS).raw,
        says="not Raw: pass the AnnData and use_raw=True",
        error=TypeError,
    ),
    "a split of other cells": Case(
        lambda f: data(),
        says=r"1 of 2 indices are out of range \(first: 60\)",
        settings=dict(split=Split(np.arange(40), np.array([50]), np.array([51, 60]))),
    ),
    "a split that overlaps": Case(
        lambda f: data(),
        says=r"1 cells are in a split more than once \(first: 39\)",
        settings=dict(split=Split(np.arange(40), np.array([39]), np.array([51]))),
    ),
    "no genes to keep": Case(
        lambda f: data(),
        says="n_genes must be a whole number of at least 1, not 0",
        settings=dict(n_genes=0),
    ),
    "more genes than there are": Case(lambda f: data(), COUNTS, settings=dict(n_genes=4000)),
    "a negative seed": Case(
        lambda f: data(),
        says="seed must be a whole number of at least 0, not -1",
        settings=dict(seed=-1),
    ),
}

# On their way into a trained model: the message, or the counts of which the embedding must be.
lost = edited(0, slice(None), [0, 5])
more = np.column_stack([COUNTS, 100 * np.ones(60)])
QUERIES = {
    "the cells of the model": Case(lambda f: data(), COUNTS),
    "another order of genes": Case(lambda f: data(COUNTS[:, ::-1], GENES[::-1]), COUNTS),
    "genes missing": Case(
        lambda f: data(np.delete(COUNTS, [0, 5], 1), np.delete(GENES, [0, 5])),
        lost,
        "lack 2 of the model's 40 genes, 5.0%",
    ),
    "most genes missing": Case(
        lambda f: data(COUNTS[:, :8], GENES[:8]),
        edited(0, slice(None), slice(8, None)),
        "lack 32 of the model's 40 genes, 80.0%.*what the model returns is not to be used",
    ),
    "more genes": Case(lambda f: data(more, [*GENES, "novel"]), COUNTS),
    "all genes unknown": Case(
        lambda f: data(genes=[f"g{i}" for i in range(40)]),
        says=r"only 0 of the data's 40 genes \(0.0%\)",
    ),
    "dense int64": Case(lambda f: data(COUNTS.astype("int64")), COUNTS),
    "backed": Case(lambda f: backed(data(), f), COUNTS),
    "no cells": Case(lambda f: data()[:0], says="no cells to look at"),
    "one cell": Case(lambda f: data()[7:8], COUNTS[7:8]),
    "cell names that repeat": Case(
        lambda f: data(cells=["c"] * 60), COUNTS, r"cells that occur more than once: 1 \(first: c\)"
    ),
    "log-transformed": Case(lambda f: data(log_normalised()), says="log-transformed"),
    "a negative value": Case(
        lambda f: data(edited(-1, 3, 3)), says="1 values are negative .first: cell cell3"
    ),
    "a cell without counts": Case(
        lambda f: data(edited(0, 3)), says="1 of 60 cells have no counts"
    ),
    "an array": Case(
        lambda f: COUNTS, says="adata must be an AnnData, not ndarray", error=TypeError
    ),
    "some cells": Case(lambda f: data(), COUNTS[[7, 59, 0]], settings=dict(indices=[7, -1, 0])),
    "a mask": Case(lambda f: data(), COUNTS[:20], settings=dict(indices=np.arange(60) < 20)),
    "a slice": Case(lambda f: data(), COUNTS[5:9], settings=dict(indices=slice(5, 9))),
    "indices out of range": Case(
        lambda f: data(),
        says=r"2 of 3 indices are out of range \(first: 60\): there are 60 cells, 0 to 59",
        settings=dict(indices=[0, 60, 99]),
    ),
    "a mask of the wrong length": Case(
        lambda f: data(),
        says="a mask of cells needs 60 entries, not 3",
        settings=dict(indices=[True, False, True]),
    ),
    "indices that are no integers": Case(
        lambda f: data(),
        says=r"positions of cells or a mask, not 1.0 \(float64\)",
        settings=dict(indices=[1.0, 2.0]),
    ),
    "names of cells": Case(
        lambda f: data(), says="not 'cell0'.*get_indexer", settings=dict(indices=["cell0", "cell1"])
    ),
    "a single position": Case(lambda f: data(), COUNTS[[7]], settings=dict(indices=7)),
    "no indices": Case(lambda f: data(), says="no cells to look at", settings=dict(indices=[])),
}


def _mutated(adata, X="as it is", column=None):
    "What AnnData's constructor would not take."
    if not isinstance(X, str):
        adata.X = X
    if column is not None:
        adata.var["gene_ids"] = column
    return adata


ad.AnnData._mutated = _mutated


def made(case, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case.make(folder)


def parts(values):
    if sparse.issparse(values):
        return values.data, values.indices, values.indptr
    return (np.asarray(values),) if isinstance(values, (np.ndarray, pd.DataFrame)) else ()


def fingerprint(adata):
    """Of all that an AnnData holds, its types and layouts included; of a backed one, of its file
    too.
    """
    if not isinstance(adata, ad.AnnData):
        return str(adata) if isinstance(adata, str) else "no AnnData"
    digest = hashlib.sha256()
    if adata.isbacked:
        digest.update(Path(adata.filename).read_bytes())
    layers = [adata.layers[name] for name in adata.layers if name is not None]
    raw = None if adata.isbacked or adata.raw is None else adata.raw.X
    for values in (None if adata.isbacked else adata.X, *layers, raw):
        digest.update(f"{type(values)} {getattr(values, 'dtype', '')}".encode())
        for part in parts(values):
            digest.update(part.tobytes() if part.dtype != object else repr(part.tolist()).encode())
    for frame in (adata.obs, adata.var):
        digest.update(frame.to_csv().encode())
    return digest.hexdigest()


def run(work):
    "(result or error, warnings in one line each) of a call."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = work()
        except Exception as error:
            result = error
    return result, [
        str(w.message)
        for w in caught
        if issubclass(w.category, (UserWarning, RuntimeWarning))
        and "run_functions_eagerly" not in str(w.message)
    ]


def new_model(case, folder):
    "Made of the case's data, trained for an epoch, and asked for its embedding."
    adata = made(case, folder)
    before = fingerprint(adata)

    def work():
        model = vampsc.VAE(adata, **SMALL, **{**own, **(case.settings or {})})
        assert isinstance(model.X.toarray(), np.ndarray)
        model.train(max_epochs=1, progress=False)
        return SimpleNamespace(
            model=model, counts=model.X.toarray(), embedding=model.get_latent_representation()
        )

    result, said = run(work)
    assert fingerprint(adata) == before, "the data were changed"
    return result, said


def embedded(model, case, folder):
    """The case's data in a trained model, and beside it the embedding of the counts that it should
    see.
    """
    adata = made(case, folder)
    before = fingerprint(adata)
    result, said = run(lambda: model.get_latent_representation(adata, **(case.settings or {})))
    assert fingerprint(adata) == before, "the data were changed"
    return result, said


def check_stop(case, error, said):
    assert isinstance(error, case.error), repr(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert Path(frame.filename).resolve().parent == HERE, f"raised in {frame.filename}: {error!r}"
    assert "\n" not in str(error) and re.search(case.says, str(error)), str(error)


def check_said(case, said):
    assert all("\n" not in line for line in said)
    if not case.says:
        assert not said
    else:
        assert len(said) == 1 and re.search(case.says, said[0]), said


@pytest.fixture
def eagerly():
    """Without compiling each small network's step, which takes TensorFlow ten times as long as the
    rest.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("name", CASES)
def test_new_model(name, eagerly, tmp_path):
    case = CASES[name]
    result, said = new_model(case, tmp_path)
    if case.counts is None:
        return check_stop(case, result, said)
    if isinstance(result, Exception):
        raise result
    seen = pd.DataFrame(result.counts, columns=result.model.genes.symbols).iloc[
        :, : np.shape(case.counts)[1]
    ]
    assert np.array_equal(seen, np.float32(case.counts)) and result.counts.sum(
        dtype="float64"
    ) == seen.to_numpy().sum(dtype="float64")
    assert result.embedding.shape == (len(case.counts), 2) and np.isfinite(result.embedding).all()
    check_said(case, said)
    assert re.search(case.report, repr(result.model.mapping)) and "\n" not in repr(
        result.model.mapping
    )


@pytest.fixture(scope="module")
def model():
    return vampsc.VAE(data(), gene_space=None, **SMALL).train(max_epochs=1, progress=False)


@pytest.mark.parametrize("name", QUERIES)
def test_query(name, model, tmp_path):
    case = QUERIES[name]
    result, said = embedded(model, case, tmp_path)
    if case.counts is None:
        return check_stop(case, result, said)
    if isinstance(result, Exception):
        raise result
    expected = np.concatenate(
        [np.asarray(model.network.encode_counts(np.float32(row)[None])[0]) for row in case.counts]
    )
    np.testing.assert_allclose(result, expected, atol=1e-5)
    check_said(case, said)


def test_a_file_that_was_closed(tmp_path):
    adata = backed(data(), tmp_path)
    model = vampsc.VAE(adata, gene_space=None, **SMALL)
    adata.file.close()
    for verb in (
        model.get_latent_representation,
        lambda: model.train(max_epochs=1, progress=False),
    ):
        error, _ = run(verb)
        check_stop(
            Case(
                None,
                says="h5ad file of these counts was closed: read it again with backed='r'",
                error=OSError,
            ),
            error,
            [],
        )


def test_same_counts_same_result(model, tmp_path):
    "Counts in another form give the very numbers that plain ones give."
    for name in ("int64", "backed, CSR", "entries in no order, added up, zeros stored"):
        result, _ = new_model(CASES[name], tmp_path)
        np.testing.assert_array_equal(result.embedding, model.get_latent_representation())


@pytest.mark.parametrize(
    "labels, words",
    [
        ([np.nan] * 60, "none of 60 cells has a label"),
        ([""] * 59 + [" "], "none of 60"),
        (["a"] * 60, "at least 2 different labels; found 1"),
        (["a"] * 30 + [np.nan] * 30, "found 1, and 30 of 60 cells have none"),
        ([f"cell{i}" for i in range(60)], "2 cells; each of 60 cells has its own label"),
        ([["a"]] * 60, "holds no labels but lists"),
    ],
)
def test_labels_that_cannot_judge(labels, words):
    adata = data()
    z = np.random.default_rng(0).standard_normal((60, 2))
    adata.obs["kind"] = pd.Series(labels, adata.obs_names)
    for judge in (metrics.silhouette, metrics.nmi_ari, metrics.knn_purity):
        with pytest.raises(ValueError, match=words) as error:
            judge(z, organs.labels(adata, "kind"))
        check_stop(Case(None, says=words), error.value, [])


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b"] * 29 + ["c", np.nan],
        ["a", "b"] * 29 + ["", " "],
        [1, 2] * 29 + [np.nan, 3],
        [True, False] * 30,
        pd.Categorical(["a", "b"] * 29 + [None, "b"], ["z", "b", "a"]),
    ],
)
def test_labels_that_can(labels):
    adata = data()
    z = np.random.default_rng(0).standard_normal((60, 2))
    adata.obs["kind"] = pd.Series(labels, adata.obs_names)
    kinds = organs.labels(adata, "kind")
    known = pd.Series(kinds).notna().to_numpy()
    assert metrics.n_labelled(kinds) == metrics.n_labelled(adata.obs["kind"]) == known.sum()
    for judge in (metrics.silhouette, metrics.nmi_ari, metrics.knn_purity):
        assert judge(z, kinds) == judge(z, adata.obs["kind"]) == judge(z[known], list(kinds[known]))


def main():
    "Print what each case says."
    import tempfile

    trained = vampsc.VAE(data(), gene_space=None, **SMALL).train(max_epochs=1, progress=False)
    for title, cases, work in (
        ("new model", CASES, new_model),
        ("query", QUERIES, lambda *c: embedded(trained, *c)),
    ):
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result, said = work(case, Path(folder))
                except pytest.skip.Exception as why:
                    print(f"{title} | {name} | skipped: {why}")
                    continue
            stops = f"stops: {type(result).__name__}: {result}"
            report = (
                repr(result.model.mapping)
                if case.report and isinstance(result, SimpleNamespace)
                else ""
            )
            works = "works" + (": " if said or report else "") + " ".join([*said, report])
            outcome = stops if isinstance(result, Exception) else works
            print(f"{title} | {name} | {outcome}", flush=True)


if __name__ == "__main__":
    main()
