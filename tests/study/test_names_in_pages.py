"""What files, labels, genes and columns are called is shown in pages as it is: no name becomes an
element, a link, a script, emphasis or a formula.
"""

from html.parser import HTMLParser

import anndata as ad
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import sparse

from vampsc import beyond, figures, study, tables

NAMES = [
    "<b>x</b>",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b",
    "$x$",
    "[a](javascript:alert(1))",
    "| a |",
    "*a*",
    "'q' \"q\"",
    "_u_ \\(y\\)",
]
WITHOUT_END = {"img", "br", "meta", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page, and its texts with the elements around each; the page's own scripts
    and styles are no texts.
    """

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.texts = []
        self.around = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in WITHOUT_END:
            self.around.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.around and self.around.pop()[0] != tag:
            pass

    def handle_data(self, text):
        tags = [tag for tag, _ in self.around]
        if "script" in tags or "style" in tags:
            assert "alert(1)" not in text
        else:
            self.texts.append((text, [*self.around]))


def check(html, names=NAMES, formulas=True):
    """All names are there as they are, and none does anything.

    formulas : the page looks for formulas, other than in what is marked.
    """
    page = Page(html)
    for tag, attributes in page.elements:
        acting = {
            key: value
            for key, value in attributes.items()
            if key != "alt" and (key.startswith("on") or "alert" in (value or ""))
        }
        assert not acting, (tag, acting)
    shown = " ".join(text for text, _ in page.texts)
    assert [name for name in names if name not in shown] == []
    for text, around in page.texts:
        if not formulas or not ("$" in text or "\\(" in text):
            continue
        assert any(
            tag in ("pre", "code") or "tex2jax_ignore" in attributes.get("class", "")
            for tag, attributes in around
        ), text
    return page


def page_of(tmp_path, *outputs):
    "The page of a notebook that shows these, each a dict from mime type to text."
    cell = nbformat.v4.new_code_cell(
        "", outputs=[nbformat.v4.new_output("display_data", data) for data in outputs]
    )
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A"), cell]),
        tmp_path / "a.ipynb",
    )
    return study.to_html(tmp_path / "a.ipynb").read_text()


def test_a_table(tmp_path):
    "In the rows, in the heads of rows and of columns, and in what is below."
    frame = pd.DataFrame({name: NAMES for name in NAMES}, index=NAMES)
    n = len(NAMES)
    text = tables.show_words(frame, caption=" ".join(NAMES), index=True)
    page = check(page_of(tmp_path, {"text/html": text}))
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("th"), tags.count("td"), tags.count("b"), tags.count("em")) == (
        1 + 2 * n,
        n * n,
        0,
        0,
    )


def test_a_table_without_heads_of_rows():
    assert "pancreas" not in tables.show_words(pd.DataFrame({"a": [1]}, index=["pancreas"]))


@pytest.mark.parametrize("around", ["{}", "**{}**", "- **Question:** on {}?", "*{}*"])
def test_a_sentence(around, tmp_path):
    names = [
        *NAMES,
        "__init__",
        "1. a",
        "- a",
        "> a",
        "# a",
        "`a`",
        "~~a~~",
        "<http://a.b>",
        "http://a.b",
        "a@b.de",
        "&lt;",
        "\\*a\\*",
        "$$x$$",
        "x^2",
    ]
    expected = [
        tag
        for tag, _ in Page(
            page_of(tmp_path, *[{"text/markdown": around.format("name")}] * len(names))
        ).elements
    ]
    (tmp_path / "a.html").unlink()
    page = check(
        page_of(
            tmp_path,
            *({"text/markdown": around.format(tables.in_markdown(name))} for name in names),
        ),
        names,
    )
    assert [
        tag for tag, a in page.elements if "tex2jax_ignore" not in a.get("class", "")
    ] == expected


def test_a_name_on_two_lines():
    assert tables.in_markdown("a\n\n# b") == f'<span class="{tables.AS_IT_IS}">a &#35; b</span>'


def test_plain_names_stay_as_they_are():
    for name in ("pancreas", "blood-facs", "Ductal cells (type 2)", "Zellen, ältere: 5 %"):
        assert tables.in_markdown(name) == name


# ---- figures


def pixels(text, **how):
    figure = Figure(figsize=(4, 0.6), dpi=60)
    figure.text(0.02, 0.4, text, **how)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize(
    "name",
    [
        "a$b$c_",
        "$x$",
        "$",
        "a$b",
        r"\alpha",
        r"a\$b",
        r"$\frac{1}{0$",
        "_u_ ^2 {y} %",
        "a & b",
        "<b>x</b>",
    ],
)
def test_a_label_is_drawn_as_it_is(name):
    assert (pixels(figures.label_text(name)) == pixels(name, parse_math=False)).all()
    # or this test could not fail
    if name == "a$b$c_":
        assert (pixels(name) != pixels(name, parse_math=False)).any()


# ---- whole pages

COLUMN = "<b>type"
BATCH = "<img src=x onerror=alert(1)>"


def write(path):
    """100 cells of ten types, whose genes, types, columns, batches and cells are called by these
    names.
    """
    kind = np.arange(100) % len(NAMES)
    rate = np.ones((10, 30))
    rate[np.arange(10), np.arange(10)] = 8
    counts = np.random.default_rng(0).poisson(rate[kind]) + 1
    genes = [f"{name} {j}" for j in range(3) for name in NAMES]
    obs = pd.DataFrame(
        {COLUMN: [NAMES[k] for k in kind], BATCH: [NAMES[k % 3] for k in kind]},
        index=[f"<b>c{i}</b>" for i in range(100)],
    )
    adata = ad.AnnData(
        sparse.csr_matrix(counts.astype("float32")),
        obs,
        pd.DataFrame({"symbol": genes}, index=genes),
    )
    adata.layers["<b>raw"] = adata.X.copy()
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def data(folder):
    return write(folder / "_<b>my$x$*a*_.h5ad")


@pytest.mark.slow
@pytest.mark.parametrize(
    "question, given",
    [
        ("linear_decoder", dict(n_pseudo_inputs=10)),
        ("pseudo_inputs", dict(sizes="5", n_pseudo_inputs=10)),
        ("kl_weight", dict(weights="1,1e-2", warmup="0.5", n_pseudo_inputs=10)),
    ],
)
def test_the_page_of_a_question(question, given, data, folder, notebooks_here):
    markers = folder / "markers.csv"
    pd.DataFrame(
        {"cell_type": NAMES * 2, "gene": [f"{name} {j}" for j in range(2) for name in NAMES]}
    ).to_csv(markers, index=False)
    if question == "linear_decoder":
        given = {**given, "markers": str(markers)}
    shape = dict(seeds="0", max_epochs=2, hidden="8", n_latent=3, jobs=1)
    page = beyond.make(
        question, folder / "beyond", organs=str(data), label_key=COLUMN, **{**shape, **given}
    )
    # types of which too few cells are left to learn from are not shown
    few = NAMES if question != "kl_weight" else NAMES[:5]
    check(page.read_text(), [*few, "_-b-my-x-a-_"])


@pytest.mark.slow
def test_the_pages_of_reports_and_tables(data, folder, notebooks_here):
    study_folder = folder / "<b>study"
    organ = study_folder / "<img src=x onerror=alert(1)> $x$ *a*"
    page = study.report(
        organ,
        data=str(data),
        label_key=COLUMN,
        batch_key=BATCH,
        layer="<b>raw",
        models="vae",
        max_epochs=1,
    )
    check(page.read_text(), [*NAMES, organ.name, "_<b>my$x$*a*_"])
    check(study.run_page(organ).read_text(), [COLUMN, BATCH], formulas=False)
    check(tables.make(study_folder).read_text(), [organ.name])
