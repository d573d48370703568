"""Build the documentation in _docs from the notebooks and check its links: `python tools/build_site.py`.

nbdev prepares the notebooks in _proc (signatures, links between symbols); smalldocs renders them. With `--with quarto`
Quarto renders the same folder; it must be installed.
"""
import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"\d+[a-zA-Z0-9]*_"                             # 00_genes is the page genes, also in nbdev's own links


def prepare():
    "The notebooks as pages in _proc, under the names that nbdev's links expect, with relative links to each other."
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    refresh_quarto_yml()                                 # title and addresses, from settings.ini
    folder, config = proc_nbs(ROOT / "nbs", n_workers=0), get_config()
    site = f"{config.doc_host}{config.doc_baseurl}/"
    for page in [*folder.rglob("*.ipynb"), folder / "_quarto.yml"]:
        up = "../" * (len(page.relative_to(folder).parts) - 1)
        text = page.read_text(encoding="utf-8").replace(site, up)
        text = re.sub(rf"(?<=[(/ \"]){NUMBER}(\w+\.ipynb)", r"\1", text)
        page.write_text(re.sub(r"output-file: [\w.-]+\\n", "", text), encoding="utf-8")     # said by the new name
        page.rename(page.with_name(re.sub(f"^{NUMBER}", "", page.name)))
    return folder


def unlisted(folder):
    "Pages that the sidebar does not name."
    listed = (folder / "_quarto.yml").read_text(encoding="utf-8")
    return [str(p) for p in (q.relative_to(folder) for q in sorted(folder.rglob("*.ipynb"))) if str(p) not in listed]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--with", dest="renderer", choices=["smalldocs", "quarto"], default="smalldocs")
    renderer = parser.parse_args().renderer
    if renderer == "quarto" and not shutil.which("quarto"): sys.exit("quarto is not installed; see quarto.org")
    folder = prepare()
    if missing := unlisted(folder): sys.exit(f"not in the sidebar of _quarto.yml: {', '.join(missing)}")
    command = {"smalldocs": [sys.executable, "-m", "smalldocs.cli", "render", "--strict", "--quiet"],
               "quarto": ["quarto", "render", "--no-cache"]}[renderer]
    if subprocess.run(command, cwd=folder).returncode: sys.exit(f"{renderer} found the faults above; the site is not built")
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(folder / "_docs", ROOT / "_docs")
    print(f"{len(list((ROOT / '_docs').rglob('*.html')))} pages, all links found: _docs/index.html")


if __name__ == "__main__": main()
