"""Covariates: models that are told each cell's batch."""

import copy
import json
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from vampsc import counts, metrics, models, organs, saving, training
from vampsc.counts import Batches, Counts

SMALL = dict(n_genes=200, n_latent=8, hidden=(64,), n_pseudo_inputs=20)
HOW = dict(progress=False, batch_size=64)


@pytest.fixture(scope="module")
def adata():
    """Cells of two laboratories: in the second, half of the genes are caught three times as well,
    whatever the cell.
    """
    cells = organs.load("pancreas")[:900].copy()
    rng = np.random.default_rng(0)
    lab = rng.integers(2, size=len(cells))
    keep = np.where(lab[:, None] & (rng.random(cells.n_vars) < 0.5)[None, :], 0.2, 0.9)
    X = cells.X.toarray()
    cells.X = sp.csr_matrix(rng.binomial(X.astype(int), keep).astype("float32"))
    cells.obs["lab"] = np.array(["north", "south"])[lab]
    return cells


TINY = dict(gene_space=None, hidden=(8,), n_latent=3)


def few_cells(donors, n=90):
    "Cells of these donors in turn, 20 genes."
    counts = np.random.default_rng(0).poisson(2.0, (n, 20)) + 1
    obs = pd.DataFrame(
        {"donor": [donors[i % len(donors)] for i in range(n)]}, index=[f"c{i}" for i in range(n)]
    )
    return ad.AnnData(
        sp.csr_matrix(counts.astype("float32")),
        obs,
        pd.DataFrame(index=[f"g{j}" for j in range(20)]),
    )


def rewrite(folder, description):
    "Another model.json, with checksums that say so."
    (folder / "model.json").write_text(json.dumps(description))
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != saving.CHECKSUMS}
    (folder / saving.CHECKSUMS).write_bytes(saving._checksums(files))


KINDS = {
    "without": {},
    "decoder": {"batch_key": "lab"},
    "both": {"batch_key": "lab", "encode_batch": True},
}


def vamps(adata, epochs):
    return {
        name: models.VAMP(adata, **SMALL, **more).train(max_epochs=epochs, **HOW)
        for name, more in KINDS.items()
    }


@pytest.fixture(scope="module")
def trained(adata):
    "Trained for as long as a test of how things work needs."
    return vamps(adata, 8)


@pytest.fixture(scope="module")
def trained_longer(adata):
    "Trained for as long as a test of how good they are needs."
    return vamps(adata, 60)


@pytest.mark.slow
def test_the_embedding_of_a_model_that_knows_the_batch_mixes_them(adata, trained_longer):
    trained = trained_longer
    z = {name: m.get_latent_representation() for name, m in trained.items()}
    asw = {name: metrics.silhouette(at, adata.obs["lab"]) for name, at in z.items()}
    # of the same laboratory; mixed: 0.5
    neighbours = {name: metrics.knn_purity(at, adata.obs["lab"]) for name, at in z.items()}
    types = {name: metrics.silhouette(at, adata.obs["cell_type"]) for name, at in z.items()}
    assert (
        asw["without"] > 0.005
        and asw["decoder"] < asw["without"] / 2
        and asw["both"] < asw["without"] / 2
    )
    assert neighbours["without"] > 0.63 and max(neighbours["decoder"], neighbours["both"]) < 0.59
    assert min(types["decoder"], types["both"]) > types["without"] - 0.1
    elbo = {name: m.get_elbo(indices=m.split.test)["elbo"] for name, m in trained.items()}
    assert max(elbo["decoder"], elbo["both"]) > elbo["without"]


def test_one_hot_batches_come_with_the_counts():
    X = Counts(sp.csr_matrix(np.arange(1, 13, dtype="float32").reshape(4, 3)))
    X.batch = np.array([0, 2, 1, 2]), 3
    counts, batch = Batches(X, [1, 2], batch_size=2)[0]
    assert (
        counts.tolist() == [[4, 5, 6], [7, 8, 9]]
        and batch.tolist() == [[0, 0, 1], [0, 1, 0]]
        and batch.dtype == np.float32
    )
    assert Counts(sp.eye(3, format="csr")).conditions([0]) is None


def test_without_a_batch_key_nothing_changes(adata, trained):
    network = trained["without"].network
    assert network.n_conditions == 0 and network.decoder.body.layers[0].kernel.shape[0] == 8
    assert trained["decoder"].network.decoder.body.layers[0].kernel.shape[0] == 10
    assert (
        trained["decoder"].network.encoder.layers[0].kernel.shape[0]
        == 200
        == trained["both"].network.encoder.layers[0].kernel.shape[0] - 2
    )


