"The mapping onto a gene space against one loop over the genes and dictionaries."

import gzip
import json
import warnings
from collections import Counter
from importlib import resources

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from server import Server

from vampsc import genes
from vampsc.genes import (
    GeneSpace,
    GeneSpaceError,
    bare_ids,
    cells_with,
    check_layer,
    layer_names,
    listed,
    mapping,
    positions,
    raw_of,
    resolve,
    values_of,
)

INS, GCG, SST, PPY, XGENE, YGENE = (
    f"ENSG{n:011d}" for n in (254647, 115263, 157005, 108849, 2586, 292348)
)
SPACE = GeneSpace(
    "toy", [INS, GCG, SST, PPY, XGENE, YGENE], ["INS", "GCG", "SST", "PPY", "CD99", "CD99"]
)


@pytest.fixture(scope="module")
def gencode():
    return GeneSpace.load("gencode-48")


def cells_of(names, n=4, seed=0, **var):
    X = np.random.default_rng(seed).poisson(2, (n, len(names))).astype("float32")
    return ad.AnnData(X, var=pd.DataFrame(var, index=list(names)))


def slow_places(space, names):
    "Place of each gene of a list of genes, each with several names (identifier first), or None."
    by_id = {i.split(".")[0]: k for k, i in enumerate(space.ids)}
    times = Counter(space.symbols)
    by_symbol = {s: k for k, s in enumerate(space.symbols) if times[s] == 1}
    for gene in names:
        stems = [name.split(".")[0] if name.startswith("ENSG") else name for name in gene]
        yield next(
            (t[n] for t, of in ((by_id, stems), (by_symbol, gene)) for n in of if n in t), None
        )


def slow_map(space, adata, columns=()):
    X = np.asarray(adata.X, "float64")
    out = np.zeros((adata.n_obs, len(space)))
    names = zip(adata.var_names, *(adata.var[c] for c in columns))
    for j, place in enumerate(slow_places(space, names)):
        if place is not None:
            out[:, place] += X[:, j]
    return out


def test_every_case_at_once():
    data = cells_of(["GCG", f"{INS}.7", "INS", "MALAT1", "CD99", f"{YGENE}.2", SST])
    mapped, report = SPACE.map(data)
    X = data.X
    assert sparse.issparse(mapped) and mapped.format == "csr" and mapped.dtype == np.float32
    assert np.array_equal(
        mapped.toarray(),
        np.column_stack([X[:, 1] + X[:, 2], X[:, 0], X[:, 6], 0 * X[:, 0], 0 * X[:, 0], X[:, 5]]),
    )
    assert (
        report.recognised,
        report.by_id,
        report.unrecognised,
        report.missing,
        report.summed,
    ) == (5, 3, 2, 2, 1)
    assert report.ambiguous == ("CD99",) and report.n_data == 7 and report.n_space == 6
    assert np.isclose(report.share_of_counts, 1 - X[:, [3, 4]].sum() / X.sum())
    assert all(word in repr(report) for word in ("toy", "CD99", "symbol")) and "\n" not in repr(
        report
    )


