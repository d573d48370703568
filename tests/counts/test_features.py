"""Which features are genes and by which column, cells without a count in the genes used, and labels
that are words for missing ones.
"""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vampsc
from vampsc import figures, metrics, organs
from vampsc.counts import EmptyCellsError, check_counts, checked_counts, counts_of, has_counts
from vampsc.genes import (
    NO_GENE,
    GeneSpace,
    GeneSpaceError,
    mapping,
    missing_labels,
    other_features,
    positions,
    resolve,
)
from vampsc.intake import batch_codes
from vampsc.models import VAE

GENCODE = GeneSpace.load("gencode-48")
IDS = dict(zip(GENCODE.symbols, GENCODE.ids))
SYMBOLS = [s for s in GENCODE.symbols if s not in GENCODE.ambiguous][:37] + ["CD4", "CD8A", "CD19"]
HUMAN = [IDS[s] for s in SYMBOLS]
SMALL = dict(hidden=(8,), n_latent=2)


def cells_of(names, X=None, n=60, **var):
    names = list(names)
    if X is None:
        X = np.random.default_rng(0).poisson(2, (n, len(names))).astype("float32") + np.eye(
            n, len(names), dtype="float32"
        )
    obs = pd.DataFrame(
        {"donor": [f"d{i % 2}" for i in range(len(X))]}, index=[f"c{i}" for i in range(len(X))]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not unique")
        return ad.AnnData(sparse.csr_matrix(X), obs, pd.DataFrame(var, index=names))


# ---- features that are no genes


def cite(column="feature_types", gene="Gene Expression", other="Antibody Capture", names=SYMBOLS):
    """40 genes, and antibodies of the same names as the last three, with counts that would swamp
    them.
    """
    X = np.random.default_rng(1).poisson(2, (60, 43)).astype("float32") + 1
    X[:, 40:] = 300
    return cells_of(
        [*names, "CD4", "CD8A", "CD19"],
        X,
        **{"gene_ids": [*HUMAN, "CD4", "CD8A", "CD19"], column: [gene] * 40 + [other] * 3},
    )


KINDS = [
    ("feature_types", "Gene Expression", "Antibody Capture"),
    ("feature_type", "Gene Expression", "CRISPR Guide Capture"),
    ("modality", "rna", "prot"),
    ("Feature.Types", "gene_expression", "Multiplexing Capture"),
    ("feature_types", "GEX", "Negative Control Probe"),
]


@pytest.mark.parametrize(
    "column, gene, other, names, space",
    [
        *((*kind, SYMBOLS, None) for kind in KINDS),
        *((*KINDS[0], names, space) for names in (SYMBOLS, HUMAN) for space in (GENCODE, "auto")),
    ],
)
def test_antibodies_take_no_place(column, gene, other, names, space):
    data = cite(column, gene, other, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = resolve(space, data)
        X, report = checked_counts(data, chosen)
    at = [
        list(chosen.symbols if space else chosen.ids).index(name)
        for name in (SYMBOLS if space else names)
    ]
    assert np.array_equal(X[:].toarray()[:, at], data.X.toarray()[:, :40]) and X.totals.max() < 300
    assert (
        report.other_features == ((other, 3),)
        and report.n_data == report.recognised == 40
        and report.share_of_counts == 1
    )
    assert (
        f"Features that are no genes are left out: {other} 3." in repr(report)
        and list(positions(chosen, data)[0][40:]) == [NO_GENE] * 3
    )
    if space:
        assert (chosen.map(data)[0] != X[:]).nnz == 0 and chosen.map(data)[1].share_of_counts == 1


def test_antibodies_in_a_part_of_the_space_and_in_a_model():
    data = cite()
    part = GENCODE.subset([list(GENCODE.symbols).index(s) for s in SYMBOLS[20:]])
    assert np.array_equal(part.map(data)[0].toarray(), data.X.toarray()[:, 20:40])
    X = counts_of(data, GENCODE)[0]
    fewer = X.columns(np.unique(X.where[X.where >= 0])[:5])
    assert np.array_equal(
        fewer.dense(np.arange(60)), X[:].toarray()[:, np.unique(X.where[X.where >= 0])[:5]]
    )
    model = VAE(data, gene_space=None, **SMALL)
    assert len(model.genes) == 40 and np.array_equal(
        model.X.dense(np.arange(60)), data.X.toarray()[:, :40]
    )
    assert model.get_latent_representation(data[:5]).shape == (
        5,
        2,
    ) and model.query_mapping.other_features == (("Antibody Capture", 3),)


@pytest.mark.parametrize(
    "values",
    [
        ["protein_coding", "lncRNA"],
        ["gene", "gene"],
        [np.nan, np.nan],
        ["", "nan"],
        ["Gene Expression", np.nan],
    ],
)
def test_types_of_genes_are_genes(values):
    assert not any(
        other_features(pd.DataFrame({"feature_type": values, "feature_biotype": ["gene"] * 2}))
    )
    assert not any(other_features(pd.DataFrame({"feature_types": pd.Categorical(values)})))


def test_no_gene_at_all():
    peaks = cells_of([f"chr1:{i}00-{i}50" for i in range(40)], feature_types=["Peaks"] * 40)
    for space in (None, "auto", "gencode-48"):
        with pytest.raises(
            GeneSpaceError,
            match="none of the data's 40 features is a gene; adata.var calls them Peaks.*mdata",
        ):
            VAE(peaks, gene_space=space, **SMALL)


# ---- the column that names the gene


def test_peaks_are_not_their_nearest_genes():
    peaks = cells_of(
        [f"chr1:{i}00-{i}50" for i in range(40)],
        nearest_gene_id=HUMAN,
        gene_id=HUMAN,
        gene_name=SYMBOLS,
    )
    with pytest.raises(GeneSpaceError, match="only 0 of the data's 40.*peaks of chromatin"):
        mapping(GENCODE, peaks)
    with pytest.raises(
        GeneSpaceError,
        match="look like peaks of chromatin, not genes .first: chr1:000-050.*gene_space=None for",
    ):
        resolve("auto", peaks)
    assert len(VAE(peaks, gene_space=None, **SMALL).genes) == 40


@pytest.mark.parametrize(
    "names, columns",
    [
        (
            [s.capitalize() for s in SYMBOLS],
            dict(
                gene_ids=[f"ENSMUSG{i:011d}" for i in range(40)],
                human_ortholog=HUMAN,
                ensembl=HUMAN,
            ),
        ),
        ([f"ENSMUSG{i:011d}" for i in range(40)], dict(gene_symbols=SYMBOLS, human_gene_id=HUMAN)),
    ],
)
def test_mouse_genes_do_not_become_human(names, columns):
    mouse = cells_of(names, **columns)
    with pytest.warns(
        UserWarning, match="0 of the data's 40 genes.*look like.*mouse.*orthologs first"
    ) as said:
        assert resolve("auto", mouse).name == "own genes"
    assert len(said) == 1
    with pytest.raises(
        GeneSpaceError, match="only 0 of.*look like.*mouse.*human orthologs first.*gene_space=None"
    ):
        mapping(GENCODE, mouse)
    mouse.var_names = HUMAN  # what the message advises
    assert mapping(GENCODE, mouse)[1].recognised == 40


def test_mouse_genes_have_a_place_among_mouse_genes():
    ids = [f"ENSMUSG{i:011d}" for i in range(40)]
    space = GeneSpace("mouse", ids, [s.capitalize() for s in SYMBOLS])
    for data in (
        cells_of([s.capitalize() for s in SYMBOLS], gene_ids=ids),
        cells_of(ids, gene_symbols=[s.capitalize() for s in SYMBOLS]),
    ):
        assert mapping(space, data)[1].by_id == 40


@pytest.mark.parametrize(
    "column",
    [
        "gene_ids",
        "Ensembl ID",
        "ensembl_gene_id",
        "gene_ids-0",
        "ENSEMBL",
        "feature.id",
        "Accession",
    ],
)
def test_a_column_named_for_it_holds_identifiers(column):
    assert mapping(GENCODE, cells_of(map(str, range(40)), **{column: HUMAN}))[1].by_id == 40


@pytest.mark.parametrize(
    "column", ["nearest_gene", "nearest_gene_id", "human_ortholog", "linked_to", "best_hit"]
)
def test_another_column_does_not(column):
    with pytest.raises(GeneSpaceError, match="only 0 of the data's 40"):
        mapping(GENCODE, cells_of(map(str, range(40)), **{column: HUMAN}))


def test_columns_that_disagree():
    few = cells_of(SYMBOLS, gene_ids=[HUMAN[1], HUMAN[0], *HUMAN[2:]])
    where, report = mapping(GENCODE, few)
    assert (
        report.disagreeing == 2
        and report.disagree == tuple(SYMBOLS[:2])
        and list(GENCODE.ids[where[:2]]) == [HUMAN[1], HUMAN[0]]
    )
    assert "2 genes of the data have an identifier and a symbol of two different genes" in repr(
        report
    )
    with pytest.raises(
        GeneSpaceError,
        match=(
            f"disagree for 40 of 40 genes .first: '{SYMBOLS[0]}' is {SYMBOLS[1]} by its"
            " identifier.*remove the wrong column"
        ),
    ):
        mapping(GENCODE, cells_of(SYMBOLS, gene_ids=np.roll(HUMAN, -1)))
    assert mapping(GENCODE, cells_of(SYMBOLS, gene_ids=HUMAN))[1].disagreeing == 0


# ---- cells without a count in the genes used


def test_the_remedies_for_cells_without_a_count_help():
    data = cells_of([f"g{j}" for j in range(40)])
    model = VAE(data, gene_space=None, n_genes=10, **SMALL)
    X = data.X.toarray()
    X[5, np.isin(data.var_names, model.genes.ids)] = 0
    query = ad.AnnData(sparse.csr_matrix(X), data.obs, data.var)
    with pytest.raises(
        EmptyCellsError,
        match=(
            r"1 of 60 cells.*the 10 genes used .first: c5.*adata ="
            r" adata\[vampsc.counts.has_counts\(adata, model\)\]"
        ),
    ) as error:
        model.get_latent_representation(query)
    assert (
        list(error.value.cells) == [5]
        and "min_counts" not in str(error.value)
        and "gene_space" not in str(error.value)
    )
    adata = query
    adata = adata[vampsc.counts.has_counts(adata, model)]
    z = model.get_latent_representation(adata)
    assert (
        np.allclose(
            z, model.get_latent_representation(query, indices=np.arange(60) != 5), atol=1e-6
        )
        and len(z) == 59
    )
    assert model.query_mapping.recognised == 10 and model.query_mapping.n_data == 40

    # a gene of that cell alone is never chosen
    X[:, 39] = np.arange(60) == 5
    X[5, :39] = 0
    rare = cells_of(data.var_names, X)
    with pytest.raises(EmptyCellsError, match="first: c5.*n_genes=None for all"):
        VAE(rare, gene_space=None, n_genes=10, **SMALL)
    assert len(VAE(rare, gene_space=None, n_genes=None, **SMALL).genes) == 40


@pytest.mark.parametrize(
    "space, settings, typed",
    [
        (None, {}, "None"),
        ("gencode-48", {}, "'gencode-48'"),
        ("auto", dict(layer="counts"), "'gencode-48', layer='counts'"),
        (None, dict(use_raw=True), "None, use_raw=True"),
    ],
)
def test_the_line_that_is_advised(space, settings, typed):
    X = np.random.default_rng(0).poisson(2, (60, 43)).astype("float32") + 1
    X[7, :] = 0
    X[8, :40] = 0
    adata = cells_of([*SYMBOLS, "x1", "x2", "x3"], X)
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()

    def make(cells):
        return checked_counts(
            cells, resolve(space, cells), settings.get("layer"), settings.get("use_raw", False)
        )

    with pytest.raises(EmptyCellsError) as error:
        make(adata)
    line = str(error.value).partition("adata = ")[2].partition(", on the command")[0]
    assert line == f"adata[vampsc.counts.has_counts(adata, {typed})]"
    kept = eval(line)
    assert len(make(kept)[0]) == (58 if space else 59)
    assert ("gene_space=None" in str(error.value)) == (space is not None)


def test_cells_without_counts_of_a_matrix_and_nan():
    X = sparse.csr_matrix(np.float32([[1, 2], [0, 0], [3, 0]]))
    with pytest.raises(
        EmptyCellsError, match=r"first: 1.*X\[np.asarray\(X.sum\(1\)\).ravel\(\) > 0\]"
    ):
        check_counts(X)
    check_counts(X[np.asarray(X.sum(1)).ravel() > 0])
    assert list(has_counts(cells_of("ab", np.float32([[np.nan, 0], [0, 0], [1, 0]])), None)) == [
        True,
        False,
        True,
    ]


def test_no_gene_can_be_chosen():
    data = cells_of([f"g{j}" for j in range(30)], np.eye(12, 30, dtype="float32"), n=12)
    with pytest.raises(ValueError, match="no gene is seen in 3 of 10 training cells.*n_genes=None"):
        VAE(data, gene_space=None, n_genes=10, **SMALL)
    assert len(VAE(data, gene_space=None, **SMALL).genes) == 30


# ---- words for missing labels

WORDS = ["nan", "NaN", "NA", "None", "<NA>", "", " ", "null", "NULL", "N/A", np.nan, None, pd.NA]


@pytest.mark.parametrize("word", WORDS, ids=repr)
def test_a_word_for_missing_is_missing_everywhere(word):
    kind = np.arange(60) % 3
    known = np.arange(60) % 2 == 1
    labels = np.where(known, np.array(["t0", "t1", "t2"], object)[kind], word)
    z = np.random.default_rng(0).standard_normal((60, 2)) + 3 * kind[:, None]
    missing = np.where(known, np.array(["t0", "t1", "t2"], object)[kind], None)
    assert np.array_equal(missing_labels(labels), ~known) and np.array_equal(
        missing_labels(pd.Categorical(labels)), ~known
    )
    adata = cells_of([f"g{j}" for j in range(5)])
    adata.obs["cell_type"] = labels
    found = organs.labels(adata)
    assert list(found.categories) == ["t0", "t1", "t2"] and np.array_equal(found.codes >= 0, known)
    assert (
        organs.label_key(adata) == "cell_type"
        and organs.describe("pancreas", adata)["n_labelled"] == 30
        and organs.describe("pancreas", adata)["cell_types"] == 3
    )
    for judge in (
        metrics.silhouette,
        lambda z, labels: metrics.knn_purity(z, labels, 5),
        metrics.nmi_ari,
    ):
        assert judge(z, labels) == judge(z, missing)
    assert metrics.n_labelled(labels) == 30 and list(figures.category_colours(labels)) == [
        "t0",
        "t1",
        "t2",
    ]
    with pytest.raises(ValueError, match="30 of 60 cells have no cell_type in obs"):
        batch_codes(adata, "cell_type")


def test_words_that_people_choose_are_labels():
    chosen = ["unknown", "unassigned", "none", "na", "Nanog+", "NA cells", 0, False]
    assert not missing_labels(chosen).any() and metrics.n_labelled(chosen) == 8


def test_no_label_at_all():
    adata = cells_of("ab")
    adata.obs["cell_type"] = "nan"
    assert organs.label_key(adata) is None
    with pytest.raises(organs.OrganError, match="none of 60 cells has a label"):
        organs.labels(adata)


def test_missing_stays_missing_in_the_cache(tmp_path):
    adata = cells_of("ab")
    adata.obs["type"] = pd.Series(["x", None, 3] * 20, adata.obs_names, dtype=object)
    organs._write(adata, tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").obs["type"].astype(object).where(
        lambda v: v.notna(), None
    ).tolist()[:3] == ["x", None, "3"]


def test_donors_of_a_study_may_be_missing():
    data = cells_of("ab")
    data.obs["type"], data.obs["who"] = ["A", "NA", "nan"] * 20, ["p1", "NA", ""] * 20
    found = organs.harmonised(
        data, {"name": "s", "organ": "o"}, {"cell_type": "type", "donor": "who"}
    )
    assert list(found.obs["cell_type"].cat.categories) == ["A"] and list(
        found.obs["donor"].cat.categories
    ) == ["p1"]
