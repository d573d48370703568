"""The paper's sentences, each beside what a model that was built with the defaults really has."""

import contextlib

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers, ops

from vampsc import organs, training
from vampsc.assembly import Architecture, build_network
from vampsc.flows import MADE, MaskedDense
from vampsc.models import PRESETS
from vampsc.networks import log_normalise, size_factors
from vampsc.posteriors import kl_to_standard_normal

PAPER = ["AE", "VAE", "IAF", "VAMP"]  # K = 500 needs 500 cells, not many genes
GENES = 700


@pytest.fixture(scope="module")
def built():
    adata = organs.load("pancreas")
    return {name: PRESETS[name](adata, n_genes=GENES) for name in PAPER}


@pytest.fixture(scope="module")
def compiled(built):
    "The optimiser and callbacks of the `paper` profile, caught at the moment of fit()."
    model = built["VAE"]
    caught = {}

    class Stop(Exception):
        pass

    def fit(run, callbacks, epochs):
        caught.update(
            callbacks=run.callbacks, epochs=epochs, data=run.train, optimizer=run.network.optimizer
        )
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "_fit", fit)
        with contextlib.suppress(Stop):
            model.train("paper", progress=False)
    return caught


def stacks(model):
    return {"encoder": model.network.encoder, "decoder": model.network.decoder.body}


def callback(compiled, kind):
    return next(c for c in compiled["callbacks"] if isinstance(c, kind))


def kernels(network):
    "Every kernel of the network and its regulariser."
    return [
        (l.kernel, l.kernel.regularizer)
        for l in network._flatten_layers()
        if isinstance(l, (layers.Dense, MaskedDense))
    ]


@pytest.mark.parametrize("name", PAPER)
def test_architecture(built, name):
    "'the following model architecture: (512, 256, 128, 256, 512)'"
    model = built[name]
    widths = {
        k: [l.units for l in s.layers if isinstance(l, layers.Dense)]
        for k, s in stacks(model).items()
    }
    assert widths == {"encoder": [512, 256], "decoder": [256, 512]}
    assert model.network.posterior.mean.units == model.network.n_latent == 128
    assert model.network.decoder.log_rate.units == len(model.genes) == GENES
    assert Architecture() == Architecture(
        n_latent=128,
        hidden=(512, 256),
        dropout=0.2,
        l1=5e-4,
        l2=5e-4,
        n_pseudo_inputs=500,
        n_flow_steps=5,
        beta=1.0,
        dispersion="gene-cell",
        linear_decoder=False,
        plain_decoder=False,
    )


@pytest.mark.parametrize("name", PAPER)
def test_order_of_hidden_layers(built, name):
    """'a tanh activation after every dense layer except the bottleneck and the last decoder layer,
    scaled and centered batch-normalisation and dropout (rate: 0.2) after each non-linearity'
    """
    for stack in stacks(built[name]).values():
        assert [type(l) for l in stack.layers] == 2 * [
            layers.Dense,
            layers.BatchNormalization,
            layers.Dropout,
        ]
        for layer in stack.layers:
            if isinstance(layer, layers.Dense):
                assert layer.activation is keras.activations.tanh
            if isinstance(layer, layers.BatchNormalization):
                assert layer.scale and layer.center
            if isinstance(layer, layers.Dropout):
                assert layer.rate == 0.2


@pytest.mark.parametrize("name", PAPER)
def test_bottleneck_and_heads_are_linear_and_alone(built, name):
    """...

    'except the bottleneck and the last decoder layer': linear, and no batch-norm or dropout beside
    those of the hidden layers.
    """
    network = built[name].network
    heads = [network.posterior.mean, network.decoder.log_rate, network.decoder.log_dispersion]
    if name != "AE":
        heads.append(network.posterior.log_var)
    assert all(h.activation is keras.activations.linear for h in heads)
    kinds = [type(l) for l in network._flatten_layers()]
    assert kinds.count(layers.BatchNormalization) == kinds.count(layers.Dropout) == 4


@pytest.mark.parametrize("name", PAPER)
def test_regularisation(built, name):
    """'L1 and L2 regularization (5e-4 each)': on the kernels of hidden layers, those of the flow
    included; on nothing else.
    """
    network = built[name].network
    penalised = [(kernel, r) for kernel, r in kernels(network) if r is not None]
    for _, r in penalised:
        assert (float(r.l1), float(r.l2)) == pytest.approx((5e-4, 5e-4))
    hidden = [
        l.kernel
        for s in stacks(built[name]).values()
        for l in s.layers
        if isinstance(l, layers.Dense)
    ]
    for step in network.posterior.flow.steps if name == "IAF" else ():
        hidden += [l.kernel for l in (*step.inner, *step.context)]
    assert {id(kernel) for kernel, _ in penalised} == {id(kernel) for kernel in hidden}
    assert len(hidden) == len(network.losses) == (4 + 5 * 4 if name == "IAF" else 4)
    assert sum(v.regularizer is not None for v in network.variables) == len(hidden)
    values = [np.asarray(kernel, "float64") for kernel in hidden]
    by_hand = sum(5e-4 * np.abs(v).sum() + 5e-4 * np.square(v).sum() for v in values)
    assert float(sum(network.losses)) == pytest.approx(by_hand, rel=1e-4)


def test_optimiser(compiled):
    "'a learning rate of 5e-5 (Adam optimizer)'"
    optimizer = compiled["optimizer"]
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert float(optimizer.learning_rate) == pytest.approx(5e-5)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon, optimizer.weight_decay) == (
        0.9,
        0.999,
        1e-7,
        None,
    )


