"""The versions of other packages: what settings.ini asks for, and the oldest of them that are
tested.

The Makefile's choice of a Python is made among stand-ins that say a version.
"""

import os
import re
import subprocess
import sys
import warnings
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
# what make installs; the packages compared with are apart
TESTED = ("", "dev_", "jax_", "pipeline_", "r_")


def requirements(*parts, python=None):
    "The requirements of settings.ini as they are typed; for one Python where it is given."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    typed = [
        Requirement(word)
        for part in parts
        for word in config["DEFAULT"][f"{part}requirements"].split()
    ]
    here = {"python_version": python} if python else {}
    return [one for one in typed if one.marker is None or not python or one.marker.evaluate(here)]


def lower_bound(requirement):
    "The oldest version that a requirement allows."
    found = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")]
    assert len(found) == 1, f"{requirement} has no lower bound, or several"
    return found[0]


def pins():
    "The versions of tools/oldest.txt by name."
    lines = (ROOT / "tools" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    words = [line.partition("==") for line in lines if line.strip() and not line.startswith("#")]
    assert all(sign for _, sign, _ in words)
    return {name: Version(version) for name, _, version in words}


def test_the_oldest_versions_are_those_of_the_settings():
    bounds = {one.name: lower_bound(one) for one in requirements(*TESTED, python="3.11")}
    assert pins() == bounds


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_package_is_asked_for_once(python):
    names = [one.name for one in requirements(*TESTED, python=python)]
    assert len(names) == len(set(names)) and {"scanpy", "pynndescent", "tensorflow"} <= set(names)


@pytest.mark.parametrize(
    "python, scanpy, pynndescent, allowed",
    [
        ("3.11", "1.11.0", "0.6.0", True),
        ("3.11", "1.11.5", "0.7.0", False),
        ("3.12", "1.12.0", "0.6.0", True),
        ("3.13", "1.12.4", "0.7.0", False),
        ("3.13", "1.12.4", "0.6.0", True),
        ("3.13", "1.11.5", "0.6.0", False),
    ],
)
def test_pairs_that_do_not_fit_are_not_installed(python, scanpy, pynndescent, allowed):
    asked = {one.name: one.specifier for one in requirements("", python=python)}
    assert (scanpy in asked["scanpy"] and pynndescent in asked["pynndescent"]) == allowed


def test_the_package_is_built_with_these_requirements(tmp_path):
    "setup.py splits them at spaces, so that a marker must not have one."
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    text = (tmp_path / "vampsc.egg-info" / "requires.txt").read_text(encoding="utf-8")
    sections = re.split(r"^\[(.*)\]$", text, flags=re.M)
    told = {"": sections[0], **dict(zip(sections[1::2], sections[2::2], strict=True))}
    for condition in (':python_version < "3.12"', ':python_version >= "3.12"'):
        assert {Requirement(word).name for word in told[condition].split()} == {"scanpy"}
    assert {Requirement(word).name for word in told["jax"].split()} == {"jax"}


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_is_about_to_go_is_an_error_in_our_own_code(kind):
    with pytest.raises(kind):
        warnings.warn("old", kind, stacklevel=1)
    with pytest.raises(kind):
        warnings.warn_explicit("old", kind, "genes.py", 1, module="vampsc.genes")
    with pytest.warns(kind):
        warnings.warn_explicit("old", kind, "core.py", 1, module="anndata._core.anndata")


# ---- the Makefile's choice of a Python


def stand_in(folder, name, version):
    """A command that is Python of another version, as far as it tells; of no version: one that
    fails, as pyenv's do if not chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if version is None:
        text = "#!/bin/sh\nexit 127\n"
    else:
        text = (
            f"#!{sys.executable}\nimport sys\nsys.version_info = {(*version, 0, 'final', 0)}\nif"
            " sys.argv[1] == '-c': exec(sys.argv[2])\nelse: print('made with',"
            " *sys.version_info[:2])\n"
        )
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def make(folder, *words, **more):
    """The Makefile in a folder of its own, with no commands but those of `folder`/bin and the
    system's tools.
    """
    for tool in ("sh", "make", "echo", "test", "touch"):
        found = next(
            Path(place) / tool for place in ("/bin", "/usr/bin") if (Path(place) / tool).exists()
        )
        if not (folder / "bin" / tool).exists():
            (folder / "bin" / tool).symlink_to(found)
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), **more}
    return subprocess.run(
        ["make", "-f", ROOT / "Makefile", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="stand-ins are shell scripts")
@pytest.mark.parametrize(
    "commands, chosen",
    [
        ({"bin/python3.11": (3, 11), "bin/python3.13": (3, 13), "bin/python3.12": (3, 12)}, "3 13"),
        (
            {
                "bin/python3.11": (3, 11),
                "bin/python3.13": None,
                ".pyenv/versions/3.13.0/bin/python3.13": (3, 13),
            },
            "3 13",
        ),
        (
            {
                "bin/python3.11": None,
                "bin/python3.13": None,
                ".pyenv/versions/3.11.7/bin/python3.11": (3, 11),
            },
            "3 11",
        ),
        ({"bin/python3": (3, 12)}, "3 12"),
        ({"bin/python3": (3, 10), "bin/python3.11": (3, 11)}, "3 11"),
    ],
)
def test_the_newest_python_is_chosen(tmp_path, commands, chosen):
    for name, version in commands.items():
        stand_in((tmp_path / name).parent, Path(name).name, version)
    done = make(tmp_path, ".venv/bin/python")
    assert done.returncode == 0 and done.stdout == f"made with {chosen}\n", done.stderr


def test_a_python_may_be_named(tmp_path):
    stand_in(tmp_path / "bin", "python3.13", (3, 13))
    own = stand_in(tmp_path / "elsewhere", "python", (3, 12))
    assert make(tmp_path, ".venv/bin/python", f"PYTHON={own}").stdout == "made with 3 12\n"


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_other_pythons_are_refused_with_a_reason(tmp_path, version):
    stand_in(tmp_path / "bin", "python3", version)
    done = make(tmp_path, ".venv/bin/python")
    assert done.returncode and "vampsc needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert "TensorFlow has no release for 3.14" in done.stderr and not (tmp_path / ".venv").exists()


def test_the_oldest_versions_are_left_out_without_the_oldest_python(tmp_path):
    stand_in(tmp_path / "bin", "python3.13", (3, 13))
    stand_in(tmp_path / "bin", "python3", (3, 13))
    done = make(tmp_path, "test-oldest")
    assert done.returncode == 0 and done.stdout.startswith(
        "Skipped: the oldest versions are tested on Python 3.11"
    )
