"""What one step makes a GPU's host do, counted without a GPU and without weights, and a forecast of
what that means on seven cards.

    python bench/launches.py --write                all cases at Qwen3-VL-2B shapes (two minutes)
    python bench/launches.py --case paper_1 -v      one case, with the operators of every phase
    python bench/launches.py --cards --write        shipped presets with their own settings, on the
                                                    cards that hold them
    python bench/launches.py --smoke                does it run?

The real code of a step runs on tensors without data, every branch a GPU takes is taken
(vise_fast/estimate/launches.py). Terms: a *launch* is a kernel or a graph replay that the host
issues, operators of several kernels counted as many; a *blocking copy* waits for the stream; a
*read* brings values home. Kernels inside replays stand apart. The forecast is arithmetic on these
counts (vise_fast/profile/cards.py), not a measurement. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _checkout
import _measure as measure
import torch
from transformers import AutoConfig

from vise_fast.config.places import SHAPES
from vise_fast.config.schema import Config, load, with_changes
from vise_fast.estimate.launches import count_step
from vise_fast.estimate.planner import GIB, usable
from vise_fast.estimate.rehearsal import rehearse
from vise_fast.method.step_plan import StepPlan
from vise_fast.model.load import known_shapes
from vise_fast.profile.cards import A_LAUNCH, CARDS, Card, floor, forecast
from vise_fast.profile.launches import Launches, Tally
from vise_fast.profile.minimal import PINNED, Shapes, minimal_step
from vise_fast.profile.roofline import decode_bytes

SIZE = (480, 640)
MIXED = [(480, 640), (384, 512), (640, 480), (512, 512), (352, 640), (480, 480), (640, 640)]
RESULT = _checkout.ROOT / "bench" / "results" / "launches-{model}.json"
GOALS = {"paper_1": 0.110, "paper_32": 32 / 22}
"""Seconds of a step on an H200 (S1, S2)."""


@dataclass(frozen=True)
class Case:
    """A step: the preset, the (height, width) of each image, words of the configuration; `file`:
    the shipped configuration under them, with its own model.
    """

    preset: str
    sizes: tuple[tuple[int, int], ...]
    words: tuple[str, ...] = ()
    file: str | None = None

    def config(self) -> Config:
        """As a GPU would run it."""
        words = (f"--reward.preset={self.preset}", f"--train.batch={len(self.sizes)}")
        return load(self.file, ["--model.dtype=bfloat16", *words, *self.words])


CASES = {
    "paper_1": Case("paper", (SIZE,)),
    "paper_32": Case("paper", (SIZE,) * 32),
    "robust_8": Case("robust", (SIZE,) * 8),
    "paper_1_nf4": Case("paper", (SIZE,), ("--model.quant=nf4",)),
    "paper_1_int8": Case("paper", (SIZE,), ("--model.quant=int8",)),
    "paper_8_mixed": Case("paper", tuple(MIXED[i % len(MIXED)] for i in range(8))),
    "paper_1_eager": Case("paper", (SIZE,), ("--model.graphs=false",)),
}
SHIPPED = {
    "lowmem-8gb": Case("robust", (SIZE,) * 8, file="lowmem-8gb"),
    "lowmem-12gb": Case("robust", (SIZE,) * 8, file="lowmem-12gb"),
    "lowmem-16gb": Case("robust", (SIZE,) * 8, file="lowmem-16gb"),
    "lowmem-24gb": Case("robust", (SIZE,) * 8, file="lowmem-24gb"),
    "qwen3-vl-2b": Case("robust", (SIZE,) * 8, file="qwen3-vl-2b"),
    "qwen3-vl-2b_paper_1": Case("paper", (SIZE,), file="qwen3-vl-2b"),
}
"""Where a run on a card of one's own begins."""


@dataclass(frozen=True)
class Counted:
    """A case: its counts, executed over minimal FLOPs, and bytes that decoding a row of an image
    must move, by phase.
    """

    seen: Launches
    ratio: float
    decoding: dict[str, float]


