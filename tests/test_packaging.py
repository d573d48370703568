"""What an installed package has beside its modules."""

import subprocess
import sys
from pathlib import Path

import pytest

from vampsc import study

ROOT = Path(__file__).resolve().parents[1]


def test_the_built_package_has_the_analysis_notebooks_and_the_data(tmp_path):
    "Built from a source that has no build folder of its own, as pip does."
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "settings.ini", "README.md", "vampsc", "nbs"):
        (source / name).symlink_to(ROOT / name)
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
