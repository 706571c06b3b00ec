"""Which block sizes of the Triton kernels are the quickest on this card? Times every candidate of
the constants that the op files hold, in turn, on the cases of kernels.py.

    python bench/tune.py                   all ops; a GPU
    python bench/tune.py --op ghost
    python bench/tune.py --smoke           does it run? a CPU too, where constants play no part

A line per op and case: the constants as they are, the quickest, and what that gains. Nothing is
changed: a gain that holds on several cards is an edit of the constant in kernels/vise_kernels/OP.py
(tests/kernels/test_triton_compiles.py says whether it spills anywhere). Every candidate that does
not compile or launch is named. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import _measure as measure
import torch

import kernels

CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "ghost": {"TILE": (32, 64), "STRETCH": (16, 32), "WARPS": (4, 8)},
    "patchify": {"VALUES": (512, 1024, 2048)},
    "resize": {"VALUES": (256, 512, 1024)},
    "warp": {"PIXELS": (256, 512, 1024)},
    "token_logprob": {"BLOCK": (2048, 4096, 8192)},
    "sample": {"BLOCK": (512, 1024, 2048)},
    "decode_attention": {"BLOCK": (32, 64, 128)},
    "swiglu": {"BLOCK": (512, 1024, 2048)},
    "heads": {"HEADS": (4, 8, 16)},
    "rotate": {"HEADS": (4, 8, 16)},
    "merge_attention": {"HEADS": (4, 8, 16)},
}
Constants = dict[str, int]


def combinations(op: str) -> list[Constants]:
    """Every candidate of an op."""
    names = CANDIDATES[op]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*names.values())]


@contextlib.contextmanager
def held(module: ModuleType, constants: Constants) -> Iterator[None]:
    """Inside, the op file's constants are these."""
    before = {name: getattr(module, name) for name in constants}
    for name, value in constants.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def under(module: ModuleType, constants: Constants, run: Callable) -> Callable[[], None]:
    """`run` with these constants."""

    def call() -> None:
        with held(module, constants):
            run()

    return call


def told(constants: Constants) -> str:
    """As one writes them."""
    return " ".join(f"{name}={value}" for name, value in constants.items())


def tuned(case: kernels.Case, device: torch.device, smoke: bool) -> dict:
    """One case under every candidate."""
    module = importlib.import_module(f"vise_kernels.{case.op}")
    usual = {name: getattr(module, name) for name in CANDIDATES[case.op]}
    runs = {}
    faults = {}
    for constants in [usual, *combinations(case.op)]:
        run = under(module, constants, case.contenders["ours"])
        try:
            run()
        except Exception as fault:  # whatever a compiler or a driver says of a size
            faults[told(constants)] = f"{type(fault).__name__}: {fault}"[:120]
            continue
        runs[told(constants)] = run
    often = {"repeats": 1, "least_s": 0.0} if smoke else {"repeats": 5, "least_s": 0.05}
    times = measure.interleaved(runs, device, **often)
    best = min(times, key=lambda name: times[name].median)
    now = told(usual)
    gain = times[now].median / times[best].median if now in times else None
    return {
        "op": case.op,
        "shape": case.shape,
        "now": now,
        "best": best,
        "now_over_best": gain,
        "seconds": {name: time.median for name, time in times.items()},
        "faults": faults,
    }


def main(words: list[str]) -> None:
    """Time, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in args.op:
        for case in kernels.cases(op, device, args.smoke):
            if case.op != op:
                continue
            row = tuned(case, device, args.smoke)
            rows.append(row)
            gain = "does not run" if row["now_over_best"] is None else f"{row['now_over_best']:.2f}"
            print(f"{op}  {row['shape']}\n  {row['now']} is {gain} of the time of {row['best']}")
            for constants, fault in row["faults"].items():
                print(f"  {constants}: {fault}")
    document = {"bench": "tune", "machine": measure.machine(device), "rows": rows}
    measure.finish(document, None)


if __name__ == "__main__":
    main(sys.argv[1:])
