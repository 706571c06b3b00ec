"""The checkout as make leaves it: its environment knows where the code lies, and moves with it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAMP = ".venv/checkout.stamp"
WHERE = """
import importlib.util
for name in ("vise_fast", "vise_kernels"):
    print(importlib.util.find_spec(name).origin)
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make")


def run(*words, **options):
    """The output of a command that has no variable of ours."""
    done = subprocess.run(
        words, env={"PATH": os.defpath}, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def make_environment(checkout):
    """An environment of what this Python has, as if make had just filled it; its site-packages."""
    run(sys.executable, "-m", "venv", "--without-pip", str(checkout / ".venv"))
    python = str(checkout / ".venv" / "bin" / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (checkout / ".venv" / "packages.stamp").touch()
    return site


@pytest.fixture
def checkout(tmp_path):
    """A copy of what make and Python need of this checkout."""
    place = tmp_path / "here"
    for package in ("vise_fast", "kernels/vise_kernels"):
        shutil.copytree(ROOT / package, place / package)
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    return place


def test_the_trainer_runs_as_typed_with_no_variable_set(checkout):
    make_environment(checkout)
    run("make", STAMP, cwd=checkout)
    text = run(".venv/bin/python", "-m", "vise_fast.train", "--help", cwd=checkout)
    assert "--train.steps" in text
    assert text == run(".venv/bin/vise-fast", "train", "--help", cwd=checkout)


def test_the_environment_moves_with_the_checkout(checkout, tmp_path):
    site = make_environment(checkout)
    run("make", STAMP, cwd=checkout)
    assert str(tmp_path) not in (site / "vise_fast_checkout.pth").read_text()
    moved = checkout.rename(tmp_path / "there")
    found = run(str(moved / ".venv" / "bin" / "python"), "-c", WHERE, cwd=tmp_path).split()
    assert found == [
        str(moved / "vise_fast" / "__init__.py"),
        str(moved / "kernels" / "vise_kernels" / "__init__.py"),
    ]
