"""The busy bench runs at its smallest, and ends with one JSON document."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_busy_bench_runs():
    command = [sys.executable, str(ROOT / "bench" / "busy.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    contests = document["images_per_s"]
    beside = {"beside", "beside one that came later", "two at once"}
    assert set(contests) == {"alone"} | beside
    assert all(contest["repeats"] == 1 and contest["least"] > 0 for contest in contests.values())
    assert set(document["ratios"]) == {f"{name} / alone" for name in beside}
    assert document["machine"]["clock"] == "wall" and document["machine"]["threads"] == 2