def test_pseudo_inputs_are_of_the_batch_of_their_cell(adata, trained):
    model = trained["both"]
    batch = np.asarray(model.network.pseudo_batch)
    assert batch.shape == (20, 2) and (batch.sum(1) == 1).all() and batch.mean(0).min() > 0.1
    assert trained["decoder"].network.pseudo_batch is None


def test_a_vamp_prior_of_one_pseudo_input_is_that_cells_posterior(adata):
    "K = 1 with u = x and its batch: no KL, also where the encoder is told the batch."
    model = models.VAMP(
        adata, batch_key="lab", encode_batch=True, **{**SMALL, "n_pseudo_inputs": 1}
    )
    net = model.network
    cell = np.array([5])
    from vampsc.networks import log_normalise

    net.prior.pseudo_inputs.assign(log_normalise(model.X.dense(cell)))
    net.pseudo_batch.assign(model.X.conditions(cell))
    x = (model.X.dense(cell), model.X.conditions(cell))
    z, log_q = net.sample(net.encode_counts(x), np.ones((1, 8), "float32"))
    assert abs(float(net.kl(None, z, log_q, net.components())[0])) < 1e-4
    net.pseudo_batch.assign(1 - model.X.conditions(cell))
    assert abs(float(net.kl(None, z, log_q, net.components())[0])) > 1e-3


def test_transform_batch_decodes_as_of_the_other(adata, trained):
    model = trained["decoder"]
    own, north, south = (
        model.get_normalized_expression(transform_batch=t, n_mc_samples=2, library_size=1e4)
        for t in (None, "north", "south")
    )
    is_south = (adata.obs["lab"] == "south").to_numpy()
    assert np.allclose(own[is_south], south[is_south]) and np.allclose(
        own[~is_south], north[~is_south]
    )
    measured = np.log(np.asarray(adata[is_south].to_df().mean() / adata[~is_south].to_df().mean()))
    counted = dict(zip(adata.var_names, measured))
    shift = [
        (np.log(south[i].mean() / north[i].mean()), counted[s])
        for i, s in model.gene_table["symbol"].items()
        if s in counted
    ]
    fitted, seen = np.array([p for p in shift if np.isfinite(p).all()]).T
    # the laboratory's effect on each gene
    assert len(seen) > 150 and np.corrcoef(fitted, seen)[0, 1] > 0.65
    with pytest.raises(ValueError, match="lab 'west' is not known; there are north, south"):
        model.get_normalized_expression(transform_batch="west")
    with pytest.raises(ValueError, match="knows no batches"):
        trained["without"].get_normalized_expression(transform_batch="north")


def test_new_cells_have_batches(trained):
    cells = trained["both"].sample_prior(300)
    assert set(cells.obs["lab"]) == {"north", "south"} and set(
        trained["both"].sample_prior(5, batch="south").obs["lab"]
    ) == {"south"}
    assert "lab" not in trained["without"].sample_prior(5).obs
    with pytest.raises(ValueError, match="lab 'west' is not known"):
        trained["both"].sample_prior(5, batch="west")


def test_saved_and_loaded(adata, trained, tmp_path):
    trained["both"].save(tmp_path / "m")
    again = models.load(tmp_path / "m")
    few = adata[100:140]
    assert np.array_equal(
        again.get_latent_representation(few), trained["both"].get_latent_representation(few)
    )
    assert np.array_equal(
        again.sample_prior(20).X.toarray(), trained["both"].sample_prior(20).X.toarray()
    )
    assert again.batches == ["north", "south"] and "2 batches of 'lab'" in repr(again)


def test_unseen_batches_are_refused_by_name(adata, trained):
    few = adata[:30].copy()
    few.obs["lab"] = ["north"] * 28 + ["east", "west"]
    for name, verb in (
        ("both", "get_latent_representation"),
        ("decoder", "get_reconstruction_error"),
        ("decoder", "get_elbo"),
        ("decoder", "get_normalized_expression"),
    ):
        with pytest.raises(
            ValueError, match="lab east, west was not seen in training, which knew north, south"
        ):
            getattr(trained[name], verb)(few)
    assert np.isfinite(trained["both"].get_latent_representation(few, indices=[0, 1])).all()


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "no column 'lab' for the batch; there are cell_type, 3.$"),
        (["a", None] * 15, "15 of 30 cells have no lab"),
        (["a", " "] * 15, "15 of 30 cells have no lab"),
        (range(30), "30 values for 30 cells"),
    ],
)
def test_a_column_that_is_no_batch(adata, values, message):
    few = adata[:30].copy()
    del few.obs["lab"]
    # names of columns may be numbers
    few.obs[3] = 1
    if values is not None:
        few.obs["lab"] = list(values)
    with pytest.raises(ValueError, match=message):
        models.VAE(few, batch_key="lab", **SMALL)


