"""Run every chapter from its first cell to its last, and compare what it says with the outputs that
are kept in it.

    # all chapters, as many at a time as there are cores
    python tools/run_notebooks.py
    python tools/run_notebooks.py 06 07 --update           # these two; keep the new outputs
    python tools/run_notebooks.py 06 --cells               # and tell which cells take the time

An error in a cell fails. An output that differs from the kept one by more than numbers may is told,
and with --strict fails too where the outputs were seen on this kind of processor. On another kind
numbers are rounded otherwise, and training may end elsewhere; `PROCESSORS` has the kinds on which
each notebook's outputs were seen, which --seen and --update write. Numbers may differ by
`TOLERANCE`, or by what the cell says, `#| tolerance: 0.2`, as a share of the larger one. A cell
`#| volatile: true` tells times or the like, and only has to run.

Each notebook has a process of its own on one core. What was found is recorded in the environment
that ran it: a notebook that has run without an error is not run again while it, the package and the
installed libraries are the same; what it said then is told again, and --strict fails for it as it
would have then. `--again` runs it all the same.

The templates in nbs/analysis need hours at their defaults; they are run by the tests, with quick
settings.
"""

import argparse
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.03
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")
ONE_CORE = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "TF_NUM_INTEROP_THREADS",
    )
}
LIMIT = 900  # seconds for a notebook
LIBRARIES = ("execnb.shell", "scanpy", "sklearn.metrics", "matplotlib.pyplot", "vampsc.study")
# by chapters
READ = (
    "vampsc",
    "nbs/analysis",
    "benchmarks",
    "workflow",
    "settings.ini",
    "tools/run_notebooks.py",
)
RECORD = Path(sys.prefix) / "notebooks.json"
PROCESSORS = ROOT / "tools" / "processors.json"


# ---- What a notebook says


def said(cell):
    "The texts of a cell's outputs as one; pictures are left out, and so is the markup of tables."
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        plain = output.get("text") or data.get("text/plain", "")
        if not any(mime.startswith("image/") for mime in data):
            texts.append("".join(plain))
    return "\n".join(texts)


def option(cell, name):
    "The value of a cell's `#| name: value`, or None."
    match = re.search(rf"^#\|\s*{name}:\s*(\S+)", "".join(cell["source"]), re.M)
    return match and match[1]


def close(a, b, share):
    """Are two numbers, as texts, the same but for `share` of the larger, or for one unit of the
    last digit shown?
    """
    x, y = (float(v.replace(",", "").replace("−", "-")) for v in (a, b))
    digits = max(len(v.partition(".")[2].split("e")[0]) for v in (a, b))
    return abs(x - y) <= max(
        share * max(abs(x), abs(y)), 1.01 * 10.0**-digits * ("e" not in a.lower())
    )


def from_where_they_differ(a, b, before=40):
    "Two texts without what they have in common at their beginning, but for some characters."
    same = len(os.path.commonprefix([a, b]))
    start = max(0, same - before)
    return a[start:], b[start:]


def differences(kept, new):
    "One line for each cell whose outputs are not those that were kept."
    for before, after in zip(kept["cells"], new["cells"]):
        if before["cell_type"] != "code" or option(before, "volatile"):
            continue
        a = said(before)
        b = said(after)
        share = float(option(before, "tolerance") or TOLERANCE)
        words = [
            NUMBER.sub("#", re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+", "", text)))
            for text in (a, b)
        ]
        if words[0] != words[1]:
            a, b = from_where_they_differ(a.strip(), b.strip())
            yield f"cell {before['id']}: said {a[:300]!r}, now says {b[:300]!r}"
        else:
            far = [
                f"{x} is now {y}"
                for x, y in zip(NUMBER.findall(a), NUMBER.findall(b))
                if not close(x, y, share)
            ]
            if far:
                yield f"cell {before['id']}: {'; '.join(far[:5])} (tolerance {share:.0%})"


# ---- On which processor


# Libraries choose by these how they add and multiply, and so how results are rounded.
VECTORS = re.compile(r"(?:avx|amx|fma|sve|asimd)\w*")


def processor(info="/proc/cpuinfo"):
    "The kind of this machine's processor: its architecture, and what it has for vectors."
    try:
        text = Path(info).read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.M)
    return " ".join([platform.machine(), *sorted(set(VECTORS.findall(flags[1] if flags else "")))])


def seen_on():
    "The kinds of processor on which outputs were seen, a dict of lists by the notebooks' names."
    return json.loads(PROCESSORS.read_text(encoding="utf-8")) if PROCESSORS.exists() else {}


def write_seen_here(same, new):
    "Record that here the outputs of some notebooks are the same, and those of others new."
    kinds = seen_on()
    for name in same:
        kinds[name] = sorted({*kinds.get(name, ()), processor()})
    for name in new:
        kinds[name] = [processor()]
    text = json.dumps(kinds, indent=1, sort_keys=True)
    PROCESSORS.write_text(text + "\n", encoding="utf-8")


