"""The tools that check notebooks and build the site."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_site  # noqa: E402
import check_notebooks  # noqa: E402
import reference  # noqa: E402
import run_notebooks  # noqa: E402


def cell(source, text="", id="a"):
    outputs = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
    return {"cell_type": "code", "id": id, "source": source, "outputs": outputs}


def differences(source, before, after):
    return list(
        run_notebooks.differences(
            {"cells": [cell(source, before)]}, {"cells": [cell(source, after)]}
        )
    )


@pytest.mark.parametrize(
    "before, after, same",
    [
        ("ELBO -2163.5 nats", "ELBO -2170.0 nats", True),
        ("ELBO -2163.5 nats", "ELBO -2263.5 nats", False),
        ("ELBO 5", "bound 5", False),
        ("12,345 cells", "12,346 cells", True),
        ("KL 0.00", "KL 0.01", True),
        ("KL 0.00", "KL 0.10", False),
        ("1e-06", "1.01e-06", True),
        ("1e-06", "2e-06", False),
        ("18 clusters", "19 clusters", True),
        ("18 clusters", "21 clusters", False),
        ("one", "", False),
    ],
)
def test_outputs_are_compared_by_their_numbers(before, after, same):
    assert (not differences("print(x)", before, after)) == same


def test_a_cell_says_how_far_its_numbers_may_go():
    assert differences("print(x)", "10.0", "12.0") and not differences(
        "#| tolerance: 0.2\nprint(x)", "10.0", "12.0"
    )
    assert not differences("#| volatile: true\nprint(x)", "10 s", "an hour")


def notebook(path, *sources):
    import nbformat

    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_an_error_stops_a_notebook_and_no_other(tmp_path):
    bad = notebook(tmp_path / "bad.ipynb", "1 / 0")
    good = notebook(
        tmp_path / "good.ipynb", "import os", "n = sum(range(10**7))\nprint(os.getcwd())"
    )
    found = {result.name: result for result in run_notebooks.run([bad, good], jobs=2)}
    assert "ZeroDivisionError" in found["bad.ipynb"].error and not found["bad.ipynb"].wrong
    assert not found["good.ipynb"].error and str(tmp_path) in found["good.ipynb"].wrong[0]
    assert found["good.ipynb"].seconds > 0 and set(found["good.ipynb"].cells) == {
        "cell-0",
        "cell-1",
    }


def test_notebooks_share_nothing_but_what_is_imported(tmp_path):
    first = notebook(
        tmp_path / "first.ipynb", "import json, os\njson.mark = 1\nos.environ['A_MARK'] = '1'"
    )
    second = notebook(
        tmp_path / "second.ipynb",
        "import json, os\nassert not hasattr(json, 'mark') and 'A_MARK' not in os.environ",
    )
    assert not any(result.error for result in run_notebooks.run([first, second], jobs=1))


def test_a_notebook_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "LIMIT", 0)
    (result,) = run_notebooks.run(
        [notebook(tmp_path / "slow.ipynb", "import time", "time.sleep(60)")]
    )
    assert "took over 0 s" in result.error


def test_processes_are_copied_only_where_no_other_thread_runs():
    import threading

    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    assert run_notebooks.how_to_start().get_start_method() == "spawn"
    stop.set()
    other.join()


def test_what_ran_in_the_same_state_is_told_again_without_running(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "load_libraries", lambda notebooks: None)
    ran = tmp_path / "ran"
    path = tmp_path / "a.ipynb"
    record = tmp_path / "record.json"

    def results(source, **how):
        notebook(path, f"open({str(ran)!r}, 'a').write('x')", source)
        (found,) = run_notebooks.results([path], 1, path=record, **how)
        return found, len(ran.read_text())

    first, times = results("print('said')")
    assert not first.recorded and times == 1 and "now says 'said'" in first.wrong[-1]
    again, times = results("print('said')")
    assert (
        again.recorded
        and times == 1
        and again.wrong == first.wrong
        and again.seconds == first.seconds
    )
    assert results("print('said')", again=True)[1] == 2
    changed, times = results("print('otherwise')")
    assert not changed.recorded and times == 3
    assert results("1 / 0")[0].error and results("1 / 0")[0].error, "an error is not recorded"
    monkeypatch.setattr(run_notebooks, "READ", ())
    assert not results("print('otherwise')")[0].recorded, "the package is another"


def test_what_decides_outputs_is_the_package_and_not_what_tools_leave():
    names = {file.relative_to(ROOT).as_posix() for file in run_notebooks.sources()}
    assert {
        "vampsc/models.py",
        "nbs/analysis/organ.ipynb",
        "tools/run_notebooks.py",
        "settings.ini",
        "benchmarks/speed.csv",
    } <= names
    assert not any("__pycache__" in name or "/." in name for name in names)


def test_a_record_that_cannot_be_kept_stops_nothing(tmp_path):
    run_notebooks.write_record({"a": 1}, tmp_path / "nowhere" / "record.json")
    assert run_notebooks.read_record(tmp_path / "nowhere" / "record.json") == {}
    (tmp_path / "damaged.json").write_text("{")
    assert run_notebooks.read_record(tmp_path / "damaged.json") == {}


def test_a_processor_is_known_by_what_it_has_for_vectors(tmp_path):
    info = tmp_path / "cpuinfo"
    kinds = set()
    for flags in ("fpu avx2 avx512f fma", "fma avx512f avx2 sse", "fpu avx2 fma", ""):
        info.write_text(f"model name : x\nflags\t\t: {flags}\nbogomips : 1\n")
        kinds.add(run_notebooks.processor(info))
    assert len(kinds) == 3 and all(kind.split()[0] for kind in kinds)
    assert run_notebooks.processor(tmp_path / "none")


@pytest.mark.parametrize("kind, code", [("this", 1), ("another", None)])
def test_other_outputs_fail_where_they_were_made_on_such_a_processor(
    tmp_path, monkeypatch, capsys, kind, code
):
    wrong = run_notebooks.Result("a.ipynb", wrong=["cell x: said 1, now says 2"])
    kinds = tmp_path / "processors.json"
    monkeypatch.setattr(run_notebooks, "results", lambda *_: [wrong])
    monkeypatch.setattr(run_notebooks, "PROCESSORS", kinds)
    run_notebooks.write_seen_here(["a.ipynb"], [])
    if kind == "another":
        kinds.write_text(json.dumps({"a.ipynb": ["abacus"]}))
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "00", "--strict"])
    if code:
        with pytest.raises(SystemExit) as stop:
            run_notebooks.main()
        assert stop.value.code == code
    else:
        run_notebooks.main()
    out = capsys.readouterr().out
    assert "not what is kept: a.ipynb" in out
    assert ("made on another kind of processor: a.ipynb" in out) == (kind == "another")


def test_outputs_may_have_been_seen_on_several_kinds_of_processor(tmp_path, monkeypatch):
    kinds = tmp_path / "processors.json"
    here = run_notebooks.processor()
    monkeypatch.setattr(run_notebooks, "PROCESSORS", kinds)
    assert run_notebooks.seen_on() == {}
    kinds.write_text(json.dumps({"a.ipynb": ["abacus"], "b.ipynb": ["abacus"]}))
    run_notebooks.write_seen_here(same=["a.ipynb"], new=["b.ipynb"])
    assert run_notebooks.seen_on() == {"a.ipynb": sorted(["abacus", here]), "b.ipynb": [here]}


def test_the_longest_begin_first_and_those_of_which_nothing_is_known_before(tmp_path):
    short, long, new = (
        notebook(tmp_path / f"{name}.ipynb", "1") for name in ("short", "long", "new")
    )
    known = {"short.ipynb": {"seconds": 1.0}, "long.ipynb": {"seconds": 9.0}}
    assert run_notebooks.longest_first([short, long, new], known) == [new, long, short]


def test_a_page_without_code_has_nothing_to_run(tmp_path):
    import nbformat

    page = tmp_path / "page.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Words", id="words")]), page
    )
    assert not run_notebooks.has_code(page) and run_notebooks.has_code(
        notebook(tmp_path / "a.ipynb", "1")
    )


def found(*cells):
    return list(check_notebooks.unfit_outputs("n", {"cells": list(cells)}))


def test_figures_need_a_text():
    figure = {
        "cell_type": "code",
        "id": "f",
        "outputs": [{"output_type": "display_data", "data": {"image/png": "aGk="}}],
    }
    assert "without a text" in found({**figure, "source": "plot()"})[0]
    assert not found(
        {
            **figure,
            "source": (
                '#| fig-alt: "Two lines that cross at the epoch where training stopped."\nplot()'
            ),
        }
    )
    assert (
        "without a text" in found({"cell_type": "markdown", "id": "m", "source": "![](a.png)"})[0]
    )
    assert not found({"cell_type": "markdown", "id": "m", "source": "![a line](a.png)"})


def test_outputs_that_do_not_belong_on_the_site():
    assert "a path of one machine" in found(cell("show()", "/home/" + "me/x.h5ad"))[0]
    assert "prints, but has no output" in found(cell("print(1)"))[0]
    assert "imports and other code" in found(cell("def f():\n    import os\nf()"))[0]


def drawn(latex, kind="display"):
    left, right = ("\\[", "\\]") if kind == "display" else ("\\(", "\\)")
    return build_site.MATHS.sub(
        build_site.as_mathml, f'<span class="math {kind}">{left}{latex}{right}</span>'
    )


def test_formulas_become_mathml_with_their_number_beside_them():
    page = drawn(r"p(z) = \\frac1K\\sum_{k=1}^K q(z\\mid u_k) \\tag{2}".replace("\\\\", "\\"))
    assert (
        page.count("<math") == 1
        and "<mfrac>" in page
        and '<span class="equation-number">(2)</span>' in page
        and "tag" not in page.split(">", 2)[2]
    )
    assert "<mtable" in drawn(
        r"\begin{aligned} a &amp;= b \\\\ &amp;= c \end{aligned}".replace("\\\\", "\\\\")
    )
    assert '<mspace width="0.17em"/>' in drawn(r"\log q", "inline") and "<mspace" not in drawn(
        r"\log(q)", "inline"
    )


def test_a_formula_that_cannot_be_drawn_stops_the_build():
    with pytest.raises(SystemExit, match="nosuchcommand"):
        drawn(r"\nosuchcommand{a}")


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
    assert (
        text.startswith(r"One line with `code` and \*stars\*.")
        and "- `a`: (cells, genes) counts, in two lines." in text
    )
    assert (
        "**Parameters**" in text
        and "- `b, c`: others." in text
        and "- `ValueError`: sometimes." in text
    )


def several(a, b=2, *more, c=None):
    """One line. And a second. b : too.

    a : counts, as at : 3 o'clock. b, c : others;
    *more : the rest. Returns a number. ValueError : sometimes.

    Parameters
    ----------
    a : counts. c : another one, which is
        explained. d : no parameter.

    Returns
    -------
    A number that takes
    two lines.
    """


def test_each_parameter_is_an_item():
    assert reference.docstring(several).splitlines() == [
        "One line. And a second.",
        "",
        "- `b`: too.",
        "",
        "- `a`: counts, as at : 3 o'clock.",
        "- `b, c`: others",
        "- `*more`: the rest.",
        "- Returns a number.",
        "- `ValueError`: sometimes.",
        "",
        "**Parameters**",
        "",
        "- `a`: counts.",
        "- `c`: another one, which is explained. d : no parameter.",
        "",
        "**Returns**",
        "",
        "- A number that takes two lines.",
    ]


def test_bases_of_a_model_are_named_by_what_they_do():
    from vampsc import models

    lines = [line for line in reference.page(models, "models").splitlines() if "](#" in line]
    assert any(line.startswith("- The KL term, unit by unit: [get_kl_per_unit]") for line in lines)
    assert not any("a base of" in line for line in lines)


def test_signatures_and_links():
    assert reference.signature(sample, "sample") == "sample(a, b=2, *, c=None)"
    from vampsc import counts, metrics, models

    assert reference.signature(counts.CountsError, "CountsError") == "class CountsError(ValueError)"
    # all arguments, a line for each where they are many
    vamp = reference.signature(models.VAMP, "VAMP")
    assert (
        vamp.startswith("VAMP(\n    adata,\n    *,\n")
        and "    n_pseudo_inputs=500,\n" in vamp
        and "settings" not in vamp
    )
    assert "/vampsc/metrics.py#L" in reference.source_link(metrics.silhouette)
    assert {"silhouette", "activity"} <= {s.__name__ for s in reference.public(metrics)}
    assert "get_elbo" in dict(
        v for base, verbs in reference.inherited(models.CountAutoencoder) for v in verbs
    )


def test_the_page_of_a_module_documents_all_that_it_exports():
    from vampsc import groups, priors

    page = reference.page(priors, "priors")
    for module in (priors, groups):
        _, head, _ = reference.page(module, "chapter").split("---\n", 2)
        assert yaml.safe_load(head)["description"] == module.__doc__.splitlines()[0].strip()
    assert (
        all(f"## {s.__name__}\n" in page for s in reference.public(priors))
        and "### Mixture.log_prob\n" in page
    )


def test_every_chapter_with_a_module_has_a_page():
    exported = build_site.modules()
    assert (
        exported["command_line"] == "cli"
        and exported["a4_speed"] == "kernels"
        and len(exported) == 29
    )
    assert np.all([(ROOT / "vampsc" / f"{m}.py").exists() for m in exported.values()])


def test_tests_that_would_begin_too_late_are_skipped_and_counted(tmp_path):
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]

    def summary(until):
        return subprocess.run(
            [*command, "-p", "conftest", "--rootdir", tmp_path, tmp_path],
            env={**os.environ, "TESTS_UNTIL": until, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
        ).stdout

    assert "1 passed" in summary("inf")
    late = summary("0")
    assert "1 skipped" in late and "it would have begun after the moment in TESTS_UNTIL" in late
