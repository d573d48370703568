"""How a symbol is documented on the site: its signature, its docstring section by section, links to
source and chapter.

nbdev calls `Doc` where a chapter exports a symbol; `pages` writes the reference, a page for each
module, from the same parts.
"""

import importlib
import inspect
import json
import re

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

# numpy's headings: Parameters, Returns, Raises
RULE = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.M)
# a chapter does not know its module; its page does
CHAPTER = "CHAPTER"
ENTRY = re.compile(r"^(\*{0,2}\w[\w, *]*?) ?: (.*)", re.S)


def escape(text):
    "Text of a docstring as Markdown: what stands in backticks stays, all else means itself."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        p if i % 2 else re.sub(r"([*_$\[\]<>|~^\\])", r"\\\1", p) for i, p in enumerate(parts)
    )


def signature(symbol, name):
    """`name(arguments)` over as many lines as it needs; of a class without arguments of its own,
    its bases.
    """
    if inspect.isclass(symbol) and not getattr(
        symbol.__init__, "__module__", "builtins"
    ).startswith(("vampsc", "__main__")):
        bases = ", ".join(b.__name__ for b in symbol.__bases__ if b is not object)
        return f"class {name}" + f"({bases})" * bool(bases)
    try:
        parameters = [p for p in inspect.signature(symbol).parameters.values() if p.name != "self"]
    except (TypeError, ValueError):
        return name
    listed = [str(p.replace(annotation=p.empty)) for p in parameters]
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        listed.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    line = f"{name}({', '.join(listed)})"
    return line if len(line) < 92 else f"{name}(\n    " + ",\n    ".join(listed) + ",\n)"


def entries(block):
    """A section's entries as (name, text); lines that begin no entry belong to the one before, and
    what names nothing has an empty name.
    """
    joined = []
    for line in re.sub(r"\n +", " ", block.strip()).splitlines():
        if joined and not ENTRY.match(line):
            joined[-1] += " " + line
        else:
            joined.append(line)
    for line in joined:
        match = ENTRY.match(line)
        named = match and not match[1].startswith(("Returns ", "Raises "))
        yield (match[1], match[2]) if named else ("", line)


def parameters(symbol):
    "The names of its parameters, with their stars."
    try:
        found = inspect.signature(symbol).parameters.values()
    except (TypeError, ValueError):
        return set()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return {stars.get(p.kind, "") + p.name for p in found}


def separated(text, known):
    """The parts of a text that holds several entries, `a : ... b : ...`, one after the other; each
    begins with names that are known, with what is returned, or with an error.
    """
    start = re.compile(r"(?:^|(?<=[.;]) )(?=(\*{0,2}\w+(?:, \*{0,2}\w+)*) : |Returns |Raises )")
    places = [
        match.end()
        for match in start.finditer(text)
        if not match[1]
        or known.issuperset(match[1].split(", "))
        or match[1].endswith(("Error", "Interrupt", "Warning"))
    ]
    bounds = sorted({0, *places, len(text)})
    return [text[a:b].rstrip(" ;") for a, b in zip(bounds, bounds[1:])]


def item(name, text):
    return f"- `{name}`: {escape(text)}" if name else f"- {escape(text)}"


def paragraph(text, known):
    "A paragraph as Markdown: sentences, then its entries about parameters as a list."
    joined = re.sub(r"\s*\n\s*", " ", text.strip())
    parts = separated(joined, known)
    first = next((i for i, part in enumerate(parts) if names_parameters(part, known)), len(parts))
    if first == len(parts):
        return escape(text.strip())
    said = [escape(" ".join(parts[:first]))] if first else []
    listed = "\n".join(item(*next(entries(part))) for part in parts[first:])
    return "\n\n".join([*said, listed])


def names_parameters(part, known):
    match = ENTRY.match(part)
    return bool(match) and known.issuperset(match[1].split(", "))


def docstring(symbol):
    "The docstring as Markdown: paragraphs, then each section as a list, an entry for each name."
    text = inspect.getdoc(symbol) or ""
    known = parameters(symbol)
    first, *rest = RULE.split(text)
    lines = [paragraph(part, known) for part in first.strip().split("\n\n")]
    for heading, block in zip(rest[::2], rest[1::2]):
        body, _, after = block.strip("\n").partition("\n\n")
        lines.append(f"**{heading}**")
        parts = [
            (name, part) if i == 0 else next(entries(part))
            for name, said in entries(body)
            for i, part in enumerate(separated(said, known))
        ]
        lines.append("\n".join(item(*part) for part in parts))
        if after.strip():
            lines.append(escape(after.strip()))
    return "\n\n".join(line for line in lines if line)


