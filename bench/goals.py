"""The goals beside what is known of them: measured on a GPU, counted, forecast, or not measured.

    python bench/goals.py                    from bench/results, and what gpu_suite.sh left there
    python bench/goals.py --gpu /elsewhere   gpu_suite.sh's folder (OUT)

Nothing is measured here: a figure is read from a result file, whose name stands beside it, and a
row without one says so. A forecast is launches.py's arithmetic on counts (sum rule, H200), good to
what forecast_check.py says of it. Figures of a CPU are no answer to these goals and are left out.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkout

RESULTS = _checkout.ROOT / "bench" / "results"
CARD = "H200 141 GB"
STEPS = 4000
"""Updates of the paper's whole run (S3)."""
Document = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """Result documents: of a GPU by bench, and the counts of launches.py."""

    measured: dict[str, list[Document]]
    launches: Document | None

    def engines(self, batch: int, looked_at: bool = False) -> dict[str, Any] | None:
        """The engines of whole paper steps of 2B at this batch: of what was measured side by side,
        the most, and of as many the last. looked_at: whose phases stand beside their floors.
        """
        found: list[dict[str, Any]] = []
        for name in ("profile_step", "rollout"):
            for document in self.measured.get(name, []):
                setting = document["setting"]
                if setting.get("preset", "paper") == "paper" and "2b" in setting["model"]:
                    found += [part for part in document["results"] if part["batch"] == batch]
        if looked_at:
            found = [part for part in found if "floor_s" in best(part)]
        return max(reversed(found), key=lambda part: len(part["engines"]), default=None)

    def forecast_ms(self, case: str) -> float | None:
        """Of a case of launches.py."""
        if self.launches is None or case not in self.launches["cases"]:
            return None
        return self.launches["cases"][case]["forecast_ms"][CARD]["sum"]

    def kernel(self, op: str, words: str) -> Document | None:
        """A row of the kernel bench."""
        for document in reversed(self.measured.get("kernels", [])):
            for row in document["rows"]:
                if row["op"] == op and words in row["shape"]:
                    return row
        return None


@dataclass(frozen=True)
class Goal:
    """A row: each function gives words, or None where nothing is known."""

    name: str
    wanted: str
    measured: Callable[[Known], str | None] = lambda known: None
    forecast: Callable[[Known], str | None] = lambda known: None


# ---- what is read --------------------------------------------------------------------------------


def gather(results: Path, suite: Path) -> Known:
    """Every document of a GPU below `results`, and in the suite's lines."""
    measured: dict[str, list[Document]] = {}
    launches = None
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        if path.name == "launches-qwen3-vl-2b.json":
            launches = document
        _keep(measured, document, path.name)
    lines = suite / "results.jsonl"
    for text in lines.read_text().splitlines() if lines.is_file() else []:
        line = json.loads(text)
        _keep(measured, line["document"], f"gpu: {line['part']}")
    return Known(measured, launches)


def _keep(measured: dict[str, list[Document]], document: Any, source: str) -> None:
    """A bench's document, where a GPU's clock took it."""
    if not isinstance(document, dict) or "bench" not in document:
        return
    clock = document.get("machine", document).get("clock", "")
    if clock.startswith("wall"):
        measured.setdefault(document["bench"], []).append(document | {"source": source})


# ---- the goals -----------------------------------------------------------------------------------


def best(result: Document) -> Document:
    """The engine that is the default on a GPU."""
    engines = result["engines"]
    return engines.get("graphed", engines.get("fast"))


def times(result: Document, other: str) -> str:
    """How many times longer another engine takes, from the medians."""
    if other not in result["engines"]:
        return f"{other} not measured"
    slow = result["engines"][other]["step"]["median_s"]
    return f"{slow / best(result)['step']['median_s']:.1f}x {other}"


