"""A whole step of the method, rollout and update, by every engine: the fast one, transformers' own
modules, NAIVE and NAIVE+ (naive.py).

    python bench/rollout.py                                     the embedded model at batch 1 and
    16: fast, naive, naive+
    python bench/rollout.py --model mid-100m --size 640x480 --batch 8
    python bench/rollout.py --model qwen3-vl-2b --batch 1 32 --plot step.png --write        (a GPU;
    random weights of the true shapes)
    python bench/rollout.py --smoke                             does everything run? under a minute
    on a CPU

Answers are locked to 14 tokens for a query and 22 for a box (verdict texts: 8), so that random
weights are as good as real ones; prompts, views, ghosts, parsing, rewards and the loss are the same
code for everybody. Times come from interleaved whole steps; phases, FLOPs, launches and syncs from
one further step each, because looking slows the step down. `floor` is what the phase's FLOPs and
its decode steps' bytes would take at the matmul rate and copy bandwidth measured in the same run.
"minimal" is profile.minimal.minimal_step for the prompts used here. Figures from a CPU are ratios and counts;
its seconds (CPU time, one thread) are in the JSON only. Left out: real answers, image decoding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import _measure as measure  # noqa: E402
import _subjects as subjects  # noqa: E402
from naive import NaiveEngine, NaiveLearner, NaivePlusEngine, NaivePolicy  # noqa: E402
from transformers import AutoConfig, AutoTokenizer  # noqa: E402

from vise_fast.config.schema import Config  # noqa: E402
from vise_fast.engine.fast import FastEngine  # noqa: E402
from vise_fast.engine.graphed import GraphedEngine  # noqa: E402
from vise_fast.engine.stock import StockBackbone, StockEngine  # noqa: E402
from vise_fast.images.image import Image  # noqa: E402
from vise_fast.method.experience import play_batch  # noqa: E402
from vise_fast.method.learner import Learner  # noqa: E402
from vise_fast.method.step_plan import Lengths, StepPlan  # noqa: E402
from vise_fast.model import load as model
from vise_fast.profile import flops as perf  # noqa: E402
from vise_fast.profile.host_syncs import Work  # noqa: E402
from vise_fast.profile.minimal import Shapes, minimal_step  # noqa: E402
from vise_fast.profile.roofline import decode_bytes  # noqa: E402
from vise_fast.system import allocator
from vise_fast.system.clock import Clock, peak_memory  # noqa: E402
from vise_fast.text.prompts import style_for  # noqa: E402
from vise_fast.text.tokens import Tokens  # noqa: E402

ENGINES = ("fast", "graphed", "unshared", "stock", "naive", "naive+")
DECODED = {"ask": subjects.QUERY_TOKENS - 1, "ground": subjects.BOX_TOKENS - 1}


@dataclass
class Contender:
    """One engine with its learner, ready to step."""

    name: str
    engine: FastEngine
    learner: Learner
    config: Config
    images: list[Image]
    modules: list[torch.nn.Module]
    steps: int = 0

    def play(self) -> list:
        self.steps += 1
        return play_batch(self.engine, self.images, self.config, self.steps)

    def step(self) -> dict[str, float]:
        metrics = self.learner.learn(self.play(), self.steps)
        if metrics["scored"] < 1:
            raise RuntimeError(
                f"{self.name}: only {metrics['scored']:.0%} of the boxes were scored; the locked "
                "step is not whole"
            )
        return metrics

    def phases(self, clock: Clock) -> dict[str, float]:
        """One step's phases by this clock, the step's whole first."""
        usual = self.engine.clock
        self.engine.clock = clock
        start = clock.now()
        self.step()
        total = clock.now() - start
        self.engine.clock = usual
        return {"step": total} | clock.take()


# ---- contenders ----------------------------------------------------------------------------------


def contender(
    name: str, subject: subjects.Subject, args: argparse.Namespace, images: list[Image]
) -> Contender:
    own = {
        "naive": ["--train.micro_batch=1", "--update.kl=k1_loss"],
        "unshared": ["--train.share_forward=false"],
    }.get(name, [])
    config = subject.config(args.preset, len(images), [*args.override, *own])
    if name.startswith("naive"):
        engine = (NaivePlusEngine if name == "naive+" else NaiveEngine)(
            subject, config, _locked(subject)
        )
        return Contender(
            name,
            engine,
            NaiveLearner(NaivePolicy(engine), engine, config),
            config,
            images,
            engine.models(),
        )
    policy = model.load(config, weights=subject.weights)
    policy.tokens = subjects.Locked(policy.tokens)
    if name == "stock":
        engine = StockEngine(StockBackbone(policy.model), policy.tokens)
    else:
        engine = (GraphedEngine if name == "graphed" else FastEngine)(
            policy.backbone, policy.tokens
        )
    return Contender(name, engine, Learner(policy, engine, config), config, images, [policy.model])


def _locked(subject: subjects.Subject) -> subjects.Locked:
    config = AutoConfig.from_pretrained(subject.directory)
    tokenizer = AutoTokenizer.from_pretrained(subject.directory)
    return subjects.Locked(
        Tokens(tokenizer, style_for(config), config.text_config.vocab_size, config.image_token_id)
    )


def plan(c: Contender) -> StepPlan:
    """The locked step; the minimum is that of an update with a forward pass of its own."""
    return replace(StepPlan.of(c.config), shares_forward=False)


def lengths(c: Contender) -> Lengths:
    """Tokens of the locked step's pieces."""
    tokens = c.engine.tokens
    style = tokens.style
    ids = getattr(tokens, "_locked", tokens)
    query = subjects.QUERIES[style.name]
    return Lengths(
        len(ids.head),
        len(ids.tail),
        len(ids.row(style.ask())),
        len(ids.row(style.ground(query))),
        len(ids.verdict_row(style.verify(query))),
        subjects.QUERY_TOKENS,
        subjects.BOX_TOKENS,
    )


