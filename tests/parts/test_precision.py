"""Mixed precision: layers' products in bfloat16, densities and weights in float32."""

import keras
import numpy as np
import pytest

from vampsc import models, organs

SMALL = dict(n_genes=300, n_latent=6, hidden=(32, 16))
MORE = {
    "VAMP": dict(n_pseudo_inputs=9),
    "VAMPIAF": dict(n_pseudo_inputs=9, flow_hidden=(16,), n_flow_steps=2),
    "HVAMP": dict(n_pseudo_inputs=9),
    "IAF": dict(flow_hidden=(16, 16), n_flow_steps=2),
}


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:120].copy()


@pytest.mark.parametrize("name", ["AE", "VAE", "IAF", "VAMP", "VAMPIAF", "HVAMP"])
def test_half_the_digits_give_nearly_the_same_loss(adata, name):
    full, mixed = (
        getattr(models, name)(adata, precision=p, **SMALL, **MORE.get(name, {}))
        for p in ("float32", "mixed_bfloat16")
    )
    assert {
        keras.backend.standardize_dtype(v.dtype) for v in mixed.network.trainable_variables
    } == {"float32"}
    assert mixed.network.encoder(np.zeros((2, 300), "float32")).dtype == "bfloat16"
    # what else the user builds is not touched
    assert keras.config.dtype_policy().name == "float32"
    x = full.X[:64].toarray()
    noise = np.random.default_rng(0).standard_normal((64, 6)).astype("float32")
    for one, other in zip(
        *(m.network.terms(x, noise, m.network.components()) for m in (full, mixed))
    ):
        assert keras.backend.standardize_dtype(other.dtype) == "float32"
        one = np.asarray(one)
        other = np.asarray(other)
        assert np.abs(one - other).max() < 0.02 * np.abs(one).max() + 0.5 and not (
            name != "AE" and np.array_equal(one, other)
        )


VERBS = (
    "get_latent_representation",
    "get_reconstruction_error",
    "get_elbo",
    "get_marginal_ll",
    "get_kl_per_unit",
    "get_aggregate_kl",
    "get_normalized_expression",
    "posterior_predictive_sample",
    "sample_prior",
    "pseudo_inputs",
    "get_loadings",
)


def both(adata, name, **more):
    "The same model in float32 and in mixed precision, with the same weights."
    settings = dict(SMALL, hidden=(8,), **MORE.get(name, {}), **more)
    full = models.PRESETS[name](adata, **settings)
    mixed = models.PRESETS[name](adata, precision="mixed_bfloat16", **settings)
    for there, here in zip(mixed.network.weights, full.network.weights, strict=True):
        there.assign(here)
    return full, mixed


def answer(model, verb):
    "What a verb gives, or the words in which it refuses."
    try:
        return getattr(model, verb)()
    except ValueError as error:
        return str(error)


# The model of all parts; the others are slow tests.
EACH = [
    pytest.param(name, marks=[] if name == "VAMPIAF" else [pytest.mark.slow])
    for name in models.PRESETS
]


@pytest.mark.parametrize("name", EACH)
def test_every_verb_answers_in_both_precisions(adata, name):
    "Or refuses in both, as an AE does what needs a prior."
    cells = adata[:40].copy()
    cells.obs["lab"] = np.where(np.arange(40) % 2, "a", "b")
    full, mixed = both(cells, name, batch_key="lab")
    refused = set()
    for verb in VERBS:
        one = answer(full, verb)
        other = answer(mixed, verb)
        assert type(one) is type(other), (verb, other)
        if isinstance(one, str):
            assert one == other
            refused.add(verb)
    assert "get_loadings" in refused and {
        "get_normalized_expression",
        "posterior_predictive_sample",
    }.isdisjoint(refused)
    assert ("sample_prior" in refused) == (name == "AE") and ("pseudo_inputs" in refused) == (
        "VAMP" not in name
    )


def test_a_linear_decoder_and_one_dispersion_a_gene(adata):
    full, mixed = both(adata[:40].copy(), "VAE", linear_decoder=True, dispersion="gene")
    assert full.get_loadings().equals(mixed.get_loadings())
    for verb in ("get_normalized_expression", "posterior_predictive_sample", "sample_prior"):
        getattr(mixed, verb)()


@pytest.mark.parametrize("name", EACH)
def test_expression_agrees_to_the_digits_of_the_products(adata, name):
    full, mixed = (m.get_normalized_expression(library_size="observed") for m in both(adata, name))
    apart = np.abs(np.log(full / mixed).to_numpy())
    # a log-rate of 10 has a step of 2^-4 in bfloat16
    assert 0 < np.median(apart) < 0.01 and apart.max() < 0.06


def test_library_sizes_keep_all_their_digits(adata):
    "Sizes that bfloat16 would round by up to 0.4 %."
    mixed = both(adata, "VAE")[1]
    z = np.zeros((4, 6), "float32")
    log_size = np.log(np.float32([[1.001], [1.002], [97.3], [12345.6]]))
    with_it, without = (
        np.asarray(mixed.network.decoder(z, v)[0], "float64") for v in (log_size, 0 * log_size)
    )
    np.testing.assert_allclose(
        with_it - without, np.broadcast_to(log_size, with_it.shape), atol=5e-6
    )
    one, other = (
        mixed.get_normalized_expression(library_size=size).to_numpy("float64")
        for size in (10_000, 10_010)
    )
    np.testing.assert_allclose(other / one, 1.001, rtol=1e-5)
    seen = mixed.get_normalized_expression(library_size="observed").to_numpy()
    totals = np.broadcast_to(mixed.X.totals[:, None], seen.shape)
    np.testing.assert_allclose(seen / one * 1e4, totals, rtol=1e-5)


def test_it_trains_and_comes_back(adata, tmp_path):
    histories = {
        p: (
            models.VAE(adata, precision=p, **SMALL).train(
                max_epochs=6, batch_size=32, progress=False
            )
        )
        for p in ("float32", "mixed_bfloat16")
    }
    last = {p: m.history["loss"].iloc[-1] for p, m in histories.items()}
    assert last["mixed_bfloat16"] == pytest.approx(last["float32"], rel=0.03)
    model = histories["mixed_bfloat16"]
    model.save(tmp_path / "m")
    again = models.load(tmp_path / "m", adata)
    assert again.architecture.precision == "mixed_bfloat16"
    np.testing.assert_array_equal(
        again.get_latent_representation(), model.get_latent_representation()
    )


def test_other_precisions_are_refused(adata):
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        models.VAE(adata, precision="float16", **SMALL)