def step_measured(batch: int) -> Callable[[Known], str | None]:
    """Milliseconds, images/s and both baselines."""

    def told(known: Known) -> str | None:
        result = known.engines(batch)
        if result is None:
            return None
        ours = best(result)
        parts = [f"{1e3 * ours['step']['median_s']:.0f} ms, {ours['images_per_s']:.1f} images/s"]
        return ", ".join([*parts, times(result, "naive"), times(result, "naive+")])

    return told


def decoding_against_generate(known: Known) -> str | None:
    """Asking and grounding, which decode: transformers' batched `generate` with PEFT over ours."""
    parts = []
    for batch in (1, 32):
        result = known.engines(batch)
        if result is not None and "seconds" in result["engines"].get("naive+", {}):
            stock = _decoding_s(result["engines"]["naive+"])
            parts.append(f"{stock / _decoding_s(best(result)):.1f}x at batch {batch}")
    return ", ".join(parts) or None


def _decoding_s(engine: Document) -> float:
    return engine["seconds"]["ask"] + engine["seconds"]["ground"]


def started(key: str, unit: str) -> Callable[[Known], str | None]:
    """A figure of the last bench of starts, start by start."""

    def told(known: Known) -> str | None:
        for document in reversed(known.measured.get("start", [])):
            every = [f"{s[key]:.3g}" for s in document["starts"] if s[key] is not None]
            return f"{', '.join(every)} {unit}, {Path(document['model']).name}" if every else None
        return None

    return told


def step_forecast(case: str, images: int) -> Callable[[Known], str | None]:
    """By the sum rule."""

    def told(known: Known) -> str | None:
        ms = known.forecast_ms(case)
        return None if ms is None else f"{ms:.0f} ms, {1e3 * images / ms:.1f} images/s"

    return told


def whole_run(known: Known) -> str | None:
    """The paper's updates alone, without start-up."""
    ms = known.forecast_ms("paper_1")
    return None if ms is None else f"{STEPS * ms / 60e3:.1f} min, start-up not included"


def share(phase: str, batch: int) -> Callable[[Known], str | None]:
    """Of a phase's floor: FLOPs at the matmul rate, or bytes at the copy bandwidth."""

    def told(known: Known) -> str | None:
        result = known.engines(batch, looked_at=True)
        if result is None:
            return None
        ours = best(result)
        return f"{ours['floor_s'][phase] / ours['seconds'][phase]:.0%}"

    return told


def reached(known: Known) -> str | None:
    """FLOP/s of a batched step over the matmul rate measured in the same run."""
    result = known.engines(32, looked_at=True)
    if result is None:
        return None
    ours = best(result)
    return f"{ours['floor_s']['step'] / ours['seconds']['step']:.0%} of peak in the step"


def decode_forecast(known: Known) -> str | None:
    """The bytes a decode step must move at full bandwidth, over the forecast of decoding."""
    if known.launches is None or "decode_share" not in known.launches["cases"]["paper_1"]:
        return None
    return f"{known.launches['cases']['paper_1']['decode_share'][CARD]:.0%}"


def kernel_row(op: str, words: str, peer: str) -> Callable[[Known], str | None]:
    """Share of the ceiling, and a peer's time."""

    def told(known: Known) -> str | None:
        row = known.kernel(op, words)
        if row is None:
            return None
        ours = row["contenders"]["ours"]
        parts = [f"{1e3 * ours['median_s']:.2f} ms, {row['share_of_ceiling']:.0%} of the ceiling"]
        for name, other in row["contenders"].items():
            if peer in name:
                parts.append(f"{name} {other['times_ours']:.1f}x")
        return ", ".join(parts)

    return told


def group(known: Known) -> str | None:
    """The update of a group of eight against row by row."""
    for document in reversed(known.measured.get("train_step", [])):
        for row in document["group_scaling"]:
            if row["group"] == 8 and "2b" in document["setting"]["update_model"]:
                less = row["row-wise"]["bytes"] / row["shared"]["bytes"]
                return f"{row['speedup']['median']:.1f}x time, {less:.1f}x memory"
    return None


