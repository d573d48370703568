"""Which genes a model has, and what its results call them: the user's choice, and the user's own
names in the user's own order.
"""

import functools
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from vampsc import genes, intake, models, organs
from vampsc.counts import has_counts

SMALL = dict(hidden=(8,), n_latent=3)
GENCODE = genes.GeneSpace.load("gencode-48")


def cells(symbols, n=60, seed=0, ids=True):
    """Counts of genes that are named by symbol, with their identifiers beside; a symbol that is not
    known has none.
    """
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 4.0, (n, len(symbols)))).astype("float32")
    X[:, 0] += 1
    id_of = dict(zip(GENCODE.symbols, GENCODE.ids))
    var = pd.DataFrame(index=list(symbols))
    if ids:
        var["gene_ids"] = [id_of.get(s, "") for s in symbols]
    return ad.AnnData(sp.csr_matrix(X), pd.DataFrame(index=[f"c{i}" for i in range(n)]), var)


def some_symbols(n, seed=0):
    "Known symbols, each of one gene, in an order that is not that of the space."
    known = np.array([s for s in GENCODE.symbols if s not in GENCODE.ambiguous])
    return list(np.random.default_rng(seed).choice(known, n, replace=False))


MARKERS = ["CCR7", "MKI67", "EPCAM"]
SYMBOLS = [*[s for s in some_symbols(40) if s not in MARKERS], *MARKERS, "MALAT1", "old name"]


@pytest.fixture(scope="module")
def adata():
    made = cells(SYMBOLS)
    made.X = sp.csr_matrix(
        made.X.toarray() * np.where(made.var_names.isin(MARKERS), 0, 1)
        + np.where(made.var_names.isin(MARKERS), 1, 0)
    ).astype("float32")
    # renamed since
    made.var.loc["old name", "gene_ids"] = GENCODE.ids[list(GENCODE.symbols).index("RACK1")]
    return made