# ---- looking at one contender --------------------------------------------------------------------


def look(
    c: Contender, shapes: Shapes, ceilings: dict[str, float], device: torch.device, memory: bool
) -> dict:
    """Phases, counts, FLOPs, launches, syncs and memory of single steps."""
    batch = len(c.images)
    size = c.images[0].pixels.shape[:2]
    found = {
        "counts": _counts(c, plan(c)),
        "seconds": c.phases(Clock(now=lambda: measure.clock(device))),
    }
    with perf.executed_flops() as counter:
        found["flops"] = c.phases(Clock(now=counter.get_total_flops))
    with Work([p for module in c.modules for p in module.parameters()]) as work:
        found["launches"] = c.phases(Clock(now=lambda: work.ops))
    found["syncs"] = dict(work.syncs) | {"all": work.total}
    minimal = batch * sum(minimal_step(shapes, plan(c), lengths(c), size).values())
    found["executed_over_minimal"] = found["flops"]["step"] / minimal
    found["minimal_flops"] = minimal
    found["floor_s"] = _floors(c, shapes, found["flops"], ceilings)
    if memory:
        found["extra_bytes"] = measure.extra_bytes(c.step, device)
    if device.type == "cuda":
        found["kernel_launches"] = _kernel_launches(c.step)
        found["peak_reserved_bytes"] = peak_memory(device)
    return found


def _counts(c: Contender, p: StepPlan) -> dict[str, float]:
    """Work per distinct image in the rollout, and what the update adds."""
    c.engine.counters.take()
    slices = c.play()
    rollout = c.engine.counters.take()
    c.learner.learn(slices, c.steps)
    update = c.engine.counters.take()
    distinct = len(c.images) * (1 + p.views + p.ghosts)
    both = 0 if p.policy_judges else len(c.images)
    return {
        "distinct_images": distinct,
        "encodes_per_distinct_image": (rollout["images_encoded"] + update["images_encoded"])
        / distinct,
        "prefixes_per_distinct_image_and_adapter_state": rollout["prefixes"] / (distinct + both),
        "rollout": rollout,
        "update": update,
    }


def _floors(
    c: Contender, s: Shapes, flops: dict[str, float], ceilings: dict[str, float]
) -> dict[str, float]:
    """Seconds each phase would take at the ceilings: its FLOPs at the matmul rate, or its decode
    steps at the copy bandwidth.
    """
    dtype = c.config.model.dtype
    half = dtype == "bfloat16" or (dtype == "auto" and c.engine.device.type == "cuda")
    width = 2 if half else 4
    batch = len(c.images)
    rows = {"ask": batch, "ground": batch * plan(c).boxes}
    pieces = lengths(c)
    height, side = c.images[0].pixels.shape[:2]
    prefix = pieces.head + height * side // (s.patch * s.merge) ** 2 + pieces.tail
    floors = {name: count / ceilings["matmul_flop_per_s"] for name, count in flops.items()}
    for name, steps in DECODED.items():
        context = prefix + getattr(pieces, name) + steps
        moved = steps * decode_bytes(s, rows[name], context, width, width)
        floors[name] = max(floors[name], moved / ceilings["copy_bytes_per_s"])
    return floors


