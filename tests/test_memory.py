"""What is left in memory of a model that nobody holds any more."""
import gc
import weakref

import pytest

from vampsc import models, organs

SMALL = dict(n_genes=100, n_latent=3, hidden=(8,))


@pytest.fixture(scope="module")
def adata(): return organs.load("pancreas")[:60].copy()


def left(make):
    "The names of the parts that outlive a model: its network and its counts."
    model = make()
    parts = {"network": weakref.ref(model.network), "counts": weakref.ref(model.X)}
    del model
    gc.collect()
    return {name for name, part in parts.items() if part() is not None}


def test_counts_and_network_go_with_the_model(adata):
    def trained(): return models.VAE(adata, **SMALL).train(max_epochs=1, progress=False)
    def used():
        model = trained()
        model.get_elbo(n_mc_samples=30)                          # so many draws are compiled as a whole
        model.get_normalized_expression()
        return model
    assert left(lambda: models.VAE(adata, **SMALL)) == set()
    assert left(trained) == set()
    assert left(lambda: models.VAE(adata, **SMALL).train(max_epochs=2, kl_warmup=1, progress=False)) == set()
    assert left(used) == set()


def test_counts_go_where_training_ended_early(adata):
    def interrupted():
        model = models.VAE(adata, **SMALL)
        with pytest.raises(FloatingPointError): model.train(max_epochs=2, learning_rate=1e30, progress=False)
        return model
    assert left(interrupted) == set()
