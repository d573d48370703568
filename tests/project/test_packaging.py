"""What an installed package has beside its modules."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vampsc import study

ROOT = Path(__file__).resolve().parents[2]


def linked_source(folder):
    "What a build needs, in a folder that has no build folder of its own."
    folder.mkdir()
    for name in ("setup.py", "settings.ini", "README.md", "vampsc", "nbs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_built_package_has_the_analysis_notebooks_and_the_data(tmp_path):
    "Built from a source that has no build folder of its own, as pip does."
    source = linked_source(tmp_path / "source")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    built = tmp_path / "built" / "vampsc"
    templates = {path.name for path in (ROOT / "nbs" / "analysis").glob("*.ipynb")}
    assert {"organ.ipynb", "tables.ipynb"} <= templates
    assert {path.name for path in (built / "analysis").glob("*.ipynb")} == templates
    assert (built / "data" / "organs.toml").is_file()


@pytest.mark.skipif(not (ROOT / "nbs").is_dir(), reason="no clone")
def test_a_clone_has_them_where_they_are_edited():
    assert study.TEMPLATE == ROOT / "nbs" / "analysis" / "organ.ipynb"
    assert not any(path.is_symlink() for path in (ROOT / "vampsc").iterdir())


def test_an_editable_install_wins_over_a_folder_of_its_name(tmp_path):
    "Python that is started beside a clone called vampsc would else take the clone for the package."
    source = linked_source(tmp_path / "vampsc")
    command = [sys.executable, "setup.py", "-q", "editable_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    code = (
        f"import site; site.addsitedir({str(installed)!r}); import vampsc; print(vampsc.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()) == source / "vampsc" / "__init__.py"