def test_a_batch_without_training_cells_is_said(adata):
    few = adata[:30].copy()
    few.obs["lab"] = "north"
    few.obs.iloc[counts.split_cells(30, 0).test[:1], few.obs.columns.get_loc("lab")] = "south"
    with pytest.warns(UserWarning, match="lab south has no training cell"):
        models.AE(few, batch_key="lab", n_genes=50, hidden=(4,), n_latent=2)


# ---- transfer


def test_transfer_starts_where_the_model_is(adata, trained):
    model = trained["decoder"]
    query = adata[:200]
    epochs = len(model.history)
    same = model.transfer(query, max_epochs=0)
    assert np.array_equal(
        same.get_latent_representation(), model.get_latent_representation(indices=range(200))
    )
    assert len(same.history) == 0 and len(model.history) == epochs > 0 and same.split != model.split
    # on a copy
    model.transfer(query, max_epochs=2, unfrozen=True, **HOW)
    young = models.VAMP(adata, batch_key="lab", **SMALL).train(max_epochs=1, **HOW)
    better, idle = (
        young.transfer(query, max_epochs=5, learning_rate=rate, unfrozen=True, **HOW).history[
            "val_loss"
        ]
        for rate in (2e-3, 1e-9)
    )
    assert len(better) == 5 and better.min() < idle.min() - 1
    assert np.array_equal(
        same.get_latent_representation(), model.get_latent_representation(indices=range(200))
    )


@pytest.mark.parametrize("name", ["decoder", "both"])
def test_transfer_adds_batches(adata, trained, name):
    model = trained[name]
    query = adata[:200].copy()
    query.obs["lab"] = "west"
    new = model.transfer(query, max_epochs=0)
    assert new.batches == ["north", "south", "west"] and new.network.n_conditions == 3
    old_rows, rows = (np.asarray(m.network.decoder.body.layers[0].kernel) for m in (model, new))
    assert np.array_equal(rows[:10], old_rows) and np.allclose(rows[10], old_rows[8:].mean(0))
    assert (
        np.isfinite(new.get_elbo()["elbo"])
        and np.isfinite(new.get_latent_representation(adata[200:220])).all()
    )
    trained_on = model.transfer(query, max_epochs=3, **HOW)
    assert trained_on.get_elbo()["elbo"] > new.get_elbo()["elbo"]
    assert trained_on.transfer(query, max_epochs=0).batches == ["north", "south", "west"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["decoder", "both"])
def test_only_rows_of_new_batches_are_trained(adata, trained, name, tmp_path):
    model = trained[name]
    query = adata[:200].copy()
    query.obs["lab"] = "west"
    start = model.transfer(query, max_epochs=0)
    end = model.transfer(query, max_epochs=3, **HOW)
    changed = []
    for before, after in zip(start.network.weights, end.network.weights):
        if np.array_equal(before, after):
            continue
        changed.append(after.path)
        assert (
            np.array_equal(np.asarray(before)[:-1], np.asarray(after)[:-1])
            and after.trainable
            and after.constraint is None
        )
    # the decoder's first layer, and two offsets for each gene
    assert len(changed) == 3
    # no training spoils an embedding, whether the encoder is conditioned on the batch or not
    for cells in (adata[200:300], query):
        assert np.array_equal(
            start.get_latent_representation(cells), end.get_latent_representation(cells)
        )
    if name == "both":
        also = model.transfer(query, max_epochs=3, encoder_rows=True, **HOW)
        assert not np.allclose(
            also.get_latent_representation(), start.get_latent_representation(), atol=1e-4
        )
        known = dict(indices=range(200, 300))
        assert np.array_equal(
            model.get_latent_representation(**known), also.get_latent_representation(adata[200:300])
        )
    end.save(tmp_path / "saved")
    assert np.array_equal(
        models.load(tmp_path / "saved", query).get_latent_representation(),
        end.get_latent_representation(),
    )
    everything = model.transfer(query, max_epochs=1, unfrozen=True, **HOW)
    assert (
        sum(
            not np.array_equal(a, b)
            for a, b in zip(start.network.weights, everything.network.weights)
        )
        > 8
    )


