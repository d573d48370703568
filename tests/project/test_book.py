"""The book keeps its promises: exercises with solutions, and for every exported function a
docstring, a use and a test.
"""

import ast
import functools
import importlib
import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import vampsc

ROOT = Path(__file__).parents[2]
# the numbered chapters, then the appendices a1, a2, ...: the foundations that any chapter may use
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9a][0-9]_*.ipynb"))
TESTS = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__))


@functools.cache
def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def exported(cell):
    return cell["cell_type"] == "code" and re.search(r"^#\|\s*exports?i?\b", source(cell), re.M)


def defined(cell):
    """Public functions and classes that an exported cell defines, as (name, the source of the
    definition).
    """
    text = source(cell)
    return [
        (n.name, ast.get_source_segment(text, n))
        for n in ast.parse(text).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    ]


def named(name, text):
    return re.search(rf"(?<!\w){name}(?!\w)", text)


def chapter(path):
    "(module, the names it exports, each with the rest of the chapter's code, and with its checks)."
    code = [source(c) for c in cells(path) if c["cell_type"] == "code"]
    module = re.search(r"default_exp (\w+)", "\n".join(code))[1]
    checks = "\n".join(t for t in code if "assert" in t and "#| export" not in t)
    for cell in filter(exported, cells(path)):
        for name, segment in defined(cell):
            yield module, name, "\n".join(code).replace(segment, ""), checks


def methods(path):
    "Of each class that a chapter exports, the public methods."
    for cell in filter(exported, cells(path)):
        for node in ast.parse(source(cell)).body:
            if isinstance(node, ast.ClassDef):
                yield from (
                    n.name for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"
                )


DEFINED = Counter(name for path in CHAPTERS for name in methods(path))


def is_tested(symbol, name, checks):
    """Is it named in a test or a check of its chapter?

    Of a class also a method that no other class has; of a command, its words.
    """
    if inspect.isclass(symbol) and any(f".{n}(" in TESTS for n in vars(symbol) if DEFINED[n] == 1):
        return True
    return any(
        named(n, text) for n in (name, name.replace("_", '", "')) for text in (TESTS, checks)
    )


# stands with its like, and is used by the next chapters
USED_LATER = {"check_places"}
# the verbs of a model, which its class puts together in a later chapter
USED_LATER |= {base.__name__ for base in vampsc.CountAutoencoder.__mro__}
# typer's callbacks: their docstring would become help text, and people call them as `vampsc` and
# `vampsc organs`
CALLBACKS = {"vampsc", "organs_callback", "main"}
COMMANDS = {
    "tables": "vampsc tables",
    "organs_list": "vampsc organs list",
    "organs_fetch": "vampsc organs fetch",
}


NAMES = [
    pytest.param(*found, id=f"{found[0]}.{found[1]}")
    for path in CHAPTERS
    for found in chapter(path)
    if not (found[0] == "cli" and found[1] in CALLBACKS)
]


@pytest.mark.parametrize("module, name, others, checks", NAMES)
def test_exported(module, name, others, checks):
    symbol = getattr(importlib.import_module(f"vampsc.{module}"), name)
    assert len((inspect.getdoc(symbol) or "").split()) >= 3, "no docstring"
    assert (
        symbol.__doc__ and symbol.__doc__ != getattr(symbol.__mro__[1], "__doc__", None)
        if inspect.isclass(symbol)
        else True
    )
    if module == "cli" and name in COMMANDS:
        assert COMMANDS[name] in "".join(map(source, cells(ROOT / "nbs" / "23_command_line.ipynb")))
    elif name not in USED_LATER:
        assert named(name, others), "no use in its chapter"
    assert is_tested(symbol, name, checks), "no test"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exercises_have_folded_solutions(path):
    texts = [source(c) for c in cells(path)]
    start = next((i for i, t in enumerate(texts) if t.startswith("## Exercises")), None)
    assert start is not None, "no exercises"
    posed = len(re.findall(r"^\*\*\d+\.\*\*", "\n".join(texts[start:]), re.M))
    code = [re.search(r"code-summary: \"Solution (\d+)", t) for t in texts[start:]]
    words = re.findall(r"<summary>Solution (\d+)", "\n".join(texts[start:]))
    solved = {m[1] for m in code if m} | set(words)
    assert posed >= (3 if path.name < "11" else 1) and solved == {str(n + 1) for n in range(posed)}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_ends_with_what_is_next(path):
    headings = re.findall(
        r"^## (.*)$",
        "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown"),
        re.M,
    )
    assert headings[-1].startswith("What we have")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda path: path.stem
)
def test_only_solutions_are_folded(path):
    "A folded cell hides its output, too: whatever a reader should see has `echo: false`."
    folded = [
        cell["id"]
        for cell in cells(path)
        if cell["cell_type"] == "code" and "code-fold: true" in source(cell)
    ]
    assert [name for name in folded if "solution" not in name] == []


