"""Two processes with one file, a kernel that belongs to another Python, and a process that is
ended: nothing is damaged, and nobody works on for nobody.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import anndata as ad
import filelock
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from scipy import sparse

from vampsc import files, models, study, training

PACKAGE = Path(files.__file__).parents[1]


def start(code, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def heed_ctrl_c():
    "In a process that is started, also where the tests run in the background of a shell."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(seen, process=None, seconds=120):
    for _ in range(int(seconds / 0.05)):
        if found := seen():
            return found
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it did not happen")


# ---- one file

HOLDS = """
    import sys, time
    from vampsc import files
    with files.locked(sys.argv[1], wait=False):
        print("mine", flush=True)
        time.sleep(600)
"""


def test_the_other_process_is_named_and_a_killed_one_blocks_nobody(tmp_path, capsys):
    path = tmp_path / "checkpoint"
    other = start(HOLDS, path)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(
        BlockingIOError,
        match=(
            rf"{path} is in use by process {other.pid} on \S+, since \d{{4}}-.*; wait for its end"
        ),
    ):
        with files.locked(path, wait=False):
            raise AssertionError("two at once")
    left = tmp_path / ".checkpoint.0123.new"
    left.write_text("half of it")
    other.kill(), other.communicate()
    with files.locked(path, wait=False):
        assert (
            json.loads((tmp_path / ".checkpoint.holder").read_text())["pid"] == os.getpid()
            and not left.exists()
        )
        # what is in it is held with it
        with files.locked(path / "within", wait=False):
            pass
    assert not (tmp_path / ".checkpoint.holder").exists()


def test_who_waits_says_for_whom(tmp_path, capsys):
    with files.locked(tmp_path / "run"):
        waits = start(
            "from vampsc import files; import sys\nwith files.locked(sys.argv[1]): print('after')",
            tmp_path / "run",
        )
        until(lambda: waits.stderr.readline().startswith(f"run: process {os.getpid()} on "), waits)
        assert waits.poll() is None
    assert waits.communicate()[0] == "after\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")]
)
def test_a_file_system_without_locks(error, tmp_path, monkeypatch):
    def none(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with pytest.warns(UserWarning, match="file system without locks"):
        with files.locked(tmp_path / "x", wait=False):
            went_on = True
    assert went_on


def test_other_errors_of_a_lock_are_errors(tmp_path):
    (tmp_path / ".x.lock").mkdir()
    with pytest.raises(OSError):
        with files.locked(tmp_path / "x"):
            pass


def test_a_checkpoint_of_two_processes(tmp_path):
    "The second is refused at once, trains nothing, and leaves the first one's file as it is."
    adata = ad.AnnData(
        sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (60, 20)).astype("float32") + 1),
        var=pd.DataFrame(index=[f"g{j}" for j in range(20)]),
    )
    model = models.AE(adata, gene_space=None, hidden=(4,), n_latent=2)
    path = tmp_path / "c"
    other = start(HOLDS, path)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(BlockingIOError, match=f"process {other.pid}"):
        model.train(max_epochs=1, checkpoint=path, progress=False)
    assert not path.exists() and len(model.history) == 0
    other.kill(), other.communicate()
    model.train(max_epochs=1, checkpoint=path, progress=False)
    assert len(training.read_checkpoint(path)[0]["rows"]) == 1


def test_writers_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "c"
    said = []

    def write(k):
        for _ in range(40):
            try:
                training.write_checkpoint(path, {"who": k}, [np.full((100, 100), k)])
            except Exception as error:
                said.append(error)

    writers = [threading.Thread(target=write, args=(k,)) for k in (1, 2)]
    for w in writers:
        w.start()
    until(path.exists)
    while any(w.is_alive() for w in writers):
        notes, (array,) = training.read_checkpoint(path)
        assert (array == notes["who"]).all()
    assert not said and os.listdir(tmp_path) == ["c"]


def test_what_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError):
        with files.atomic_file(tmp_path / "a") as new:
            new.write_text("half"), 1 / 0
    assert (tmp_path / "a").read_text() == "before" and os.listdir(tmp_path) == ["a"]


# ---- the notebook's process


@pytest.fixture()
def template(tmp_path):
    def make(*sources):
        cells = [
            nbformat.v4.new_code_cell("given = 1", metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, sources),
        ]
        about = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_markdown_cell("# A"), *cells], metadata=about
            ),
            tmp_path / "template.ipynb",
        )
        return tmp_path / "template.ipynb"

    return make


def test_the_notebook_runs_in_this_python(tmp_path, template, monkeypatch):
    "Also where Jupyter's `python3` is another one, that has neither this package nor a kernel."
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps(
            {
                "argv": ["/bin/false", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(spec.parents[2]))
    page = study.fill_in(
        template("import sys, os\nprint(given, sys.executable, os.getppid())"),
        tmp_path / "out" / "a.ipynb",
        {"given": 7},
    )
    assert f"7 {sys.executable} {os.getpid()}" in page.read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_kernel_that_dies_is_one_line(tmp_path, template):
    with pytest.raises(ValueError, match="the process that ran the notebook ended before its time"):
        study.fill_in(template("import os; os._exit(3)"), tmp_path / "out" / "a.ipynb", {})


@pytest.mark.slow
def test_sigterm_ends_the_notebook_and_what_it_started(tmp_path, template):
    path = template(
        "import subprocess, time\nfrom pathlib import Path\nchild = subprocess.Popen(['sleep',"
        " '600'])\nPath(given).write_text(str(child.pid))\ntime.sleep(600)"
    )
    code = """
        import sys
        from pathlib import Path
        from vampsc import study
        study.fill_in(Path(sys.argv[1]), Path(sys.argv[2]), {"given": sys.argv[3]})
    """
    process = start(code, path, tmp_path / "out" / "a.ipynb", tmp_path / "pid")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), process)
    all_of_it = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(all_of_it) >= 3
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and not psutil.wait_procs(all_of_it, timeout=15)[1]


def test_a_worker_ends_with_its_parent(tmp_path):
    code = """
        import subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", "import os, time; from vampsc import files; files.end_with_parent(os.getppid(), 0.1); print('ready', flush=True); time.sleep(600)"])
        print(worker.pid, flush=True)
        time.sleep(600)
    """  # noqa: E501
    parent = start(code)
    worker = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs([worker], timeout=30)[1]
    # of itself it is no worker
    files.end_with_parent(os.getpid())


def test_what_a_worker_imports_is_quiet_as_it_starts(tmp_path):
    (tmp_path / "loud.py").write_text("import os\nos.write(2, b'noise from C')")
    code = """
        import os, sys
        from vampsc import files
        files.begin_worker(os.getpid(), "loud")
        print("loud" in sys.modules)
        os.write(2, b"an error")
    """
    worker = start(code, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE}"})
    assert worker.communicate(timeout=60) == ("True\n", "an error")


def marked(value):
    """The processes that have this in their environment, wherever they hang by now: kernel,
    workers, and those that keep books for them.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get("VAMPSC_TEST") == value
            ):
                found.append(process)
        except psutil.Error:
            pass
    return found


