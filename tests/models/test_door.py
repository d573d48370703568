"""Settings, keys, batches and arguments: made Python's where they enter, or refused by name before
anything is computed.
"""

import os

import keras
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from vampsc import assembly, counts, downloads, genes, intake, models, organs, training
from vampsc.counts import CountsError

SMALL = dict(gene_space=None, hidden=(8,), n_latent=3)


def cells(n=60, seed=0, **obs):
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 4.0, (n, 30))).astype("float32")
    X[:, 0] += 1
    names = [f"c{i}" for i in range(n)]
    return AnnData(
        X,
        pd.DataFrame({"donor": np.array(["d0", "d1"])[np.arange(n) % 2], **obs}, index=names),
        pd.DataFrame(index=[f"g{j}" for j in range(30)]),
    )


@pytest.fixture(scope="module")
def adata():
    return cells()


@pytest.fixture(scope="module")
def model(adata):
    return models.IAF(adata, batch_key="donor", flow_hidden=(8,), n_flow_steps=1, **SMALL)


# ---- settings


def test_numbers_of_numpy_are_pythons_in_an_architecture():
    plain = dict(
        posterior="iaf",
        prior="vamp",
        n_latent=3,
        hidden=(8, 4),
        dropout=0.5,
        l1=0.25,
        l2=0.0,
        beta=2.0,
        n_pseudo_inputs=5,
        learn_weights=True,
        n_flow_steps=2,
        flow_hidden=(6,),
        linear_decoder=False,
        plain_decoder=True,
    )
    numpys = dict(
        posterior=np.str_("iaf"),
        prior=np.str_("vamp"),
        n_latent=np.int64(3),
        hidden=np.array([8, 4]),
        dropout=np.float32(0.5),
        l1=np.float64(0.25),
        l2=np.int32(0),
        beta=2,
        n_pseudo_inputs=np.uint8(5),
        learn_weights=np.bool_(True),
        n_flow_steps=np.int16(2),
        flow_hidden=[np.int64(6)],
        linear_decoder=np.bool_(False),
        plain_decoder=np.bool_(True),
    )
    given = assembly.Architecture(**numpys)
    expected = assembly.Architecture(**plain)
    assert given == expected
    for name in plain:
        assert type(getattr(given, name)) is type(getattr(expected, name)), name
    assert {type(width) for width in given.hidden} == {int}
    assert (
        assembly.Architecture(hidden=pd.Series([8, 4])).hidden
        == assembly.Architecture(hidden=range(8, 3, -4)).hidden
        == (8, 4)
    )


