"""The kernel bench runs at its smallest, covers every op, and ends with one JSON document."""

import json
import os
import subprocess
import sys
from pathlib import Path

import vise_kernels.dispatch

ROOT = Path(__file__).parents[2]


def test_the_kernel_bench_runs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), "--smoke", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    ops = set()
    for row in document["rows"]:
        ops.update(row["op"].split(" + "))
    assert ops == set(vise_kernels.dispatch.NATIVE_OPS)
    for row in document["rows"]:
        assert {"ours", "plain"} <= set(row["contenders"]) and row["share_of_ceiling"] > 0
    assert document["ceilings"]["copy_bytes_per_s"] > 0 and document["versions"]["torch"]
