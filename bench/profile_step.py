"""Where a whole step's time goes on a GPU: phases by wall clock, and kernels by torch's profiler.

    python bench/profile_step.py                          2B shapes, paper preset, 1 and 32 images
    python bench/profile_step.py --preset robust --batch 8
    python bench/profile_step.py --smoke                  does it run? a CPU too, without kernels

The steps are rollout.py's, with locked answers. Four go first (they compile, capture and make the
moments), six are timed, three more are cut into phases, of which the middle one is told, and one is
profiled: looking slows it down, so its kernels' times count and its own does not. "busy" is what
the GPU spent in kernels. The last line is one JSON object. Left out: peers and FLOPs (rollout.py),
single kernels beside their plain versions (kernels.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import _measure as measure
import _subjects as subjects
import rollout
import torch

from vise_fast.model import load as model
from vise_fast.system.machine.clock import Clock, peak_memory

WARM = 4
TIMED = 6
LOOKED_AT = 3
SHOWN = 15


def kernels(contender: rollout.Contender, device: torch.device) -> list[dict[str, Any]]:
    """Name, calls and seconds of each kernel of one step, the longest first; none on a CPU."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contender.step()
        torch.cuda.synchronize(device)
    events = profile.key_averages()
    found = [
        {"name": event.key, "calls": event.count, "seconds": event.self_device_time_total / 1e6}
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def profiled(contender: rollout.Contender, device: torch.device, smoke: bool) -> dict[str, Any]:
    """Times, phases and kernels of one engine's step."""
    for _ in range(1 if smoke else WARM):
        contender.step()
    times = measure.Times()
    for _ in range(1 if smoke else TIMED):
        start = measure.clock(device)
        contender.step()
        times.seconds.append(measure.clock(device) - start)
    clock = Clock(now=lambda: measure.clock(device))
    phases = [contender.phases(clock) for _ in range(1 if smoke else LOOKED_AT)]
    phases.sort(key=lambda phase: phase["step"])
    listed = kernels(contender, device)
    return {
        "step": times.summary(),
        "images_per_s": len(contender.images) / times.median,
        "seconds": phases[len(phases) // 2],
        "busy_s": sum(kernel["seconds"] for kernel in listed),
        "kernels": listed,
        "peak_reserved_bytes": peak_memory(device),
    }


def tell(batch: int, engine: str, found: dict[str, Any]) -> None:
    """The step, its phases, the longest kernels."""
    step = found["step"]
    print(
        f"\nbatch {batch}, {engine}: {1e3 * step['median_s']:.1f} ms "
        f"({1e3 * step['least_s']:.1f}-{1e3 * step['most_s']:.1f}), "
        f"{found['images_per_s']:.2f} images/s, busy {1e3 * found['busy_s']:.1f} ms"
    )
    for name, seconds in found["seconds"].items():
        print(f"  {name:10s} {1e3 * seconds:8.1f} ms")
    for kernel in found["kernels"][:SHOWN]:
        print(f"  {1e3 * kernel['seconds']:8.2f} ms {kernel['calls']:6d}  {kernel['name'][:70]}")


def main(words: list[str]) -> None:
    """Profile, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-vl-2b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--preset", choices=("paper", "robust"), default="paper")
    parser.add_argument("--engine", choices=("fast", "graphed"), default="graphed")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.model = "nano"
        args.batch = [1]
        args.engine = "fast"
    given = rollout.parse(["--model", args.model, "--preset", args.preset])
    device = model.device_of("auto")
    ceilings = rollout.start(device, args.smoke, "auto")
    results = []
    for batch in args.batch:
        with tempfile.TemporaryDirectory() as scratch:
            subject = subjects.find(args.model, False, scratch)
            images = subjects.pictures(*given.size, batch)
            contender = rollout.contender(args.engine, subject, given, images)
            found = profiled(contender, device, args.smoke)
        tell(batch, args.engine, found)
        results.append({"batch": batch, "engines": {args.engine: found}})
    setting = {"model": args.model, "preset": args.preset, "size": list(given.size)}
    document = {"bench": "profile_step", "machine": measure.machine(device), "ceilings": ceilings}
    measure.finish(document | {"setting": setting, "results": results}, None)


if __name__ == "__main__":
    main(sys.argv[1:])
