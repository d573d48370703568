"""The list of slips fits the package as it is; tools/slips.py runs them."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import slips  # noqa: E402

CHAPTERS = [
    "likelihood",
    "networks",
    "posteriors",
    "flows",
    "priors",
    "assembly",
    "training",
    "metrics",
]


def source(slip):
    return (ROOT / "vampsc" / slip.module).read_text(encoding="utf-8")


def test_there_are_thirty_and_three_of_every_chapter():
    names = Counter(slip.name for slip in slips.SLIPS)
    modules = Counter(slip.module for slip in slips.SLIPS)
    assert len(slips.SLIPS) >= 30 and max(names.values()) == 1
    assert all(modules[f"{chapter}.py"] >= 3 for chapter in [*CHAPTERS, "kernels"])


@pytest.mark.parametrize("slip", slips.SLIPS, ids=lambda slip: slip.name)
def test_the_text_is_there_once_and_its_tests_are_there(slip):
    text = slips.changed(slip, source(slip))  # raises where it is not there once
    assert text != source(slip)
    # a slip of the pen would be caught by any test
    compile(text, slip.module, "exec")
    file, _, test = slip.test.partition("::")
    tests = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test}\(", tests, re.M), f"tests/{file} has no {test}"


def test_a_text_that_is_gone_or_is_there_twice_is_named():
    slip = slips.Slip("half-dropped", "posteriors.py", "0.5 *", "", "parts/test_posteriors.py")
    with pytest.raises(
        ValueError, match=r"half-dropped: '0.5 \*' is 0 times in vampsc/posteriors.py"
    ):
        slips.changed(slip, "x / 2")
    with pytest.raises(ValueError, match="is 2 times"):
        slips.changed(slip, "0.5 * x + 0.5 * y")
    assert slips.changed(slip, "0.5 * x") == " x"