def imported(path):
    "The modules of the package that the exported cells of a chapter import at their top level."
    for cell in filter(exported, cells(path)):
        for node in ast.parse(source(cell)).body:
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vampsc"):
                continue
            inner = node.module.removeprefix("vampsc").lstrip(".")
            yield from [inner] if inner else [alias.name for alias in node.names]


def module_of(path):
    texts = (source(c) for c in cells(path) if c["cell_type"] == "code")
    return next(m[1] for m in map(re.compile(r"#\| default_exp (\w+)").search, texts) if m)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_imports_only_earlier_ones_and_foundations(path):
    foundations = [p for p in CHAPTERS if p.name.startswith("a")]
    chapters = [] if path in foundations else [p for p in CHAPTERS if p not in foundations]
    earlier = [p for p in chapters if p < path] + (
        [p for p in foundations if p < path] if path in foundations else foundations
    )
    later = set(imported(path)) - set(map(module_of, earlier))
    assert not later, f"{path.stem} imports {later}, which stand in later chapters"


def private_names_of_others(path):
    "Where a module takes another module's private name, as `module._name` or by an import."
    modules = {p.stem for p in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        taken = []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            taken = [node.attr] * (node.value.id in modules)
        elif isinstance(node, ast.ImportFrom):
            taken = [alias.name for alias in node.names]
        yield from (name for name in taken if re.match(r"_[^_]", name))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "vampsc").glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_no_module_takes_another_ones_private_names(path):
    assert list(private_names_of_others(path)) == []


def code_of(path):
    "The code of a notebook, without IPython's own commands."
    code = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "code")
    return re.sub(r"^[%!].*$", "", code, flags=re.M)


def missing_names(path):
    "What a notebook takes from our modules that is not there, or is private."
    tree = ast.parse(code_of(path))
    modules = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if node.module == "vampsc":
                modules[alias.asname or alias.name] = f"vampsc.{alias.name}"
            elif node.module.startswith("vampsc."):
                found = hasattr(importlib.import_module(node.module), alias.name)
                if not found or alias.name.startswith("_"):
                    yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is None:
                continue
            found = hasattr(importlib.import_module(module), node.attr)
            if not found or node.attr.startswith("_"):
                yield f"{module}.{node.attr}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs" / "analysis").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_a_page_takes_only_public_names_that_are_there(path):
    assert list(missing_names(path)) == []


PAGES = sorted((ROOT / "nbs").rglob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_code_and_tables_in_prose_are_whole(page):
    "Fences are closed, Python in them can be parsed, and each row of a table is one line."
    for cell in cells(page):
        if cell["cell_type"] != "markdown":
            continue
        text = source(cell)
        fences = re.findall(r"^\s*```", text, re.M)
        assert len(fences) % 2 == 0 and text.count("```") == len(fences), cell["id"]
        for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            ast.parse(code)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert all(row.rstrip().endswith("|") for row in rows), cell["id"]
