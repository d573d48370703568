"""What a user should be told before a result misleads: an untrained model, genes that a query
lacks, a misspelt argument.
"""

import dataclasses
import inspect
import re
import subprocess
import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from vampsc import assembly, models, study, training

SMALL = dict(gene_space=None, hidden=(8,), n_latent=3)


def cells(n=60, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 4.0, (n, 30))).astype("float32")
    X[:, 0] += 1
    return ad.AnnData(
        X,
        pd.DataFrame(index=[f"c{i}" for i in range(n)]),
        pd.DataFrame(index=[f"g{j}" for j in range(30)]),
    )


@pytest.fixture(scope="module")
def adata():
    return cells()


@pytest.fixture(scope="module")
def model(adata):
    return models.VAE(adata, linear_decoder=True, **SMALL).train(max_epochs=1, progress=False)


# ---- untrained

VERBS = {
    "embed": lambda m, a: m.embed(a.copy()),
    "latent": lambda m, a: m.get_latent_representation(),
    "loadings": lambda m, a: m.get_loadings(),
    "expression": lambda m, a: m.get_normalized_expression(),
    "predictive": lambda m, a: m.posterior_predictive_sample(),
    "prior": lambda m, a: m.sample_prior(3),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_an_untrained_model_says_so(adata, model, verb, tmp_path):
    new = models.VAE(adata, linear_decoder=True, **SMALL)
    with pytest.warns(
        UserWarning, match=r"this VAE is not trained.* random weights; model.train\(\) comes first"
    ):
        verb(new, adata)
    new.save(tmp_path / "m")
    with pytest.warns(UserWarning, match="not trained"):
        verb(models.load(tmp_path / "m", adata), adata)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not trained")
        verb(model, adata)


def test_transferred_and_loaded_models_are_trained(adata, model, tmp_path):
    moved = model.transfer(cells(seed=1), max_epochs=0, progress=False, unfrozen=True)
    assert moved.is_trained and not len(moved.history)
    moved.save(tmp_path / "m")
    assert (
        models.load(tmp_path / "m").is_trained
        and not models.VAMP(
            adata, pseudo_inputs_from="random", n_pseudo_inputs=5, **SMALL
        ).is_trained
    )


def test_a_network_that_was_trained_otherwise_is_trained(adata):
    model = models.AE(adata, **SMALL)
    profile = training.get_profile(max_epochs=1)
    training.fit(model.network, model.X, model.split, profile, progress=False)
    assert model.is_trained and not len(model.history)


# ---- genes that a query lacks


@pytest.mark.parametrize(
    "n, words",
    [
        (29, r"lack 1 of the model's 30 genes, 3.3% \(first: g29\)"),
        (27, r"lack 3 of the model's 30 genes, 10.0% \(first: g27, g28, g29\)"),
        (8, "lack 22 of the model's 30 genes, 73.3%"),
    ],
)
def test_missing_genes_are_said_whatever_their_share(adata, model, n, words):
    with pytest.warns(UserWarning, match=words):
        model.get_latent_representation(adata[:, :n])


def test_nothing_is_said_where_none_is_missing(adata, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.get_latent_representation(adata[:, ::-1])


def test_genes_that_the_models_own_data_lacked_are_not_missed(tmp_path):
    symbols = ["INS", "GCG", "SST", "PPY", "GHRL", "KRT19", "PRSS1", "COL1A1"]
    data = cells()[:, :8].copy()
    data.var_names = symbols
    data.X[:, 0] += 1
    model = models.AE(data, gene_space="gencode-48", hidden=(2,), n_latent=2)
    model.save(tmp_path / "m")
    for one in (model, models.load(tmp_path / "m")):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the data lack")
            one.get_elbo(data) if one.network.prior else one.get_reconstruction_error(data)
        with pytest.warns(UserWarning, match="lack 2 of the model's 8 genes, 25.0%"):
            one.get_reconstruction_error(data[:, :6])


# ---- arguments


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda m, a: models.VAE(a, n_gene=10),
            (
                r"'n_gene' is not a setting of a model \(did you mean 'n_genes'\?\); there are"
                r" gene_space, n_genes, keep_genes"
            ),
        ),
        (lambda m, a: models.VAE(a, batchkey="x"), "did you mean 'batch_key'"),
        (lambda m, a: models.VAE(a, n_latnet=3), "did you mean 'n_latent'"),
        (
            lambda m, a: m.get_latent_representation(batchsize=3),
            r"no argument 'batchsize' \(did you mean 'batch_size'\?\)",
        ),
        (lambda m, a: m.train(max_epoch=3), "did you mean 'max_epochs'"),
        (
            lambda m, a: study.refuse_unknown(["max_epoch"], ["max_epochs"]),
            "did you mean 'max_epochs'",
        ),
        (lambda m, a: models.VAE(a, zzz=1), "'zzz' is not a setting of a model; there are"),
    ],
)
def test_the_nearest_name_is_suggested(adata, model, call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(model, adata)


@pytest.mark.parametrize("kind", [models.CountAutoencoder, *models.PRESETS.values()])
def test_signatures_and_docstrings_name_all_arguments(adata, kind):
    shown = inspect.signature(kind)
    fields = {
        f.name: f.default
        for f in dataclasses.fields(assembly.Architecture)
        if f.name not in ("n_batches", "n_covariates", "posterior", "prior")
    }
    assert {name: shown.parameters[name].default for name in fields} == fields
    assert {
        "adata",
        "gene_space",
        "n_genes",
        "keep_genes",
        "layer",
        "batch_key",
        "split",
        "seed",
    } <= set(shown.parameters)
    assert ("posterior" in shown.parameters) == (kind is models.CountAutoencoder) and not any(
        p.kind is p.VAR_KEYWORD for p in shown.parameters.values()
    )
    words = set(re.findall(r"\w+", kind.__doc__))
    assert set(shown.parameters) <= words
    settings = {
        name: p.default
        for name, p in shown.parameters.items()
        if name
        not in (
            "adata",
            "n_latent",
            "hidden",
            "gene_space",
            "posterior",
            "prior",
            "n_pseudo_inputs",
        )
    }
    # all that is shown is taken
    made = kind(adata, **SMALL, **settings)
    assert made.architecture.n_latent == 3


def test_a_class_of_ones_own_keeps_its_signature():
    class Mine(models.VAE):
        def __init__(self, adata, depth=2):
            super().__init__(adata, hidden=(8,) * depth)

    assert list(inspect.signature(Mine).parameters) == ["adata", "depth"]


def test_help_shows_the_arguments():
    done = subprocess.run(
        [sys.executable, "-c", "import vampsc; help(vampsc.VAMP)"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        "class VAMP(CountAutoencoder)" in done.stdout
        and "n_pseudo_inputs=500" in done.stdout
        and "**settings" not in done.stdout.split("Methods defined here")[0]
    )