def test_a_model_of_numpys_numbers_trains_saves_and_comes_back(adata, tmp_path):
    model = models.VAMP(
        adata,
        gene_space=None,
        hidden=np.array([8]),
        n_latent=np.int64(3),
        beta=np.float32(0.5),
        n_pseudo_inputs=np.int64(5),
        seed=np.int64(1),
        n_genes=np.int64(20),
    )
    model.train(
        max_epochs=np.int64(1),
        batch_size=np.int64(32),
        learning_rate=np.float32(1e-3),
        progress=np.bool_(False),
        checkpoint=tmp_path / "c",
    )
    model.save(tmp_path / "m")
    assert (
        models.load(tmp_path / "m").architecture == model.architecture and len(model.history) == 1
    )


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(dropout=1.0), "dropout must be a number of at least 0 and below 1, not 1.0"),
        (dict(dropout=-0.1), "dropout"),
        (dict(beta=-1), "beta must be a number of at least 0, not -1"),
        (dict(beta=float("nan")), "beta.*nan"),
        (dict(beta=True), "beta"),
        (dict(beta="1"), "beta"),
        (dict(l1=-1e-4), "l1"),
        (dict(l2=float("inf")), "l2"),
        (dict(n_latent=0), "n_latent"),
        (dict(n_latent=3.0), "n_latent"),
        (dict(n_latent=True), "n_latent"),
        (dict(hidden=(8.0,)), "each of hidden must be a whole number.*8.0"),
        (dict(hidden=(0,)), "hidden"),
        (dict(hidden=8), r"hidden must be a tuple of whole numbers, such as \(512, 256\); got 8"),
        (dict(hidden="88"), "hidden"),
        (dict(linear_decoder="no"), "linear_decoder must be True or False, not 'no'"),
        (dict(encode_batch=1), "encode_batch"),
        (dict(dispersion=["gene"]), "dispersion"),
        (dict(precision=None), "precision"),
        (dict(seed=-1), "seed"),
        (dict(seed=None), "seed"),
        (dict(n_genes=0), "n_genes"),
        (dict(use_raw="yes"), "use_raw"),
        (dict(layer=["counts"]), "layer must be the name of one layer"),
        (dict(pseudo_inputs_from="nowhere"), "pseudo_inputs_from"),
        (dict(n_hidden=128), "n_hidden.*here it is hidden="),
        (dict(gene_likelihood="zinb"), "likelihood=, 'nb', 'zinb' or 'poisson'"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name_before_the_data_are_looked_at(wrong, words):
    with pytest.raises((ValueError, TypeError), match=words):
        models.VAE(None, **wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(learning_rate=0), "learning_rate must be a number above 0, not 0"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(learning_rate=True), "learning_rate"),
        (dict(patience=0), "patience"),
        (dict(lr_patience=1.5), "lr_patience"),
        (dict(max_epochs=-1), "max_epochs"),
        (dict(batch_size=0), "batch_size"),
        (dict(n_genes=0), "n_genes"),
        (dict(kl_warmup=5, max_epochs=5), "kl_warmup=5"),
        (dict(profile={"max_epochs": 3}), "profile must be one of"),
        (dict(profile=400), "not 400. Epochs are max_epochs=400"),
    ],
)
def test_training_settings_out_of_range(wrong, words):
    with pytest.raises(ValueError, match=words):
        training.get_profile(**wrong)
    if "profile" not in wrong:
        with pytest.raises(ValueError, match=words):
            training.Profile(**{**vars(training.PROFILES["quick"]), **wrong})


def test_training_settings_of_numpy_are_pythons():
    given = training.get_profile(
        max_epochs=np.int64(3), learning_rate=np.float64(0.5), n_genes=np.int32(7)
    )
    assert [type(v) for v in (given.max_epochs, given.learning_rate, given.n_genes)] == [
        int,
        float,
        int,
    ]
    assert given == training.get_profile(max_epochs=3, learning_rate=0.5, n_genes=7)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(early_stopping=True), "early_stopping.*here it is patience="),
        (dict(train_size=0.9), "split="),
        (dict(resume="yes"), "resume"),
        (dict(callbacks=[print]), "callbacks must be Keras callbacks"),
        (dict(seed=1), "'seed' is not known"),
    ],
)
def test_arguments_of_train_are_refused_by_name(model, wrong, words):
    with pytest.raises((ValueError, TypeError), match=words):
        model.train(max_epochs=1, progress=False, **wrong)


def test_batches_check_their_settings():
    X = np.ones((4, 2), "float32")
    assert (
        counts.Batches(
            X, batch_size=np.int64(3), seed=np.int64(2), shuffle=np.bool_(True)
        ).batch_size
        == 3
    )
    for wrong in (dict(seed=-1), dict(shuffle="yes"), dict(batch_size=2.0)):
        with pytest.raises(CountsError, match=next(iter(wrong))):
            counts.Batches(X, **wrong)


# ---- columns


def test_a_column_that_is_there_twice_is_named(adata):
    twice = adata.copy()
    twice.obs = pd.concat([twice.obs, twice.obs[["donor"]]], axis=1)
    with pytest.raises(ValueError, match="2 columns of obs are called 'donor'.*duplicated"):
        models.VAE(twice, batch_key="donor", **SMALL)
    # the remedy
    twice.obs = twice.obs.loc[:, ~twice.obs.columns.duplicated()]
    assert models.VAE(twice, batch_key="donor", **SMALL).batches == ["d0", "d1"]