def counted(name: str, case: Case) -> Counted:
    """One case at a model's shapes."""
    words = (f"--model.path=Qwen/{name}", *case.words)
    config = usual_answers(Case(case.preset, case.sizes, words).config())
    shapes = AutoConfig.from_pretrained(SHAPES / f"{name}.json", trust_remote_code=False)
    seen = count_step(config, shapes, case.sizes)
    plan = StepPlan.of(config)
    sizes = Shapes.of(shapes, config.lora.r)
    least = sum(sum(minimal_step(sizes, plan, PINNED, size).values()) for size in case.sizes)
    done = sum(flops * count for (flops, _), count in seen.total.kernels.items())
    return Counted(seen, done / least, decoding(sizes, case.sizes[0]))


def usual_answers(config: Config) -> Config:
    """With answers as long as they usually are, not as long as they may be."""
    limits = {"rollout.query_tokens": PINNED.query, "rollout.box_tokens": PINNED.box}
    return with_changes(config, limits)


def decoding(shapes: Shapes, size: tuple[int, int]) -> dict[str, float]:
    """Bytes that the decode steps of each answer must move, for one row behind one image."""
    tokens = size[0] * size[1] // (shapes.patch * shapes.merge) ** 2
    prefix = PINNED.head + tokens + PINNED.tail
    found = {}
    for question, limit in (("ask", PINNED.query), ("ground", PINNED.box)):
        context = prefix + getattr(PINNED, question) + limit - 1
        found[f"{question}: decode"] = (limit - 1) * decode_bytes(shapes, 1, context)
    return found


def decode_share(found: Counted) -> dict[str, float]:
    """By card, for a step of one row: time at the memory's full bandwidth over the sum rule's."""
    shares = {}
    for card in CARDS:
        tallies = [found.seen.by_phase[name] for name in found.decoding]
        told = sum(floor(t, card) + t.launches * A_LAUNCH for t in tallies)
        shares[card.name] = sum(found.decoding.values()) / card.bandwidth / told
    return shares


def table(seen: Launches, verbose: bool) -> None:
    """Phase by phase."""
    print(f"{'phase':32}{'launches':>9}{'blocking':>9}{'reads':>6}{'replays':>8}{'inside':>8}")
    for name, tally in [*seen.by_phase.items(), ("step", seen.total)]:
        _row(name, tally)
        if verbose and name != "step":
            for operator, count in tally.names.most_common(12):
                print(f"    {count:7} {operator}")


def _row(name: str, t: Tally) -> None:
    numbers = f"{t.launches:9}{t.blocking_copies:9}{t.reads:6}{t.replays:8}{t.inside:8}"
    print(f"{name:32}{numbers}")


def forecasts(seen: Launches, cards: Sequence[Card] = CARDS) -> dict[str, dict[str, float]]:
    """Milliseconds by card and rule."""
    found = {}
    for card in cards:
        seconds = forecast(seen, card)
        found[card.name] = {rule: 1e3 * value for rule, value in seconds._asdict().items()}
    return found


def show(found: dict[str, dict[str, float]], images: int, goal: float | None) -> None:
    """The forecast, labelled as one."""
    print("forecast, ms a step (arithmetic on counts, not measured): floor / max rule / sum rule")
    for card, ms in found.items():
        speed = images / ms["sum"] * 1e3
        print(
            f"    {card:20}{ms['floor']:8.0f} /{ms['max']:7.0f} /{ms['sum']:7.0f}   "
            f"{speed:6.1f} images/s by the sum rule"
        )
    if goal is not None:
        print(f"    goal on an H200: {1e3 * goal:.0f} ms")


def document(case: Counted, found: dict) -> dict:
    """One case of the result file."""
    seen = case.seen
    total = seen.total
    return {
        "launches": total.launches,
        "blocking_copies": total.blocking_copies,
        "reads": total.reads,
        "replays": total.replays,
        "kernels_inside_replays": total.inside,
        "executed_over_minimal_flops": case.ratio,
        "phases": {
            name: {
                "launches": t.launches,
                "blocking_copies": t.blocking_copies,
                "reads": t.reads,
                "inside": t.inside,
            }
            for name, t in seen.by_phase.items()
        },
        "forecast_ms": found,
    }


