"""The models: that they learn, that their verbs agree with each other, and that what is saved comes
back.
"""

import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from keras import ops

from vampsc import assembly, intake, models, networks, organs, posteriors
from vampsc.counts import CountsError

PRESETS = list(models.PRESETS)
GENERATIVE = [name for name in PRESETS if name != "AE"]
SMALL = dict(
    n_genes=300, n_latent=8, hidden=(32,), n_pseudo_inputs=40, flow_hidden=(24,), n_flow_steps=2
)
HOW = dict(learning_rate=1e-2, batch_size=64, progress=False)


@pytest.fixture(scope="module")
def adata():
    return organs.load("pancreas")[:400].copy()


@pytest.fixture(scope="module")
def trained(adata):
    return {
        name: models.PRESETS[name](adata, **SMALL).train(max_epochs=8, **HOW) for name in PRESETS
    }


@pytest.mark.parametrize("name", PRESETS)
def test_training_lowers_the_loss_on_cells_not_trained_on(trained, name):
    model = trained[name]
    fresh = assembly.build_network(model.architecture, len(model.genes), seed=5)
    before = model.network
    model.network = fresh
    untrained = model.get_reconstruction_error(indices=model.split.test)["per_cell"]
    model.network = before
    assert model.get_reconstruction_error(indices=model.split.test)["per_cell"] < 0.8 * untrained
    assert model.history["val_loss"].iloc[-1] < 0.9 * model.history["val_loss"].iloc[0]


def test_presets_are_the_corners_of_posterior_and_prior(trained):
    corners = {n: (m.architecture.posterior, m.architecture.prior) for n, m in trained.items()}
    assert corners == {
        "AE": ("point", "none"),
        "VAE": ("gaussian", "normal"),
        "IAF": ("iaf", "normal"),
        "VAMP": ("gaussian", "vamp"),
        "VAMPIAF": ("iaf", "vamp"),
        "MOG": ("gaussian", "mixture"),
        "HVAMP": ("hierarchical", "hvamp"),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_embedding_shape_subset_and_seed(trained, name):
    model = trained[name]
    z = model.get_latent_representation(n_mc_samples=4)
    assert z.shape == (400, 8) and z.dtype == np.float32 and np.isfinite(z).all()
    if model.network.posterior.exact_mean:
        assert np.allclose(model.get_latent_representation(indices=[5, 3]), z[[5, 3]], atol=1e-4)
        assert np.array_equal(z, model.get_latent_representation(n_mc_samples=1, seed=9))
    else:
        assert np.array_equal(z, model.get_latent_representation(n_mc_samples=4))
        assert not np.array_equal(z, model.get_latent_representation(n_mc_samples=4, seed=9))


@pytest.mark.parametrize("name", GENERATIVE)
def test_elbo_is_reconstruction_and_kl(trained, name):
    model = trained[name]
    elbo = model.get_elbo(n_mc_samples=20)
    assert elbo["elbo"] == pytest.approx(-elbo["reconstruction"] - elbo["kl"])
    # one draw for each of 400 cells
    error = model.get_reconstruction_error()
    assert elbo["reconstruction"] == pytest.approx(error["per_cell"], rel=0.03)
    assert error["per_gene"] == pytest.approx(error["per_cell"] / 300)
    assert elbo["kl"] > 0 and elbo["standard_error"] > 0


def test_closed_kl_of_the_vae_equals_the_sampled_one(trained):
    net = trained["VAE"].network
    x = trained["VAE"].X[:64].toarray()
    parameters = net.encode(networks.log_normalise(x))
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(400):
        z, log_q = net.posterior.sample(parameters, rng.standard_normal((64, 8)).astype("float32"))
        draws.append(np.asarray(log_q) - np.asarray(net.prior.log_prob(z)))
    closed = np.asarray(net.kl(parameters, z, log_q, None))
    assert np.mean(draws) == pytest.approx(closed.mean(), rel=0.01)


def test_reconstruction_against_scipy(trained):
    from scipy import stats

    net = trained["AE"].network
    x = trained["AE"].X[:5].toarray()
    z = net.encode(networks.log_normalise(x))[0]
    log_mu, log_theta = (
        np.asarray(v, "float64") for v in net.decoder(z, np.log(x.sum(1, keepdims=True) / 1e4))
    )
    mu = np.exp(log_mu)
    theta = np.exp(log_theta)
    expected = -stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1)
    assert np.allclose(net.reconstruction(x, z), expected, rtol=1e-5)


