"""A loaded model and the cells that it was trained on: known again, in any order, and told from
others.
"""

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from vampsc import counts, models, saving
from vampsc.counts import CountsError, Split, check_split

SMALL = dict(gene_space=None, hidden=(8,), n_latent=3)


def cells(n=60, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 4.0, (n, 30))).astype("float32")
    X[:, 0] += 1
    obs = pd.DataFrame(
        {"donor": np.array(["d0", "d1"])[np.arange(n) % 2]}, index=[f"c{i}" for i in range(n)]
    )
    return AnnData(X, obs, pd.DataFrame(index=[f"g{j}" for j in range(30)]))


@pytest.fixture(scope="module")
def adata():
    return cells()


@pytest.fixture(scope="module")
def model(adata):
    return models.VAE(adata, batch_key="donor", **SMALL).train(max_epochs=1, progress=False)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "m"
    model.save(path)
    return path


def of_an_older_version(folder, tmp_path):
    "The same folder without the marks of the cells."
    import shutil

    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / saving.CELLS).unlink()
    (old / saving.CHECKSUMS).unlink()
    (old / saving.CHECKSUMS).write_bytes(
        saving._checksums({p.name: p.read_bytes() for p in old.iterdir()})
    )
    return old


def test_the_split_follows_cells_in_another_order(model, folder, adata):
    shuffled = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    again = models.load(folder, shuffled)
    for part in ("train", "validation", "test"):
        assert set(shuffled.obs_names[getattr(again.split, part)]) == set(
            adata.obs_names[getattr(model.split, part)]
        )
    elbo = [m.get_elbo(indices=m.split.test, n_mc_samples=50)["elbo"] for m in (model, again)]
    assert elbo[0] == pytest.approx(elbo[1], rel=0.01)
    z = pd.DataFrame(again.get_latent_representation(), shuffled.obs_names).loc[adata.obs_names]
    np.testing.assert_allclose(z, model.get_latent_representation(), atol=1e-5)


def test_what_was_put_in_order_is_saved_in_that_order(folder, adata, tmp_path):
    backwards = adata[::-1].copy()
    models.load(folder, backwards).save(tmp_path / "m")
    once_more = models.load(tmp_path / "m", adata)
    assert once_more.split == models.load(folder, adata).split


def test_a_model_without_its_cells_saves_their_marks(folder, adata, tmp_path):
    models.load(folder).save(tmp_path / "m")
    assert models.load(tmp_path / "m", adata).split == models.load(folder).split


def test_other_cells_are_refused_with_what_to_do(folder, adata):
    other = cells(seed=9)
    with pytest.raises(
        ValueError, match="of the model.s 60 cells have other counts.*without adata"
    ):
        models.load(folder, other)
    other.obs_names = [f"x{i}" for i in range(60)]
    with pytest.raises(
        ValueError, match=r"60 of 60 have names that it does not know \(first: x0\).*without adata"
    ):
        models.load(folder, other)
    with pytest.raises(ValueError, match="trained on 60 cells and adata has 59.*without adata"):
        models.load(folder, adata[1:])
    other.obs["donor"] = "d0"
    # the remedy
    assert models.load(folder).get_latent_representation(other).shape == (60, 3)


def test_cells_that_were_renamed_are_known_by_their_counts(model, folder, adata):
    renamed = adata.copy()
    renamed.obs_names = renamed.obs_names + "-1"
    assert models.load(folder, renamed).split == model.split


def test_shared_names_in_another_order_are_refused(adata, tmp_path):
    twice = adata.copy()
    with pytest.warns(UserWarning, match="not unique|more than once"):
        twice.obs_names = ["c"] * 30 + [f"c{i}" for i in range(30)]
        models.VAE(twice, **SMALL).save(tmp_path / "m")
        # in their order they are known
        assert len(models.load(tmp_path / "m", twice).split.train) == 48
        with pytest.raises(ValueError, match="share do not tell"):
            models.load(tmp_path / "m", twice[::-1].copy())


def test_models_of_older_versions_compare_the_totals_of_training_cells(
    model, folder, adata, tmp_path
):
    old = of_an_older_version(folder, tmp_path)
    assert models.load(old, adata).split == model.split
    with pytest.raises(ValueError, match="another order, which an older version did not keep"):
        models.load(old, adata[::-1].copy())
    with pytest.raises(ValueError, match="their counts are others"):
        models.load(old, cells(seed=9))
    with pytest.raises(ValueError, match="adata has 10"):
        models.load(old, adata[:10])


# ---- splits given by hand