def test_without_new_batches_nothing_is_trained(adata, trained, capsys):
    for name, why in (("without", "it knows no batches"), ("decoder", "no batch is new")):
        same = trained[name].transfer(adata[:100], max_epochs=2, progress=False)
        assert len(same.history) == 0 and f"{why}" in capsys.readouterr().out
        assert all(
            np.array_equal(a, b)
            for a, b in zip(trained[name].network.weights, same.network.weights)
        )
        with pytest.raises(ValueError, match="nothing to train: .* unfrozen=True"):
            same.train(max_epochs=1)


def changed_rows(before, after):
    "For each weight that differs, which of its rows do: {path: list}."
    pairs = [
        (w.path, np.asarray(b) != np.asarray(w)) for b, w in zip(before, after.network.weights)
    ]
    return {
        path: np.flatnonzero(rows.reshape(len(rows), -1).any(1)).tolist()
        for path, rows in pairs
        if rows.any()
    }


def saved_and_loaded(model, query, path):
    model.save(path)
    return models.load(path, query)


SENT = {
    "itself": lambda model, query, path: model,
    "deepcopy": lambda model, query, path: copy.deepcopy(model),
    "pickle": lambda model, query, path: pickle.loads(pickle.dumps(model)),
    "saved": saved_and_loaded,
}


@pytest.mark.long
@pytest.mark.parametrize(
    "way, kind, more, n_weights",
    [
        # first layers of both, two offsets for each gene
        *((way, "VAE", {"encode_batch": True}, 4) for way in SENT),
        ("itself", "VAE", {}, 3),
        ("itself", "AE", {"encode_batch": True, "hidden": ()}, 5),
        ("itself", "VAE", {"linear_decoder": True}, 4),
    ],
)
def test_training_a_transferred_model_again_changes_new_rows_alone(
    way, kind, more, n_weights, tmp_path
):
    cells = few_cells("abc")
    known = cells[cells.obs["donor"] != "c"].copy()
    query = cells[cells.obs["donor"] == "c"].copy()
    model = models.PRESETS[kind](known, batch_key="donor", **{**TINY, **more})
    transferred = model.transfer(query, max_epochs=0, encoder_rows=True)
    new = SENT[way](transferred, query, tmp_path / "m")
    before = new.network.get_weights()
    new.train(max_epochs=2, learning_rate=1e-3, progress=False)
    changed = changed_rows(before, new)
    assert len(changed) == n_weights and all(len(rows) == 1 for rows in changed.values())
    assert np.array_equal(model.get_latent_representation(), new.get_latent_representation(known))


def test_a_model_saved_before_there_were_new_rows_is_loaded(tmp_path):
    cells = few_cells("ab")
    models.VAE(cells, batch_key="donor", **TINY).save(tmp_path / "m")
    of_json = json.loads((tmp_path / "m" / "model.json").read_text())
    assert of_json.pop("new_rows") is None
    rewrite(tmp_path / "m", of_json)
    before = models.load(tmp_path / "m", cells)
    weights = before.network.get_weights()
    assert len(changed_rows(weights, before.train(max_epochs=1, progress=False))) > 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": [99], "rows": 1},
        {"weights": [0], "rows": 2},
        {"weights": [], "rows": 1},
        {"rows": 1},
        7,
    ],
    ids=str,
)
def test_new_rows_that_save_did_not_write_are_refused(wrong, tmp_path):
    models.VAE(few_cells("ab"), batch_key="donor", **TINY).save(tmp_path / "m")
    rewrite(
        tmp_path / "m",
        {**json.loads((tmp_path / "m" / "model.json").read_text()), "new_rows": wrong},
    )
    with pytest.raises(ValueError, match="new_rows in .*model.json is not as save writes it"):
        models.load(tmp_path / "m")


@pytest.mark.long
def test_a_transfer_of_new_batches_goes_on(adata, trained, tmp_path):
    model = trained["decoder"]
    query = adata[:200].copy()
    query.obs["lab"] = "west"
    whole = model.transfer(query, training.Profile(learning_rate=1e-2, max_epochs=4), **HOW)
    model.transfer(
        query, training.Profile(learning_rate=1e-2, max_epochs=2), checkpoint=tmp_path / "c", **HOW
    )
    went_on = model.transfer(
        query,
        training.Profile(learning_rate=1e-2, max_epochs=4),
        checkpoint=tmp_path / "c",
        resume=True,
        **HOW,
    )
    assert all(np.array_equal(a, b) for a, b in zip(whole.network.weights, went_on.network.weights))
    with pytest.raises(ValueError, match="new batches"):
        model.transfer(
            query,
            training.Profile(learning_rate=1e-2, max_epochs=4),
            checkpoint=tmp_path / "c",
            resume=True,
            unfrozen=True,
            **HOW,
        )