@pytest.mark.parametrize("name", GENERATIVE)
def test_prior_samples_are_counts_at_draws_from_the_prior(trained, name):
    model = trained[name]
    new = model.sample_prior(4000, seed=1)
    assert (
        new.shape == (4000, 300)
        and sp.issparse(new.X)
        and (new.X.data == np.round(new.X.data)).all()
    )
    assert list(new.var_names) == list(model.gene_table.index)
    z = new.obsm["z"]
    if not model.architecture.has_components:
        assert np.allclose(z.mean(0), 0, atol=0.1) and np.allclose(z.std(0), 1, atol=0.1)
    else:
        means, log_vars, log_weights = (ops.convert_to_numpy(c) for c in model.network.components())
        shares = np.exp(log_weights)
        mean = shares @ means
        var = shares @ (np.exp(log_vars) + (means - mean) ** 2)
        # HVAMP: the components are those of z2
        upper = z[:, -means.shape[1] :]
        assert np.allclose(upper.mean(0), mean, atol=0.25)
        assert np.allclose(upper.var(0), var, rtol=0.2)
    first = model.sample_prior(50, seed=1)
    assert np.array_equal(first.X.toarray(), model.sample_prior(50, seed=1).X.toarray())


def test_prior_samples_have_the_decoders_mean(trained):
    """With every library the same, the mean count of a gene is the mean of the decoder's rate over
    draws of z.
    """
    model = trained["VAE"]
    library = model.library
    model.library = np.full(10, 1e4)
    new = model.sample_prior(20_000, seed=2)
    model.library = library
    log_mu, log_theta = (
        np.asarray(v, "float64")
        for v in model.network.decoder(new.obsm["z"], np.zeros((20_000, 1), "float32"))
    )
    mu = np.exp(log_mu)
    theta = np.exp(log_theta)
    error = np.sqrt((mu + mu**2 / theta).mean(0) / 20_000)
    counts = model.genes.map(new)[0]  # in the decoder's order
    assert (np.abs(np.asarray(counts.mean(0)).ravel() - mu.mean(0)) < 5 * error).mean() > 0.99


@pytest.mark.parametrize("name", GENERATIVE)
def test_kl_by_unit_adds_up_to_the_kl(trained, name):
    model = trained[name]
    test = trained[name].split.test
    units, component = model.get_kl_per_unit(indices=test, n_mc_samples=40, seed=1)
    elbo = model.get_elbo(indices=test, n_mc_samples=40, seed=1)
    assert units.shape == (8,) and units.dtype == np.float64
    assert units.sum() + component == pytest.approx(elbo["kl"], rel=1e-4)  # the same draws
    if model.architecture.has_components:
        dearest = -np.min(ops.convert_to_numpy(model.network.components()[2]))
        assert 0 < component <= dearest + 1e-6
    else:
        assert component == 0
    if name == "VAE":
        closed = posteriors.kl_to_standard_normal(
            *model.network.encode(networks.log_normalise(model.X[test].toarray()))
        )
        np.testing.assert_allclose(units, np.asarray(closed).mean(0), rtol=1e-4)
    # prices, but for the noise of the draws
    if name in ("VAMP", "HVAMP"):
        assert units.min() > -0.05