def test_keys_that_are_no_names(adata):
    with pytest.raises(
        ValueError, match=r"batch_key must be the name of one column, not \['donor', 'assay'\]"
    ):
        models.VAE(adata, batch_key=["donor", "assay"], **SMALL)
    with pytest.raises(
        organs.OrganError, match=r"key must be the name of one column of adata.obs, not \['donor'\]"
    ):
        organs.labels(adata, ["donor"])


def test_columns_called_by_numbers(adata, tmp_path):
    numbered = adata.copy()
    numbered.obs[0] = np.repeat(["a", "b"], 30)
    with pytest.raises(ValueError, match="no column 'Donor' for the batch; there are donor, 0"):
        models.VAE(numbered, batch_key="Donor", **SMALL)
    model = models.VAE(numbered, batch_key=np.int64(0), **SMALL)
    assert model.batches == ["a", "b"] and "batches of 0" in repr(model)
    model.save(tmp_path / "m")
    assert models.load(tmp_path / "m", numbered).get_normalized_expression().shape == (60, 30)


# ---- batches


@pytest.mark.parametrize(
    "values",
    [[0, 1], [0.0, 1.0], ["0", "1"], ["0.0", "1.0"], [" 0", "1 "], np.array([0, 1], "uint8")],
)
def test_batches_have_one_name_whatever_their_type(values):
    codes, names = intake.batch_codes(cells(n=20, batch=np.tile(values, 10)), "batch")
    assert names == ["0", "1"] and codes.tolist() == [0, 1] * 10
    as_categories = cells(n=20, batch=pd.Categorical(np.tile(values, 10)))
    assert intake.batch_codes(as_categories, "batch", ["1", "0"])[0].tolist() == [1, 0] * 10


def test_labels_that_are_no_whole_numbers_stay_as_they_are():
    assert [
        intake.batch_name(v) for v in ("d1.0", "1.5", "01", 1e3, -2.0, True, "a b", b"d0", 1e16)
    ] == ["d1.0", "1.5", "01", "1000", "-2", "True", "a b", "d0", str(10**16)]


def test_names_of_older_versions_are_known_again():
    assert (
        intake.batch_codes(cells(n=20, batch=np.tile([0, 1], 10)), "batch", ["0.0", "1.0"])[
            0
        ].tolist()
        == [0, 1] * 10
    )


def test_spellings_of_one_batch_are_said():
    with pytest.warns(UserWarning, match="taken as one batch: ' d0', 'd0'"):
        assert intake.batch_codes(cells(n=20, batch=np.tile(["d0", " d0"], 10)), "batch")[1] == [
            "d0"
        ]
    with pytest.warns(
        UserWarning,
        match=r"'D0' looks like 'd0' and is taken as another.*replace\(\{'D0': 'd0'\}\)",
    ):
        assert intake.batch_codes(cells(n=20, batch=np.tile(["d0", "D0"], 10)), "batch")[1] == [
            "D0",
            "d0",
        ]


def test_transfer_knows_batches_of_another_type_and_says_which_are_new(capsys):
    model = models.VAE(cells(batch=np.arange(60) % 2), batch_key="batch", **SMALL)
    same = model.transfer(
        cells(batch=(np.arange(60) % 2).astype(float)), max_epochs=0, progress=False
    )
    assert same.batches == ["0", "1"] and "added" not in capsys.readouterr().out
    np.testing.assert_allclose(
        same.get_normalized_expression(seed=1), model.get_normalized_expression(seed=1), rtol=1e-5
    )
    more = model.transfer(cells(batch=np.arange(60) % 3), max_epochs=0, progress=False)
    assert (
        more.batches == ["0", "1", "2"]
        and "VAE: batch 2 is added to those that the model knows" in capsys.readouterr().out
    )


def test_transfer_warns_of_a_batch_that_looks_like_a_known_one(model):
    query = cells(donor=np.array(["D0", "d1"])[np.arange(60) % 2])
    with pytest.warns(UserWarning, match="donor 'D0' looks like 'd0'"):
        model.transfer(query, max_epochs=0, progress=False)
    with pytest.raises(ValueError, match=r"D0 was not seen.*'D0' looks like the known 'd0'"):
        model.get_elbo(query)