ORDER = np.random.default_rng(0).permutation(60)
PARTS = ORDER[:44], ORDER[44:50], ORDER[50:]
FORMS = {
    "unsorted": PARTS,
    "lists": [p.tolist() for p in PARTS],
    "masks": [np.isin(np.arange(60), p) for p in PARTS],
    "series": [pd.Series(np.isin(np.arange(60), p), dtype="boolean") for p in PARTS],
    "from the end": [p - 60 for p in PARTS],
    "numpy's": [p.astype("uint8") for p in PARTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_split_is_sorted_positions_whatever_it_was_given_as(form):
    split = check_split(Split(*FORMS[form]), 60)
    for part, expected in zip(split._parts(), PARTS):
        assert part.dtype == int and part.tolist() == sorted(expected)
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split


def test_masks_and_some_of_the_cells_are_kept_with_the_model(adata, tmp_path):
    some = Split(*(np.isin(np.arange(60), p) for p in (ORDER[:40], ORDER[40:46], ORDER[46:50])))
    model = models.VAMP(adata, split=some, n_pseudo_inputs=5, **SMALL).train(
        max_epochs=1, progress=False
    )
    assert "40 training, 6 validation and 4 test cells" in repr(model) and model.history[
        "cells_seen"
    ].tolist() == [40]
    model.save(tmp_path / "m")
    again = models.load(tmp_path / "m", adata)
    assert again.split == model.split and again.split.test.tolist() == sorted(ORDER[46:50])
    np.testing.assert_allclose(
        again.get_elbo(indices=again.split.test)["elbo"],
        model.get_elbo(indices=model.split.test)["elbo"],
    )


def test_masks_that_an_older_version_wrote_down_are_read(adata):
    written = {
        name: np.isin(np.arange(60), part).tolist()
        for name, part in zip(("train", "validation", "test"), PARTS)
    }
    assert Split.from_dict(written) == Split(*PARTS)


@pytest.mark.parametrize(
    "parts, words",
    [
        (
            (np.arange(59) < 40, np.arange(59) == 50, np.arange(59) == 51),
            "masks of a split have 59 entries for 60 cells",
        ),
        ((np.arange(60) < 40, np.arange(59) == 50, []), "entry for each cell, and have 60 and 59"),
        (([0, 1, 2, 2], [3], [4]), "more than once"),
        (([0, 1, -60], [3], [4]), "more than once"),
        (([0, 1, 60], [3], [4]), "out of range"),
        (([0.0, 1.0], [3], [4]), "train cells of a split must be positions"),
        ((["c0", "c1"], [3], [4]), "get_indexer"),
        (({0, 1}, [3], [4]), "not a set"),
    ],
)
def test_splits_that_are_none_are_refused_by_the_model(adata, parts, words):
    with pytest.raises(CountsError, match=words):
        models.VAE(adata, split=Split(*parts), **SMALL)


def test_a_mask_with_missing_entries_says_so(model):
    with pytest.raises(CountsError, match="30 of 60 entries of the mask.*fillna"):
        model.get_latent_representation(indices=pd.Series([True, None] * 30, dtype="boolean"))
    whole = pd.Series([True, False] * 30, dtype="boolean")
    assert model.get_latent_representation(indices=whole).shape == (30, 3)


def test_batches_that_were_changed_since_are_said(folder, adata):
    moved = adata[::-1].copy()
    again = models.load(folder, moved)
    # beside the cells that have them
    assert np.array_equal(again.library, again.X.totals[again.split.train])
    assert np.array_equal(again.library_batch, again.X.batch[0][again.split.train])
    moved.obs["donor"] = "d0"
    with pytest.warns(UserWarning, match=r"\d+ of 48 training cells are of another donor"):
        models.load(folder, moved)


OF_TWO_CELLS = np.array([[0, 2, 0], [1, 0, 3]], "float32")


def test_marks_know_cells_by_name_and_total(tmp_path):
    X = counts.Counts(sparse.csr_matrix(OF_TWO_CELLS))
    X.names = pd.Index(["a", "b"])
    X.totals = np.array([2.0, 4.0])
    marks = saving.CellMarks.of(X)
    (tmp_path / "cells.npz").write_bytes(marks.to_bytes())
    marks = saving.CellMarks.load(tmp_path / "cells.npz")
    assert marks.places_in(X).tolist() == [0, 1]

    X.names = pd.Index(["b", "a"])
    X.totals = np.array([4.0, 2.0])
    assert marks.places_in(X).tolist() == [1, 0]
    X.totals = np.array([4.0, 3.0])
    with pytest.raises(
        ValueError, match="1 of the model's 2 cells have other counts .*first: a, 2 then and 3 now"
    ):
        marks.places_in(X)


def test_a_model_is_saved_with_the_marks_of_its_cells(tmp_path):
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(3, (20, 6)).astype("float32") + 1)
    model = models.AE(adata, gene_space=None, hidden=(4,), n_latent=2)
    assert isinstance(model, saving.Persistence)
    model.save(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == set(saving.FILES)
