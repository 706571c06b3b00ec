"""How far off is the forecast by counting (launches.py)? Held against what can be measured without
a GPU: a whole step on this CPU.

    python bench/forecast_check.py --write     mid-100m, batch 1 and 4, two sizes of image
    python bench/forecast_check.py --smoke     the embedded model, one image

The same counter (calls, FLOPs and bytes of each operator) and the same rule: each operator takes
what its FLOPs or its bytes take at the machine's ceilings, whichever is more, and each call costs
the host something (the sum rule of vise_fast/profile/cards.py). The constants are measured in the
same run, between the steps, on other work: a matrix product, a copy, and for a call the embedded
model's step, which does little else: what it takes beyond its kernels, over its calls. That is
with the Python around an operator; `bare_call_s` is a chain of operators without. Nothing is fitted
on what is forecast. The step takes plain PyTorch's path for every op of vise_kernels, because what
a native kernel does is not seen by torch. One thread, CPU time of the process. Left out: what a
GPU's libraries add.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import _checkout
import _measure as measure
import _subjects as subjects
import rollout
import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import prefer

from vise_fast.profile.cards import Card, floor
from vise_fast.profile.launches import Launches, Tally
from vise_fast.system.machine.clock import Clock

CPU = torch.device("cpu")
RESULT = _checkout.ROOT / "bench" / "results" / "forecast_check-cpu.json"
LAYERS = 50


def chain() -> Tensor:
    """What a layer calls, on so few numbers that only the calling takes time."""
    x = torch.ones(4, 8)
    weight = torch.ones(8, 8)
    for _ in range(LAYERS):
        scaled = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        q, k = F.linear(torch.cat([scaled, x]), weight).view(2, 4, 8).unbind(0)
        x = x + F.silu(q[:, :4].repeat(1, 2)) * k.transpose(0, 1).reshape(4, 8)
    return x


@dataclass(frozen=True)
class Counted:
    """A step that can be run, and what one of it was seen to do."""

    contender: rollout.Contender
    seen: Launches

    @classmethod
    def of(cls, subject: subjects.Subject, batch: int, side: int) -> Counted:
        """A paper step on images of side x side pixels, the second of its kind looked at."""
        words = [f"--data.max_pixels={max(side * side, 1024)}", "--model.dtype=float32"]
        given = argparse.Namespace(preset="paper", override=words)
        contender = rollout.contender("fast", subject, given, subjects.pictures(side, side, batch))
        contender.step()
        return cls(contender, looked_at(contender))

    @property
    def calls(self) -> int:
        """Of operators."""
        return self.seen.total.launches


def looked_at(contender: rollout.Contender) -> Launches:
    """One step's counts."""
    seen = Launches("cpu")
    usual = contender.engine.clock
    contender.engine.clock = seen.clock
    with seen:
        contender.step()
    contender.engine.clock = usual
    return seen


def kernels_s(tallies: Iterable[Tally], found: dict[str, float]) -> float:
    """Seconds that operators take at this machine's ceilings."""
    card = Card("this CPU", found["matmul_flop_per_s"], found["copy_bytes_per_s"], "measured")
    return sum(floor(tally, card, 0.0) for tally in tallies)


def constants(small: Counted, smoke: bool) -> dict[str, float]:
    """This machine's ceilings and what a call costs, s."""
    with Launches("cpu") as bare:
        chain()
    runs = {"chain": chain, "small": small.contender.step}
    times = measure.interleaved(runs, CPU, repeats=3, least_s=0.05)
    found = measure.ceilings(CPU, smoke)
    beyond = times["small"].median - kernels_s(small.seen.by_phase.values(), found)
    found["call_s"] = beyond / small.calls
    found["bare_call_s"] = times["chain"].median / bare.total.launches
    return found


def forecast(seen: Launches, found: dict[str, float]) -> dict[str, float]:
    """Seconds of the step and its two parts."""
    kernels = kernels_s(seen.by_phase.values(), found)
    host = seen.total.launches * found["call_s"]
    return {"kernels_s": kernels, "host_s": host, "step_s": kernels + host}


def by_phase(seen: Launches, found: dict[str, float], spent: dict[str, float]) -> dict:
    """Forecast and measured seconds of each phase that a clock sees; phases inside others belong to
    both.
    """
    rows = {}
    for name in spent:
        parts = [t for phase, t in seen.by_phase.items() if name in phase.split(": ")]
        told = kernels_s(parts, found) + sum(t.launches for t in parts) * found["call_s"]
        rows[name] = {"forecast_s": told, "measured_s": spent[name]}
    return rows


def checked(case: Counted, small: Counted, args: argparse.Namespace) -> dict:
    """One case: forecast and measured, constants taken before every repeat."""
    ratios = []
    for _ in range(args.repeats):
        found = constants(small, args.smoke)
        told = forecast(case.seen, found)
        spent = case.contender.phases(Clock(now=lambda: measure.clock(CPU)))
        ratios.append(told["step_s"] / spent.pop("step"))
    ratios.sort()
    return {
        "calls": case.calls,
        "flops": sum(flops * n for (flops, _), n in case.seen.total.kernels.items()),
        "constants": found,
        "forecast": told,
        "phases": by_phase(case.seen, found, spent),
        "forecast_over_measured": {
            "median": ratios[len(ratios) // 2],
            "least": ratios[0],
            "most": ratios[-1],
        },
    }


def show(case: dict) -> None:
    """One case, ratios only: seconds of a CPU are in the document."""
    ratio = case["forecast_over_measured"]
    print(
        f"batch {case['batch']}, {case['size']}: forecast / measured {ratio['median']:.2f} "
        f"({ratio['least']:.2f}-{ratio['most']:.2f}); of the forecast, calls "
        f"{case['forecast']['host_s'] / case['forecast']['step_s']:.0%}"
    )
    total = sum(row["measured_s"] for row in case["phases"].values())
    for name, row in case["phases"].items():
        share = row["measured_s"] / total
        if share > 0.02:
            print(f"    {name:20}{share:5.0%} {row['forecast_s'] / row['measured_s']:6.2f}")


def main(words: list[str]) -> None:
    """Count, measure, tell; the last line is the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mid-100m", help="nano or a name in configs/models")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--side", type=int, nargs="+", default=[128, 256], help="pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.model = "nano"
        args.batch = [1]
        args.side = [128]
        args.repeats = 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prefer("plain")
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(args.model, False, scratch)
        small = Counted.of(subjects.find("nano", False, scratch), 1, 128)
        for batch in args.batch:
            for side in args.side:
                case = Counted.of(subject, batch, side)
                where = {"batch": batch, "size": f"{side}x{side}"}
                cases.append(where | checked(case, small, args))
                show(cases[-1])
    document = {
        "bench": "forecast_check",
        "machine": measure.machine(CPU),
        "setting": {"model": subject.name, "preset": "paper", "path": "plain"},
        "cases": cases,
    }
    measure.finish(document, RESULT if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