def _kernel_launches(step: Callable) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    calls = {event.key: event.count for event in profile.key_averages()}
    return {
        name: calls[name]
        for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
        if name in calls
    }


# ---- one batch size ------------------------------------------------------------------------------


def run(
    subject: subjects.Subject,
    args: argparse.Namespace,
    batch: int,
    device: torch.device,
    ceilings: dict[str, float],
) -> dict:
    images = (
        subjects.pictures(*args.size, batch)
        if args.images is None
        else subjects.folder(args.images, args.size, batch)
    )
    contenders = {name: contender(name, subject, args, images) for name in args.engine}
    times = measure.interleaved(
        {name: c.step for name, c in contenders.items()}, device, args.repeats, least_s=0.0
    )
    shapes = Shapes.of(
        AutoConfig.from_pretrained(subject.directory), contenders[args.engine[0]].config.lora.r
    )
    looks = {
        name: look(c, shapes, ceilings, device, memory=not args.smoke)
        for name, c in contenders.items()
    }
    engines = {
        name: {"step": times[name].summary(), "images_per_s": batch / times[name].median}
        | looks[name]
        for name in contenders
    }
    ratios = {
        f"{name} / {first}": _ratio(times[name].seconds, times[first].seconds)
        for first in args.engine[:1]
        for name in args.engine[1:]
    }
    return {"batch": batch, "engines": engines, "ratios": ratios}


def _ratio(slow: list[float], quick: list[float]) -> dict[str, float]:
    """Of neighbouring repeats: both saw the same machine."""
    ratios = torch.tensor([a / b for a, b in zip(slow, quick, strict=True)], dtype=torch.float64)
    return {
        "median": ratios.median().item(),
        "least": ratios.min().item(),
        "most": ratios.max().item(),
    }


# ---- telling -------------------------------------------------------------------------------------


def table(result: dict, ceilings: dict[str, float], device: torch.device) -> str:
    """Phases of every engine: share of the step (GPU: ms), share of the floor, launches; then
    counts and ratios.
    """
    gpu = device.type == "cuda"
    lines = []
    for name, e in result["engines"].items():
        seconds = e["seconds"]
        floors = e["floor_s"]
        lines.append(
            f"\nbatch {result['batch']}, {name}"
            + (
                f": {e['step']['median_s'] * 1e3:.1f} ms, {e['images_per_s']:.2f} images/s"
                if gpu
                else ""
            )
        )
        for phase, spent in seconds.items():
            if phase != "step":
                shown = f"{spent * 1e3:9.1f} ms" if gpu else f"{spent / seconds['step']:9.1%}"
                near = floors.get(phase, 0.0) / spent if spent > 0 else 0.0
                lines.append(
                    f"  {phase:10s}{shown}   floor {near:6.1%}   "
                    f"{e['flops'].get(phase, 0) / 1e9:10.1f} GFLOP "
                    f"{e['launches'].get(phase, 0):8.0f} launches"
                )
        lines.append(_summary(e, ceilings))
    lines += [
        f"\n{pair}: {r['median']:.2f}x ({r['least']:.2f}-{r['most']:.2f})"
        for pair, r in result["ratios"].items()
    ]
    return "\n".join(lines)


def _summary(e: dict, ceilings: dict[str, float]) -> str:
    counts = e["counts"]
    rollout = e["counts"]["rollout"]
    reached = e["flops"]["step"] / e["seconds"]["step"] / ceilings["matmul_flop_per_s"]
    return (
        f"  encodes {counts['encodes_per_distinct_image']:.2f}, prefixes "
        f"{counts['prefixes_per_distinct_image_and_adapter_state']:.2f} per distinct image; "
        f"{rollout['forwards']} forwards + {rollout['decode_steps']} decode steps; executed / "
        f"minimal FLOPs {e['executed_over_minimal']:.3f}; "
        f"{e['syncs']['all']} syncs; {e['launches']['step']:.0f} launches; {reached:.1%} of the "
        "matmul rate"
    )