def test_learning_rate_decay(compiled):
    "'50 % learning rate decay after 10 epochs without improvement of the validation loss'"
    decay = callback(compiled, keras.callbacks.ReduceLROnPlateau)
    assert (decay.factor, decay.patience, decay.monitor) == (0.5, 10, "val_loss")


def test_early_stopping(compiled):
    "'early stopping with a patience of 100 epochs'; the profile's bound on epochs is far beyond."
    stop = callback(compiled, keras.callbacks.EarlyStopping)
    assert (stop.patience, stop.monitor, stop.restore_best_weights) == (100, "val_loss", True)
    assert compiled["epochs"] >= 10_000


def test_split(built, compiled):
    "'held-out a random selection of 10 % validation data, and 10 % test data from training'"
    split = built["VAE"].split
    train, validation, test = (len(part) for part in (split.train, split.validation, split.test))
    assert train + validation + test == 1937
    assert validation == pytest.approx(193.7, abs=1) and test == pytest.approx(193.7, abs=1)
    assert not set(split.train) & set(split.validation) and not set(split.test) & {
        *split.train,
        *split.validation,
    }
    assert sorted(compiled["data"].indices) == sorted(split.train)


def test_flow_steps(built):
    "'We used 5 flow layers in the VAE-IAF model'"
    steps = built["IAF"].network.posterior.flow.steps
    assert len(steps) == 5 and all(isinstance(step, MADE) for step in steps)
    # not in the paper; its code family's
    assert [l.kernel.shape for l in steps[0].inner] == [(128, 320), (320, 320)]
    assert steps[0].outer.kernel.shape == (320, 2 * 128)


def test_pseudo_inputs(built):
    """'K learnable pseudo-inputs', of the one encoder; K = 500 is not in the paper but its code
    family's and Tomczak & Welling's.
    """
    network = built["VAMP"].network
    assert (
        network.prior.pseudo_inputs.shape == (500, GENES) and network.prior.pseudo_inputs.trainable
    )
    # no encoder of its own
    assert {w.path for w in network.prior.trainable_weights} == {network.prior.pseudo_inputs.path}
    means, log_vars, log_weights = network.components()
    again = network.encode(ops.convert_to_tensor(network.prior.pseudo_inputs))
    np.testing.assert_array_equal(means, again[0])
    np.testing.assert_allclose(log_weights, -np.log(500), rtol=1e-6)


@pytest.mark.parametrize("name", PAPER)
def test_input_layer(built, name):
    """'an additional layer at the input of each model which normalised all counts to 10000,
    followed by a ln(1+x) operation'
    """
    model = built[name]
    x = model.X[:20].toarray()
    by_hand = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    np.testing.assert_allclose(log_normalise(x), by_hand, rtol=1e-5)
    np.testing.assert_allclose(
        model.get_latent_representation(indices=range(20), n_mc_samples=2),
        model._posterior_mean(
            model.network.encode(by_hand.astype("float32")), np.random.default_rng(0), 2
        ),
        rtol=1e-3,
        atol=1e-3,
    )


def test_gene_space(built):
    """'mapped each dataset input gene space to ...

    (protein-coding only), replacing any missing expression values with zeros'
    """
    adata = organs.load("pancreas")
    model = PRESETS["AE"](adata)
    # GENCODE 48; Ensembl 97 is fetched when asked for
    assert len(model.genes) == 20_120
    missing = ~pd.Index(model.genes.symbols).isin(adata.var_names) & ~pd.Index(
        model.genes.ids
    ).isin(adata.var_names)
    assert missing.sum() > 1000 and model.X[:][:, missing].nnz == 0


@pytest.mark.parametrize("name", PAPER)
def test_the_loss_is_not_tuned(built, name):
    """'do not require tuning the loss': weight 1 on the KL, no warm-up; the loss is reconstruction
    + KL + penalty.
    """
    model = built[name]
    draw = np.random.default_rng(0)
    assert model.architecture.beta == model.network.beta == 1.0
    x = model.X[:30].toarray()
    noise = draw.standard_normal((30, 128)).astype("float32")
    reconstruction, kl = model.network.terms(x, noise, model.network.components())
    loss = model.network.compute_loss(y_pred=(reconstruction, kl))
    penalty = float(sum(model.network.losses))
    assert float(loss) == pytest.approx(
        float(np.mean(reconstruction) + np.mean(kl)) + penalty, rel=1e-5
    )
    if name == "AE":
        assert np.all(np.asarray(kl) == 0)
    if name == "VAE":
        truth = np.sum(kl_to_standard_normal(*model.network.encode(log_normalise(x))), axis=1)
        np.testing.assert_allclose(kl, truth, rtol=1e-4)


def test_size_factors_scale_the_mean():
    """Twice the counts of a cell: the same latent vector, twice the mean, the same dispersion (a
    negative binomial on counts).
    """
    network = build_network(Architecture(hidden=(8,), n_latent=3), 12)
    x = np.random.default_rng(0).poisson(3.0, (4, 12)).astype("float32") + 1
    z = np.zeros((4, 3), "float32")
    one, two = (network.decoder(z, ops.log(size_factors(f * x))) for f in (1, 2))
    np.testing.assert_allclose(np.asarray(two[0]) - np.asarray(one[0]), np.log(2), rtol=1e-4)
    np.testing.assert_array_equal(one[1], two[1])


def test_profiles():
    """The settings that the paper leaves open are those of its code family: batch 128, and all
    genes.
    """
    paper = training.PROFILES["paper"]
    assert paper == training.Profile(
        learning_rate=5e-5,
        lr_patience=10,
        patience=100,
        max_epochs=10_000,
        batch_size=128,
        n_genes=None,
    )
