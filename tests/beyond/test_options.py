"""An option has one name and one default, on the command line, in notebooks and in the pipeline."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

from vampsc import beyond, cli

ROOT = Path(__file__).parents[2]
# A command names one data set, the pipeline all of the paper's; each has a folder of its own to
# write into, and seeds as many as it needs. A question keeps its own profile unless one is given.
OF_ITS_OWN = {"data", "source", "organs", "out", "seed", "seeds"}
OF_A_QUESTION = {"profile"}


def of_command(function):
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    return {name: getattr(p.default, "default", p.default) for name, p in parameters.items()}


def of_notebook(name):
    cells = json.loads((ROOT / "nbs" / "analysis" / f"{name}.ipynb").read_text())["cells"]
    found = {}
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), {}, found)
    return found


def of_pipeline():
    text = (ROOT / "workflow" / "Snakefile").read_text()
    known = re.search(r"KNOWN = (dict\(.*?\))\nQUESTIONS", text, re.S)[1]
    return {k.arg: ast.literal_eval(k.value) for k in ast.parse(known).body[0].value.keywords}


PLACES = {
    "vampsc fit": of_command(cli.fit),
    "vampsc report": of_command(cli.report),
    "vampsc beyond": of_command(cli.beyond),
    "organ.ipynb": of_notebook("organ"),
    "Snakefile": of_pipeline(),
}


def places_with(name):
    return {place: options[name] for place, options in PLACES.items() if name in options}


NAMES = sorted({name for options in PLACES.values() for name in options} - OF_ITS_OWN)


@pytest.mark.parametrize("name", [name for name in NAMES if len(places_with(name)) > 1])
def test_an_option_has_the_same_default_everywhere(name):
    defaults = places_with(name)
    if name in OF_A_QUESTION:
        del defaults["vampsc beyond"]
    assert len(set(map(repr, defaults.values()))) == 1, defaults


def test_what_the_pipeline_hands_on_is_an_option_of_the_command():
    text = (ROOT / "workflow" / "Snakefile").read_text()
    handed_on = set(re.findall(r'"(\w+)"', re.search(r"options\((\"profile\".*?)\)", text)[1]))
    assert len(handed_on) > 5 and handed_on <= set(PLACES["vampsc fit"])
    assert handed_on <= set(PLACES["Snakefile"])


def test_what_a_report_takes_is_a_parameter_of_its_notebook():
    of_the_command = {"as_json", "overwrite", "backed", "no_umap", "drop_empty", "jobs"}
    options = set(PLACES["vampsc report"]) - OF_ITS_OWN - of_the_command
    assert len(options) > 8
    assert options - set(PLACES["organ.ipynb"]) == set()


@pytest.mark.parametrize("question", beyond.QUESTIONS)
def test_what_all_questions_take_is_a_parameter_of_each_notebook(question):
    parameters = of_notebook(question)
    assert {"organs", "seeds", "label_key", "n_genes", "jobs", "out"} <= set(parameters)
    assert parameters["out"] == "runs/beyond" and parameters["label_key"] == "auto"


def test_all_questions_are_in_the_help():
    shown = inspect.signature(inspect.unwrap(cli.beyond)).parameters["question"].default.help
    assert set(re.findall(r"\w+", shown)) - {"or"} == set(beyond.QUESTIONS)
