"Metrics against scikit-learn, closed forms and simulation."

import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import kstest
from sklearn import metrics as sk
from sklearn.decomposition import PCA

from vampsc import metrics
from vampsc.metrics import (
    active_units,
    active_units_split_half,
    activity,
    activity_split_half,
    co_variation_split_half,
    count_marginals,
    data_copying,
    energy_distance,
    knn_purity,
    n_components,
    n_components_split_half,
    n_labelled,
    nmi_ari,
    silhouette,
    silhouette_samples,
    silhouette_split_half,
    two_sample_accuracy,
    type_shares,
)


def groups(n=300, d=6, k=4, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k, n)
    return rng.normal(size=(n, d)) + spread * rng.normal(size=(k, d))[codes], np.array(
        [f"type {c}" for c in codes], object
    )


def slow_silhouette(z, labels):
    "Straight from the definition, with distances from differences."
    labels = np.asarray(labels)
    distance = cdist(z, z)
    out = []
    for i in range(len(z)):
        own = labels == labels[i]
        if own.sum() == 1:
            out.append(0.0)
            continue
        a = distance[i, own].sum() / (own.sum() - 1)
        b = min(distance[i, labels == other].mean() for other in set(labels) - {labels[i]})
        out.append((b - a) / max(a, b))
    return np.array(out)


# ---- silhouette


@pytest.mark.parametrize("block_size", [1, 7, 100, 299, 300, 301, 1024])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_silhouette_block_sizes(block_size, dtype):
    # a tile for every pair of cells is slow
    z, labels = groups(300 if block_size > 1 else 60)
    z = z.astype(dtype)
    assert np.allclose(
        silhouette_samples(z, labels, block_size),
        sk.silhouette_samples(z.astype("float64"), labels),
        atol=1e-6,
        rtol=0,
    )
    assert (
        abs(silhouette(z, labels, block_size) - sk.silhouette_score(z.astype("float64"), labels))
        < 1e-6
    )