def quietly(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


@pytest.fixture(scope="module")
def model(adata):
    return quietly(models.VAE, adata, **SMALL).train(max_epochs=1, progress=False)


# ---- which genes


def test_a_chosen_subset_is_modelled_on_its_own_genes(adata):
    with pytest.warns(
        UserWarning,
        match=(
            r"have 45 genes, a small part of gencode-48: the model has the 44.*not:"
            r" MALAT1.*gene_space=None takes all 45.*all 20,120"
        ),
    ):
        model = models.VAE(adata, **SMALL)
    assert len(model.genes) == 44 == model.X.shape[1] and model.genes.whole == GENCODE


def test_the_whole_space_where_it_is_asked_for(adata):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the data have")
        assert len(models.VAE(adata, gene_space="gencode-48", **SMALL).genes) == 20_120
        assert len(models.VAE(adata, gene_space=None, **SMALL).genes) == 45


def test_half_of_the_space_and_more_is_the_whole_space():
    many = cells([s for s in GENCODE.symbols if s not in GENCODE.ambiguous][:10_100], n=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the data have")
        assert len(models.AE(many, hidden=(2,), n_latent=2).genes) == 20_120


def test_such_a_model_takes_cells_that_are_named_otherwise(model, adata):
    by_id = adata[:, adata.var["gene_ids"] != ""].copy()
    by_id.var = pd.DataFrame(index=by_id.var["gene_ids"])
    np.testing.assert_allclose(
        model.get_latent_representation(by_id), model.get_latent_representation(), atol=1e-6
    )


def test_n_genes_as_a_list_a_mask_or_a_column(adata):
    chosen = ["old name", "CCR7", GENCODE.ids[list(GENCODE.symbols).index("MKI67")]]
    marked = adata.copy()
    marked.var["highly_variable"] = marked.var_names.isin(["old name", "CCR7", "MKI67"])
    for data, n_genes in (
        (adata, chosen),
        (adata, np.array(chosen)),
        (marked, "highly_variable"),
        (marked, marked.var["highly_variable"]),
    ):
        model = models.VAE(data, n_genes=n_genes, **SMALL)
        assert set(model.genes.symbols) == {"RACK1", "CCR7", "MKI67"}


def test_genes_of_raw_are_chosen_by_the_columns_of_adata(adata):
    data = adata.copy()
    data.raw = adata
    data = data[:, :20].copy()
    data.var["highly_variable"] = np.arange(20) < 5
    model = models.VAE(data, use_raw=True, n_genes="highly_variable", **SMALL)
    assert set(model.gene_table.index) == set(SYMBOLS[:5])
    assert np.array_equal(
        model.X.toarray().sum(0)[model.own_names.order], adata[:, :5].X.toarray().sum(0)
    )


@pytest.mark.parametrize(
    "n_genes, says",
    [
        (["CCR7", "nix", "nada"], r"2 of 3 genes are not in the data: nix, nada"),
        (
            "highly_variabel",
            (
                r"no column of adata.var \(did you mean 'highly_variable'\?\); there are gene_ids,"
                r" highly_variable"
            ),
        ),
        ("gene_ids", "must hold True and False only"),
        ([1, 2], "1 is no name"),
        (["MALAT1"], "none of 1 genes has a place"),
        (1.5, "n_genes"),
    ],
)
def test_genes_that_cannot_be_had(adata, n_genes, says):
    data = adata.copy()
    data.var["highly_variable"] = False
    with pytest.raises(ValueError, match=says):
        quietly(models.VAE, data, n_genes=n_genes, **SMALL)


def test_chosen_genes_without_a_place_are_named(adata):
    with pytest.warns(
        UserWarning,
        match="n_genes: 1 of 2 genes have no place in gencode-48 and are left out: MALAT1",
    ):
        assert len(models.VAE(adata, n_genes=["MALAT1", "CCR7"], **SMALL).genes) == 1


def test_markers_are_kept(adata):
    without = models.VAE(adata, n_genes=10, **SMALL)
    assert not set(MARKERS) & set(without.genes.symbols)
    model = models.VAE(adata, n_genes=10, keep_genes=MARKERS, **SMALL)
    assert set(model.genes.symbols) == {*without.genes.symbols, *MARKERS} and len(model.genes) == 13
    assert (
        len(models.VAE(adata, n_genes=10, keep_genes=without.genes.symbols[:4], **SMALL).genes)
        == 10
    )
    with pytest.raises(ValueError, match="keep_genes: 2 of 3 genes are not in the data: nix, nada"):
        models.VAE(adata, n_genes=10, keep_genes=["nix", "CCR7", "nada"], **SMALL)


# ---- lists of genes


def test_all_genes_that_are_not_there_are_named(model):
    with pytest.raises(
        ValueError,
        match="2 of 4 are not genes of the model: nix, nada; skip_missing=True.*keep_genes=",
    ):
        model.get_normalized_expression(gene_list=["CCR7", "nix", "MKI67", "nada"])
    some = model.get_normalized_expression(
        gene_list=["CCR7", "nix", "old name", "nada"], skip_missing=True
    )
    assert list(some.columns) == ["CCR7", "old name"]
    np.testing.assert_array_equal(
        some, model.get_normalized_expression(gene_list=["CCR7", "RACK1"])
    )
    with pytest.raises(ValueError, match="2 of 2 are not genes of the model"):
        model.get_normalized_expression(gene_list=["nix", "nada"], skip_missing=True)


# ---- names and order of what a model gives back


def test_results_have_the_datas_names_in_the_datas_order(model, adata):
    own = [name for name in adata.var_names if name != "MALAT1"]
    assert list(model.get_normalized_expression().columns) == own
    for made in (model.sample_prior(5), model.posterior_predictive_sample(indices=[0])):
        assert list(made.var_names) == own and made.var.loc["old name", "symbol"] == "RACK1"
        assert np.array_equal(genes.positions(model.genes, made)[0], model.own_names.order)
    vamp = quietly(models.VAMP, adata, n_pseudo_inputs=5, linear_decoder=True, **SMALL)
    assert (
        list(vamp.pseudo_inputs().var_names)
        == list(vamp.get_loadings().index)
        == list(vamp.gene_table.index)
        == own
    )


def test_values_move_with_their_names(model, adata):
    denoised = model.get_normalized_expression(library_size="observed", n_mc_samples=50)
    counted = adata.to_df()[denoised.columns]
    assert np.corrcoef(np.log1p(denoised.mean()), np.log1p(counted.mean()))[0, 1] > 0.7
    by_place = model.get_normalized_expression(
        gene_list=model.genes.ids, library_size="observed", n_mc_samples=50
    )
    np.testing.assert_array_equal(
        denoised[["CCR7", "old name"]],
        by_place[[GENCODE.ids[list(GENCODE.symbols).index(s)] for s in ("CCR7", "RACK1")]],
    )
    new = model.sample_prior(400, seed=1)
    assert np.corrcoef(np.log1p(new.to_df().mean()), np.log1p(counted.mean()))[0, 1] > 0.7
    assert np.array_equal(
        model.genes.map(new)[0].toarray()[:, model.own_names.order], new.X.toarray()
    )


def test_names_are_saved(model, adata, tmp_path):
    model.save(tmp_path / "m")
    again = models.load(tmp_path / "m")
    assert again.gene_table.equals(model.gene_table)
    assert np.array_equal(again.sample_prior(4).to_df(), model.sample_prior(4).to_df())


def test_other_cells_have_their_own_names(model, adata):
    query = adata[:, ::-1].copy()
    query.var_names = [f"x-{name}" for name in query.var_names]
    found = model.get_normalized_expression(query)
    assert list(found.columns) == [
        f"x-{name}" for name in adata.var_names[::-1] if name != "MALAT1"
    ]
    np.testing.assert_allclose(
        found.to_numpy()[:, ::-1], model.get_normalized_expression(), rtol=1e-4
    )


def test_genes_that_the_data_lack_come_last():
    few = cells(["INS", "GCG", "SST"])
    model = models.VAE(
        few,
        gene_space=GENCODE.subset(np.isin(GENCODE.symbols, ["GCG", "INS", "SST", "PPY", "GHRL"])),
        **SMALL,
    )
    assert list(model.gene_table.index)[:3] == ["INS", "GCG", "SST"] and set(
        model.gene_table.index[3:]
    ) == {"PPY", "GHRL"}
    few.var_names = few.var["gene_ids"].to_list()
    assert model.get_normalized_expression(few).columns[0] == few.var_names[0]


@pytest.mark.parametrize("fill", [0, np.nan])
def test_a_layer_that_fits(model, adata, fill):
    data = adata.copy()
    data.layers["denoised"] = model.get_normalized_expression(fill=fill).to_numpy()
    assert data.layers["denoised"].shape == data.shape
    np.testing.assert_array_equal(data.layers["denoised"][:, data.var_names == "MALAT1"], fill)
    as_named = model.get_normalized_expression()
    np.testing.assert_array_equal(data.to_df("denoised")[as_named.columns], as_named)
    of_query = model.get_normalized_expression(adata[:5, ::-1], fill=fill)
    assert list(of_query.columns) == list(adata.var_names[::-1])


def test_columns_that_are_added_up_hold_the_value_of_the_gene(adata):
    twice = ad.concat([adata, adata[:, ["CCR7"]].copy()], axis=1, merge="first")
    twice.var_names = [*adata.var_names, "CCR7 again"]
    twice.var["gene_ids"] = [*adata.var["gene_ids"], adata.var.loc["CCR7", "gene_ids"]]
    filled = quietly(models.VAE, twice, **SMALL).get_normalized_expression(fill=0)
    np.testing.assert_array_equal(filled["CCR7"], filled["CCR7 again"])
    assert filled.shape == twice.shape


def test_a_layer_that_fits_where_the_counts_are_in_raw(adata):
    data = adata.copy()
    data.raw = adata
    data = data[:, 10:20].copy()
    model = quietly(models.VAE, data, use_raw=True, **SMALL)
    filled = model.get_normalized_expression(fill=0)
    assert list(filled.columns) == list(data.var_names)
    np.testing.assert_array_equal(filled, model.get_normalized_expression()[data.var_names])


def test_fill_is_a_number_and_not_with_a_list(model):
    with pytest.raises(ValueError, match="fill must be a number"):
        model.get_normalized_expression(fill="nan")
    with pytest.raises(ValueError, match="give one of them"):
        model.get_normalized_expression(fill=0, gene_list=["CCR7"])


def with_an_old_name():
    "One gene is called otherwise than today: its identifier finds it, or the data's own name."
    adata = cells(SYMBOLS[:30])
    names = adata.var_names.to_list()
    names[3] = "a name of before"
    adata.var_names = names
    return adata


def test_the_datas_own_names_find_genes_when_identifiers_are_gone(tmp_path):
    "As after ad.concat, which drops what is not equal in all its parts."
    adata = with_an_old_name()
    model = models.VAE(adata, **SMALL)
    model.train(max_epochs=1, progress=False)
    bare = adata.copy()
    bare.var = bare.var[[]]
    model.save(tmp_path / "model")
    for one in (model, models.load(tmp_path / "model")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            z = one.get_latent_representation(bare)
        assert np.array_equal(z, model.get_latent_representation())
        assert has_counts(bare, one).all()


def test_an_own_name_takes_no_gene_that_the_cells_have_by_identifier():
    adata = with_an_old_name()
    model = models.VAE(adata, **SMALL)
    # the gene is there by its identifier, and another gene has its old name
    query = adata.copy()
    query.var_names = [*query.var_names[:3], SYMBOLS[3], *query.var_names[4:]]
    other = cells(["a name of before"], ids=False)
    both = ad.concat([query, other], axis=1, merge="same")
    both.var["gene_ids"] = [*query.var["gene_ids"], ""]
    where = model._take(both)[0].where
    assert where[-1] == -1 and (where[:-1] >= 0).all()
    assert len(set(where[:-1])) == len(where) - 1


def test_counts_in_another_place_than_the_models():
    "The remedy is one that a verb has: its counts are where the model's were."
    adata = cells(SYMBOLS[:30])
    model = models.VAE(adata, **SMALL)
    query = adata.copy()
    query.layers["counts"] = adata.X.copy()
    query.X.data = np.log1p(query.X.data / 3)
    with pytest.raises(ValueError, match="layer='counts'; the model reads adata.X, so put them"):
        model.get_latent_representation(query)
    in_layer = models.VAE(query, layer="counts", **SMALL)
    with pytest.raises(ValueError, match=r"adata.layers\['counts'\] = adata.X"):
        in_layer.get_latent_representation(adata)
    adata.layers["counts"] = adata.X
    in_layer.get_latent_representation(adata)


def test_a_gene_that_is_written_otherwise_is_suggested():
    model = models.VAE(cells(SYMBOLS[:30]), **SMALL)
    name = model.gene_table.index[5]
    for wrong in (name.lower(), name + "x"):
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            model.get_normalized_expression(gene_list=[wrong])


@pytest.mark.long
def test_variances_of_residuals_are_scanpys():
    "Also of a gene that no cell has, and of cells of which some have the same sum."
    X = organs.load("pancreas").X[:300, :2000]
    often = np.flatnonzero(np.asarray((X > 0).sum(0)).ravel() >= 3)
    ranked = sc.experimental.pp.highly_variable_genes(
        ad.AnnData(X[:, often]), n_top_genes=150, flavor="pearson_residuals", inplace=False
    )
    with_empty = sp.hstack([X[:, often], sp.csr_matrix((300, 1))], format="csr")
    variances = intake.residual_variances(with_empty)
    assert variances[-1] == 0
    np.testing.assert_allclose(variances[:-1], ranked["residual_variances"].to_numpy(), rtol=1e-6)
    assert np.array_equal(
        intake.variable_genes(X, 150), often[ranked["highly_variable"].to_numpy()]
    )


def test_residuals_are_computed_in_parts_that_fit_in_memory():
    rng = np.random.default_rng(0)
    share, of_cell = rng.random(70), rng.integers(1, 9, 40).astype(float)
    residuals = functools.partial(intake._residuals, theta=10.0, bound=2.0)
    r = residuals(0, np.outer(share, of_cell))
    for at_once in (1, 50, 10_000):
        sums = intake._sums_without_counts(share, of_cell, residuals, at_once)
        np.testing.assert_allclose(sums, [r.sum(1), (r**2).sum(1)])
