"""How the benches measure: interleaved repeats, median and spread, ceilings taken in the same run,
and one form of result file.

On a GPU the clock is wall time between synchronisations; on a CPU it is the process's CPU time, so
that other work on the machine costs little, and contenders run on one thread. Left out: what is
measured.
"""

import importlib.util
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from _checkout import ROOT

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "torchvision",
    "kornia",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "nanobind",
)


def installed(module: str) -> bool:
    """Whether `module` can be imported, without doing so."""
    return importlib.util.find_spec(module) is not None


@dataclass
class Times:
    """Seconds per call, one entry per repeat."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float]:
        """Median and spread, for the result file."""
        return {"median_s": self.median, "least_s": min(self.seconds), "most_s": max(self.seconds)}


def ratio(slow: Times, quick: Times) -> dict[str, float]:
    """Of neighbouring repeats, which saw the same machine: median, least and most."""
    ratios = [a / b for a, b in zip(slow.seconds, quick.seconds, strict=True)]
    return {"median": statistics.median_low(ratios), "least": min(ratios), "most": max(ratios)}


def clock(device: torch.device) -> float:
    """Now, in seconds: after all queued work on a GPU, CPU time of this process otherwise."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleaved(
    contenders: dict[str, Callable], device: torch.device, repeats: int, least_s: float
) -> dict[str, Times]:
    """Every contender once per repeat, A B C A B C ...; each turn repeats the call until about
    `least_s` have passed.
    """
    calls = {name: _calls(run, device, least_s) for name, run in contenders.items()}
    times = {name: Times() for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = clock(device)
            for _ in range(calls[name]):
                run()
            times[name].seconds.append((clock(device) - start) / calls[name])
    return times


def _calls(run: Callable, device: torch.device, least_s: float) -> int:
    run()  # compiles, allocates
    if least_s == 0:
        return 1
    start = clock(device)
    run()
    return max(1, min(1000, round(least_s / max(clock(device) - start, 1e-6))))


def extra_bytes(run: Callable, device: torch.device) -> int:
    """Most tensor memory alive at once during `run()`, beyond what was there before; its results
    included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()  # alive until the profile ends
    del kept
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def ceilings(device: torch.device, smoke: bool, dtype: str = "auto") -> dict[str, float]:
    """Measured copy bandwidth (bytes read and written per second) and matmul rate (FLOP/s) in
    `dtype`; auto: bf16 on a GPU, fp32 on a CPU.
    """
    cuda = device.type == "cuda"
    size = 2**20 if smoke else 2**30 if cuda else 2**27
    side = 256 if smoke else 8192 if cuda else 1024
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    kind = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    left = torch.randn(side, side, dtype=kind, device=device)
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ left}
    times = interleaved(runs, device, repeats=5, least_s=0.05)
    return {
        "copy_bytes_per_s": 2 * size / times["copy"].median,
        "matmul_flop_per_s": 2 * side**3 / times["matmul"].median,
    }


def machine(
    device: torch.device,
    sources: tuple[str, ...] = ("vise_fast", "kernels", "bench", "CMakeLists.txt"),
) -> dict:
    """What a reader needs to judge the numbers; `sources`: the paths that the numbers depend on."""
    versions = {name: metadata.version(name) for name in PACKAGES if _has(name)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "clock": "wall, synchronised" if device.type == "cuda" else "CPU time of the process",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(sources),
        "date": date.today().isoformat(),
    }


def _has(package: str) -> bool:
    return any(True for _ in metadata.distributions(name=package))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(sources: tuple[str, ...]) -> str:
    """The commit measured, with a plus sign where `sources` differ from it; outside a checkout, or
    without git, what $COMMIT says, else "unknown".
    """
    told = os.environ.get("COMMIT", "unknown")
    if shutil.which("git") is None:
        return told
    command = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return told
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *sources], cwd=ROOT)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def finish(results: dict, path: Path | None) -> None:
    """Adds the command, writes the result file where there is one to write, prints the document as
    the last line.
    """
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    results["command"] = " ".join(["python", str(script), *sys.argv[1:]])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