@given(
    st.integers(5, 60),
    st.integers(1, 5),
    st.integers(2, 5),
    st.integers(1, 70),
    st.integers(0, 999),
)
def test_silhouette_of_any_shape(n, d, k, block_size, seed):
    z, labels = groups(n, d, k, seed)
    if 2 <= len(set(labels)) < n:
        assert np.allclose(
            silhouette_samples(z, labels, block_size), slow_silhouette(z, labels), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("block_size", [7, 100, 1024])
def test_silhouette_of_two_halves_straight_from_its_definition(block_size):
    z, labels = groups()
    rng = np.random.default_rng(1)
    # a shift of a half changes no difference
    a, b = (z + 0.3 * rng.normal(size=z.shape) + shift for shift in (5, -7))

    def between(x):
        return x[:, None] - x[None]

    distance = np.sqrt(np.maximum((between(a) * between(b)).sum(-1), 0))
    assert silhouette_split_half(a, b, labels, block_size) == pytest.approx(
        sk.silhouette_score(distance, labels, metric="precomputed"), abs=1e-6
    )
    assert silhouette_split_half(z, z, labels, block_size) == pytest.approx(
        silhouette(z, labels), abs=1e-9
    )
    labels[::3] = None
    known = np.arange(300) % 3 > 0
    assert silhouette_split_half(a, b, labels, block_size) == pytest.approx(
        silhouette_split_half(a[known], b[known], labels[known]), abs=1e-9
    )
    with pytest.raises(ValueError, match="one shape"):
        silhouette_split_half(a, b[:, :3], labels)
    with pytest.raises(ValueError, match="block_size"):
        silhouette_split_half(a, b, labels, 0)


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_noise_lowers_a_silhouette_but_not_that_of_two_halves(noise):
    z, labels = groups(1000, 5)
    # in 123 units is nothing but noise
    z = np.hstack([z, np.zeros((1000, 123))])
    rng = np.random.default_rng(2)
    exact = silhouette(z, labels)
    a, b = (z + noise * np.sqrt(2) * rng.normal(size=z.shape) for _ in range(2))
    lost = exact - silhouette((a + b) / 2, labels)
    assert lost > 0.04 and abs(silhouette_split_half(a, b, labels) - exact) < 0.1 * lost


@pytest.mark.parametrize("missing", [np.nan, None, "", " ", pd.NA])
def test_unlabelled_cells(missing):
    z, labels = groups()
    labels[::3] = missing
    known = np.arange(300) % 3 > 0
    samples = silhouette_samples(z, labels, 64)
    assert n_labelled(labels) == 200 and np.array_equal(np.isnan(samples), ~known)
    assert np.allclose(
        samples[known], sk.silhouette_samples(z[known], labels[known].astype(str)), atol=1e-6
    )
    assert silhouette(z, labels) == pytest.approx(
        sk.silhouette_score(z[known], labels[known].astype(str)), abs=1e-6
    )


def test_categorical_labels():
    z, labels = groups()
    expected = silhouette(z, labels)
    for form in (
        pd.Categorical(labels),
        pd.Series(labels, index=range(5, 305)),
        list(labels),
        pd.factorize(labels)[0],
    ):
        assert silhouette(z, form) == pytest.approx(expected, abs=1e-12)


def test_singletons_and_points():
    z, labels = groups(50)
    labels[[3, 20]] = "alone", "too"
    samples = silhouette_samples(z, labels)
    assert samples[3] == samples[20] == 0 and np.allclose(
        samples, slow_silhouette(z, labels), atol=1e-6
    )
    assert silhouette(np.ones((50, 3)), labels) == 0
    assert silhouette([[0.0], [0], [1], [1]], list("aabb")) == pytest.approx(1)
    assert silhouette([[0.0], [1], [3], [4]], list("aabb")) == pytest.approx(
        np.mean([5 / 7, 3 / 5, 3 / 5, 5 / 7])
    )


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_large_offset(offset):
    z, labels = groups()
    assert np.allclose(
        silhouette_samples(z + offset, labels), slow_silhouette(z, labels), atol=1e-6, rtol=0
    )
    assert np.allclose(activity(z + offset), z.var(0), rtol=1e-8) and n_components(
        z + offset
    ) == n_components(z)


@pytest.mark.parametrize(
    "labels, words",
    [
        (["a"] * 4, "at least 2 different labels; found 1"),
        ([None] * 4, "found 0"),
        (list("abcd"), "2 cells"),
        (list("abc"), "4 cells.* 3 labels"),
        ([["a"]] * 4, "shape"),
    ],
)
def test_silhouette_refuses(labels, words):
    with pytest.raises(ValueError, match=words):
        silhouette(np.eye(4), labels)


@pytest.mark.parametrize("block_size", [0, -5])
def test_block_size_refused(block_size):
    z, labels = groups()
    with pytest.raises(ValueError, match="block_size"):
        silhouette(z, labels, block_size=block_size)


def test_memory_is_that_of_a_block():
    z, labels = groups(6000, 8)
    tracemalloc.start()
    silhouette(z, labels, block_size=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # all distances at once: 288 MB
    assert peak < 20e6


@pytest.mark.parametrize(
    "function",
    [
        activity,
        active_units,
        n_components,
        lambda z: silhouette(z, [0, 1, 1]),
        lambda z: activity_split_half(z, z),
    ],
)
@pytest.mark.parametrize(
    "z, words",
    [
        (np.zeros(3), "matrix"),
        (np.zeros((3, 0)), "matrix"),
        ([[0, np.nan], [1, 2], [1, np.inf]], "2 of 3 cells"),
    ],
)
def test_embeddings_refused(function, z, words):
    with pytest.raises(ValueError, match=words):
        function(z)


# ---- active units


def test_activity_closed_forms():
    # exactly, though 0.1 is not
    assert (activity(np.full((10, 3), 0.1)) == 0).all()
    z = np.column_stack(
        [
            np.tile([-1.0, 1], 50),
            np.tile([0, 0.2], 50),
            np.tile([0, 0.2002], 50),
            np.full(100, 0.1),
            np.arange(100),
        ]
    )
    assert np.allclose(activity(z), [1, 0.01, 0.1001**2, 0, (100**2 - 1) / 12], rtol=1e-9)
    assert (
        active_units(z, 0.0100001) == 3
        and active_units(z, 0.5) == 2
        and active_units(np.full((9, 7), 0.1)) == 0
    )
    assert np.allclose(activity_split_half(z, 2 * z), 2 * activity(z)) and np.allclose(
        activity_split_half(z, -z), -activity(z)
    )
    with pytest.raises(ValueError, match="one shape"):
        activity_split_half(z, z[:5])


def test_units_are_active_above_a_variance_of_a_hundredth():
    z = np.outer(np.tile([-1.0, 1.0], 20), np.sqrt([0.0099, 0.0101, 0.09, 2.0]))
    assert active_units(z) == active_units_split_half(z, z) == 3


@pytest.mark.parametrize("samples", [5, 50])
def test_split_half_is_unbiased(samples):
    rng = np.random.default_rng(1)

    def half(mean, sd):
        return mean + sd * rng.normal(size=mean.shape) / np.sqrt(samples)

    n = 4000
    d = 128
    signal = rng.normal(size=(4000, 128))
    collapsed = np.zeros((n, d))  # posterior N(0, 1); and N(mean, 0.2)
    plain = np.sqrt(0.8) * signal
    a = half(collapsed, 1)
    b = half(collapsed, 1)
    assert active_units_split_half(a, b) == 0
    assert samples > 5 or active_units((a + b) / 2) == 128  # what the halves are for
    assert abs(activity_split_half(a, b).mean()) < 5 / samples / np.sqrt(n * d)
    a = half(plain, np.sqrt(0.2))
    b = half(plain, np.sqrt(0.2))
    assert active_units_split_half(a, b) == 128
    assert activity_split_half(a, b).mean() == pytest.approx(
        0.8, abs=5 * 0.8 * np.sqrt(2 / n / d) + 1e-3
    )


# ---- principal components


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n, d", [(200, 10), (50, 128), (500, 64)])
def test_components_against_sklearn(share, n, d):
    rng = np.random.default_rng(n)
    z = rng.normal(size=(n, d)) * np.geomspace(1, 0.01, d) + 3
    assert n_components(z, share) == PCA(n_components=share, svd_solver="full").fit(z).n_components_


def test_components_closed_forms():
    z = np.vstack([np.diag([3.0, 2, 1]), -np.diag([3.0, 2, 1])])  # variances 9 : 4 : 1
    assert [n_components(z, s) for s in (9 / 14, 0.65, 13 / 14, 0.93, 1)] == [1, 2, 2, 3, 3]
    assert (
        n_components(np.full((10, 3), 0.1)) == 0
        and n_components_split_half(z, z, 0.93) == 3
        and n_components_split_half(z, -z) == 0
    )
    for share in (0, -1, 1.01, np.nan):
        with pytest.raises(ValueError, match="share"):
            n_components(z, share)


def test_components_split_half_without_noise_of_the_halves():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(4000, 3)) @ rng.normal(size=(3, 64))
    a, b = (mean + 0.7 * rng.normal(size=mean.shape) for _ in range(2))
    assert n_components(mean) == 3 == n_components_split_half(a, b) < n_components(a)


@pytest.mark.parametrize("cells, allowed", [(500, 0.7), (1000, 0.5), (5000, 0.5)])
def test_components_split_half_of_few_cells(cells, allowed):
    """Noise takes two components from the count at 500 cells, one at 5,000; corrected, it is that
    of the exact means.
    """
    found = []
    for seed in range(5 if cells > 1000 else 12):
        rng = np.random.default_rng(seed)
        spectrum = 0.5 * np.exp(-np.arange(128) / 7.5) * (np.arange(128) < 30)
        exact = rng.normal(size=(cells, 128)) * np.sqrt(spectrum)
        # of 25 samples each
        a, b = (exact + rng.normal(size=exact.shape) / 5 for _ in range(2))
        found.append(
            [
                n_components(exact),
                n_components_split_half(a, b, n_noisier=0),
                n_components_split_half(a, b),
            ]
        )
    exact, as_it_is, corrected = np.mean(found, axis=0)
    assert as_it_is < exact - 0.6
    assert abs(corrected - exact) < allowed


def test_co_variation_of_halves_is_that_of_the_exact_means():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(3000, 1))
    exact = np.hstack(
        [0.3 * (0.6 * common + 0.8 * rng.normal(size=(3000, 20))), np.zeros((3000, 10))]
    )
    a, b = (exact + rng.normal(size=exact.shape) / 5 for _ in range(2))
    of_exact = co_variation_split_half(exact, exact)
    assert of_exact == pytest.approx(0.36, abs=0.03)
    assert co_variation_split_half(a, b) == pytest.approx(of_exact, abs=0.02)
    mean = (a + b) / 2
    assert np.abs(np.corrcoef(mean[:, :20].T)[~np.eye(20, dtype=bool)]).mean() < of_exact - 0.05
    assert np.isnan(co_variation_split_half(exact[:, :1], exact[:, :1]))
    with pytest.raises(ValueError, match="one shape"):
        co_variation_split_half(a, b[:, :4])


