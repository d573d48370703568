"Functions of the network compiled as a whole, beside the same run one operation after the other."

import keras
import numpy as np
import pytest

from vampsc import assembly, inference, kernels, models, organs
from vampsc.posteriors import GaussianPosterior


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:80].copy()


def numbers(model):
    "What the verbs say of the cells, with a last minibatch of another size."
    said = {
        "z": model.get_latent_representation(n_mc_samples=3, batch_size=48),
        "error": list(model.get_reconstruction_error(n_mc_samples=3, batch_size=48).values()),
    }
    if model.network.prior is not None:
        said |= {
            "elbo": list(model.get_elbo(n_mc_samples=2, batch_size=48).values()),
            "marginal": model.get_marginal_ll(n_mc_samples=3, batch_size=48, per_cell=True),
        }
    if type(model.network.posterior) is GaussianPosterior and model.network.prior is not None:
        said["both"] = model.get_marginal_ll(
            n_mc_samples=4, batch_size=48, per_cell=True, proposal="both"
        )
    return said


@pytest.mark.parametrize("name", ["AE", "VAE", "VAMPIAF", "HVAMP"])
def test_compiled_and_not_are_equal_also_after_the_weights_have_changed(adata, name, monkeypatch):
    small = dict(n_pseudo_inputs=9) if "VAMP" in name else {}
    if "IAF" in name:
        small |= dict(n_flow_steps=2, flow_hidden=(8,))
    model = getattr(models, name)(adata, n_genes=200, n_latent=4, hidden=(16, 8), **small)
    for shift in (0.0, 0.1):
        model.network.set_weights([w + np.float32(shift) for w in model.network.get_weights()])
        for bound in ("COMPILE_FROM_VALUES", "COMPILE_FROM_CALLS"):
            monkeypatch.setattr(inference, bound, np.inf)
        compiled = model._compiled
        model._compiled = {}
        plain = numbers(model)
        assert not model._compiled
        monkeypatch.setattr(inference, "COMPILE_FROM_VALUES", 0)
        # those of the first round, traced before the change
        model._compiled = compiled
        whole = numbers(model)
        assert model._compiled
        for key in plain:
            np.testing.assert_allclose(whole[key], plain[key], rtol=2e-4, atol=2e-5, err_msg=key)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the compiled kernels need TensorFlow"
)
def test_each_path_has_its_own(adata, monkeypatch):
    monkeypatch.setattr(inference, "COMPILE_FROM_VALUES", 0)
    model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
    found = []
    for path in ("compiled", "plain"):
        with kernels.use_path(path):
            found.append(model.get_elbo()["elbo"])
    assert set(model._compiled) == {True, False}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_only_much_work_is_compiled(adata, monkeypatch):
    model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
    monkeypatch.setattr(inference, "COMPILE_FROM_VALUES", 80 * 200 * 3)
    model.get_elbo(n_mc_samples=2)
    assert not model._compiled
    model.get_elbo(n_mc_samples=3)
    assert model._compiled


def test_many_small_calls_are_compiled_too(adata):
    model = models.VAE(adata, n_genes=200, n_latent=4, hidden=(16,))
    model.get_marginal_ll(indices=range(10), n_mc_samples=inference.COMPILE_FROM_CALLS - 1)
    assert not model._compiled
    few = model.get_marginal_ll(indices=range(10), n_mc_samples=3)
    often = model.get_marginal_ll(indices=range(10), n_mc_samples=inference.COMPILE_FROM_CALLS)
    assert model._compiled
    # whatever was compiled meanwhile
    assert model.get_marginal_ll(indices=range(10), n_mc_samples=3) == few
    model.network, before = assembly.build_network(model.architecture, 200, seed=9), model.network
    other = model.get_marginal_ll(indices=range(10), n_mc_samples=inference.COMPILE_FROM_CALLS)
    model.network = before
    assert (
        model.get_marginal_ll(indices=range(10), n_mc_samples=inference.COMPILE_FROM_CALLS)
        == often
        != other
    )