def are(processes, word):
    found = []
    for process in processes:
        try:
            command = " ".join(process.cmdline())
            if word in command and "resource_tracker" not in command:
                found.append(process)
        except psutil.Error:
            pass
    return found


MOMENTS = {
    "the kernel starts": lambda all_of_it, _: are(all_of_it, "ipykernel"),
    "workers start": lambda all_of_it, _: len(are(all_of_it, "loky")) == 2,
    "workers train": lambda _, folder: len(list(folder.glob("out/my/*/*/checkpoint"))) == 2,
}


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals as on Linux and macOS")
def test_workers_of_a_leader_that_has_ended_are_ended():
    "Workers that are still starting do not notice that nobody waits for them."
    leader = start(
        """
        import subprocess, sys
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(worker.pid, flush=True)
        """,
        start_new_session=True,
    )
    worker = psutil.Process(int(leader.stdout.readline()))
    leader.wait(20)
    assert worker.is_running() and study._left_behind(leader.pid)
    study._end_group(leader)
    gone, alive = psutil.wait_procs([worker], timeout=10)
    assert not alive or worker.status() == psutil.STATUS_ZOMBIE
    study._end_group(leader)  # and nothing is left to be ended


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals as on Linux and macOS")
def test_what_is_left_after_a_lost_interrupt_is_ended():
    """Python drops an exception that is raised within a destructor, a KeyboardInterrupt too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    kernel = start("import time; time.sleep(600)", start_new_session=True)
    try:
        with study._signals_end([kernel], patience=0.1) as received:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            kernel.wait(20)
        assert received == [signal.SIGINT] and kernel.returncode == -signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        kernel.kill()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals as on Linux and macOS")
@pytest.mark.parametrize(
    "moment, to",
    [
        ("workers start", "SIGINT"),
        ("workers start", "SIGKILL"),
        ("workers start", "SIGKILL of the kernel"),
        ("workers train", "SIGTERM"),
    ],
)
def test_nothing_is_left_of_a_question_that_is_ended(moment, to, tmp_path):
    """The command as a user starts it, with two runs side by side; SIGINT as Ctrl-C sends it, to
    the group of the terminal.
    """
    adata = ad.AnnData(
        sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (80, 30)).astype("float32") + 1),
        var=pd.DataFrame(index=[f"g{j}" for j in range(30)]),
    )
    adata.write_h5ad(tmp_path / "my.h5ad")
    words = [
        "beyond",
        "both",
        "--organs",
        tmp_path / "my.h5ad",
        "--out",
        tmp_path / "out",
        "--seeds",
        "0,1",
        "--jobs",
        "2",
        "--max-epochs",
        "100000",
        "--set",
        "hidden=8",
        "--set",
        "n_latent=2",
    ]
    mark = str(tmp_path)
    process = start(
        "from vampsc.cli import main; main()",
        *words,
        cwd=tmp_path,
        env={**os.environ, "VAMPSC_TEST": mark},
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        until(lambda: MOMENTS[moment](marked(mark), tmp_path), process, 300)
        if to == "SIGKILL of the kernel":
            are(marked(mark), "ipykernel")[0].kill()
        elif to == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(getattr(signal, to))
        # where three tests share two cores
        until(lambda: process.poll() is not None and not marked(mark), seconds=120)
        said = process.communicate()[1]
    finally:
        for left in marked(mark):
            left.kill()
    assert process.returncode == {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9}.get(to, 1)
    if to == "SIGINT":
        assert said.count("vampsc: interrupted; the same command goes on") == 1
        # Before it, a Python interrupted while it imports may say where; the last word is ours.
        assert said.splitlines()[-1].startswith("vampsc: interrupted; the same command goes on")
    if to == "SIGKILL of the kernel":
        assert "vampsc: the process that ran the notebook ended before its time" in said