def plot(results: list[dict], path: Path) -> None:
    """Stacked phases, one bar per engine and batch, as shares of the slowest step of its batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (
            f"{name}\nbatch {r['batch']}",
            e["seconds"],
            max(x["seconds"]["step"] for x in r["engines"].values()),
        )
        for r in results
        for name, e in r["engines"].items()
    ]
    phases = list(
        dict.fromkeys(phase for _, seconds, _ in bars for phase in seconds if phase != "step")
    )
    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(bars), 4.5), layout="constrained")
    floor = [0.0] * len(bars)
    for phase in phases:
        heights = [seconds.get(phase, 0.0) / slowest for _, seconds, slowest in bars]
        axes.bar([label for label, _, _ in bars], heights, bottom=floor, label=phase)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.set_ylabel("time, slowest engine of the batch = 1")
    axes.legend()
    figure.savefig(path, dpi=120)


# ---- the command ---------------------------------------------------------------------------------


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="nano", help="nano, a name in configs/models, or a directory"
    )
    parser.add_argument(
        "--weights",
        choices=("own", "random"),
        default="own",
        help="random: the shapes of a directory's model with made-up weights",
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        choices=ENGINES,
        default=["fast", "naive+", "naive"],
        help="the first is what the others are compared with",
    )
    parser.add_argument("--images", type=Path, help="a folder instead of drawn scenes")
    parser.add_argument("--size", help="WIDTHxHEIGHT; default 128x128 for nano, 640x480 else")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="images per update; default 1 16 for nano, 8 else"
    )
    parser.add_argument("--preset", choices=("paper", "robust"), default="paper")
    parser.add_argument("--samples", type=int, help="G instead of the preset's")
    parser.add_argument(
        "--quant", choices=("none", "int8", "nf4"), default="none", help="fast and stock only"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="write a PNG")
    parser.add_argument(
        "--write", action="store_true", help="put the document under bench/results/"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the embedded model, one image, one repeat, all engines",
    )
    args = parser.parse_args(words)
    if args.smoke:
        args.model = "nano"
        args.batch = [1]
        args.repeats = 1
        args.engine = list(ENGINES)
    nano = args.model == "nano"
    width, height = (
        int(side) for side in (args.size or ("128x128" if nano else "640x480")).split("x")
    )
    args.size = (height, width)
    args.batch = args.batch or ([1, 16] if nano else [8])
    args.override = [
        f"--model.device={args.device}",
        f"--model.dtype={args.dtype}",
        f"--model.quant={args.quant}",
    ]
    args.override += [f"--data.max_pixels={max(height * width, 1024)}"] + (
        [f"--rollout.samples={args.samples}"] if args.samples else []
    )
    return args


def main(words: list[str]) -> None:
    args = parse(words)
    device = model.device_of(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    allocator.keep_freed_memory()  # as a run does; here for every engine
    torch.manual_seed(0)
    ceilings = measure.ceilings(device, args.smoke, args.dtype)
    rate = ceilings["matmul_flop_per_s"] / 1e12
    bandwidth = ceilings["copy_bytes_per_s"] / 1e9
    print(f"ceilings measured in this run: {rate:.3g} TFLOP/s, {bandwidth:.3g} GB/s copied")
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(args.model, args.weights == "random", scratch)
        results = [run(subject, args, batch, device, ceilings) for batch in args.batch]
    for result in results:
        print(table(result, ceilings, device))
    if args.plot:
        plot(results, args.plot)
    height, width = args.size
    setting = dict(
        model=subject.name,
        preset=args.preset,
        size=f"{width}x{height}",
        samples=args.samples,
        quant=args.quant,
        dtype=args.dtype,
        repeats=args.repeats,
    )
    kind = args.preset if args.dtype == "auto" else f"{args.preset}-{args.dtype}"
    name = f"rollout-{args.model.replace('/', '_')}-{width}x{height}-{kind}-{device.type}.json"
    measure.finish(
        {
            "bench": "rollout",
            "machine": measure.machine(device),
            "ceilings": ceilings,
            "setting": setting,
            "results": results,
        },
        measure.ROOT / "bench" / "results" / name if args.write else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