# ---- what must not matter


@given(st.integers(0, 9999), st.floats(-100, 100), st.floats(0.1, 50))
def test_invariances(seed, shift, scale):
    z, labels = groups(60, 4, 3, seed)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    order = rng.permutation(60)
    names = dict(zip(sorted(set(labels)), rng.permutation(10)))
    expected = silhouette_samples(z, labels)
    components = n_components(z)
    assert np.allclose(
        silhouette_samples(z @ rotation * scale + shift, labels), expected, atol=1e-6
    )
    assert np.allclose(
        silhouette_samples(z[order], [names[k] for k in labels[order]]), expected[order], atol=1e-9
    )
    assert n_components(z @ rotation * scale + shift) == components == n_components(z[order])
    assert np.allclose(activity(z[order] + shift), z.var(0)) and np.allclose(
        activity(scale * z), scale**2 * z.var(0)
    )


# ---- clusters and neighbours


def mutual_information(a, b):
    "Equation by hand, in nats, from the table of shares."
    table = pd.crosstab(np.asarray(a), np.asarray(b)).to_numpy() / len(a)
    expected = table.sum(1, keepdims=True) * table.sum(0)
    return (table[table > 0] * np.log((table / expected)[table > 0])).sum()


def rand_adjusted(a, b):
    "Pairs of cells, one by one."
    a = np.unique(a, return_inverse=True)[1]
    b = np.unique(b, return_inverse=True)[1]
    i, j = np.triu_indices(len(a), 1)
    same_a = a[i] == a[j]
    same_b = b[i] == b[j]
    both = (same_a & same_b).sum()
    expected = same_a.sum() * same_b.sum() / len(i)
    return (both - expected) / ((same_a.sum() + same_b.sum()) / 2 - expected)