def on_cards(name: str) -> dict:
    """A shipped preset on the cards that hold its step: counted, shown; its part of the result
    file.
    """
    case = SHIPPED[name]
    config = case.config()
    shapes = known_shapes(config.model.path)
    peak = rehearse(config, shapes, list(case.sizes), torch.bfloat16).peak
    seen = count_step(usual_answers(config), shapes, case.sizes)
    found = forecasts(seen, holding(config, peak))
    model = config.model.path.rsplit("/", 1)[-1]
    print(f"\n== {name}: {model}, {config.reward.preset}, images of 640x480: {len(case.sizes)}")
    print(f"    peak {peak / GIB:.1f} GiB predicted, {seen.total.launches:,} launches an update")
    show(found, len(case.sizes), None)
    sys.stdout.flush()  # the next takes minutes
    return {
        "model": model,
        "preset": config.reward.preset,
        "images": len(case.sizes),
        "peak_gib": peak / GIB,
        "launches": seen.total.launches,
        "blocking_copies": seen.total.blocking_copies,
        "reads": seen.total.reads,
        "forecast_ms": found,
    }


def holding(config: Config, peak: float) -> list[Card]:
    """The cards with room for so many bytes, as the planner reckons."""
    found = []
    for card in CARDS:
        budget = {"memory.budget_gb": float(card.memory_gb)}
        if peak <= usable(with_changes(config, budget)):
            found.append(card)
    return found


def write(name: str, words: list[str], cases: dict[str, dict]) -> None:
    """The result file; other cases that the same commit counted on this day stay in it."""
    path = Path(str(RESULT).format(model=name))
    machine = measure.machine(torch.device("cpu"))
    before = json.loads(path.read_text()) if path.is_file() else {}
    kept = before["cases"] if before.get("machine") == machine else {}
    results = {
        "bench": "launches",
        "machine": machine,
        "cards": [card._asdict() for card in CARDS],
        "command": " ".join(["python", "bench/launches.py", *words]),
        "cases": kept | cases,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="qwen3-vl-2b", help="a name in configs/models")
    add("--case", nargs="+", choices=CASES, default=list(CASES))
    cards = "shipped presets (all unless named) on the cards that hold them"
    add("--cards", nargs="*", choices=SHIPPED, metavar="PRESET", help=cards)
    add("-v", "--verbose", action="store_true", help="the operators of every phase")
    add("--write", action="store_true", help="put the document under bench/results/")
    add("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.model = "mid-100m"
        args.case = ["paper_1"]
    return args


def at_shapes(args: argparse.Namespace) -> dict[str, dict]:
    """The cases at one model's shapes: counted, shown; their part of the result file."""
    cases = {}
    for name in args.case:
        case = CASES[name]
        known = counted(args.model, case)
        seen = known.seen
        found = forecasts(seen)
        cases[name] = document(known, found)
        print(f"\n== {name}: {args.model}, executed over minimal FLOPs {known.ratio:.3f}")
        table(seen, args.verbose)
        show(found, len(case.sizes), GOALS.get(name) if args.model == "qwen3-vl-2b" else None)
        if name == "paper_1":
            cases[name]["decode_share"] = decode_share(known)
            shares = [f"{card} {value:.0%}" for card, value in cases[name]["decode_share"].items()]
            print(f"    decoding, of the bandwidth floor: {', '.join(shares)}")
    return cases


def main(words: list[str]) -> None:
    """Count, show, write."""
    args = parse(words)
    torch.set_num_threads(1)
    if args.cards is None:
        cases = at_shapes(args)
    else:
        cases = {name: on_cards(name) for name in args.cards or SHIPPED}
    if args.write:
        write(args.model if args.cards is None else "cards", words, cases)
    keys = ("launches", "blocking_copies", "reads")
    print(json.dumps({name: {key: case[key] for key in keys} for name, case in cases.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
