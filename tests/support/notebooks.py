"""Notebooks, and runs of other methods, that the tests' own process executes.

A kernel, or a run of another method, is a process of its own, which first imports TensorFlow and
compiles its functions: that takes longer than what most of them do with a few small models.
"""

import gc
import traceback

import matplotlib.pyplot as plt
import nbformat
import papermill
from execnb.shell import CaptureShell
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


def execute_here(template, target, parameters, **_):
    "As papermill.execute_notebook, which also takes how a kernel is started."
    notebook = parameterize_notebook(
        load_notebook_node(template), parameters, kernel_name="python3", language="python"
    )
    shell = CaptureShell()
    try:
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                run_cell(shell, cell, number)
    finally:
        nbformat.write(notebook, target)
        InteractiveShell._instance = None
        plt.close("all")
        # what the page has trained: graphs in circles, which Python seldom looks for in these tests
        del shell
        gc.collect()


def run_cell(shell, cell, number):
    "Execute a cell and keep its outputs; an error as papermill raises it."
    outputs = shell.run(cell.source)
    cell.outputs = [nbformat.from_dict(joined(output)) for output in outputs]
    if shell.exc:
        name = type(shell.exc).__name__
        raise papermill.PapermillExecutionError(
            number, number, cell.source, name, str(shell.exc), outputs[-1]["traceback"]
        )


def joined(output):
    "An output whose texts are one text each."
    output = dict(output)
    if "text" in output:
        output["text"] = "".join(output["text"])
    if "data" in output:
        output["data"] = {
            kind: "".join(value) if isinstance(value, list) else value
            for kind, value in output["data"].items()
        }
    return output


def call_here(python, command, log):
    "As peers._call: one run of a method, or the scores of all."
    from vampsc import peers

    work = peers.main if "peers.main()" in command[0] else peers.score
    if work is peers.score and not peers._has("scib_metrics"):
        return 0
    try:
        work(command[1:])
    except Exception:
        log.write_text(traceback.format_exc())
        return 1
    return 0
