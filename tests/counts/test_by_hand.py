"""The loss, the verbs' averages and the turns of a training run, against numbers worked out by
hand.
"""

import anndata as ad
import keras
import numpy as np
import pandas as pd
import pytest

from vampsc import models, training
from vampsc.counts import Split
from vampsc.likelihood import NegativeBinomial

SPLIT = Split(train=np.arange(40), validation=np.arange(40, 50), test=np.arange(50, 60))
SMALL = dict(gene_space=None, n_latent=3, hidden=(8,), split=SPLIT)


@pytest.fixture(scope="module")
def adata():
    """Genes 0 to 4 vary between the training cells, genes 5 to 9 more between the test cells, the
    others by chance alone.
    """
    rng = np.random.default_rng(0)
    rates = np.full((60, 20), 4.0)
    rates[:40, :5] = rng.choice([2.0, 8.0], (40, 5))
    rates[50:, 5:10] = rng.choice([1.0, 300.0], (10, 5))
    counts = rng.poisson(rates).astype("float32")
    counts[:, 19] += 1  # no empty cell
    return ad.AnnData(counts, var=pd.DataFrame(index=[f"gene-{g}" for g in range(20)]))


def bound(a):
    return a / np.sqrt(1 + (a / 20) ** 2)


# ---- what the cells that are held out must not decide


def test_genes_are_chosen_by_the_training_cells(adata):
    model = models.AE(adata, n_genes=5, **SMALL)
    assert list(model.genes.ids) == [f"gene-{g}" for g in range(5)]


def test_the_decoder_starts_at_the_rates_of_the_training_cells(adata):
    bias = np.asarray(models.AE(adata, **SMALL).network.decoder.log_rate.bias, "float64")
    of_training = adata.X[:40].astype("float64")
    rates = (of_training.sum(0) + 0.5) / of_training.sum() * 1e4
    np.testing.assert_allclose(bound(bias), np.log(rates), rtol=1e-5)


# ---- the loss


def test_the_loss_weighs_the_kl_term_and_it_alone(adata):
    model = models.VAE(adata, beta=0.3, l1=2e-3, l2=3e-3, **SMALL)
    network = model.network
    reconstruction = np.float32([100, 300])
    kl = np.float32([10, 30])
    hidden = network.encoder.layers[0], network.decoder.body.layers[0]
    kernels = [np.asarray(layer.kernel, "float64") for layer in hidden]
    penalty = sum(2e-3 * np.abs(k).sum() + 3e-3 * np.square(k).sum() for k in kernels)
    loss = network.compute_loss(y_pred=(reconstruction, kl))
    assert float(loss) == pytest.approx(200 + 0.3 * 20 + penalty, rel=1e-6)
    loss = network.compute_loss(y=np.float32([0.5, 0.1]), y_pred=(reconstruction, kl))
    assert float(loss) == pytest.approx(200 + (0.5 * 10 + 0.1 * 30) / 2 + penalty, rel=1e-6)


# ---- verbs


def test_a_sampled_embedding_is_the_mean_of_its_draws(adata):
    model = models.IAF(adata, n_flow_steps=2, flow_hidden=(8,), **SMALL)
    network = model.network
    rng = np.random.default_rng(7)
    parameters = network.encode_counts(adata.X)
    noise = [rng.standard_normal((60, 3)).astype("float32") for _ in range(3)]
    draws = [np.asarray(network.sample(parameters, of_one)[0]) for of_one in noise]
    found = model.get_latent_representation(n_mc_samples=3, seed=7)
    np.testing.assert_allclose(found, np.mean(draws, axis=0), rtol=1e-4, atol=1e-5)


def test_normalised_expression_is_the_decoders_mean_at_10000_counts(adata):
    "Without the size factor it is the exponential of the bounded head."
    model = models.AE(adata, **SMALL)
    z = model.network.encode_counts(adata.X)[0]
    rates = np.exp(bound(np.asarray(model.network.decoder.heads(z)[0], "float64")))
    np.testing.assert_allclose(model.get_normalized_expression(), rates, rtol=1e-4)
    at_20000 = model.get_normalized_expression(library_size=2e4)
    np.testing.assert_allclose(at_20000, 2 * rates, rtol=1e-4)


def test_drawn_counts_have_the_moments_of_the_negative_binomial():
    mu = np.array([[0.5, 3.0, 20.0]])
    theta = np.array([[0.8, 2.0, 50.0]])
    logs = [np.log(np.repeat(v, 200_000, axis=0)) for v in (mu, theta)]
    drawn = NegativeBinomial().sample(np.random.default_rng(0), *logs).astype("float64")
    np.testing.assert_allclose(drawn.mean(0), mu[0], rtol=0.02)
    np.testing.assert_allclose(drawn.var(0), (mu + mu**2 / theta)[0], rtol=0.04)


# ---- a training run


@pytest.fixture
def run(adata):
    """Ready to begin; the rate is halved after 2 epochs without a better validation loss, and
    training ends after 5.
    """
    model = models.AE(adata, **SMALL)
    profile = training.Profile(
        learning_rate=0.01, lr_patience=2, patience=5, max_epochs=3, batch_size=16
    )
    return training.Run(model.network, model.X, model.split, profile, progress=False)


def test_a_run_learns_from_the_training_cells_and_watches_the_validation_cells(run):
    run._prepare()
    seen = np.concatenate([run.train.cells(b) for b in range(len(run.train))])
    assert list(np.sort(seen)) == list(range(40))
    # in an order that is drawn
    assert list(seen) != list(range(40))
    watched = np.concatenate([run.validation.cells(b) for b in range(len(run.validation))])
    assert list(watched) == list(range(40, 50))


def test_the_rate_is_halved_and_training_ends_by_the_validation_loss(run):
    """The training loss falls all the time, the validation loss only until the second epoch,
    counted from 0.
    """
    run._prepare()
    watching = [
        c for c in run.callbacks if isinstance(c, (training.Halving, keras.callbacks.EarlyStopping))
    ]
    network = run.network
    rates = []
    network.stop_training = False
    for callback in watching:
        callback.set_model(network)
        callback.on_train_begin()
    for epoch, validation_loss in enumerate([9.0, 8.0, 7.0] + [7.5] * 20):
        for callback in watching:
            callback.on_epoch_end(epoch, {"loss": 5.0 - 0.1 * epoch, "val_loss": validation_loss})
        rates.append(float(network.optimizer.learning_rate))
        if network.stop_training:
            break
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 2 + [0.0025] * 2)


def test_the_best_weights_come_back_though_the_last_epoch_was_worse(run):
    class Spoil(keras.callbacks.Callback):
        "Before the last epoch the decoder's weights go bad, and stay so."

        def on_epoch_begin(self, epoch, logs=None):
            if epoch < 2:
                return
            self.model.optimizer.learning_rate = 1e-9
            bias = self.model.decoder.log_rate.bias
            bias.assign(np.asarray(bias) - 1)

    run.shown = [Spoil()]
    losses = run.go().history["val_loss"]
    assert len(losses) == 3 and losses.idxmin() < 3
    again = run.network.evaluate(
        training._Inputs(run.X, run.split.validation, 16), verbose=0, return_dict=True
    )["loss"]
    assert again == pytest.approx(losses.min(), rel=1e-4)
