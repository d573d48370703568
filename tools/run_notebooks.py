"""Run every chapter from its first cell to its last, and compare what it says with the outputs that are kept in it.

    python tools/run_notebooks.py                          # all chapters, as many at a time as there are cores
    python tools/run_notebooks.py 06 07 --update           # these two; keep the new outputs

An error in a cell fails. An output that differs from the kept one by more than numbers may is told, and with --strict fails too:
on another kind of processor, training may end elsewhere. Numbers may differ by `TOLERANCE`, or by what the cell says,
`#| tolerance: 0.2`, as a share of the larger one. A cell `#| volatile: true` tells times or the like, and only has to run. Each notebook has a process of its own on one core. The templates in nbs/analysis need hours at their defaults;
they are run by the tests, with quick settings.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.03
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")
ONE_CORE = {name: "1" for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
LIMIT = 900                                              # seconds for a notebook


def said(cell):
    "The texts of a cell's outputs as one; pictures are left out, and so is the markup of tables."
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        plain = output.get("text") or data.get("text/plain", "")
        if not any(mime.startswith("image/") for mime in data): texts.append("".join(plain))
    return "\n".join(texts)


def option(cell, name):
    "The value of a cell's `#| name: value`, or None."
    match = re.search(rf"^#\|\s*{name}:\s*(\S+)", "".join(cell["source"]), re.M)
    return match and match[1]


def close(a, b, share):
    "Are two numbers, as texts, the same but for `share` of the larger, or for one unit of the last digit shown?"
    x, y = (float(v.replace(",", "").replace("−", "-")) for v in (a, b))
    digits = max(len(v.partition(".")[2].split("e")[0]) for v in (a, b))
    return abs(x - y) <= max(share * max(abs(x), abs(y)), 1.01 * 10.0 ** -digits * ("e" not in a.lower()))


def differences(kept, new):
    "One line for each cell whose outputs are not those that were kept."
    for before, after in zip(kept["cells"], new["cells"]):
        if before["cell_type"] != "code" or option(before, "volatile"): continue
        a, b = said(before), said(after)
        share = float(option(before, "tolerance") or TOLERANCE)
        words = [NUMBER.sub("#", re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+", "", text))) for text in (a, b)]
        if words[0] != words[1]: yield f"cell {before['id']}: said {a.strip()[:300]!r}, now says {b.strip()[:300]!r}"
        else:
            far = [f"{x} is now {y}" for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)) if not close(x, y, share)]
            if far: yield f"cell {before['id']}: {'; '.join(far[:5])} (tolerance {share:.0%})"


def run(notebook, update):
    "(name, seconds, what its outputs no longer are, the error that stopped it) of one notebook."
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ipynb"
        command = [Path(sys.executable).with_name("exec_nb"), notebook.name, "--dest", out, "--exc_stop"]
        environment = {**os.environ, **ONE_CORE, "TF_CPP_MIN_LOG_LEVEL": "3"}
        try: done = subprocess.run(command, cwd=notebook.parent, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired: return notebook.name, LIMIT, [], f"took over {LIMIT} s"
        if done.returncode or not out.exists(): return notebook.name, time.time() - start, [], done.stderr.strip()[-1500:]
        kept, new = (json.loads(p.read_text(encoding="utf-8")) for p in (notebook, out))
        wrong = list(differences(kept, new))
        if update:
            notebook.write_bytes(out.read_bytes())
            subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", notebook], cwd=ROOT, check=True)
    return notebook.name, time.time() - start, wrong, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of the names of notebooks; none: all")
    parser.add_argument("--update", action="store_true", help="keep the new outputs")
    parser.add_argument("--strict", action="store_true", help="fail where outputs are not those that are kept")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="so many at a time")
    chosen = parser.parse_args()
    notebooks = [n for n in sorted((ROOT / "nbs").glob("*.ipynb")) if not chosen.names or n.name.startswith(tuple(chosen.names))]
    if not notebooks: sys.exit(f"no notebook in nbs begins with {' or '.join(chosen.names)}")
    start, broken, changed = time.time(), [], []
    with ThreadPoolExecutor(chosen.jobs) as workers:
        for name, seconds, wrong, error in workers.map(lambda n: run(n, chosen.update), sorted(notebooks, key=lambda n: -n.stat().st_size)):
            print(f"{name:28s} {seconds:6.1f} s" + "".join(f"\n    {line}" for line in [*wrong, *error.splitlines()]), flush=True)
            if error: broken.append(name)
            if wrong and not chosen.update: changed.append(name)
    print(f"{len(notebooks)} notebooks in {time.time() - start:.0f} s")
    if changed: print(f"not what is kept: {', '.join(changed)}; look at the lines above, and keep the new outputs with --update")
    if broken: sys.exit(f"stopped by an error: {', '.join(broken)}")
    if changed and chosen.strict: sys.exit(1)


if __name__ == "__main__": main()