def test_cells_of_unknown_donors_are_embedded_where_the_donor_does_not_matter(adata, model):
    strangers = cells(donor=["x"] * 60)
    bare = strangers.copy()
    del bare.obs["donor"]
    for verb in ("get_latent_representation", "get_kl_per_unit"):
        known, unknown, none = (
            getattr(model, verb)(query, seed=1) for query in (adata, strangers, bare)
        )
        np.testing.assert_allclose(unknown[0], known[0], rtol=1e-5)
        np.testing.assert_allclose(none[0], known[0], rtol=1e-5)
    as_d1 = [
        model.get_normalized_expression(query, transform_batch="d1").to_numpy()
        for query in (adata, bare)
    ]
    np.testing.assert_allclose(*as_d1, rtol=1e-4)
    for verb in ("get_elbo", "get_normalized_expression", "posterior_predictive_sample"):
        with pytest.raises(ValueError, match="transfer"):
            getattr(model, verb)(strangers)
    told = models.VAE(adata, batch_key="donor", encode_batch=True, **SMALL)
    with pytest.raises(ValueError, match="transfer"):
        told.get_latent_representation(strangers)
    with pytest.raises(ValueError, match="transfer"):
        told.get_normalized_expression(strangers, transform_batch="d0")


# ---- arguments of the verbs


def test_genes_are_named_in_every_usual_form(model):
    whole = model.get_normalized_expression()
    for wanted, columns in (
        ("g1", ["g1"]),
        (["g3", "g1"], ["g3", "g1"]),
        (pd.Index(["g2"]), ["g2"]),
        (np.array(["g2"]), ["g2"]),
        (np.arange(30) < 2, ["g0", "g1"]),
        (pd.Series(["g4"]), ["g4"]),
        (["g1.3"] * 0, []),
    ):
        some = model.get_normalized_expression(gene_list=wanted)
        assert list(some.columns) == columns
        np.testing.assert_allclose(some, whole[columns], rtol=1e-6)
    with pytest.raises(ValueError, match="'nix' is not a gene"):
        model.get_normalized_expression(gene_list=["g1", "nix"])
    with pytest.raises(ValueError, match="mask of genes needs 30 entries, not 3"):
        model.get_normalized_expression(gene_list=[True, False, True])


def test_an_identifier_may_have_a_version():
    data = cells()
    data.var_names = [f"ENSG{j:011d}" for j in range(30)]
    model = models.AE(data, **SMALL)
    some = model.get_normalized_expression(gene_list=["ENSG00000000004.7"])
    np.testing.assert_array_equal(
        some.iloc[:, 0], model.get_normalized_expression()["ENSG00000000004"]
    )


@pytest.mark.parametrize(
    "verb, wrong, words",
    [
        (
            "get_normalized_expression",
            dict(library_size="latent"),
            "library_size='latent'.*'observed'",
        ),
        (
            "get_normalized_expression",
            dict(library_size=-1),
            "library_size must be a number above 0",
        ),
        ("get_normalized_expression", dict(library_size=float("nan")), "library_size"),
        ("get_normalized_expression", dict(transform_batch=["d0", "d1"]), "one name"),
        (
            "get_normalized_expression",
            dict(return_numpy=True),
            "no argument 'return_numpy'.*to_numpy",
        ),
        ("get_latent_representation", dict(give_mean=True), "n_mc_samples"),
        (
            "get_latent_representation",
            dict(n_mc_samples=10.0),
            "n_mc_samples must be a whole number",
        ),
        ("get_latent_representation", dict(seed=-1), "seed must be"),
        ("get_latent_representation", dict(batch_size=0), "batch_size"),
        ("get_elbo", dict(n_mc_samples=0), "n_mc_samples"),
        (
            "get_elbo",
            dict(indexes=[0]),
            r"no argument 'indexes' \(did you mean 'indices'\?\); it has adata, indices",
        ),
        ("get_marginal_ll", dict(per_cell="yes"), "per_cell must be True or False"),
        ("get_marginal_ll", dict(proposal=1), "proposal=1"),
        ("sample_prior", dict(n_samples=1e3), "n_samples must be a whole number"),
        ("sample_prior", dict(n_samples=0), "n_samples must be a whole number of at least 1"),
        ("posterior_predictive_sample", dict(n_samples=True), "n_samples"),
        ("save", dict(path="x", overwrite="yes"), "overwrite"),
        ("embed", dict(adata=None, key=["X"]), "key must be the name"),
    ],
)
def test_arguments_of_verbs_are_refused_by_name(model, verb, wrong, words):
    with pytest.raises((ValueError, TypeError), match=words):
        getattr(model, verb)(**wrong)