@given(st.integers(8, 60), st.integers(2, 4), st.integers(0, 500))
def test_nmi_and_ari_by_hand(n, k, seed):
    from sklearn.cluster import KMeans

    z, labels = groups(n, 3, k, seed)
    labels[:4] = ["type 0", "type 0", "type 1", "type 1"]
    clusters = KMeans(len(set(labels)), n_init=10, random_state=0).fit_predict(
        z - z[0] - (z - z[0]).mean(0)
    )
    found = nmi_ari(z, labels)
    entropy = mutual_information(labels, labels) + mutual_information(clusters, clusters)
    assert found["nmi"] == pytest.approx(
        2 * mutual_information(labels, clusters) / entropy, abs=1e-9
    )
    assert found["ari"] == pytest.approx(rand_adjusted(labels, clusters), abs=1e-9)


def test_nmi_and_ari_at_their_ends():
    codes = np.repeat([0, 1, 2], 50)
    z = 100 * np.eye(3)[codes] + np.random.default_rng(0).normal(size=(150, 3))
    assert nmi_ari(z, codes) == pytest.approx({"nmi": 1, "ari": 1})
    by_chance = nmi_ari(z, np.random.default_rng(1).permutation(codes))
    assert abs(by_chance["ari"]) < 0.05 and by_chance["nmi"] < 0.05
    cut = nmi_ari(z, codes, n_clusters=6)  # every type cut in two
    assert 0.6 < cut["nmi"] < 0.9 and 0.4 < cut["ari"] < 0.75
    assert nmi_ari(z, codes, seed=3) == nmi_ari(z, codes, seed=3)


