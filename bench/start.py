"""Seconds from the start of the process to its first update, and how far answers are scored from
what they were sampled with.

    python bench/start.py                          the embedded model
    python bench/start.py --model DIR --write      a directory's model, in the dtype of the device
    python bench/start.py --smoke                  one start of the smallest step

A whole `python -m vise_fast.train` each time, the paper preset on one drawn scene an update. The
first start finds what the machine happens to have in its page cache (drop it before for a cold
one); the others are warm. Wall time. Left out: evaluations, and downloads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _checkout
import _measure as measure
import torch

from vise_fast.system.console import read_lines

LOOK_S = 0.02
GAP = "logprob_gap"


def start(model: str, updates: int, run: Path) -> dict[str, Any]:
    """One training: seconds to the first update and between it and the last, the mean gap."""
    words = ["--reward.preset", "paper", "--train.steps", str(updates), "--eval.scenes", "0"]
    words += ["--run.dir", str(run), "--run.report", "false", "--model.path", model]
    begun = time.monotonic()
    training = subprocess.Popen(
        [sys.executable, "-m", "vise_fast.train", *words],
        env={**os.environ, "PYTHONPATH": f"{_checkout.ROOT}:{_checkout.ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    while training.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(LOOK_S)
    first_s = time.monotonic() - begun
    said, _ = training.communicate()
    if training.returncode:
        raise SystemExit(f"the training failed:\n{said[-2000:]}")
    steps = read_lines(metrics)
    gaps = [step[GAP] for step in steps if GAP in step]
    return {
        "first_update_s": first_s,
        "update_s": [step["seconds"] for step in steps],
        GAP: sum(gaps) / len(gaps) if gaps else None,
    }


def main(words: list[str]) -> None:
    """Start, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.starts = 1
        args.updates = 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as home:
        starts = [
            start(args.model, args.updates, Path(home) / str(number))
            for number in range(args.starts)
        ]
    for found in starts:
        print(f"first update after {found['first_update_s']:.1f} s, {GAP} {found[GAP]}")
    clock = "wall, of whole processes" if device.type == "cuda" else "a CPU's, of whole processes"
    machine = measure.machine(device) | {"clock": clock}
    place = _checkout.ROOT / "bench" / "results" / f"start-{device.type}.json"
    document = {"bench": "start", "machine": machine, "model": args.model, "starts": starts}
    measure.finish(document, place if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
