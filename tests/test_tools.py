"""The tools that check notebooks and build the site."""
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import build_site                                        # noqa: E402
import check_notebooks                                   # noqa: E402
import reference                                         # noqa: E402
import run_notebooks                                     # noqa: E402


def cell(source, text="", id="a"):
    outputs = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
    return {"cell_type": "code", "id": id, "source": source, "outputs": outputs}


def differences(source, before, after):
    return list(run_notebooks.differences({"cells": [cell(source, before)]}, {"cells": [cell(source, after)]}))


@pytest.mark.parametrize("before, after, same", [
    ("ELBO -2163.5 nats", "ELBO -2170.0 nats", True), ("ELBO -2163.5 nats", "ELBO -2263.5 nats", False), ("ELBO 5", "bound 5", False),
    ("12,345 cells", "12,346 cells", True), ("KL 0.00", "KL 0.01", True), ("KL 0.00", "KL 0.10", False), ("1e-06", "1.01e-06", True),
    ("1e-06", "2e-06", False), ("18 clusters", "19 clusters", True), ("18 clusters", "21 clusters", False), ("one", "", False)])
def test_outputs_are_compared_by_their_numbers(before, after, same): assert (not differences("print(x)", before, after)) == same


def test_a_cell_says_how_far_its_numbers_may_go():
    assert differences("print(x)", "10.0", "12.0") and not differences("#| tolerance: 0.2\nprint(x)", "10.0", "12.0")
    assert not differences("#| volatile: true\nprint(x)", "10 s", "an hour")


def test_an_error_stops_a_notebook(tmp_path):
    import nbformat
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0", id="bad")]), tmp_path / "bad.ipynb")
    name, _, wrong, error = run_notebooks.run(tmp_path / "bad.ipynb", update=False)
    assert name == "bad.ipynb" and not wrong and "ZeroDivisionError" in error


def found(*cells): return list(check_notebooks.unfit_outputs("n", {"cells": list(cells)}))


def test_figures_need_a_text():
    figure = {"cell_type": "code", "id": "f", "outputs": [{"output_type": "display_data", "data": {"image/png": "aGk="}}]}
    assert "without a text" in found({**figure, "source": "plot()"})[0]
    assert not found({**figure, "source": '#| fig-alt: "Two lines that cross at the epoch where training stopped."\nplot()'})
    assert "without a text" in found({"cell_type": "markdown", "id": "m", "source": "![](a.png)"})[0]
    assert not found({"cell_type": "markdown", "id": "m", "source": "![a line](a.png)"})


def test_outputs_that_do_not_belong_on_the_site():
    assert "a path of one machine" in found(cell("show()", "/home/" + "me/x.h5ad"))[0]
    assert "prints, but has no output" in found(cell("print(1)"))[0]
    assert "imports and other code" in found(cell("def f():\n    import os\nf()"))[0]


def drawn(latex, kind="display"):
    left, right = ("\\[", "\\]") if kind == "display" else ("\\(", "\\)")
    return build_site.MATHS.sub(build_site.as_mathml, f'<span class="math {kind}">{left}{latex}{right}</span>')


def test_formulas_become_mathml_with_their_number_beside_them():
    page = drawn(r"p(z) = \\frac1K\\sum_{k=1}^K q(z\\mid u_k) \\tag{2}".replace("\\\\", "\\"))
    assert page.count("<math") == 1 and "<mfrac>" in page and '<span class="equation-number">(2)</span>' in page and "tag" not in page.split(">", 2)[2]
    assert "<mtable" in drawn(r"\begin{aligned} a &amp;= b \\\\ &amp;= c \end{aligned}".replace("\\\\", "\\\\"))
    assert '<mspace width="0.17em"/>' in drawn(r"\log q", "inline") and "<mspace" not in drawn(r"\log(q)", "inline")


def test_a_formula_that_cannot_be_drawn_stops_the_build():
    with pytest.raises(SystemExit, match="nosuchcommand"): drawn(r"\nosuchcommand{a}")


def sample(a, b=2, *, c=None):
    """One line with `code` and *stars*.

    Parameters
    ----------
    a : (cells, genes) counts,
        in two lines.
    b, c : others.

    Raises
    ------
    ValueError : sometimes.
    """


def test_docstrings_become_lists():
    text = reference.docstring(sample)
    assert text.startswith(r"One line with `code` and \*stars\*.") and "- `a`: (cells, genes) counts, in two lines." in text
    assert "**Parameters**" in text and "- `b, c`: others." in text and "- `ValueError`: sometimes." in text


def test_signatures_and_links():
    assert reference.signature(sample, "sample") == "sample(a, b=2, *, c=None)"
    from vampsc import counts, metrics, models
    assert reference.signature(counts.CountsError, "CountsError") == "class CountsError(ValueError)"
    assert reference.signature(models.VAMP, "VAMP") == "VAMP(adata, **settings)"
    assert "/vampsc/metrics.py#L" in reference.source_link(metrics.silhouette)
    assert {"silhouette", "activity"} <= {s.__name__ for s in reference.public(metrics)}
    assert "get_elbo" in dict(v for base, verbs in reference.inherited(models.CountAutoencoder) for v in verbs)


def test_the_page_of_a_module_documents_all_that_it_exports():
    from vampsc import priors
    page = reference.page(priors, "priors")
    assert all(f"## {s.__name__}\n" in page for s in reference.public(priors)) and "### VampPrior.log_prob\n" in page


def test_every_chapter_with_a_module_has_a_page():
    exported = build_site.modules()
    assert exported["command_line"] == "cli" and exported["speed"] == "kernels" and len(exported) == 21
    assert np.all([(ROOT / "vampsc" / f"{m}.py").exists() for m in exported.values()])
