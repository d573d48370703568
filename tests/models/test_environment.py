"""What surrounds a model: copies of it, forked processes, Keras' settings, and several models in
one session.
"""

import copy
import gc
import logging
import os
import pickle
import select
import subprocess
import sys
import warnings
import weakref

import keras
import numpy as np
import pytest
from anndata import AnnData

from vampsc import devices, inference, models
from vampsc.counts import split_cells

SMALL = dict(gene_space=None, hidden=(8,), n_latent=3)
ON_TENSORFLOW = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow")


def cells(n=60, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 4.0, (n, 30))).astype("float32")
    X[:, 0] += 1
    adata = AnnData(X)
    adata.obs["donor"] = np.array(["d0", "d1"])[np.arange(n) % 2]
    return adata


@pytest.fixture(scope="module")
def model():
    return models.VAMPIAF(
        cells(),
        batch_key="donor",
        n_pseudo_inputs=5,
        flow_hidden=(6,),
        n_flow_steps=1,
        split=split_cells(60, 3),
        **SMALL,
    ).train(max_epochs=1, progress=False)


# ---- copies


def same(one, other):
    "Do two models have the same weights, history, split and cells, and answer alike?"
    assert all(
        np.array_equal(a, b)
        for a, b in zip(one.network.get_weights(), other.network.get_weights(), strict=True)
    )
    assert (
        one.history.equals(other.history)
        and one.split == other.split
        and one.architecture == other.architecture
    )
    np.testing.assert_array_equal(
        one.get_latent_representation(seed=1), other.get_latent_representation(seed=1)
    )
    assert one.get_elbo(indices=one.split.test) == other.get_elbo(indices=other.split.test)
    assert np.array_equal(one.sample_prior(4).X.toarray(), other.sample_prior(4).X.toarray())


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_is_a_model_of_its_own(model, how):
    other = how(model)
    same(model, other)
    assert type(other) is type(model) and other.network is not model.network
    before = model.network.get_weights()
    one, two = (
        m.train(max_epochs=1, progress=False).history["loss"].tolist()
        for m in (copy.deepcopy(other), other)
    )
    # the noise goes on alike, too
    assert one == two and len(two) == len(model.history) + 1
    assert all(np.array_equal(a, b) for a, b in zip(before, model.network.get_weights()))
    assert not np.array_equal(other.network.get_weights()[0], before[0])


def test_a_copy_shares_the_counts_and_goes_through_joblib(model, tmp_path):
    assert copy.deepcopy(model).X.source is model.X.source
    joblib = pytest.importorskip("joblib")
    joblib.dump({"best": model}, tmp_path / "m.joblib")
    same(model, joblib.load(tmp_path / "m.joblib")["best"])


def test_a_network_alone_says_what_to_copy(model):
    with pytest.raises(NotImplementedError, match=r"copy.deepcopy\(model\) and model.save"):
        copy.deepcopy(model.network)


def test_copies_of_a_model_without_its_cells(model, tmp_path):
    model.save(tmp_path / "m")
    for other in (
        copy.deepcopy(models.load(tmp_path / "m")),
        pickle.loads(pickle.dumps(models.load(tmp_path / "m"))),
    ):
        with pytest.raises(ValueError, match="loaded without its data"):
            other.get_latent_representation()
        other.save(tmp_path / "again", overwrite=True)
        assert models.load(tmp_path / "again", cells()).split == model.split


def test_cells_in_a_file_are_shared_by_a_copy_and_not_sent_away(tmp_path):
    import anndata

    cells().write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    model = models.AE(backed, **SMALL)
    np.testing.assert_array_equal(
        copy.deepcopy(model).get_latent_representation(), model.get_latent_representation()
    )
    with pytest.raises(TypeError, match="in a file.*save the model, and load it"):
        pickle.dumps(model)
    backed.file.close()


# ---- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.parametrize("work", ["use", "make", "load"])
def test_a_forked_process_is_told_instead_of_waiting_for_ever(model, work, tmp_path):
    doing = {
        "use": lambda: model.get_latent_representation(),
        "make": lambda: models.AE(cells(), **SMALL),
        "load": lambda: models.load(tmp_path),
    }[work]
    read, write = os.pipe()
    with warnings.catch_warnings():
        # newer Pythons warn of the fork itself
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        try:
            doing()
            said = "no error"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    answered = select.select([read], [], [], 60)[0]
    said = os.read(read, 2000).decode() if answered else "it hangs"
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert said.startswith("RuntimeError") and "get_context('spawn')" in said


