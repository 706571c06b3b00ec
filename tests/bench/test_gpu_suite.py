"""The suite for a GPU: its parts by name, what it refuses, what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and timeout"
)


def suite(*words, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_suite.sh"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_parts_have_names():
    names = [line.split(":")[0] for line in suite("--list").stdout.splitlines()]
    wanted = {"tests", "launches", "rollout-2b-b1", "kernels-ghost", "memory-32b-nf4"}
    assert wanted <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("words", [["--part", "nope", "--list"], ["--prat"], ["--minutes"]])
def test_what_it_does_not_know_is_refused(words):
    done = suite(*words)
    assert done.returncode != 0 and done.stderr.strip()


def test_a_part_leaves_a_line_behind(tmp_path):
    done = suite("--smoke", "--part", "launches", OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "machine.json",
        "results.jsonl",
        "log.txt",
        "goals.md",
    }
    assert "| S1 paper, 1 image |" in (tmp_path / "goals.md").read_text()
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["part"] == "launches" and line["status"] == "done"
    assert line["document"]["paper_1"]["blocking_copies"] == 0


def test_a_missing_package_skips_its_parts(tmp_path):
    """As on an image without pydantic: a Python that does not find it."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"import pydantic"*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = suite("--smoke", "--part", "launches", OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 0 and "skipped, pydantic is not installed" in done.stdout