def source_link(symbol):
    "A link to the lines on GitHub, or nothing."
    try:
        lines, start = inspect.getsourcelines(inspect.unwrap(symbol))
    except (TypeError, OSError):
        return ""
    module = symbol.__module__.replace(".", "/")
    url = f"{get_config().git_url}/blob/{get_config().branch}/{module}.py#L{start}"
    return f'[source]({url}){{target="_blank"}}'


def anchor(name):
    return re.sub(r"[^\w.-]", "", name.lower())


class Doc:
    """What a chapter, or a page of the reference, shows of a symbol; as nbdev's renderers, made of
    symbol, name, title_level.
    """

    def __init__(self, symbol, name=None, title_level=3, links=None):
        self.symbol = symbol
        self.name = name or symbol.__qualname__
        self.level = title_level
        # in a chapter, the source is on the page
        here = [f"[reference](reference/{CHAPTER}.qmd#{anchor(self.name)})"]
        self.links = here if links is None else [*links, source_link(symbol)]

    def _repr_markdown_(self):
        links = " · ".join(filter(None, self.links))
        return (
            f"---\n\n{'#' * self.level} {self.name}\n\n::: {{.doc-links}}\n{links}\n:::\n\n"
            f"```python\n{signature(self.symbol, self.name)}\n```\n\n{docstring(self.symbol)}\n"
        )


def public(module):
    "The functions and classes of a module that it exports, in the order of their definition."
    symbols = [getattr(module, name) for name in module.__all__ if not name.startswith("_")]
    return [
        s
        for s in symbols
        if (inspect.isfunction(s) or inspect.isclass(s)) and s.__module__ == module.__name__
    ]


def methods(cls):
    "The public methods that a class defines and documents, as (name, function)."
    found = (
        (name, inspect.unwrap(getattr(cls, name)))
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)))
    )
    return [(name, f) for name, f in found if f.__doc__]


def inherited(cls):
    "Of our own base classes: (class, its documented methods)."
    ours = [base for base in cls.__mro__[1:] if base.__module__.startswith("vampsc.")]
    return [(base, methods(base)) for base in ours if methods(base)]


def in_yaml(text):
    "A text as a scalar in YAML, whatever quotes and colons are in it."
    return json.dumps(text, ensure_ascii=False)


def page(module, chapter):
    "The reference of a module as a Quarto page; chapter is the name of the page that builds it."
    intro = (module.__doc__ or "").strip().splitlines()[0]
    lines = [
        f"---\ntitle: {in_yaml(module.__name__)}\ndescription: {in_yaml(intro)}\n---\n",
        (
            "Explained, step by step and with its tests, in the chapter"
            f" [{chapter}](../{chapter}.ipynb).\n"
        ),
    ]
    for symbol in public(module):
        link = f"[chapter](../{chapter}.ipynb#{anchor(symbol.__name__)})"
        lines.append(Doc(symbol, title_level=2, links=[link])._repr_markdown_())
        for base, verbs in inherited(symbol) if symbol.__name__ == "CountAutoencoder" else ():
            said = ", ".join(f"[{name}](#{anchor(f'{base.__name__}.{name}')})" for name, _ in verbs)
            about = (base.__doc__ or base.__name__).split("; a base of")[0].removesuffix(".")
            lines.append(f"- {about}: {said}\n")
        lines += [
            Doc(f, name=f"{symbol.__name__}.{name}", title_level=3, links=())._repr_markdown_()
            for name, f in methods(symbol)
        ]
    return "\n".join(lines)


def pages(folder, exported):
    """Write the reference into folder/reference, a page for each module of {chapter: module}, with
    links between its symbols.
    """
    out = folder / "reference"
    lookup = NbdevLookup()
    out.mkdir(exist_ok=True)
    site = f"{get_config().doc_host}{get_config().doc_baseurl}/"
    for chapter, name in exported.items():
        text = lookup.linkify(page(importlib.import_module(f"vampsc.{name}"), chapter))
        for other, module in exported.items():
            text = text.replace(f"{site}{other}.html", f"{module}.html")
        (out / f"{name}.qmd").write_text(text + "\n", encoding="utf-8")
