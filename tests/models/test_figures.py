"""Figures: what is in them, and that nothing is cut off."""

import importlib.util
import subprocess
import sys

import anndata as ad
import matplotlib
import matplotlib.figure
import numba
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vampsc import figures

RNG = np.random.default_rng(0)


def cells(n=60, units=6):
    return RNG.normal(size=(n, units)).astype("float32")


class Drawn(FigureCanvasAgg):
    "A canvas that was drawn on; once is enough."


def drawn(figure):
    "The figure drawn as it would be saved, and what measures its parts."
    if not isinstance(figure.canvas, Drawn):
        Drawn(figure).draw()
    return figure.canvas.get_renderer()


def inside(figure):
    "Every text and the legend lie on the canvas."
    renderer = drawn(figure)
    canvas = figure.bbox
    texts = [t for a in figure.axes for t in (a.title, a.xaxis.label, a.yaxis.label)] + [
        t for g in figure.legends for t in g.get_texts()
    ]
    boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()] + [
        g.get_window_extent(renderer) for g in figure.legends
    ]
    return all(
        b.x0 >= -1 and b.y0 >= -1 and b.x1 <= canvas.x1 + 1 and b.y1 <= canvas.y1 + 1 for b in boxes
    )


def apart(figure):
    "The legend covers no panel."
    renderer = drawn(figure)
    right = max(a.get_window_extent(renderer).x1 for a in figure.axes)
    return all(g.get_window_extent(renderer).x0 >= right - 1 for g in figure.legends)


def grid(n_models, labels):
    names = [f"model {i}" for i in range(n_models)]
    n = len(labels) if labels is not None else 60
    return figures.umap_grid(
        {k: cells(n) for k in names}, labels, coordinates={k: cells(n, 2) for k in names}
    )


@pytest.mark.parametrize("n_models", [1, 2, 4, 6])
@pytest.mark.parametrize("n_types", [2, 14, 40])
def test_umap_grid_legend_is_whole_and_beside_the_panels(n_models, n_types):
    labels = [f"a cell type with a long name {i % n_types}" for i in range(120)]
    figure = grid(n_models, labels)
    assert isinstance(figure, Figure) and len([a for a in figure.axes if a.axison]) == n_models
    assert {t.get_text() for t in figure.legends[0].get_texts()} == set(labels)
    assert inside(figure) and apart(figure)


def test_unlabelled_cells_are_grey_and_said():
    figure = grid(1, ["a", None, "b", np.nan] * 10)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["unlabelled", "a", "b"]
    assert sum(len(c.get_offsets()) for c in figure.axes[0].collections) == 40
    assert not grid(1, None).legends


def test_colours_differ_and_do_not_depend_on_the_order_of_cells():
    names = [f"type {i}" for i in range(100)]
    colours = figures.category_colours(names)
    assert len(set(colours.values())) == 100 and colours == figures.category_colours(names[::-1])


DECLARED = """import numba

@numba.njit("f8(f8)")
def double(x):
    return 2 * x

@numba.njit
def triple(x):
    return 3 * x
"""


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_of_declared_types_are_stored_when_they_are_compiled(tmp_path):
    (tmp_path / "declared.py").write_text(DECLARED)
    njit = numba.njit
    with figures._stored_when_compiled():
        module = imported(tmp_path / "declared.py")
    assert numba.njit is njit
    assert module.double(2.0) == 4 and module.triple(2.0) == 6
    stored = [path.name for path in (tmp_path / "__pycache__").glob("*.nbi")]
    assert len(stored) == 1 and stored[0].startswith("declared.double")


def test_without_a_folder_to_store_it_umap_is_compiled_all_the_same(tmp_path, monkeypatch):
    def no_place(self):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", no_place)
    (tmp_path / "declared.py").write_text(DECLARED)
    with figures._stored_when_compiled():
        module = imported(tmp_path / "declared.py")
    assert module.double(2.0) == 4 and not list(tmp_path.glob("__pycache__/*.nbi"))


def test_umap_is_imported_and_numba_is_as_before():
    njit = numba.njit
    figures.import_umap()
    module = sys.modules["umap"]
    figures.import_umap()
    assert sys.modules["umap"] is module and numba.njit is njit