@given(
    st.integers(4, 60), st.integers(1, 5), st.integers(2, 4), st.integers(1, 8), st.integers(0, 500)
)
def test_purity_by_hand(n, d, types, k, seed):
    z, labels = groups(n, d, types, seed)
    labels[:2], labels[2] = "type 0", "type 1"
    k = min(k, n - 1)
    distance = cdist(z, z)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, 1)[:, :k]
    assert knn_purity(z, labels, k) == pytest.approx((labels[nearest] == labels[:, None]).mean())


def test_purity_at_its_ends():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [600, 300, 100])
    assert knn_purity(100 * np.eye(3)[codes] + rng.normal(size=(1000, 3)), codes) == 1
    mixed = knn_purity(rng.normal(size=(1000, 3)), codes)
    # the chance of drawing one's own type
    assert mixed == pytest.approx(0.6**2 + 0.3**2 + 0.1**2, abs=0.03)
    # all on one point: itself left out
    assert knn_purity(np.zeros((20, 2)), [0, 1] * 10, k=19) == pytest.approx(9 / 19)


@pytest.mark.parametrize(
    "metric", [lambda z, l: nmi_ari(z, l)["nmi"], lambda z, l: nmi_ari(z, l)["ari"], knn_purity]
)
def test_unlabelled_cells_take_no_part(metric):
    z, labels = groups(200, 4, 3)
    some = labels.copy()
    some[::5] = None
    keep = np.array([l is not None for l in some])
    assert metric(z, some) == pytest.approx(metric(z[keep], labels[keep]))
    z[~keep] = 1e6  # wherever they are
    assert metric(z, some) == pytest.approx(metric(z[keep], labels[keep]))
    assert metric(z, pd.Categorical(some)) == metric(z, some)
    # scale and place do not matter
    assert metric(3 * z + 7, some) == pytest.approx(metric(z, some))
    z[~keep] = 0
    assert metric(z + 1e8, some) == pytest.approx(metric(z, some), abs=0.02)