def test_numbers_of_numpy_as_arguments(model):
    z = model.get_latent_representation(
        n_mc_samples=np.int64(3), seed=np.uint8(1), batch_size=np.int32(7)
    )
    np.testing.assert_array_equal(
        z, model.get_latent_representation(n_mc_samples=3, seed=1, batch_size=7)
    )
    assert model.sample_prior(np.int64(4), batch=np.str_("d1")).n_obs == 4
    sizes = [
        model.get_normalized_expression(library_size=size).to_numpy()
        for size in (100, np.float32(100))
    ]
    np.testing.assert_array_equal(*sizes)


def test_one_callback_is_enough_and_a_whole_network_is_not_written(adata, tmp_path):
    model = models.AE(adata, **SMALL)
    epochs = []
    model.train(
        max_epochs=2,
        progress=False,
        callbacks=keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: epochs.append(epoch)
        ),
    )
    assert epochs == [0, 1]
    whole = keras.callbacks.ModelCheckpoint(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="save_weights_only=True.*weights.h5"):
        model.train(max_epochs=1, progress=False, callbacks=[whole])
    weights = keras.callbacks.ModelCheckpoint(tmp_path / "x.weights.h5", save_weights_only=True)
    model.train(max_epochs=1, progress=False, callbacks=weights)
    assert (tmp_path / "x.weights.h5").stat().st_size > 0


# ---- paths


def test_the_home_folder_in_paths(adata, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"id": adata.var_names, "symbol": adata.var_names}).to_csv(
        home / "g.csv", index=False
    )
    model = models.AE(adata, gene_space="~/g.csv", hidden=(8,), n_latent=3)
    model.train(max_epochs=1, progress=False, checkpoint="~/x.checkpoint").save("~/m")
    assert len(models.load("~/m").history) == 1
    model.save("~/m", overwrite=True)
    # a lock may lie beside
    seen = sorted(name for name in os.listdir(home) if not name.startswith("."))
    assert seen == ["g.csv", "m", "x.checkpoint"] and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize(
    "value, least, right",
    [
        (3, 0, True),
        (np.int64(3), 3, True),
        (2, 3, False),
        (2.0, 0, False),
        ("2", 0, False),
        (None, 0, False),
    ],
)
def test_whole_numbers(value, least, right):
    if right:
        assert counts.whole_number("n", value, least) == 3
    else:
        with pytest.raises(
            counts.CountsError, match=f"n must be a whole number of at least {least}"
        ):
            counts.whole_number("n", value, least)


def test_an_adata_is_one_or_the_remedy_is_named():
    genes.check_adata(organs.load("pancreas")[:2])
    with pytest.raises(TypeError, match="read the file first"):
        genes.check_adata("my.h5ad")


def test_a_column_by_its_name():
    obs = pd.DataFrame([[1, 2, 3]], columns=["donor", 7, 7])
    assert counts.column_of(obs, "donor").tolist() == [1]
    with pytest.raises(
        counts.CountsError, match="no column 'lab' for the batches; there are donor, 7"
    ):
        counts.column_of(obs, "lab", " for the batches")
    with pytest.raises(counts.CountsError, match="2 columns of obs are called 7"):
        counts.column_of(obs, 7)


def test_paths_of_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert downloads.user_path("~/runs") == tmp_path / "runs"
    with pytest.raises(TypeError, match="a path must be text or a Path, not 5"):
        downloads.user_path(5)
    with pytest.raises(ValueError, match="the path is empty"):
        downloads.user_path("")