COUNTED = """import numpy as np
from numba.core import event
from vampsc import figures

class Compiled(event.Listener):
    names = []

    def on_start(self, event):
        pass

    def on_end(self, event):
        function = event.data["dispatcher"].py_func
        self.names.append(f"{function.__module__}.{function.__name__}")

event.register("numba:compile", Compiled())
figures.umap_coordinates(np.random.default_rng(0).normal(size=(60, 4)))
print(*[name for name in Compiled.names if name.startswith(("umap", "pynndescent"))])
"""


@pytest.mark.slow
def test_the_second_process_does_not_compile_umap_again(tmp_path):
    compiled = [
        subprocess.run(
            [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    # the layout is compiled where it is called
    assert set(compiled[1]) <= {
        "umap.layouts._optimize_layout_euclidean_single_epoch",
        "umap.layouts.clip",
        "umap.layouts.rdist",
        "umap.utils.tau_rand_int",
    }


@pytest.mark.slow
def test_umap_is_decided_by_its_seed():
    z = np.concatenate([cells(40), cells(40) + 12])
    one = figures.umap_coordinates(z, seed=3)
    again = figures.umap_coordinates(z, seed=3)
    assert one.shape == (80, 2) and np.array_equal(one, again)
    gap = np.linalg.norm(one[:40].mean(0) - one[40:].mean(0))
    # two groups stay two groups
    assert gap > one[:40].std(0).max()


@pytest.mark.slow
def test_neighbours_of_so_many_cells_that_they_are_searched_approximately():
    "From 8,192 cells on scanpy leaves the search to pynndescent, and the two must fit together."
    many = ad.AnnData(np.concatenate([cells(4200, 3), cells(4200, 3) + 30]))
    sc.pp.neighbors(many, use_rep="X")
    between = many.obsp["connectivities"].tocsr()[:4200, 4200:].nnz
    assert many.obsp["connectivities"].nnz >= 14 * 8400 and between == 0


def test_covariance_has_its_own_scale_centred_on_zero():
    small = cells(200)
    large = 10 * cells(200)
    figure = figures.covariance_grid({"small": small, "large": large})
    images = [a.images[0] for a in figure.axes if a.images]
    for image, z in zip(images, (small, large)):
        expected = np.cov(z.T.astype("float64"))
        assert (
            np.allclose(image.get_array(), expected)
            and image.norm.vmax == -image.norm.vmin == np.abs(expected).max()
        )
    assert inside(figure)


def test_clustered_covariance_is_a_permutation():
    z = cells(300)
    z[:, 5] = z[:, 0] + 0.1 * z[:, 5]
    image = figures.covariance_grid({"m": z}, order="cluster").axes[0].images[0].get_array()
    assert np.allclose(np.sort(image.ravel()), np.sort(np.cov(z.T.astype("float64")).ravel()))
    off = np.abs(image - np.diag(np.diag(image)))
    # the pair that covaries is adjacent
    assert abs(np.subtract(*np.unravel_index(off.argmax(), off.shape))) == 1


def history(n, kl=1.0):
    loss = 1e5 * np.exp(-np.arange(n)) + 2000 - np.arange(n)
    return pd.DataFrame(
        {
            "loss": loss,
            "val_loss": loss + 5,
            "kl": kl * loss / 50,
            "val_kl": kl * loss / 60,
            "learning_rate": np.where(np.arange(n) < n // 2, 1e-3, 5e-4),
        },
        index=pd.RangeIndex(1, n + 1),
    )


def test_training_curves_show_what_matters():
    figure = figures.training_curves({"AE": history(40, kl=0.0), "VAE": history(40)})
    loss = figure.axes[1]
    low, high = loss.get_ylim()
    # not squeezed by the first epochs
    assert low < 1961 and 2010 < high < 1e4
    # training, validation, one halving
    assert len(loss.lines) == 3
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == [
        "training",
        "validation",
    ]
    assert inside(figure)


def test_a_rate_that_falls_in_every_epoch_is_not_marked():
    falling = history(40).assign(learning_rate=1e-3 * np.cos(np.linspace(0, 1.5, 40)))
    assert len(figures.training_curves({"VAE": falling}).axes[0].lines) == 2


@pytest.mark.parametrize("n", [1, 2, 5])
def test_short_histories_can_be_drawn(n):
    assert inside(figures.training_curves({"VAE": history(n)}))


def test_matplotlib_is_left_alone():
    before = dict(matplotlib.rcParams)
    (
        grid(2, ["a", "b"] * 30),
        figures.covariance_grid({"m": cells()}),
        figures.training_curves({"m": history(3)}),
    )
    import matplotlib.pyplot as plt

    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()


@pytest.mark.long
@pytest.mark.parametrize("n_models", [1, 4, 6])
def test_sixty_long_names_stay_readable(n_models):
    figure = grid(
        n_models,
        [
            f"CD{i % 60} positive alpha-beta memory T cell of the lamina propria, activated"
            for i in range(240)
        ],
    )
    assert len(figure.legends[0].get_texts()) == 60 and inside(figure) and apart(figure)
    assert figure.get_size_inches()[0] < 15


def test_names_are_printed_as_they_are():
    figure = grid(1, ["a$b$", "_c", "", "x" * 150] * 15)
    assert [t.get_text().replace("\n", "") for t in figure.legends[0].get_texts()] == [
        "unlabelled",
        "_c",
        r"a\$b\$",
        "x" * 150,
    ]
    assert inside(figure)
    long = "a model with a very long name indeed, seed 12, paper profile"
    assert inside(figures.umap_grid({long: cells()}, None, coordinates={long: cells(60, 2)}))


def test_categories_keep_a_natural_or_their_own_order():
    assert list(figures.category_colours(["T10", "T2", "B"])) == ["B", "T2", "T10"]
    assert list(
        figures.category_colours(pd.Categorical(["b", "a"], categories=["c", "b", "a"]))
    ) == ["b", "a"]


def test_what_is_refused():
    z = {"m": cells()}
    for draw in (figures.umap_grid, figures.covariance_grid, figures.training_curves):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw({})
    with pytest.raises(ValueError, match="60 cells but there are 3 labels"):
        figures.umap_grid(z, list("abc"), coordinates=z)
    with pytest.raises(ValueError, match="order"):
        figures.covariance_grid(z, order="clustr")


@pytest.mark.parametrize(
    "z", [cells(60, 1), np.zeros((60, 4)), np.c_[cells(60, 3), np.zeros((60, 2))]]
)
def test_single_and_dead_units_can_be_clustered(z):
    assert inside(figures.covariance_grid({"m": z}, order="cluster"))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[["loss"]],
        lambda h: h.iloc[:0],
        lambda h: h.assign(val_loss=np.nan),
        lambda h: h.assign(loss=np.inf),
        lambda h: h.drop(columns=["kl", "val_kl", "learning_rate"]),
    ],
)
def test_histories_with_gaps(change):
    assert inside(figures.training_curves({"m": change(history(20))}))


def test_a_late_rise_is_not_cut_off():
    late = history(50)
    late.loc[50, "val_loss"] = 5e4
    assert figures.training_curves({"m": late}).axes[0].get_ylim()[1] > 5e4


@pytest.mark.long
@pytest.mark.parametrize("n", range(1, 7))
def test_up_to_six_models_fit_a_page(n):
    names = [f"m{i}" for i in range(n)]
    for figure in (
        grid(n, ["alpha", "beta"] * 30),
        figures.covariance_grid({k: cells() for k in names}),
        figures.training_curves({k: history(20) for k in names}),
    ):
        assert figure.get_size_inches()[0] <= 9.01 and inside(figure)


def test_a_picture_is_a_png():
    figure, axes = figures.panels(5)
    assert isinstance(figure, figures.Picture) and axes.shape == (5,)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_labels_of_a_figure_are_in_the_order_of_their_numbers():
    found = figures.categorical(["B 10", "B 2", None, "nan", "B 2"])
    assert list(found.cat.categories) == ["B 2", "B 10"] and found.isna().sum() == 2


def test_cells_of_a_panel_are_drawn_once_each():
    axis = matplotlib.figure.Figure().subplots()
    labels = pd.Series(["a", "b", None])
    figures.scatter_cells(axis, np.zeros((3, 2)), figures.categorical(labels))
    assert sum(len(c.get_offsets()) for c in axis.collections) == 3