@pytest.mark.parametrize(
    "metric, words", [(nmi_ari, "Comparing clusters"), (knn_purity, "The purity")]
)
def test_clusters_and_neighbours_refuse(metric, words):
    with pytest.raises(ValueError, match=f"{words}.* at least 2 different labels; found 1"):
        metric(np.zeros((4, 2)), ["a"] * 4)
    with pytest.raises(ValueError, match="4 cells but there are 3 labels"):
        metric(np.zeros((4, 2)), ["a", "b", "a"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        metric(np.full((4, 2), np.nan), list("aabb"))


@pytest.mark.parametrize("k", [0, -1, 4, 50])
def test_purity_refuses_k(k):
    with pytest.raises(ValueError, match=f"k must be from 1 to 3.*got {k}"):
        knn_purity(np.eye(4), list("aabb"), k=k)


# ---- invented cells beside real ones


def poisson_cells(n=400, genes=40, seed=0, types=2):
    """Counts (n, genes) of cells of several types, and their types; the types are those of every
    seed.
    """
    rates = np.exp(np.random.default_rng(99).normal(0.5, 1.0, (types, genes)))
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, types, n)
    return rng.poisson(rates[kind] * np.exp(rng.normal(0, 0.3, (n, 1)))).astype("float32"), kind


@pytest.mark.long
def test_equal_distributions_give_chance_level_and_distance_zero():
    covered = 0
    distances = []
    p_values = []
    for seed in range(12):
        a = poisson_cells(200, seed=2 * seed)[0]
        b = poisson_cells(200, seed=2 * seed + 1)[0]
        # forests take their time
        if seed < 6:
            found = two_sample_accuracy(a, b, seed=seed)
            covered += found["low"] <= 0.5 <= found["high"]
        energy = energy_distance(a, b, seed=seed)
        distances.append(energy["distance"])
        p_values.append(energy["p_value"])
    assert covered >= 5  # of 6, 95 % each
    assert abs(np.mean(distances)) < 3 * np.std(distances) / np.sqrt(12) and min(
        distances
    ) < 0 < max(distances)
    assert 0.25 < np.mean(p_values) < 0.75


def test_a_shift_is_detected_by_all():
    a = poisson_cells(seed=0)[0]
    b = poisson_cells(seed=1)[0]
    b[:, 3] += 5 + b[:, 3]
    found = two_sample_accuracy(a, b)
    energy = energy_distance(a, b)
    assert found["low"] > 0.75 and found["n_cells"] == 800
    assert energy["p_value"] < 0.02 and energy["distance"] > 3 * abs(
        energy_distance(a, poisson_cells(seed=1)[0])["distance"]
    )


def test_energy_distance_from_its_definition():
    a = poisson_cells(30, seed=0)[0]
    b = poisson_cells(30, seed=1)[0] * 2
    x, y = (np.log1p(1e4 * m / m.sum(1, keepdims=True)) for m in (a, b))

    def pairs(u):
        return [np.linalg.norm(u[i] - u[j]) for i in range(30) for j in range(30) if i != j]

    by_hand = (
        2 * np.mean([np.linalg.norm(p - q) for p in x for q in y])
        - np.mean(pairs(x))
        - np.mean(pairs(y))
    )
    assert energy_distance(a, b, n_permutations=0)["distance"] == pytest.approx(by_hand, abs=1e-4)


def test_two_samples_dense_sparse_and_of_other_sizes():
    a = poisson_cells(300, seed=0)[0]
    b = poisson_cells(120, seed=1)[0]
    for f in (two_sample_accuracy, energy_distance, count_marginals):
        assert f(sp.csr_matrix(a), sp.csr_matrix(b)) == pytest.approx(f(a, b), abs=1e-9)
    assert (
        two_sample_accuracy(a, b)["n_cells"] == 240
        and two_sample_accuracy(a, b, most=50)["n_cells"] == 100
    )


def test_a_forest_of_few_cells_warns_that_it_learns_little():
    a = poisson_cells(250, seed=0)[0]
    b = poisson_cells(250, seed=1)[0]
    with pytest.warns(UserWarning, match="learns from 140 cells of a kind"):
        two_sample_accuracy(a, b[:140])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_sample_accuracy(a, b)


def test_copies_are_found_and_counted():
    training = poisson_cells(300, seed=0)[0]
    test = poisson_cells(100, seed=1)[0]
    fresh = poisson_cells(300, seed=2)[0]
    assert data_copying(training, test, training[::-1])["copied"] == 1
    half = data_copying(training, test, np.vstack([training[:150], fresh[:150]]))
    assert half["copied"] == pytest.approx(0.5, abs=0.3) and half["copied_p"] < 0.01
    # copies of test cells
    other = data_copying(training, test, test)
    assert other["copied"] == pytest.approx(-3) and other["copied_p"] == 1
    # cells that vary too little are near to all cells, and copies of none
    middle = data_copying(training, test, np.tile(fresh.mean(0), (50, 1)))
    assert middle["closer"] > 0.95 and middle["copied_p"] > 0.05


def test_without_copies_the_p_value_is_uniform_and_the_share_is_zero():
    found = []
    for seed in range(40):
        cells = np.split(poisson_cells(300, seed=seed)[0], 3)
        found.append(data_copying(*cells, n_permutations=200, seed=seed))
    p = [f["copied_p"] for f in found]
    assert kstest(p, "uniform").pvalue > 0.01
    for name, expected in (("copied", 0), ("closer", 0.5)):
        values = [f[name] for f in found]
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(40)


def test_data_copying_from_its_definition():
    training = poisson_cells(30, seed=0)[0]
    test = poisson_cells(12, seed=1)[0]
    invented = poisson_cells(25, seed=2)[0]
    x, y, z = (np.log1p(1e4 * m / m.sum(1, keepdims=True)) for m in (training, test, invented))

    def nearest(cell, others):
        return min(np.linalg.norm(cell - other) for other in others)

    share = np.mean([nearest(cell, x) < nearest(cell, y) for cell in z])
    pairs = [nearest(cell, x) < nearest(other, x) for cell in z for other in y]
    found = data_copying(sp.csr_matrix(training), test, invented)
    assert found["copied"] == pytest.approx((share - 30 / 42) / (12 / 42))
    assert found["closer"] == pytest.approx(np.mean(pairs))
    assert 1 / 1001 <= found["copied_p"] <= 1


def test_wrong_samples_are_named():
    a = poisson_cells(50)[0]
    with pytest.raises(ValueError, match="test and invented cells must have the same genes"):
        data_copying(a, a[:, 1:], a)
    with pytest.raises(ValueError, match="10 test cells are needed; got 4"):
        data_copying(a, a[:4], a)
    with pytest.raises(ValueError, match="same genes; got 40 and 39"):
        two_sample_accuracy(a, a[:, 1:])
    with pytest.raises(ValueError, match="at least 10 cells"):
        energy_distance(a[:5], a)
    with pytest.raises(ValueError, match="invented cells have negative"):
        two_sample_accuracy(a, a - 5)
    with pytest.raises(ValueError, match="NaN"):
        count_marginals(a, np.where(a > 3, np.nan, a))
    with pytest.raises(ValueError, match="most"):
        energy_distance(a, a, most=0)


def test_marginals_by_hand():
    real = np.array([[1, 0, 9], [0, 10, 0], [5, 5, 0], [2, 3, 5]], "float32")
    # only the libraries differ, by a factor of 10
    found = count_marginals(real, 10 * real)
    assert found["library"] == pytest.approx(1) and found["dropout"] == 0
    assert found["correlation"] == pytest.approx(1) and found["correlation_slope"] == pytest.approx(
        1
    )
    # one zero more in one gene of three
    fewer = real.copy()
    fewer[2, 1] = 0
    assert count_marginals(real, fewer)["dropout"] == pytest.approx(1 / 12)


def test_shuffled_genes_lose_their_correlations_and_nothing_else():
    a = poisson_cells(seed=0)[0]
    b = np.random.default_rng(0).permuted(poisson_cells(seed=0)[0], axis=0)
    found = count_marginals(a, b)
    assert (
        found["dropout"] == 0
        and abs(found["correlation_slope"])
        < 0.1
        < 0.9
        < count_marginals(a, a)["correlation_slope"] + 1e-9
    )


def test_cells_without_counts_are_no_error():
    a = poisson_cells(seed=0)[0]
    b = poisson_cells(seed=1)[0]
    b[:20] = 0
    assert energy_distance(a, b)["p_value"] < 0.05 and two_sample_accuracy(a, b)["accuracy"] > 0.5


def test_type_shares_of_known_mixtures():
    real, kind = poisson_cells(400, seed=0)
    labels = np.where(kind == 1, "one", "zero").astype(object)
    labels[:10] = None
    other, other_kind = poisson_cells(500, seed=1)
    shares = type_shares(real, labels, other, sp.csr_matrix(other[other_kind == 1]))
    assert (
        shares.loc["one", 0] == pytest.approx(other_kind.mean(), abs=0.02)
        and shares.loc["one", 1] > 0.97
    )
    np.testing.assert_allclose(shares.sum(), 1)
    with pytest.raises(ValueError, match="2 different labels"):
        type_shares(real, ["one"] * 400, other)
    with pytest.raises(ValueError, match="same genes"):
        type_shares(real, labels, other[:, 1:])


# ---- batches


def test_batch_mixing_against_a_count_by_hand():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(60, 3))
    batches = np.array(["a", "b", "c"])[rng.integers(0, 3, 60)]
    distances = np.square(z[:, None] - z).sum(-1)
    np.fill_diagonal(distances, np.inf)
    near = np.argsort(distances, axis=1)[:, :5]
    other = (batches[near] != batches[:, None]).mean()
    by_chance = np.mean([(np.delete(batches, i) != batches[i]).mean() for i in range(60)])
    assert metrics.batch_mixing(z, batches, k=5) == pytest.approx(other / by_chance)


def test_batches_that_cannot_be_mixed_are_named():
    z = np.zeros((5, 2))
    with pytest.raises(ValueError, match="two batches or more"):
        metrics.batch_mixing(z, ["a"] * 5, k=2)
    with pytest.raises(ValueError, match="2 of 5 cells have no batch"):
        metrics.batch_mixing(z, ["a", None, "b", None, "b"], k=2)
