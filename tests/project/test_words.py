"""README, landing page, help texts and error messages use the field's terms, not words that only
this project uses for them.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import typer

from vampsc import cli

ROOT = Path(__file__).parents[2]

# Instead of: conditioned on; requested; recorded, stored; the number of; is reused.
HOME_MADE = re.compile(
    r"\b(told|asked|asks them|said|so many|that many times|a run that is there|anybody's"
    r" question|nobody's question)\b",
    re.I,
)


def messages(path):
    "The texts of errors and warnings of a module, with their lines."
    for node in ast.walk(ast.parse(path.read_text())):
        is_warning = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn"
        if not isinstance(node, ast.Raise) and not is_warning:
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.lineno, part.value


@pytest.mark.parametrize("path", sorted((ROOT / "vampsc").glob("*.py")), ids=lambda path: path.stem)
def test_errors(path):
    assert [(line, text) for line, text in messages(path) if HOME_MADE.search(text)] == []


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "nbs/index.ipynb", "nbs/glossary.ipynb"]
)
def test_first_pages(name):
    text = (ROOT / name).read_text()
    if name.endswith(".ipynb"):
        text = "\n".join(
            "".join(cell["source"])
            for cell in json.loads(text)["cells"]
            if cell["cell_type"] == "markdown"
        )
    else:
        text = re.sub(r"```python.*?```", "", text, flags=re.S)
    assert [line for line in text.splitlines() if HOME_MADE.search(line)] == []


def test_help():
    def texts(command):
        yield command.help or ""
        for parameter in command.params:
            yield getattr(parameter, "help", None) or ""
        for inner in getattr(command, "commands", {}).values():
            yield from texts(inner)

    found = list(texts(typer.main.get_command(cli.app)))
    assert len(found) > 80
    assert [text for text in found if HOME_MADE.search(text)] == []


def test_the_list_finds_them():
    assert HOME_MADE.search("batches that the decoder is told") and not HOME_MADE.search(
        "the decoder is conditioned on the batch"
    )
