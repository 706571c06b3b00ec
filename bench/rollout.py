"""A whole step of the method, rollout and update, by every engine: the fast one, transformers' own
modules, NAIVE and NAIVE+ (naive.py).

    python bench/rollout.py            the embedded model at batch 1 and 16: fast, naive, naive+
    python bench/rollout.py --model mid-100m --size 640x480 --batch 8
    python bench/rollout.py --model qwen3-vl-2b --batch 1 32 --plot step.png --write
                                       a GPU; random weights of the true shapes
    python bench/rollout.py --smoke    does everything run? under a minute on a CPU

Answers are locked to 14 tokens for a query and 22 for a box (verdict texts: 8), so that random
weights are as good as real ones; prompts, views, ghosts, parsing, rewards and the loss are the same
code for everybody. Times come from interleaved whole steps; phases, FLOPs, launches and syncs from
one further step each, because looking slows the step down. `floor` is what the phase's FLOPs and
its decode steps' bytes would take at the matmul rate and copy bandwidth measured in the same run.
"minimal" is profile.minimal.minimal_step for the prompts used here. Figures from a CPU are ratios
and counts; its seconds (CPU time, one thread) are in the JSON only. Left out: real answers, image
decoding.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import _checkout
import _measure as measure
import _subjects as subjects
import torch
from naive import NaiveEngine, NaiveLearner, NaivePlusEngine, NaivePolicy
from transformers import AutoConfig, AutoTokenizer

from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import GraphedEngine
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.images.image import Image
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import Lengths, StepPlan
from vise_fast.model import load as model
from vise_fast.profile import flops as perf
from vise_fast.profile.host_syncs import Work
from vise_fast.profile.minimal import Shapes, minimal_step
from vise_fast.profile.roofline import decode_bytes
from vise_fast.system.machine import allocator
from vise_fast.system.machine.clock import Clock, peak_memory
from vise_fast.text.prompts import style_for
from vise_fast.text.tokens import Tokens

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
        """One more rollout: its slices."""
        self.steps += 1
        return play_batch(self.engine, self.images, self.config, self.steps)

    def step(self) -> dict[str, float]:
        """One more whole step: its metrics. RuntimeError: a box went unscored."""
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
    """The engine called `name` over weights of its own."""
    own = {
        "naive": ["--train.micro_batch=1", "--update.kl=k1_loss"],
        "unshared": ["--train.share_forward=false"],
    }.get(name, [])
    config = subject.config(args.preset, len(images), [*args.override, *own])
    if name.startswith("naive"):
        kind = NaivePlusEngine if name == "naive+" else NaiveEngine
        engine = kind(subject, config, _locked(subject))
        learner = NaiveLearner(NaivePolicy(engine), engine, config)
        return Contender(name, engine, learner, config, images, engine.models())
    policy = model.load(config, weights=subject.weights)
    policy.tokens = subjects.Locked(policy.tokens)
    if name == "stock":
        engine = StockEngine(StockBackbone(policy.model), policy.tokens)
    else:
        kind = GraphedEngine if name == "graphed" else FastEngine
        engine = kind(policy.backbone, policy.tokens)
    return Contender(name, engine, Learner(policy, engine, config), config, images, [policy.model])


def _locked(subject: subjects.Subject) -> subjects.Locked:
    config = AutoConfig.from_pretrained(subject.directory, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(subject.directory, trust_remote_code=False)
    vocabulary = config.text_config.vocab_size
    return subjects.Locked(Tokens(tokenizer, style_for(config), vocabulary, config.image_token_id))


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
    every = itertools.chain.from_iterable(module.parameters() for module in c.modules)
    with Work(list(every)) as work:
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
    encoded = rollout["images_encoded"] + update["images_encoded"]
    return {
        "distinct_images": distinct,
        "encodes_per_distinct_image": encoded / distinct,
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
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
    return {name: calls[name] for name in names if name in calls}


# ---- one batch size ------------------------------------------------------------------------------


def run(
    subject: subjects.Subject,
    args: argparse.Namespace,
    batch: int,
    device: torch.device,
    ceilings: dict[str, float],
) -> dict:
    """All engines on the same images: times, looks, and ratios to the first."""
    if args.images is None:
        images = subjects.pictures(*args.size, batch)
    else:
        images = subjects.folder(args.images, args.size, batch)
    contenders = {name: contender(name, subject, args, images) for name in args.engine}
    steps = {name: c.step for name, c in contenders.items()}
    times = measure.interleaved(steps, device, args.repeats, least_s=0.0)
    first, *others = args.engine
    rank = contenders[first].config.lora.r
    shapes = Shapes.of(AutoConfig.from_pretrained(subject.directory, trust_remote_code=False), rank)
    engines = {}
    for name, c in contenders.items():
        engines[name] = {"step": times[name].summary(), "images_per_s": batch / times[name].median}
        if args.times_only:
            continue
        engines[name] |= look(c, shapes, ceilings, device, memory=not args.smoke)
    ratios = {f"{name} / {first}": measure.ratio(times[name], times[first]) for name in others}
    return {"batch": batch, "engines": engines, "ratios": ratios}


# ---- telling -------------------------------------------------------------------------------------


def table(result: dict, ceilings: dict[str, float], device: torch.device) -> str:
    """Phases of every engine: share of the step (GPU: ms), share of the floor, launches; then
    counts and ratios.
    """
    gpu = device.type == "cuda"
    lines = []
    for name, e in result["engines"].items():
        speed = f": {e['step']['median_s'] * 1e3:.1f} ms, {e['images_per_s']:.2f} images/s"
        lines.append(f"\nbatch {result['batch']}, {name}" + (speed if gpu else ""))
        if "seconds" not in e:
            continue
        lines += [_phase(name, e, gpu) for name in e["seconds"] if name != "step"]
        lines.append(_summary(e, ceilings))
    lines += [
        f"\n{pair}: {r['median']:.2f}x ({r['least']:.2f}-{r['most']:.2f})"
        for pair, r in result["ratios"].items()
    ]
    return "\n".join(lines)


def _phase(name: str, e: dict, gpu: bool) -> str:
    spent = e["seconds"][name]
    shown = f"{spent * 1e3:9.1f} ms" if gpu else f"{spent / e['seconds']['step']:9.1%}"
    near = e["floor_s"].get(name, 0.0) / spent if spent > 0 else 0.0
    return (
        f"  {name:10s}{shown}   floor {near:6.1%}   {e['flops'].get(name, 0) / 1e9:10.1f} GFLOP "
        f"{e['launches'].get(name, 0):8.0f} launches"
    )


def _summary(e: dict, ceilings: dict[str, float]) -> str:
    counts = e["counts"]
    rollout = counts["rollout"]
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

    bars: dict[str, dict[str, float]] = {}
    for result in results:
        bars |= _shares(result)
    phases: dict[str, None] = {}
    for shares in bars.values():
        phases |= dict.fromkeys(shares)
    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(bars), 4.5), layout="constrained")
    floor = [0.0] * len(bars)
    for phase in phases:
        heights = [shares.get(phase, 0.0) for shares in bars.values()]
        axes.bar(list(bars), heights, bottom=floor, label=phase)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.set_ylabel("time, slowest engine of the batch = 1")
    axes.legend()
    figure.savefig(path, dpi=120)


def _shares(result: dict) -> dict[str, dict[str, float]]:
    """{label: {phase: share of the batch's slowest step}}."""
    spent = {name: dict(e["seconds"]) for name, e in result["engines"].items()}
    slowest = max(seconds.pop("step") for seconds in spent.values())
    labels = {name: f"{name}\nbatch {result['batch']}" for name in spent}
    shares = {}
    for name, seconds in spent.items():
        shares[labels[name]] = {phase: s / slowest for phase, s in seconds.items()}
    return shares


# ---- the command ---------------------------------------------------------------------------------


def parse(words: list[str]) -> argparse.Namespace:
    """The command line, with the defaults that hang on the model filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_subject(parser.add_argument)
    _add_measuring(parser.add_argument)
    args = parser.parse_args(words)
    if args.times_only and args.plot:
        parser.error("--plot shows phases, which --times-only leaves out")
    if args.smoke:
        args.model = "nano"
        args.batch = [1]
        args.repeats = 1
        args.engine = list(ENGINES)
    nano = args.model == "nano"
    size = args.size or ("128x128" if nano else "640x480")
    width, height = (int(side) for side in size.split("x"))
    args.size = (height, width)
    args.batch = args.batch or ([1, 16] if nano else [8])
    args.override = [
        f"--model.device={args.device}",
        f"--model.dtype={args.dtype}",
        f"--model.quant={args.quant}",
        f"--data.max_pixels={max(height * width, 1024)}",
    ]
    if args.samples:
        args.override.append(f"--rollout.samples={args.samples}")
    return args


def _add_subject(add: Callable) -> None:
    add("--model", default="nano", help="nano, a name in configs/models, or a directory")
    add(
        "--weights",
        choices=("own", "random"),
        default="own",
        help="random: the shapes of a directory's model with made-up weights",
    )
    add("--images", type=Path, help="a folder instead of drawn scenes")
    add("--size", help="WIDTHxHEIGHT; default 128x128 for nano, 640x480 else")
    add("--batch", type=int, nargs="+", help="images per update; default 1 16 for nano, 8 else")
    add("--preset", choices=("paper", "robust"), default="paper")
    add("--samples", type=int, help="G instead of the preset's")
    add("--quant", choices=("none", "int8", "nf4"), default="none", help="fast and stock only")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--device", default="auto")


def _add_measuring(add: Callable) -> None:
    add(
        "--engine",
        nargs="+",
        choices=ENGINES,
        default=["fast", "naive+", "naive"],
        help="the first is what the others are compared with",
    )
    add("--repeats", type=int, default=5)
    add("--times-only", action="store_true", help="no phases, counts, FLOPs, memory: minutes less")
    add("--plot", type=Path, help="write a PNG")
    add("--write", action="store_true", help="put the document under bench/results/")
    smoke = "the embedded model, one image, one repeat, all engines"
    add("--smoke", action="store_true", help=smoke)


def start(device: torch.device, smoke: bool, dtype: str) -> dict[str, float]:
    """What every bench of whole steps does first; the machine's ceilings."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    allocator.keep_freed_memory()  # as a run does; here for every engine
    torch.manual_seed(0)
    ceilings = measure.ceilings(device, smoke, dtype)
    rate = ceilings["matmul_flop_per_s"] / 1e12
    bandwidth = ceilings["copy_bytes_per_s"] / 1e9
    print(f"ceilings measured in this run: {rate:.3g} TFLOP/s, {bandwidth:.3g} GB/s copied")
    return ceilings


def main(words: list[str]) -> None:
    """Measure, tell, and write where asked to."""
    args = parse(words)
    device = model.device_of(args.device)
    ceilings = start(device, args.smoke, args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(args.model, args.weights == "random", scratch)
        results = [run(subject, args, batch, device, ceilings) for batch in args.batch]
    for result in results:
        print(table(result, ceilings, device))
    if args.plot:
        plot(results, args.plot)
    height, width = args.size
    setting = {"model": subject.name, "preset": args.preset, "size": f"{width}x{height}"}
    setting |= {key: getattr(args, key) for key in ("samples", "quant", "dtype", "repeats")}
    document = {
        "bench": "rollout",
        "machine": measure.machine(device),
        "ceilings": ceilings,
        "setting": setting,
        "results": results,
    }
    kind = args.preset if args.dtype == "auto" else f"{args.preset}-{args.dtype}"
    name = f"rollout-{args.model.replace('/', '_')}-{width}x{height}-{kind}-{device.type}.json"
    place = _checkout.ROOT / "bench" / "results" / name
    measure.finish(document, place if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