@pytest.mark.parametrize("name", ["VAMP", "VAMPIAF", "HVAMP"])
def test_pseudo_inputs_as_cells(trained, name):
    model = trained[name]
    found = model.pseudo_inputs()
    means, *_ = model.network.components()
    assert found.shape == (40, 300) and list(found.var_names) == list(model.gene_table.index)
    assert found.var.equals(model.gene_table)
    assert (
        np.array_equal(
            found[:, model.own_names.names].X, np.asarray(model.network.prior.pseudo_inputs)
        )
        and (found.X >= 0).all()
    )
    np.testing.assert_allclose(found.obs["weight"], 1 / 40, rtol=1e-6)
    np.testing.assert_array_equal(found.obsm["z"], means)
    # a copy, not the model's own
    found.X[:] = 0
    assert np.asarray(model.network.prior.pseudo_inputs).max() > 0


def test_learned_weights_are_trained_and_saved(adata, tmp_path):
    model = models.VAMP(adata, **SMALL, learn_weights=True)
    np.testing.assert_allclose(model.pseudo_inputs().obs["weight"], 1 / 40, rtol=1e-6)
    model.train(max_epochs=4, **HOW)
    weight = model.pseudo_inputs().obs["weight"]
    assert (
        weight.sum() == pytest.approx(1, rel=1e-5)
        and weight.max() > 1.02 / 40
        and weight.min() < 0.98 / 40
    )
    model.save(tmp_path / "m")
    assert np.array_equal(models.load(tmp_path / "m").pseudo_inputs().obs["weight"], weight)
    drawn = model.network.prior.sample(
        50_000, 8, model.network.components(), np.random.default_rng(0)
    )
    means = model.pseudo_inputs().obsm["z"]
    expected = weight.to_numpy() @ means
    np.testing.assert_allclose(drawn.mean(0), expected, atol=6 * drawn.std() / np.sqrt(50_000))


@pytest.mark.parametrize("k", [0, -1])
def test_a_prior_of_no_components_is_refused(adata, k):
    with pytest.raises(
        ValueError, match=f"n_pseudo_inputs must be a whole number of at least 1, not {k}"
    ):
        models.VAMP(adata, **{**SMALL, "n_pseudo_inputs": k})


def test_models_without_pseudo_inputs_say_so(trained):
    for name in ("AE", "VAE", "IAF"):
        with pytest.raises(ValueError, match=f"{name} has no pseudo-inputs; take VAMP"):
            trained[name].pseudo_inputs()


def test_an_autoencoder_has_no_prior(trained):
    with pytest.raises(ValueError, match="no ELBO"):
        trained["AE"].get_elbo()
    with pytest.raises(ValueError, match="no prior"):
        trained["AE"].sample_prior()


@pytest.mark.long
def test_one_seed_one_history(adata):
    runs = [
        models.VAMP(adata, **SMALL).train(max_epochs=2, progress=False).history for _ in range(2)
    ]
    columns = ["loss", "val_loss", "kl"]
    assert np.allclose(runs[0][columns], runs[1][columns], rtol=1e-5)
    other = models.VAMP(adata, seed=1, **SMALL).train(max_epochs=2, progress=False).history
    assert not np.allclose(runs[0][columns], other[columns], rtol=1e-3)


def test_the_users_random_state_is_left_alone(adata):
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    models.AE(adata, **SMALL).train(max_epochs=1, progress=False)
    assert np.random.rand() == expected


def test_pseudo_inputs_start_at_training_cells_and_stay_nonnegative(adata, trained):
    fresh = models.VAMP(adata, **SMALL)
    start = ops.convert_to_numpy(fresh.network.prior.pseudo_inputs)
    cells = np.asarray(networks.log_normalise(fresh.X[fresh.split.train].toarray()))
    nearest = ((start[:, None] - cells[None]) ** 2).mean(-1).min(1)
    assert nearest.max() < 1e-3 < ((start[:, None] - start[None]) ** 2).mean()
    after = ops.convert_to_numpy(trained["VAMP"].network.prior.pseudo_inputs)
    assert after.min() >= 0 and not np.allclose(after, start)


def test_more_pseudo_inputs_than_cells_are_capped_with_a_word(adata):
    with pytest.warns(UserWarning, match="500 pseudo-inputs are more than the"):
        model = models.VAMP(adata[:50].copy(), **{**SMALL, "n_pseudo_inputs": 500})
    assert model.architecture.n_pseudo_inputs == len(model.split.train) == 40