# ---- Running it


@dataclass
class Result:
    """What came of a notebook: processor seconds, of each cell too; what its outputs no longer are;
    the error that stopped it.
    """

    name: str
    seconds: float = 0.0
    cells: dict = field(default_factory=dict)
    wrong: list = field(default_factory=list)
    error: str = ""
    recorded: bool = False


# of this process and of those that it has waited for
def processor_seconds():
    return sum(os.times()[:4])


def execute(notebook, folder):
    """In a process of its own: write the executed notebook, its seconds and what is said to the
    error stream into a folder.
    """
    sys.stdout = sys.stderr = log = open(folder / "log", "w", buffering=1, encoding="utf-8")
    # what libraries in C write, too
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    from execnb.shell import CaptureShell

    os.chdir(notebook.parent)
    sys.argv = ["exec_nb", notebook.name]
    seconds = {}

    def before(cell):
        seconds[cell.get("id")] = -processor_seconds()

    def after(cell):
        seconds[cell.get("id")] += processor_seconds()

    CaptureShell().execute(
        notebook, folder / "out.ipynb", exc_stop=True, preproc=before, postproc=after
    )
    (folder / "seconds.json").write_text(json.dumps([processor_seconds(), seconds]))


def load_libraries(notebooks):
    "Import what chapters import, so that it is done once and not by each of them."
    os.environ.update(ONE_CORE, TF_CPP_MIN_LOG_LEVEL="3")
    vampsc = importlib.import_module("vampsc")
    # with TensorFlow, but without what it says as it starts
    _ = vampsc.models
    for library in LIBRARIES:
        importlib.import_module(library)
    draws = sum("umap" in notebook.read_text(encoding="utf-8") for notebook in notebooks)
    if draws > 1:
        vampsc.figures.import_umap()
    # what was imported stays, and what a training makes need not be looked through so often
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def how_to_start():
    """How processes begin: as copies of this one, which has loaded the libraries, or anew.

    A copy is sound where no other thread runs that might hold a lock: TensorFlow starts its threads
    with its first operation, and none is done here. Where that cannot be seen (not on Linux), and
    for a thread that nobody expected, the answer is anew.
    """
    threads = Path("/proc/self/task")
    alone = threads.exists() and len(list(threads.iterdir())) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


def finish(notebook, folder, code, update):
    """The Result of a notebook whose process has ended with that exit code; its outputs are kept if
    `update`.
    """
    out = folder / "out.ipynb"
    if code or not out.exists():
        log = (
            (folder / "log").read_text(encoding="utf-8", errors="replace").strip()
            if (folder / "log").exists()
            else ""
        )
        return Result(notebook.name, error=log[-1500:] or f"its process ended with {code}")
    kept, new = (json.loads(p.read_text(encoding="utf-8")) for p in (notebook, out))
    seconds, cells = json.loads((folder / "seconds.json").read_text())
    result = Result(
        notebook.name,
        round(seconds, 1),
        {name: round(s, 1) for name, s in cells.items()},
        list(differences(kept, new)),
    )
    if update:
        notebook.write_bytes(out.read_bytes())
        subprocess.run(
            [Path(sys.executable).with_name("nbdev_clean"), "--fname", notebook],
            cwd=ROOT,
            check=True,
        )
    return result


@dataclass
class Running:
    "A notebook's process, the folder that it writes into, and since when it runs."

    notebook: Path
    folder: Path
    process: multiprocessing.Process
    since: float = field(default_factory=time.monotonic)

    def ended(self):
        return self.process.exitcode is not None

    def takes_too_long(self):
        return time.monotonic() - self.since > LIMIT

    def end(self):
        self.process.kill()
        self.process.join()


def begin(notebook, scratch):
    "A process of its own for a notebook."
    folder = Path(scratch) / notebook.stem
    folder.mkdir()
    process = how_to_start().Process(target=execute, args=(notebook, folder))
    process.start()
    return Running(notebook, folder, process)


def run(notebooks, jobs=1, update=False):
    "A Result for each notebook, as they end; so many at a time, in the order given."
    waiting = list(notebooks)
    running = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(begin(waiting.pop(0), scratch))
                wait([one.process.sentinel for one in running], timeout=1)
                for one in [r for r in running if r.ended() or r.takes_too_long()]:
                    running.remove(one)
                    if one.ended():
                        yield finish(one.notebook, one.folder, one.process.exitcode, update)
                    else:
                        one.end()
                        yield Result(one.notebook.name, error=f"took over {LIMIT} s")
        finally:
            for one in running:
                one.end()


# ---- What is known from last time


def sources():
    """The files that chapters read, in order; without caches and what else tools leave in folders
    of their own.
    """
    for name in READ:
        place = ROOT / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            inner = file.relative_to(ROOT).parts
            if file.is_file() and not any(
                part == "__pycache__" or part.startswith(".") for part in inner
            ):
                yield file


