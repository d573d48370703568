"""Build the documentation in _docs from the notebooks and check its links: `python
tools/build_site.py`.

nbdev prepares the notebooks in _proc (signatures, links between symbols), and the reference is
written beside them; smalldocs renders both. With `--with quarto` Quarto renders the same folder; it
must be installed. Formulas become MathML, which browsers draw by themselves, so that the site needs
no other server.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import reference
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

import vampsc

_ = vampsc.VAE  # TensorFlow starts here, without its log
ROOT = Path(__file__).resolve().parents[1]
# 00_genes is the page genes, also in nbdev's own links
NUMBER = r"\d+[a-zA-Z0-9]*_"
COMMAND = re.compile(r"\[(`\w+(?:\(\))?`)\]\([^)\s]*command_line\.html#[^)]*\)")


def modules():
    "The module that each chapter exports, as {page: module}."
    found = (
        (
            re.sub(f"^{NUMBER}", "", n.stem),
            re.search(r"#\| default_exp (\w+)", n.read_text(encoding="utf-8")),
        )
        for n in sorted((ROOT / "nbs").glob("*.ipynb"))
    )
    return {page: match[1] for page, match in found if match}


def prepare():
    """The notebooks as pages in _proc, under the names that nbdev's links expect, with relative
    links to each other.
    """
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    refresh_quarto_yml()  # title and addresses, from settings.ini
    config = get_config()
    exported = modules()
    config.d["renderer"] = "reference.Doc"
    folder = proc_nbs(ROOT / "nbs", n_workers=0)
    site = f"{config.doc_host}{config.doc_baseurl}/"
    reference.pages(folder, exported)
    for page in [*folder.rglob("*.ipynb"), *folder.rglob("*.qmd"), folder / "_quarto.yml"]:
        name = re.sub(f"^{NUMBER}", "", page.stem)
        up = "../" * (len(page.relative_to(folder).parts) - 1)
        text = page.read_text(encoding="utf-8").replace(site, up)
        # `fit` and `sample` are mostly methods
        if name != "command_line":
            text = COMMAND.sub(r"\1", text)
        text = re.sub(rf"(?<=[(/ \"]){NUMBER}(\w+\.ipynb)", r"\1", text)
        text = text.replace(
            f"reference/{reference.CHAPTER}.qmd", f"reference/{exported.get(name)}.qmd"
        )
        # said by the new name
        page.write_text(re.sub(r"output-file: [\w.-]+\\n", "", text), encoding="utf-8")
        page.rename(page.with_name(name + page.suffix))
    return folder


def unlisted(folder):
    "Pages that the sidebar does not name."
    listed = (folder / "_quarto.yml").read_text(encoding="utf-8")
    return [
        str(p)
        for p in (q.relative_to(folder) for q in sorted(folder.rglob("*.ipynb")))
        if str(p) not in listed
    ]


MATHS = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
TAG = re.compile(r"\\tag\{(.+?)\}")
ENGINE = re.compile(r"<(script|link)\b[^>]*\b(katex|mathjax|polyfill)[^>]*>(\s*</script>)?", re.I)
OPERATOR = re.compile(
    r"(?<!<msub>)(?<!<msup>)(?<!<munder>)(<mi>(?:log|exp|min|max)</mi>)(?!<mo[^>]*>&#x0002[89];|</)"
)


def as_mathml(match):
    """A formula of a page, in LaTeX, as MathML; the number of an equation stands beside it.

    The source stays, to be copied.
    """
    kind = match[1]
    latex = html.unescape(match[2])
    number = TAG.search(latex)
    # which latex2mathml knows
    source = TAG.sub("", latex).replace("{aligned}", "{align*}")
    drawn = convert(source, display="block" if kind == "display" else "inline")
    if left := re.search(r"\\[a-zA-Z]+|(?<=>)&(?=<)", html.unescape(drawn)):
        sys.exit(f"{left[0]} in the formula {latex!r} is not known to latex2mathml")
    # log q, not logq
    drawn = OPERATOR.sub(r'\1<mspace width="0.17em"/>', drawn)
    drawn = drawn.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
    beside = f'<span class="equation-number">({number[1]})</span>' if number else ""
    return f'<span class="math {kind}">{drawn}{beside}</span>'


def draw_maths(folder):
    "In all pages: formulas as MathML, and no engine to draw them."
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(ENGINE.sub("", MATHS.sub(as_mathml, text)), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--with", dest="renderer", choices=["smalldocs", "quarto"], default="smalldocs"
    )
    renderer = parser.parse_args().renderer
    if renderer == "quarto" and not shutil.which("quarto"):
        sys.exit("quarto is not installed; see quarto.org")
    folder = prepare()
    if missing := unlisted(folder):
        sys.exit(f"not in the sidebar of _quarto.yml: {', '.join(missing)}")
    command = {
        "smalldocs": [sys.executable, "-m", "smalldocs.cli", "render", "--strict", "--quiet"],
        "quarto": ["quarto", "render", "--no-cache"],
    }[renderer]
    if subprocess.run(command, cwd=folder).returncode:
        sys.exit(f"{renderer} found the faults above; the site is not built")
    draw_maths(folder / "_docs")
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(folder / "_docs", ROOT / "_docs")
    print(f"{len(list((ROOT / '_docs').rglob('*.html')))} pages, all links found: _docs/index.html")


if __name__ == "__main__":
    main()