FRESH = """
import sys, numpy as np, vampsc
adata, folder = vampsc.organs.load("pancreas")[:400].copy(), sys.argv[1]
for name in sys.argv[2:]:
    model = vampsc.load(f"{folder}/{name}", adata)
    found = {"z": model.get_latent_representation(n_mc_samples=3)}
    if name != "AE": found["log_p"] = model.get_marginal_ll(n_mc_samples=2, per_cell=True)
    np.savez(f"{folder}/{name}.npz", **found)
    print(type(model).__name__, len(model.history))
"""


@pytest.mark.long
def test_saved_models_give_bit_equal_results_in_a_fresh_process(trained, tmp_path):
    "Embeddings, and the log-densities of prior, posterior and counts together, cell by cell."
    for name, model in trained.items():
        model.save(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path, *PRESETS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in PRESETS for word in (name, "8")]
    for name, model in trained.items():
        found = np.load(tmp_path / f"{name}.npz")
        assert np.array_equal(found["z"], model.get_latent_representation(n_mc_samples=3)), name
        if name == "AE":
            continue
        log_p = model.get_marginal_ll(n_mc_samples=2, per_cell=True)
        assert np.array_equal(found["log_p"], log_p) and np.isfinite(log_p).all(), name


def test_saving_does_not_overwrite_unasked_and_loading_names_what_is_wrong(
    trained, adata, tmp_path
):
    path = tmp_path / "model"
    trained["VAE"].save(path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained["VAE"].save(path)
    trained["VAE"].save(path, overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for other in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(FileExistsError, match="no saved model"):
            trained["VAE"].save(other, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    # no half-written folder is left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "thesis"]
    with pytest.raises(FileNotFoundError, match="no model"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="400 cells"):
        models.load(path, adata[:100])
    with pytest.raises(ValueError, match="adata="):
        models.load(path).get_latent_representation()


def test_new_cells_in_another_gene_order_with_missing_genes(trained, adata):
    model = trained["VAE"]
    z = model.get_latent_representation()
    order = np.random.default_rng(0).permutation(adata.n_vars)
    assert np.allclose(model.get_latent_representation(adata[:20, order].copy()), z[:20], atol=1e-4)
    fewer = adata[:20, order[: adata.n_vars // 2]].copy()
    assert np.isfinite(model.get_latent_representation(fewer)).all()


def test_training_again_goes_on(adata):
    model = models.AE(adata, **SMALL).train(max_epochs=2, progress=False)
    model.train(max_epochs=2, learning_rate=1e-4, progress=False)
    assert list(model.history.index) == [1, 2, 3, 4]
    assert model.history["loss"][4] < model.history["loss"][1]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_latnet=3), "'n_latnet' is not a setting"),
        (dict(dispersion="cell"), "dispersion='cell'"),
        (dict(gene_space="gencode-47"), "gencode-47"),
        (dict(layer="counts"), "counts"),
    ],
)
def test_wrong_settings_are_named(adata, wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        models.VAE(adata, **wrong)


def test_wrong_training_settings_are_named(trained):
    for wrong, message in (
        (dict(max_epoch=3), "'max_epoch'"),
        (dict(profile="fast"), "'fast'"),
        (dict(n_genes=5), "n_genes"),
    ):
        with pytest.raises(ValueError, match=message):
            trained["AE"].train(progress=False, **wrong)


def test_data_that_are_no_counts_are_refused(adata):
    logged = adata[:100].copy()
    logged.X = sp.csr_matrix(np.log1p(logged.X.toarray()))
    with pytest.raises(CountsError, match="log-transformed"):
        models.VAE(logged)
    empty = adata[:100].copy()
    empty.X[7] = 0
    with pytest.raises(CountsError, match="no counts"):
        models.VAE(empty)


def test_options_reach_the_network(adata):
    linear = models.VAE(
        adata, **{**SMALL, "linear_decoder": True, "dispersion": "gene", "beta": 0.5}
    )
    assert (
        linear.network.decoder.body.count_params() == 0
        and linear.network.decoder.log_dispersion is None
    )
    assert linear.network.beta == 0.5
    linear.train(max_epochs=1, progress=False)
    x = linear.X[:4].toarray()
    reconstruction, kl = linear.network(x)
    loss = linear.network.compute_loss(x=x, y_pred=(reconstruction, kl))
    assert float(loss) == pytest.approx(
        float(ops.mean(reconstruction + 0.5 * kl) + sum(linear.network.losses)), rel=1e-5
    )


def rates_at_zero(model, batch=None):
    "What the decoder expects of 10,000 counts at z = 0, by gene."
    z = np.zeros((1, model.architecture.n_latent), "float32")
    return np.exp(
        np.asarray(
            model.network.decoder(z, np.zeros((1, 1), "float32"), conditions=batch)[0], "float64"
        )[0]
    )


def mean_rates(counts):
    return (counts.sum(0) + 0.5) / (counts.sum() / 1e4)


@pytest.mark.parametrize(
    "how", [{"n_genes": None}, {}, {"linear_decoder": True}, {"dispersion": "gene"}]
)
def test_the_decoder_starts_at_the_mean_rates_of_the_training_cells(adata, how):
    model = models.VAE(adata, **{**SMALL, **how})
    counts = model.X[np.arange(adata.n_obs)].toarray().astype("float64")
    assert rates_at_zero(model) == pytest.approx(mean_rates(counts[model.split.train]), rel=1e-3)
    # no other cells were looked at
    assert rates_at_zero(model) != pytest.approx(mean_rates(counts), rel=0.02)
    # of which the half counts are next to nothing
    assert rates_at_zero(model).sum() == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_has_that_start_also_after_saving(adata, tmp_path, name):
    model = models.PRESETS[name](adata, **SMALL)
    at_train = mean_rates(model.X[model.split.train].toarray().astype("float64"))
    assert rates_at_zero(model) == pytest.approx(at_train, rel=1e-3)
    model.save(tmp_path / "young")
    assert np.array_equal(rates_at_zero(models.load(tmp_path / "young")), rates_at_zero(model))
    trained = model.train(max_epochs=1, progress=False)
    # it is a start, no more
    assert np.abs(np.log(rates_at_zero(trained) / at_train)).max() > 0.01
    trained.save(tmp_path / "old")
    assert np.array_equal(rates_at_zero(models.load(tmp_path / "old")), rates_at_zero(trained))


def test_the_start_with_batches(adata):
    cells = adata.copy()
    cells.obs["lab"] = np.where(np.arange(cells.n_obs) % 3, "north", "south")
    model = models.VAE(cells, batch_key="lab", **SMALL)
    start = mean_rates(model.X[model.split.train].toarray().astype("float64"))
    assert rates_at_zero(model, np.zeros((1, 2), "float32")) == pytest.approx(start, rel=1e-3)
    # told one, the hidden layers add their noise
    for batch in np.eye(2, dtype="float32")[:, None]:
        ratio = np.log(rates_at_zero(model, batch) / start)
        assert (
            np.corrcoef(np.log(rates_at_zero(model, batch)), np.log(start))[0, 1] > 0.9
            and abs(ratio.mean()) < 0.3
        )


def test_mean_log_rates_by_hand(monkeypatch):
    X = sp.csr_matrix(np.array([[1, 0, 3], [0, 0, 4], [100, 100, 100]], "float32"))
    assert intake.mean_log_rates(X, [0, 1]) == pytest.approx(
        np.log(np.array([1.5, 0.5, 7.5]) / (8 / 1e4))
    )
    monkeypatch.setattr(intake, "MAX_CELLS_EXAMINED", 2)
    X = sp.csr_matrix(np.eye(50, dtype="float32"))
    drawn = [
        np.flatnonzero(intake.mean_log_rates(X, np.arange(10, 50), seed) > np.log(5e3))
        for seed in (0, 0, 1)
    ]
    # 1.5 of 2 counts, not 0.5
    assert [len(cells) for cells in drawn] == [2, 2, 2] and min(map(min, drawn)) >= 10
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_a_rate_beyond_the_bound_is_no_start_at_infinity(adata):
    decoder = models.VAE(adata, **SMALL).network.decoder
    decoder.start_at(np.linspace(-1e6, 1e6, SMALL["n_genes"]))
    rates = np.asarray(decoder(np.zeros((1, 8), "float32"), np.zeros((1, 1), "float32"))[0])[0]
    assert np.isfinite(np.asarray(decoder.log_rate.bias)).all() and rates[[0, -1]] == pytest.approx(
        [-18, 18], abs=1e-3
    )


def test_data_without_known_genes_train_on_their_own(adata):
    mine = ad.AnnData(adata.X[:100, :500].copy())
    mine.var_names = [f"locus{i}" for i in range(500)]
    keep = np.asarray(mine.X.sum(1)).ravel() > 0
    with pytest.warns(UserWarning):
        model = models.VAE(mine[keep].copy(), n_latent=4, hidden=(16,))
    assert len(model.genes) == 500
    assert (
        len(models.VAE(mine[keep].copy(), gene_space=None, n_latent=4, hidden=(16,)).genes) == 500
    )


# ---- the KL term by cells, loadings, the start of the pseudo-inputs


@pytest.mark.parametrize("name", ["VAE", "VAMP"])
def test_aggregate_kl_against_a_mixture_by_hand(trained, name):
    model = trained[name]
    cells = np.arange(60)
    found = model.get_aggregate_kl(indices=cells, n_mc_samples=3, batch_size=25, seed=4)
    net = model.network
    rng = np.random.default_rng(4)
    rows = []
    m, v = (np.asarray(p, "float64") for p in net.encode_counts(model.X[cells].toarray()))

    def log_normal(z, m, v):
        return -0.5 * (np.log(2 * np.pi) + v + (z - m) ** 2 / np.exp(v)).sum(-1)

    for at in range(0, 60, 25):
        own = slice(at, at + 25)
        for _ in range(3):
            z = m[own] + np.exp(v[own] / 2) * rng.standard_normal(m[own].shape).astype("float32")
            rows += [
                (log_normal(z_i, m[i], v[i]), np.log(np.mean(np.exp(log_normal(z_i, m, v)))))
                for i, z_i in zip(cells[own], z)
            ]
    own, all_ = np.transpose(rows)
    assert found["mutual_information"] == pytest.approx((own - all_).mean(), rel=1e-4)
    assert found["kl"] == pytest.approx(
        found["aggregate_kl"] + found["mutual_information"], abs=1e-9
    )
    assert found["kl"] == pytest.approx(
        model.get_elbo(indices=cells, n_mc_samples=100)["kl"], rel=0.1
    )
    assert 0 < found["mutual_information"] < found["log_n_cells"] == pytest.approx(np.log(60))


def test_aggregate_kl_at_its_ends(trained):
    model = trained["VAE"]
    # one cell: z cannot say which
    one = model.get_aggregate_kl(indices=[5], n_mc_samples=4)
    assert one["mutual_information"] == pytest.approx(0, abs=1e-4) and one[
        "aggregate_kl"
    ] == pytest.approx(one["kl"], abs=1e-4)
    weights = model.network.get_weights()
    for head in (model.network.posterior.mean, model.network.posterior.log_var):
        # a posterior that is the prior
        for w in head.weights:
            w.assign(np.zeros(w.shape))
    gone = model.get_aggregate_kl(indices=model.split.test)
    model.network.set_weights(weights)
    assert gone["mutual_information"] == pytest.approx(0, abs=1e-3) and gone[
        "aggregate_kl"
    ] == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize("name", ["AE", "IAF", "HVAMP"])
def test_aggregate_kl_is_refused_by_name(trained, name):
    with pytest.raises(ValueError, match="VAE"):
        trained[name].get_aggregate_kl(indices=[0, 1])


def test_loadings_are_the_change_of_the_log_rate(adata):
    model = models.VAE(adata, linear_decoder=True, **SMALL)
    loadings = model.get_loadings()
    assert loadings.shape == (300, 8) and list(loadings.index) == list(model.gene_table.index)
    z = np.zeros((2, 8), "float32")
    z[1, 3] = 1
    a = np.asarray(model.network.decoder.heads(z)[0])
    np.testing.assert_allclose(
        loadings["z3"], (a[1] - a[0])[model.own_names.order], rtol=1e-5, atol=1e-6
    )


def test_loadings_of_a_deep_decoder_are_refused(trained):
    with pytest.raises(ValueError, match="linear_decoder=True"):
        trained["VAE"].get_loadings()


def test_loadings_leave_out_the_batches(adata):
    cells = adata[:100].copy()
    cells.obs["lab"] = np.arange(100) % 2
    assert models.VAE(
        cells, linear_decoder=True, batch_key="lab", **SMALL
    ).get_loadings().shape == (300, 8)


def test_random_pseudo_inputs_have_the_genes_of_no_cell(adata):
    cells, random = (
        models.VAMP(adata, pseudo_inputs_from=origin, **SMALL) for origin in ("cells", "random")
    )
    a, b = (np.asarray(m.network.prior.pseudo_inputs) for m in (cells, random))
    # each gene's values, but for the noise
    np.testing.assert_allclose(np.sort(a, axis=0), np.sort(b, axis=0), atol=0.1)

    def nearest(u):
        return np.linalg.norm(u[:, None] - np.log1p(expression(cells))[None], axis=-1).min(1)

    assert nearest(a).max() < 0.5 < nearest(b).min()
    assert (
        cells._identity(TRAINING, cells.X)["origin"]
        != random._identity(TRAINING, random.X)["origin"]
    )
    with pytest.raises(ValueError, match="pseudo_inputs_from='middle'"):
        models.VAMP(adata, pseudo_inputs_from="middle", **SMALL)


TRAINING = models.training.get_profile("quick")


def expression(model):
    X = model.X[model.split.train].toarray()
    return 1e4 * X / X.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "name, remedy",
    [
        (
            "setup_anndata",
            r"VAMP has no setup_anndata: give batch_key=.* to VAMP\(adata, ...\) itself",
        ),
        ("load", r"vampsc.load\(path, adata\) reads a saved model"),
        ("load_query_data", r"vampsc.load\(path\).transfer\(new_cells\)"),
    ],
)
def test_methods_of_scvi_tools_are_named_by_what_does_the_same(name, remedy):
    with pytest.raises(AttributeError, match=remedy):
        getattr(models.VAMP, name)
    assert not hasattr(models.VAMP, name)


def test_the_folder_of_a_run_is_as_good_as_that_of_its_model(tmp_path):
    adata = ad.AnnData(np.random.default_rng(0).poisson(1.0, (40, 12)).astype("float32"))
    model = models.AE(adata, gene_space=None, hidden=(4,), n_latent=2)
    model.save(tmp_path / "run" / "model")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        models.load(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    again = models.load(tmp_path / "run")
    for one, other in zip(model.network.get_weights(), again.network.get_weights()):
        assert np.array_equal(one, other)


@pytest.fixture
def small_ae():
    return models.AE(organs.load("pancreas")[:60], n_genes=50, n_latent=4, hidden=(8,))


def test_the_class_behind_the_presets():
    adata = organs.load("pancreas")[:60]
    small_ae = dict(
        n_genes=50, n_latent=4, hidden=(8,), n_pseudo_inputs=5, n_flow_steps=1, flow_hidden=(8,)
    )
    plain = models.CountAutoencoder(adata, "iaf", "vamp", **small_ae)
    preset = models.VAMPIAF(adata, **small_ae)
    assert plain.architecture == preset.architecture
    assert np.array_equal(plain.get_latent_representation(), preset.get_latent_representation())
    with pytest.raises(ValueError, match="cannot be combined with"):
        models.CountAutoencoder(adata, "point", "vamp")