def test_transfer_to_other_genes(adata, trained):
    query = adata[:100, ::-1].copy()
    assert np.array_equal(
        trained["without"].transfer(query, max_epochs=0).get_latent_representation(),
        trained["without"].get_latent_representation(indices=range(100)),
    )


# ---- the verbs that give expression and counts


def test_normalized_expression(adata, trained):
    model = trained["without"]
    one = model.get_normalized_expression(
        indices=[3, 5], gene_list=["INS", "ENSG00000115263"], n_mc_samples=3
    )
    assert (
        list(one.columns) == ["INS", "ENSG00000115263"]
        and list(one.index) == list(adata.obs_names[[3, 5]])
        and (one.dtypes == "float32").all()
    )
    whole = model.get_normalized_expression(indices=[3, 5], n_mc_samples=3)
    assert np.allclose(whole["GCG"], one["ENSG00000115263"])
    assert np.allclose(
        model.get_normalized_expression(indices=[3, 5], n_mc_samples=3, library_size=1),
        whole / 1e4,
        rtol=1e-4,
    )
    observed = model.get_normalized_expression(
        indices=[3, 5], n_mc_samples=3, library_size="observed"
    )
    assert np.allclose(observed, whole * model.X.totals[[3, 5], None] / 1e4, rtol=1e-4)
    with pytest.raises(ValueError, match="'INSULIN' is not a gene of the model"):
        model.get_normalized_expression(gene_list=["INSULIN"])


@pytest.mark.slow
def test_denoised_expression_is_near_the_counts_of_its_cell_type(adata, trained_longer):
    model = trained_longer["without"]
    expected = model.get_normalized_expression(library_size="observed").to_numpy()
    beta = (adata.obs["cell_type"] == "beta").to_numpy()
    means = (
        np.log1p(expected[beta].mean(0)),
        np.log1p(model.X.toarray()[beta].mean(0)[model.own_names.order]),
    )
    assert np.corrcoef(*means)[0, 1] > 0.88


def test_posterior_predictive_samples(trained):
    model = trained["without"]
    cells = model.posterior_predictive_sample(indices=range(50), n_samples=40)
    assert (
        cells.shape == (2000, 200)
        and cells.X.dtype == np.float32
        and cells.X.format == "csr"
        and (cells.X.data == np.round(cells.X.data)).all()
    )
    assert (
        cells.obs["cell"].nunique() == 50
        and cells.obs["sample"].max() == 39
        and cells.obs_names.is_unique
    )
    expected = model.get_normalized_expression(
        indices=range(50), n_mc_samples=40, library_size="observed"
    ).to_numpy()
    drawn = cells.X.toarray().reshape(40, 50, 200).mean(0)
    assert np.corrcoef(np.log1p(drawn).ravel(), np.log1p(expected).ravel())[0, 1] > 0.95
    assert abs(drawn.sum() / expected.sum() - 1) < 0.05
    assert model.posterior_predictive_sample(indices=[0]).n_obs == 1


def test_embed_returns_the_key(adata, trained):
    cells = adata[:20].copy()
    assert trained["without"].embed(cells) == "X_vamp" and cells.obsm["X_vamp"].dtype == np.float32
    assert np.array_equal(
        cells.obsm["X_vamp"], trained["without"].get_latent_representation(indices=range(20))
    )
    assert trained["without"].embed(cells, key="X") == "X"


def test_only_the_cells_asked_for_are_checked(adata, trained):
    cells = adata[:20].copy()
    cells.X[3] = -1
    model = trained["without"]
    assert np.array_equal(
        model.get_latent_representation(cells, indices=[7, 5, 7]),
        model.get_latent_representation(indices=[7, 5, 7]),
    )
    with pytest.raises(ValueError, match="negative"):
        model.get_latent_representation(cells)
    for wrong in ([20], [0.5], np.ones(3, bool)):
        with pytest.raises(ValueError, match="indices|mask"):
            model.get_latent_representation(adata[:20], indices=wrong)


def test_an_encoder_that_has_nothing_to_be_conditioned_on_is_refused(adata):
    with pytest.raises(ValueError, match="none is named: batch_key= names the column"):
        models.VAE(adata, encode_batch=True, **SMALL)
