"""The rollout bench runs at its smallest with every engine, and ends with one JSON document."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_rollout_bench_runs():
    command = [sys.executable, str(ROOT / "bench" / "rollout.py"), "--smoke", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    (result,) = document["results"]
    assert set(result["engines"]) == {"fast", "graphed", "unshared", "stock", "naive", "naive+"}
    assert document["machine"]["device"] and document["ceilings"]["matmul_flop_per_s"] > 0
    fast = result["engines"]["fast"]
    naive = result["engines"]["naive"]
    assert fast["counts"]["encodes_per_distinct_image"] == 1
    assert naive["counts"]["encodes_per_distinct_image"] > 2.3
    assert fast["flops"]["step"] < naive["flops"]["step"]
    assert set(result["ratios"]) == {
        "graphed / fast",
        "unshared / fast",
        "stock / fast",
        "naive / fast",
        "naive+ / fast",
    }


def test_times_only_looks_at_nothing_else():
    command = [sys.executable, str(ROOT / "bench" / "rollout.py"), "--batch", "1", "--repeats", "1"]
    words = ["--engine", "fast", "unshared", "--times-only", "--device", "cpu"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert {*result["engines"]["fast"]} == {"step", "images_per_s"}
    assert set(result["ratios"]) == {"unshared / fast"}


def test_a_step_is_profiled_where_there_is_no_gpu_too():
    command = [sys.executable, str(ROOT / "bench" / "profile_step.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert result["engines"]["fast"]["seconds"]["update"] > 0