def counted(case: str, key: str) -> Callable[[Known], str | None]:
    """A count of launches.py: true of any card."""

    def told(known: Known) -> str | None:
        if known.launches is None or case not in known.launches["cases"]:
            return None
        return f"{known.launches['cases'][case][key]:,} counted"

    return told


GOALS = (
    Goal(
        "S1 paper, 1 image",
        "<= 110 ms, >= 20x NAIVE, >= 8x NAIVE+",
        step_measured(1),
        step_forecast("paper_1", 1),
    ),
    Goal(
        "S2 paper, 32 images",
        ">= 22 images/s, >= 60x NAIVE",
        step_measured(32),
        step_forecast("paper_32", 32),
    ),
    Goal("S3 the paper's whole run", "<= 8 min", forecast=whole_run),
    Goal("S4 decode, batch 1", ">= 50% of bandwidth", share("ask", 1), decode_forecast),
    Goal(
        "S5 decode against generate + PEFT",
        ">= 12x at batch 1, >= 6x at 32",
        decoding_against_generate,
    ),
    Goal("S6 vision encode, 32 images", ">= 3x SDPA, >= 45% of peak", share("encode", 32)),
    Goal("S7 batched step", ">= 33% of peak, >= 45% in the update", reached),
    Goal(
        "S8 log-prob head",
        "<= 128 MB extra, >= 1.5x Liger, >= 1.1x CCE",
        kernel_row("linear_logprob", "bfloat16", "iger"),
    ),
    Goal(
        "S9 log-prob of ready logits",
        ">= 80% of copy bandwidth, >= 3x TRL",
        kernel_row("token_logprob", "bfloat16, forward", "TRL"),
    ),
    Goal(
        "S10 ghost blur, 64 images",
        "<= 0.5 ms, >= 10x kornia, >= 100x OpenCV",
        kernel_row("ghost", "64 x 480x640, blur", "kornia"),
    ),
    Goal(
        "S11 uint8 to patches",
        ">= 20x stock processor",
        kernel_row("resize + patchify", "", "stock"),
    ),
    Goal("S12 group of 8, update", ">= 4x time, >= 3x memory", group),
    Goal(
        "S13 first update after start",
        "<= 30 s cold, <= 15 s warm",
        started("first_update_s", "s"),
    ),
    Goal(
        "S14 rollout against update log-prob",
        "<= 0.01 nat a token in bf16",
        started("logprob_gap", "nat"),
    ),
    Goal("launches, paper, 1 image", "<= 6,500 (2,500 for S1)", counted("paper_1", "launches")),
    Goal("launches, robust, 8 images", "<= 9,000", counted("robust_8", "launches")),
    Goal("launches, paper, 1 image, nf4", "<= 9,000", counted("paper_1_nf4", "launches")),
    Goal("launches, paper, 1 image, int8", "<= 9,000", counted("paper_1_int8", "launches")),
    Goal("blocking copies, paper, 1 image", "<= 4", counted("paper_1", "blocking_copies")),
    Goal("reads back, paper, 1 image", "<= 6", counted("paper_1", "reads")),
)


def rows(known: Known) -> list[dict[str, str | None]]:
    """The table."""
    return [
        {
            "goal": goal.name,
            "wanted": goal.wanted,
            "measured": goal.measured(known),
            "forecast": goal.forecast(known),
        }
        for goal in GOALS
    ]


def main(words: list[str]) -> None:
    """Read, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--gpu", type=Path, help="gpu_suite.sh's folder; RESULTS/gpu")
    args = parser.parse_args(words)
    known = gather(args.results, args.gpu or args.results / "gpu")
    table = rows(known)
    print("| goal | wanted | measured or counted | forecast (H200, not measured) |")
    print("|---|---|---|---|")
    for row in table:
        measured = row["measured"] or "not measured"
        print(f"| {row['goal']} | {row['wanted']} | {measured} | {row['forecast'] or ''} |")
    sources = {name: [d["source"] for d in held] for name, held in known.measured.items()}
    print(json.dumps({"bench": "goals", "rows": table, "sources": sources}))


if __name__ == "__main__":
    main(sys.argv[1:])
