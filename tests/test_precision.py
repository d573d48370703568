"""Mixed precision: the layers' products in bfloat16, all that is a density or a weight in float32."""
import keras
import numpy as np
import pytest

from vampsc import models, organs

SMALL = dict(n_genes=300, n_latent=6, hidden=(32, 16))
MORE = {"VAMP": dict(n_pseudo_inputs=9), "VAMPIAF": dict(n_pseudo_inputs=9, flow_hidden=(16,), n_flow_steps=2),
        "HVAMP": dict(n_pseudo_inputs=9), "IAF": dict(flow_hidden=(16, 16), n_flow_steps=2)}


@pytest.fixture(scope="module")
def adata(): return organs.load("pancreas")[:120].copy()


@pytest.mark.parametrize("name", ["AE", "VAE", "IAF", "VAMP", "VAMPIAF", "HVAMP"])
def test_half_the_digits_give_nearly_the_same_loss(adata, name):
    full, mixed = (getattr(models, name)(adata, precision=p, **SMALL, **MORE.get(name, {})) for p in ("float32", "mixed_bfloat16"))
    assert {keras.backend.standardize_dtype(v.dtype) for v in mixed.network.trainable_variables} == {"float32"}
    assert mixed.network.encoder(np.zeros((2, 300), "float32")).dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"                     # what else the user builds is not touched
    x = full.X[:64].toarray()
    noise = np.random.default_rng(0).standard_normal((64, 6)).astype("float32")
    for one, other in zip(*(m.network.terms(x, noise, m.network.components()) for m in (full, mixed))):
        assert keras.backend.standardize_dtype(other.dtype) == "float32"
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() < 0.02 * np.abs(one).max() + 0.5 and not (name != "AE" and np.array_equal(one, other))


def test_it_trains_and_comes_back(adata, tmp_path):
    histories = {p: models.VAE(adata, precision=p, **SMALL).train(max_epochs=6, batch_size=32, progress=False) for p in ("float32", "mixed_bfloat16")}
    last = {p: m.history["loss"].iloc[-1] for p, m in histories.items()}
    assert last["mixed_bfloat16"] == pytest.approx(last["float32"], rel=0.03)
    model = histories["mixed_bfloat16"]
    model.save(tmp_path / "m")
    again = models.load(tmp_path / "m", adata)
    assert again.architecture.precision == "mixed_bfloat16"
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())


def test_other_precisions_are_refused(adata):
    with pytest.raises(ValueError, match="mixed_bfloat16"): models.VAE(adata, precision="float16", **SMALL)