def surroundings():
    """A hash of what decides a notebook's outputs, besides itself: the package, what chapters read,
    Python and the libraries.
    """
    libraries = sorted({f"{d.name} {d.version}" for d in metadata.distributions()})
    digest = hashlib.sha256("\n".join([sys.version, *libraries]).encode())
    for file in sources():
        digest.update(f"\n{file.relative_to(ROOT)}\n".encode())
        digest.update(file.read_bytes())
    return digest


def key(notebook, around):
    "A hash of a notebook, outputs and all, with its surroundings."
    digest = around.copy()
    digest.update(notebook.read_bytes())
    return digest.hexdigest()


def read_record(path=RECORD):
    "What earlier runs found, a dict by the notebooks' names; empty where nothing can be read."
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_record(record, path=RECORD):
    """Keep it in one step, so that nobody reads half of it; where nothing can be written, the next
    run is a whole one.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(record, indent=1), encoding="utf-8")
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)


def longest_first(notebooks, record):
    """As they are best begun: first those of which nothing is known, by how much they train, then
    by the seconds that were recorded.
    """

    def length(notebook):
        known = record.get(notebook.name)
        if known:
            return 0, known["seconds"]
        return 1, notebook.read_text(encoding="utf-8").count("train(")

    return sorted(notebooks, key=length, reverse=True)


def has_code(notebook):
    "Is there anything to run?"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return any(cell["cell_type"] == "code" and "".join(cell["source"]).strip() for cell in cells)


def results(notebooks, jobs, update=False, again=False, path=RECORD):
    """A Result for each notebook that has code: what is known of the same state, then what runs
    find; these are recorded.
    """
    around = surroundings()
    record = read_record(path)
    unknown = []
    keys = {}
    for notebook in filter(has_code, notebooks):
        keys[notebook.name] = key(notebook, around)
        known = record.get(notebook.name, {})
        if update or again or known.get("key") != keys[notebook.name]:
            unknown.append(notebook)
        else:
            yield Result(
                notebook.name, known["seconds"], known["cells"], known["wrong"], recorded=True
            )
    if not unknown:
        return
    load_libraries(unknown)
    for result in run(longest_first(unknown, record), jobs, update):
        if not result.error:
            # What --update has just kept was not compared with a second run, so it has no key.
            found = {
                "key": None if update else keys[result.name],
                "seconds": result.seconds,
                "cells": result.cells,
                "wrong": result.wrong,
            }
            write_record({**read_record(path), result.name: found}, path)
        yield result


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of the names of notebooks; none: all")
    parser.add_argument("--update", action="store_true", help="keep the new outputs")
    parser.add_argument(
        "--strict", action="store_true", help="fail where outputs are not those that are kept"
    )
    parser.add_argument(
        "--seen", action="store_true", help="record the processor where outputs are the same"
    )
    parser.add_argument(
        "--again", action="store_true", help="run also what has run in the same state"
    )
    parser.add_argument(
        "--cells", action="store_true", help="tell the cells that take a second or more"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="so many at a time"
    )
    return parser.parse_args()


def tell(result, cells):
    "Print what came of a notebook."
    print(f"{result.name:28s} {result.seconds:6.1f} s" + " as recorded" * result.recorded)
    for line in [*result.wrong, *result.error.splitlines()]:
        print("   ", line)
    slowest = sorted(result.cells.items(), key=lambda cell: -cell[1])
    for name, seconds in slowest:
        if cells and seconds >= 1:
            print(f"    {seconds:6.1f} s in {name}")
    sys.stdout.flush()


def main():
    chosen = arguments()
    notebooks = [
        n
        for n in sorted((ROOT / "nbs").glob("*.ipynb"))
        if not chosen.names or n.name.startswith(tuple(chosen.names))
    ]
    if not notebooks:
        sys.exit(f"no notebook in nbs begins with {' or '.join(chosen.names)}")
    start = time.time()
    told = []
    for result in results(notebooks, chosen.jobs, chosen.update, chosen.again):
        tell(result, chosen.cells)
        told.append(result)
    print(
        f"{len(told)} notebooks in {time.time() - start:.0f} s; {sum(r.seconds for r in told):.0f}"
        " s of processors' time in them"
    )
    broken = [r.name for r in told if r.error]
    changed = [r.name for r in told if r.wrong and not chosen.update]
    if chosen.seen or chosen.update:
        fine = [r for r in told if not r.error]
        write_seen_here(
            [r.name for r in fine if not r.wrong],
            [r.name for r in fine if r.wrong and chosen.update],
        )
    elsewhere = {name for name in changed if processor() not in seen_on().get(name, ())}
    if elsewhere:
        print(f"made on another kind of processor: {', '.join(sorted(elsewhere))}")
    if changed:
        print(
            f"not what is kept: {', '.join(changed)}; look at the lines above, and keep the new"
            " outputs with --update"
        )
    if broken:
        sys.exit(f"stopped by an error: {', '.join(broken)}")
    if chosen.strict and not elsewhere.issuperset(changed):
        sys.exit(1)


if __name__ == "__main__":
    main()