@given(
    st.lists(
        st.sampled_from(
            [
                INS,
                f"{INS}.1",
                "INS",
                f"{GCG}.12",
                "GCG",
                SST,
                "PPY",
                "CD99",
                XGENE,
                "ACTB",
                "RP11-206L10.2",
            ]
        ),
        min_size=1,
        max_size=14,
    ),
    st.integers(0, 9),
)
def test_any_names_against_the_loop(names, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names may repeat
        data = cells_of(names, seed=seed)
    expected = slow_map(SPACE, data)
    places = list(slow_places(SPACE, [[n] for n in names]))
    if all(p is None for p in places):
        with pytest.raises(GeneSpaceError, match="gene_space=None"):
            SPACE.map(data)
    else:
        mapped, report = SPACE.map(data)
        assert np.array_equal(mapped.toarray(), expected)
        assert report.recognised == sum(p is not None for p in places)


def test_identifier_column_beats_symbols(gencode):
    pick = np.random.default_rng(1).choice(len(gencode), 300, replace=False)
    names = [f"sym{i}" for i in range(200)] + list(gencode.symbols[pick[200:]])
    data = cells_of(names, ensembl=[f"{i}.3" for i in gencode.ids[pick[:250]]] + [np.nan] * 50)
    mapped, report = gencode.map(data)
    data.var["ensembl"] = data.var["ensembl"].fillna("")
    assert (
        np.array_equal(mapped.toarray(), slow_map(gencode, data, ["ensembl"]))
        and report.by_id >= 250
    )
    where = positions(gencode, data)[0]
    assert np.array_equal(where[:250], pick[:250])


def test_real_data_against_the_loop(gencode, shared_data):
    data = ad.read_h5ad(shared_data / "blood_zheng_facs.h5ad")[:20]
    data = ad.AnnData(data.X.toarray(), var=data.var)
    assert np.array_equal(gencode.map(data)[0].toarray(), slow_map(gencode, data, ["ensembl"]))


def test_a_missing_layer_is_named_with_those_that_are_there():
    adata = ad.AnnData(np.ones((2, 3), "float32"), layers={"counts": np.ones((2, 3))})
    check_layer(adata, None)
    check_layer(adata, "counts")
    words = "no layer 'raw' in adata.layers; it has: counts; look there$"
    with pytest.raises(GeneSpaceError, match=words):
        check_layer(adata, "raw", "; look there")


def test_order_and_layer(gencode):
    data = cells_of(gencode.ids[::7])
    data.layers["double"] = sparse.csc_matrix(2 * data.X)
    mapped = gencode.map(data)[0]
    shuffled = data[:, np.random.default_rng(0).permutation(data.n_vars)]
    assert (gencode.map(shuffled)[0] != mapped).nnz == 0
    assert (gencode.map(data, layer="double")[0] != 2 * mapped).nnz == 0
    with pytest.raises(GeneSpaceError, match="no layer 'spliced'.*double"):
        gencode.map(data, layer="spliced")


def test_embedded_table(gencode, shared_data):
    assert len(gencode) == 20_120 == len(set(gencode.ids)) and all(
        len(i) == 15 and i.startswith("ENSG") for i in gencode.ids
    )
    path = shared_data / "Homo_sapiens_GRCh38_97.csv"
    old = GeneSpace.load(path)
    reference = pd.read_csv(path)
    assert len(old) == 19_986 and len(set(old.ids) & set(gencode.ids)) == 19_795
    assert list(old.ids) == list(reference["ensg"]) and len(old.ambiguous) == 15


@pytest.mark.parametrize("which", [slice(10, 40), np.arange(20_120) % 5 == 0, np.array([7, 3, -1])])
def test_subset(gencode, which):
    which = np.arange(len(gencode))[which] if isinstance(which, slice) else which
    part = gencode.subset(which)
    assert np.array_equal(part.ids, gencode.ids[which]) and part.ambiguous == gencode.ambiguous
    data = cells_of(gencode.ids)
    assert (part.map(data)[0] != gencode.map(data)[0][:, which]).nnz == 0


def test_subset_maps_as_the_whole():
    whole = GeneSpace("two", [INS, GCG], [INS, "GCG"])
    # the identifier says INS, the symbol GCG
    data = cells_of(["GCG", "other"], ensembl=[INS, GCG])
    assert np.array_equal(
        whole.subset([1]).map(data)[0].toarray(), whole.map(data)[0][:, [1]].toarray()
    )


@pytest.mark.parametrize(
    "which, words",
    [
        (np.ones(3, bool), "mask"),
        ([0.5], "positions"),
        ([20_120], "below 20,120"),
        ([1, 1], "more than once"),
        (np.zeros(20_120, bool), "no genes"),
    ],
)
def test_subset_refuses(gencode, which, words):
    with pytest.raises(GeneSpaceError, match=words):
        gencode.subset(which)


def test_dictionary(gencode):
    for space in (
        gencode.subset([*range(9), list(gencode.symbols).index("CD99")]),
        SPACE,
        GeneSpace.of(cells_of("abc")),
    ):
        back = GeneSpace.from_dict(json.loads(json.dumps(space.to_dict())))
        assert (
            back == space
            and back.name == space.name
            and back.ambiguous == space.ambiguous
            and back.whole == space.whole
        )


def test_resolve(gencode, tmp_path):
    human = cells_of([*gencode.ids[:50], *map(str, range(50))])
    other = cells_of([*gencode.ids[:49], *map(str, range(51))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto", human) == gencode and resolve("gencode-48", other) == gencode
        assert (
            list(resolve(None, human).ids) == list(human.var_names)
            and resolve(SPACE, human) is SPACE
        )
    with pytest.warns(UserWarning, match="49 of the data's 100 genes.*gene_space=None"):
        own = resolve("auto", other)
    assert list(own.ids) == list(other.var_names)
    assert np.array_equal(own.map(other[:, ::-1])[0].toarray(), other.X)
    pd.DataFrame({"symbol": ["INS", ""], "id": [f"{INS}.9", GCG]}).to_csv(
        tmp_path / "mine.csv.gz", index=False
    )
    for path in (tmp_path / "mine.csv.gz", str(tmp_path / "mine.csv.gz")):
        mine = resolve(path, human)
        assert (
            mine.name == "mine"
            and list(mine.ids) == [INS, GCG]
            and list(mine.symbols) == ["INS", GCG]
        )


@pytest.mark.parametrize(
    "space, words",
    [
        ("gencode-47", "unknown gene space.*gencode-48"),
        ("ensembl-x", "ensembl-97"),
        (3, "not int"),
        ("{}/no_columns.csv", "id,symbol"),
        ("{}/empty.csv", "cannot be read"),
        ("{}/cut.csv.gz", "cannot be read"),
    ],
)
def test_resolve_refuses(space, words, tmp_path):
    (tmp_path / "no_columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    table = (resources.files("vampsc") / "data" / "genes_gencode_48.csv.gz").read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(table[: len(table) // 2])
    with pytest.raises(GeneSpaceError, match=words):
        resolve(space.format(tmp_path) if isinstance(space, str) else space, cells_of("ab"))


def test_spaces_and_coverage_refused(gencode):
    data = cells_of([INS, "a", "b", "c"])
    with pytest.raises(
        GeneSpaceError, match=r"only 1 of the data's 4 genes \(25.0%\).*gencode-48"
    ) as error:
        gencode.map(data, min_recognised=0.5)
    assert (
        "\n" not in str(error.value) and gencode.map(data, min_recognised=0.25)[1].recognised == 1
    )
    with pytest.raises(GeneSpaceError, match="2 symbols"):
        GeneSpace("x", ["a"], ["b", "c"])
    with pytest.raises(GeneSpaceError, match="make_unique"):
        GeneSpace("x", ["a", "b", "a"])


@given(st.text(max_size=30))
def test_bare_ids_leave_other_names(text):
    if not text.startswith("ENS"):
        assert bare_ids([text])[0] == text
    assert bare_ids([f"{INS}.{abs(hash(text)) % 100}"])[0] == INS


# ---- raw


def with_raw(form, seed=0):
    "Counts of 8 genes in raw, halves of 5 of them in X."
    full = cells_of("abcdefgh", 20, seed)
    full.X = form(full.X)
    data = full[:, :5].copy()
    data.raw = full
    data.X = data.X * 0.5
    return data, full


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("place", ["memory", "file"])
def test_raw_has_the_cells_of_the_data_and_its_own_genes(form, place, tmp_path):
    data, full = with_raw(form)
    data.obs["kind"] = "t"
    if place == "file":
        data.write_h5ad(tmp_path / "cells.h5ad")
        data = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")

    def dense(X):
        return X[:].toarray() if hasattr(X[:], "toarray") else np.asarray(X[:])

    raw = raw_of(data)
    assert (
        list(raw.var_names) == list("abcdefgh")
        and raw.obs.equals(data.obs)
        and np.array_equal(dense(raw.X), dense(full.X))
    )
    assert place == "file" or np.shares_memory(
        *(getattr(X, "data", X) if form is not np.asarray else X for X in (raw.X, data.raw.X))
    )
    assert (
        place == "memory"
        or type(raw.X).__module__.split(".")[0] == "h5py"
        or not sparse.issparse(raw.X)
    )
    part = raw_of(data[[7, 0, 3]])
    assert np.array_equal(dense(part.X), dense(full.X)[[7, 0, 3]]) and list(part.obs_names) == list(
        data.obs_names[[7, 0, 3]]
    )


@pytest.mark.parametrize(
    "names, settings, words",
    [
        (["a", 3, None], {}, "a, 3, None"),
        ([], {}, "none"),
        ([], dict(none=""), ""),
        ((), dict(most=2), "none"),
        ("abc", dict(most=2), "a, b, ..."),
        ("ab", dict(most=2), "a, b"),
        (np.array([1.5, 2.0]), {}, "1.5, 2.0"),
        (pd.Index([7, 8]), {}, "7, 8"),
        ((v for v in "xyz"), dict(most=1), "x, ..."),
    ],
)
def test_names_in_messages(names, settings, words):
    assert listed(names, **settings) == words


def test_layers_beside_X():
    "X is among the layers from anndata 0.13 on; a layer's name may be a number."
    data = cells_of("abc")
    assert layer_names(data) == []
    with pytest.raises(GeneSpaceError, match="no layer 'counts' in adata.layers; it has: none$"):
        values_of(data, "counts")
    data.layers["counts"] = data.X
    data.layers[7] = data.X
    assert layer_names(data) == ["counts", 7]
    with pytest.raises(
        GeneSpaceError, match="no layer 'spliced' in adata.layers; it has: counts, 7$"
    ):
        values_of(data, "spliced")
    data.X = None
    with pytest.raises(GeneSpaceError, match="adata.X is empty: pass layer=; layers: counts, 7$"):
        values_of(data)
    assert np.array_equal(values_of(data, 7), values_of(data, "counts"))
    with pytest.raises(GeneSpaceError, match="pass layer=; layers: counts, 7"):
        raw_of(data)


def test_raw_refused():
    data = cells_of("abc")
    with pytest.raises(GeneSpaceError, match="adata.raw is empty.*adata.raw = adata.copy"):
        raw_of(data)
    data.layers["counts"] = data.X
    with pytest.raises(GeneSpaceError, match="pass layer=; layers: counts"):
        raw_of(data)
    for wrong, words in (
        (np.ones((2, 3)), "not ndarray: make one"),
        ("a.h5ad", "organs.load"),
        (with_raw(np.asarray)[0].raw, "use_raw=True"),
    ):
        for take in (
            raw_of,
            lambda adata: mapping(SPACE, adata),
            lambda adata: resolve("auto", adata),
        ):
            with pytest.raises(TypeError, match=f"adata must be an AnnData.*{words}"):
                take(wrong)


# ---- the report, and names that are not known


def test_report_names_what_it_counts():
    data = cells_of([INS, "INS", "GCG", "CD99", "x1", "x2", *(f"y{i}" for i in range(9))], 30)
    data.X[:, [2, 4]] = 0
    report = SPACE.map(data)[1]
    assert (
        report.added_up == ("INS",)
        and report.unseen == 1
        and report.missing == 4
        and "x1" not in report.not_used
        and len(report.not_used) == 5
    )
    before = mapping(SPACE, data)[1]
    assert (
        before.unseen is None
        and np.isnan(before.share_of_counts)
        and before.not_used == ("CD99", "x1", "x2", "y0", "y1")
        and "nan" not in repr(before)
    )
    for words in (
        (
            "3 of the data's 15 genes have a place in toy (6 genes): 1 by identifier, 2 by symbol;"
            " they hold"
        ),
        "12 genes of the data are not used (",
        "1 (CD99)",
        "1 gene of the space is the sum of several columns (INS)",
        "4 genes of the space are missing from the data, set to 0 in every cell.",
        "1 gene of the space is in the data without a count in any cell.",
    ):
        assert words in repr(report), words


def test_cells_with():
    X = np.random.default_rng(0).poisson(0.5, (30, 9)).astype("float32")
    stored = sparse.csr_matrix(X)
    # zeros that are stored are no counts
    stored.data[::4] = 0
    assert np.array_equal(cells_with(stored), (stored.toarray() > 0).sum(0))


@pytest.mark.parametrize(
    "name, found",
    [
        ("INS", True),
        (" INS ", True),
        (f"{INS}.12", True),
        ("ins", False),
        ("Ins", False),
        ("IDDM2", False),
        ("INS-IGF2", False),
        (f"{INS}0", False),
        ("ENST00000381330", False),
    ],
)
def test_names_are_not_guessed(name, found):
    "Neither case nor former names: IDDM2 is a synonym of INS."
    assert (positions(SPACE, cells_of([name, "PPY"]))[0][0] == 0) == found


@pytest.mark.parametrize(
    "names, kind",
    [
        ([f"ENSMUSG{i:011d}.3" for i in range(9)], "mouse genes"),
        (["Ins1", "Gcg", "Sst", "Actb"], "symbols of mouse or rat"),
        ([f"ENST{i:011d}" for i in range(9)], "transcripts"),
        ([f"FBgn{i:07d}" for i in range(9)], "fruit fly"),
        ([f"ENSSSCG{i:011d}" for i in range(9)], "genes of another species"),
        (map(str, range(9)), "numbers"),
        (["GRCh38_INS", "GRCh38_GCG"], "names with a genome before them"),
        (["Gene1", "Gene2", "Gene3"], None),
    ],
)
def test_names_of_another_kind(gencode, names, kind):
    data = cells_of(list(names))
    with pytest.warns(
        UserWarning, match="known to gencode-48.*own genes.*gene_space=None"
    ) as caught:
        resolve("auto", data)
    assert (
        len(caught) == 1
        and "\n" not in str(caught[0].message)
        and "maps all the same" not in str(caught[0].message)
    )
    assert ("they look like" in str(caught[0].message)) == (kind is not None) and (
        kind or ""
    ) in str(caught[0].message)
    with pytest.raises(GeneSpaceError, match=f"only 0 of.*{kind or 'gene_space=None'}"):
        gencode.map(data)


@pytest.mark.parametrize("known, works", [(3, False), (4, True)])
def test_less_than_a_tenth_of_the_genes_stops(gencode, known, works):
    data = cells_of([*gencode.ids[:known], *(f"x{i}" for i in range(40 - known))])
    if works:
        assert gencode.map(data)[1].recognised == known
    else:
        with pytest.raises(
            GeneSpaceError,
            match=r"only 3 of the data's 40 genes \(7.5%\).*not: x0, x1, x2; the space has: ",
        ):
            gencode.map(data)
        assert gencode.map(data, min_recognised=0)[1].recognised == 3


# ---- Ensembl

HEAD = (
    "#!genome-build GRCh38.p12\n#!genome-version GRCh38\n#!genome-date"
    " 2013-12\n#!genome-build-accession NCBI:GCA_000001405.27\n#!genebuild-last-updated 2019-03\n"
)


def gtf(genes):
    """Lines as in a release of Ensembl: each gene with its transcript and exons; genes of other
    kinds between them.
    """

    def block(place, ident, symbol, kind):
        about = (
            f'gene_id "{ident}"; gene_version "3"; gene_name "{symbol}"; gene_source "havana";'
            f' gene_biotype "{kind}";'
        )
        position = f"{place * 10 + 1}\t{place * 10 + 9}"
        at = f"{place % 22 + 1}\tensembl_havana\t{{}}\t{position}\t.\t+\t.\t{about}"
        inner = (
            f' transcript_id "ENST{place:011d}"; transcript_biotype "protein_coding"; tag "basic";'
        )
        return "\n".join(
            [
                at.format("gene"),
                at.format("transcript") + inner,
                at.format("exon") + inner + ' exon_number "1";',
            ]
        )

    lines = [block(place, *gene, "protein_coding") for place, gene in genes]
    lines.insert(
        len(lines) // 2,
        block(7, "ENSG00000223972", "DDX11L1", "transcribed_unprocessed_pseudogene"),
    )
    lines.insert(0, block(8, "ENSG00000237613", "FAM138A", "lncRNA"))
    return gzip.compress((HEAD + "\n".join(lines) + "\n").encode(), 1)


@pytest.fixture
def ensembl(monkeypatch, tmp_path):
    "A server in Ensembl's place, and an empty cache."
    with Server().running() as server:
        monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("VAMPSC_MIRRORS", f"https://ftp.ensembl.org/={server.address}/")
        yield server


GTF = "/pub/release-{0}/gtf/homo_sapiens/Homo_sapiens.GRCh38.{0}.gtf.gz"


def test_ensembl_97_is_the_papers(ensembl, shared_data):
    paper = pd.read_csv(shared_data / "Homo_sapiens_GRCh38_97.csv", index_col=0)
    ensembl.files[GTF.format(97)] = gtf(zip(paper.index, zip(paper["ensg"], paper["name"])))
    space = GeneSpace.load("ensembl-97")
    assert (
        len(space) == 19_986
        and list(space.ids) == list(paper["ensg"])
        and list(space.symbols) == list(paper["name"])
    )
    assert len(space.ambiguous) == 15
    # the second time from the cache
    assert GeneSpace.load("ensembl-97") == space and len(ensembl.asked) == 1


def test_ensembl_97_maps(ensembl):
    ensembl.files[GTF.format(97)] = gtf([(1, (INS, "INS")), (2, (GCG, "GCG"))])
    assert (
        resolve("ensembl-97", cells_of(["GCG", "x"])).map(cells_of(["GCG", "x"]))[0].shape[1] == 2
    )


def test_ensembl_refused(ensembl, tmp_path):
    with pytest.raises(OSError, match="no such file.*by hand: .*Homo_sapiens.GRCh38.97.gtf.gz"):
        GeneSpace.load("ensembl-97")
    ensembl.files[GTF.format(97)] = gzip.compress(b"no gtf")
    with pytest.raises(
        GeneSpaceError, match="Homo_sapiens.GRCh38.97.gtf.gz names no protein-coding genes"
    ):
        GeneSpace.load("ensembl-97")
    ensembl.files[GTF.format(98)] = gtf([(1, (INS, "INS"))] * 500)[:-40]
    with pytest.raises(GeneSpaceError, match="98.gtf.gz is damaged.*delete it"):
        GeneSpace.load("ensembl-98")


@pytest.fixture(scope="module")
def two_cells():
    X = sp.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], "float32"))
    return ad.AnnData(X, layers={"twice": 2 * X}, var=pd.DataFrame(index=list("abc")))


def test_values_and_matrix_of_x_and_of_a_layer(two_cells):
    assert genes.values_of(two_cells) is two_cells.X
    assert (genes.matrix_of(two_cells, "twice") != 2 * two_cells.X).nnz == 0 and genes.matrix_of(
        two_cells
    ).dtype == np.float32
    with pytest.raises(genes.GeneSpaceError, match="no layer 'thrice'.*twice"):
        genes.values_of(two_cells, "thrice")
    with pytest.raises(genes.GeneSpaceError, match="X is empty"):
        genes.matrix_of(ad.AnnData(obs=two_cells.obs, var=two_cells.var))


def test_counts_are_in_one_place():
    genes.check_places(None, True)
    genes.check_places("twice", False)
    with pytest.raises(genes.GeneSpaceError, match="two places"):
        genes.check_places("twice", True)


def test_a_report_with_counts_names_the_lost_genes_in_most_cells(two_cells):
    space = genes.GeneSpace("two", ids=["a", "b"], symbols=["a", "b"])
    where, report = genes.mapping(space, two_cells)
    told = genes.with_counts(report, where, np.array([1, 0, 1]), two_cells.var_names, share=4 / 6)
    assert isinstance(told, genes.MappingReport) and (
        told.n_data,
        told.recognised,
        told.missing,
    ) == (3, 2, 0)
    assert told.not_used == ("c",) and told.share_of_counts == 4 / 6
    # b has a column and no count
    assert told.unseen == 1