def test_a_backend_that_cannot_train_is_refused_by_name():
    code = (
        "import anndata, numpy, vampsc\ntry: vampsc.AE(anndata.AnnData(numpy.ones((20, 5),"
        " 'float32')), gene_space=None)\nexcept RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "numpy"},
    )
    assert (
        "not on Keras' backend 'numpy'" in done.stdout and "KERAS_BACKEND=tensorflow" in done.stdout
    ), done.stderr


# ---- Keras' numbers


@pytest.fixture
def double():
    "Keras' default is float64, as another package or keras.json may set it."
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


MORE = {
    "AE": {},
    "VAE": {},
    "IAF": dict(flow_hidden=(6,), n_flow_steps=1),
    "VAMP": dict(n_pseudo_inputs=5, learn_weights=True),
    "VAMPIAF": dict(n_pseudo_inputs=5, flow_hidden=(6,), n_flow_steps=1),
    "MOG": dict(n_pseudo_inputs=5),
    "HVAMP": dict(n_pseudo_inputs=5),
}


def verbs(model):
    "What every verb of a model says, as arrays."
    said = [
        model.get_latent_representation(n_mc_samples=2),
        model.get_reconstruction_error(n_mc_samples=2),
        model.get_normalized_expression(n_mc_samples=2),
        model.posterior_predictive_sample().X.toarray(),
    ]
    if model.network.prior is not None:
        said += [
            model.get_elbo(),
            model.get_marginal_ll(n_mc_samples=2),
            model.get_kl_per_unit()[0],
            model.sample_prior(5).X.toarray(),
        ]
    if model.architecture.has_pseudo_inputs:
        said.append(model.pseudo_inputs().X)
    if type(model).__name__ in ("VAE", "VAMP"):
        said += [model.get_aggregate_kl(), model.get_marginal_ll(n_mc_samples=2, proposal="both")]
    return [np.array(list(v.values())) if isinstance(v, dict) else np.asarray(v) for v in said]


@pytest.mark.parametrize("name", ["VAE", "VAMPIAF", "HVAMP"])
def test_double_precision_as_keras_default_changes_nothing(name, double):
    model = models.PRESETS[name](cells(), **SMALL, **MORE[name]).train(max_epochs=1, progress=False)
    assert {
        keras.backend.standardize_dtype(v.dtype) for v in model.network.trainable_variables
    } == {"float32"}
    found = verbs(model)
    keras.config.set_floatx("float32")
    expected = models.PRESETS[name](cells(), **SMALL, **MORE[name]).train(
        max_epochs=1, progress=False
    )
    for one, other in zip(found, verbs(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(models.PRESETS))
@pytest.mark.parametrize(
    "more",
    [dict(batch_key="donor"), dict(dispersion="gene", linear_decoder=True)],
    ids=["batches", "linear"],
)
def test_every_verb_works_in_mixed_precision(name, more):
    full, mixed = (
        models.PRESETS[name](cells(), precision=p, **SMALL, **MORE[name], **more)
        for p in ("float32", "mixed_bfloat16")
    )
    for one, other in zip(verbs(full)[:3], verbs(mixed)[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=0.1, atol=0.1)
    assert all(np.isfinite(v).all() for v in verbs(mixed))
    z = np.ones((2, 3), "float32")
    size = np.full((2, 1), 1.23456789, "float32")
    batch = np.eye(2, dtype="float32") if "batch_key" in more else None
    log_mu, log_theta = mixed.network.decoder(z, size, conditions=batch)
    assert {keras.backend.standardize_dtype(v.dtype) for v in (log_mu, log_theta)} == {"float32"}
    plain, _ = mixed.network.decoder(z, 0 * size, conditions=batch)
    # sizes keep their digits
    np.testing.assert_allclose(np.asarray(log_mu) - np.asarray(plain), 1.2345679, atol=1e-5)


# ---- several models in one session


@ON_TENSORFLOW
@pytest.mark.slow
def test_many_models_are_not_taken_for_one_that_is_traced_again(monkeypatch):
    import tensorflow as tf

    # the verbs compile what they call, too
    monkeypatch.setattr(inference, "COMPILE_FROM_CALLS", 1)
    said = []
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        for seed in range(7):
            model = models.AE(cells(seed=seed), seed=seed, **SMALL).train(
                max_epochs=1, progress=False
            )
            model.get_latent_representation(batch_size=30)
            seen.append(weakref.ref(model.network))
        tf.get_logger().warning("another warning")
    finally:
        tf.get_logger().removeHandler(handler)
    assert said == ["another warning"]
    del model
    gc.collect()
    # nothing keeps the earlier ones
    assert not any(network() for network in seen)


def test_here_models_can_be_made():
    assert devices.check_ready() is None
