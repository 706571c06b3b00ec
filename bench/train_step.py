"""The whole step by NAIVE, NAIVE+ and ours, and the update pass alone: shared prefix against row by
row, what each trick saves.

    python bench/train_step.py            the embedded model, and a mid-size random one for the
                                          update pass; a CPU
    python bench/train_step.py --model qwen3-vl-2b --update-model qwen3-vl-2b
        --update-size 640x480 --dtype bfloat16 --batch 1 32
                                          a GPU
    python bench/train_step.py --smoke    does everything run? a minute on a CPU

Whole steps are rollout.py's: interleaved repeats, phases, images per second, executed over minimal
FLOPs. The update pass is policy and
reference scores, log-prob head with exact KL, and the backward pass, for one image and G locked
answers of 22 tokens, all with LoRA:
  row-wise        a batch of G rows, each answer with a prefix of its own (what a batched trainer
  does)
  shared          one tree per image, as trained
  plain autograd  the same tree, LoRA and norms in plain autograd
  checkpointing   the same tree, activations computed again layer by layer
`bytes` is the most tensor memory alive at once beyond what was there before. Figures from a CPU are
ratios and counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import _checkout
import _measure as measure
import _subjects as subjects
import memory
import rollout
import torch
from torch.nn import functional as F
from vise_kernels import linear_logprob_kl

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered
from vise_fast.method import roles
from vise_fast.method.roles import Question, Sampling
from vise_fast.model import load as model
from vise_fast.model import lora_linear as linear
from vise_fast.model import qwen3_vl
from vise_fast.model.tree import Features
from vise_fast.profile import flops as perf

GROUPS = (1, 2, 4, 8, 16)


@dataclass
class Update:
    """One image, G locked answers, and the passes over them."""

    engine: FastEngine
    features: Features
    answered: Answered

    @classmethod
    def of(cls, engine: FastEngine, size: tuple[int, int], group: int) -> Update:
        """`group` answers to one scene of a size (height, width)."""
        features = engine.encode([image.pixels for image in subjects.pictures(*size, 1)])
        query = subjects.QUERIES[engine.tokens.style.name]
        questions = [Question(0, query, list(range(group)))]
        sampling = Sampling(subjects.BOX_TOKENS)
        boxes = roles.ground(engine, engine.prefill(features, True), questions, sampling)
        return cls(engine, features, Answered(boxes.rows, boxes.answers, boxes.owner))

    def shared(self, recompute: bool = False) -> None:
        """One tree, as trained; `recompute`: with checkpointing."""
        self._one(self.features, self.answered, recompute)

    def row_wise(self) -> None:
        """Each answer with a prefix of its own."""
        answered = self.answered
        group = len(answered.owner)
        alone = Answered(answered.rows * group, answered.answers, list(range(group)))
        self._one(self.features.select([0] * group), alone)

    def plain(self) -> None:
        """One tree in plain autograd."""
        with plain_autograd():
            self._one(self.features, self.answered)

    def _one(self, features: Features, answered: Answered, recompute: bool = False) -> None:
        with torch.no_grad():
            reference = self.engine.score(features, answered, False)
        hidden = self.engine.score(features, answered, True, recompute=recompute)
        answers = answered.answers
        ids = answers.ids[answers.mask().bool()]
        logprob, _, kl = linear_logprob_kl(
            hidden, reference, self.engine.backbone.head.weight, ids, banned=self.engine.banned
        )
        (kl - logprob).sum().backward()


@contextmanager
def plain_autograd():
    """The fused nodes replaced by what they compute."""

    def unfused(self, x, pack, before=None):
        return self.plain(x, pack and self.pack(x.dtype), before)

    def kept(function, x):
        return function(x)

    with (
        mock.patch.object(linear.FusedLinear, "__call__", unfused),
        mock.patch.object(qwen3_vl, "recomputed", kept),
    ):
        yield


@dataclass(frozen=True)
class Measuring:
    """How the update pass is timed."""

    device: torch.device
    repeats: int

    def times(self, runs: dict[str, Callable]) -> dict[str, measure.Times]:
        """Interleaved."""
        return measure.interleaved(runs, self.device, self.repeats, least_s=0.0)

    def held(self, runs: dict[str, Callable]) -> dict[str, int]:
        """Most bytes alive."""
        return {name: measure.extra_bytes(run, self.device) for name, run in runs.items()}


def scaling_of(update: Update, how: Measuring) -> dict:
    """Shared against row by row: FLOPs, time and memory of the update of one image."""
    runs = {"shared": update.shared, "row-wise": update.row_wise}
    times = how.times(runs)
    row = {
        "group": len(update.answered.owner),
        "prefix_over_answer": _prefix(update) / subjects.BOX_TOKENS,
    }
    for name, held in how.held(runs).items():
        row[name] = {"flops": _flops(runs[name]), "bytes": held} | times[name].summary()
    return row | {
        "flop_fraction": row["shared"]["flops"] / row["row-wise"]["flops"],
        "speedup": measure.ratio(times["row-wise"], times["shared"]),
    }


def tricks(update: Update, how: Measuring) -> dict:
    """The update pass as it is, in plain autograd, and with checkpointing: time and memory relative
    to the first.
    """
    runs = {
        "shared": update.shared,
        "plain autograd": update.plain,
        "checkpointing": lambda: update.shared(recompute=True),
    }
    times = how.times(runs)
    held = how.held(runs)
    return {
        name: {
            "time": measure.ratio(times[name], times["shared"]),
            "bytes": held[name],
            "bytes_ratio": held[name] / held["shared"],
        }
        for name in runs
    }


def shared_products(rows: int, engine: FastEngine, how: Measuring) -> dict:
    """Policy and reference rows through a frozen weight of the MLP in one product against two: is
    anything won?
    """
    text = engine.backbone.config.text_config
    width = text.hidden_size
    out = 2 * text.intermediate_size
    options = {"device": how.device, "dtype": engine.backbone.dtype}
    x, y, weight = (torch.randn(n, width, **options) for n in (rows, rows, out))
    both = torch.cat([x, y])
    runs = {
        "two products": lambda: (F.linear(x, weight), F.linear(y, weight)),
        "one product": lambda: F.linear(both, weight),
    }
    times = measure.interleaved(runs, how.device, how.repeats, least_s=0.2)
    ratio = measure.ratio(times["two products"], times["one product"])
    return {"rows": rows, "width": width, "out": out, "two_over_one": ratio}


def _flops(run: Callable) -> int:
    with perf.executed_flops() as counter:
        run()
    return counter.get_total_flops()


def _prefix(update: Update) -> int:
    """Tokens of prefix and question."""
    rows, columns = update.features.grids[0]
    image = rows * columns // update.engine.backbone.merge_size**2
    tokens = update.engine.tokens
    question = update.answered.rows[0]
    return len(tokens.head) + image + len(tokens.tail) + len(question)


def engine_of(name: str, size: tuple[int, int], words: list[str], scratch: str) -> FastEngine:
    """An engine over random weights of a shape: nano's, one of memory.MODELS, or one of
    configs/models.
    """
    if name in memory.MODELS:
        directory = subjects._write(memory.shape_of(name), scratch)
        subject = subjects.Subject(name, directory, True)
    else:
        subject = subjects.find(name, True, scratch)
    config = subject.config("robust", 1, [*words, f"--data.max_pixels={size[0] * size[1]}"])
    policy = model.load(config, weights=subject.weights)
    policy.tokens = subjects.Locked(policy.tokens)
    return FastEngine(policy.backbone, policy.tokens)


def tell(scaling: list[dict], saved: dict, products: list[dict]) -> None:
    """The update pass on screen."""
    print("\nupdate pass of one image, row by row against one shared tree")
    for row in scaling:
        bytes_ratio = row["row-wise"]["bytes"] / row["shared"]["bytes"]
        r = row["speedup"]
        print(
            f"  G {row['group']:2d}: FLOPs {row['flop_fraction']:.3f} of row-wise, time "
            f"{r['median']:.2f}x less ({r['least']:.2f}-{r['most']:.2f}), prefix / answer "
            f"{row['prefix_over_answer']:.1f}, bytes {bytes_ratio:.2f}x"
        )
    for name, s in saved.items():
        print(
            f"  {name:16s} time {s['time']['median']:.2f} "
            f"({s['time']['least']:.2f}-{s['time']['most']:.2f}), bytes {s['bytes_ratio']:.2f} of "
            f"the shared tree's {saved['shared']['bytes'] / 2**20:.1f} MiB"
        )
    for p in products:
        r = p["two_over_one"]
        print(
            f"  policy and reference rows in one product, {p['rows']} x {p['width']} x {p['out']}: "
            f"two products take {r['median']:.3f} of its time ({r['least']:.3f}-{r['most']:.3f})"
        )


def plot(scaling: list[dict], path: Path) -> None:
    """FLOP fraction and speed-up over G."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    groups = [row["group"] for row in scaling]
    flops = [1 / row["flop_fraction"] for row in scaling]
    times = [row["speedup"]["median"] for row in scaling]
    axes.plot(groups, flops, marker="o", label="FLOPs, row-wise / shared")
    axes.plot(groups, times, marker="s", label="time, row-wise / shared")
    axes.plot(groups, groups, color="grey", linewidth=1, label="all prefix")
    axes.set(xlabel="G, answers per image", ylabel="times less", xscale="log", yscale="log")
    axes.set(xticks=groups, xticklabels=groups)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    whole = "of the whole step: nano, a name in configs/models, or a directory"
    add("--model", default="nano", help=whole)
    add("--batch", type=int, nargs="+", default=[8])
    add("--size", help="WIDTHxHEIGHT of the whole step's images")
    add("--preset", choices=("paper", "robust"), default="paper")
    update = (
        "of the update pass: narrow, wide, vocal (memory.py), nano, or a name in configs/models"
    )
    add("--update-model", default="wide", help=update)
    add("--update-size", default="192x192")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--repeats", type=int, default=5)
    add("--write", action="store_true", help="put document and PNG under bench/results/")
    add("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.batch = [2]
        args.repeats = 1
        args.update_model = "narrow"
        args.update_size = "64x64"
    return args


def whole_steps(
    args: argparse.Namespace, device: torch.device, ceilings: dict[str, float]
) -> list[dict]:
    """rollout.py's interleaved steps of ours, NAIVE+ and NAIVE."""
    same = ("model", "preset", "device", "dtype", "repeats")
    words = [f"--{name}={getattr(args, name)}" for name in same]
    words += ["--batch", *map(str, args.batch)]
    steps = rollout.parse(words + (["--size", args.size] if args.size else []))
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(args.model, False, scratch)
        results = [rollout.run(subject, steps, batch, device, ceilings) for batch in args.batch]
    for result in results:
        print(rollout.table(result, ceilings, device))
    return results


def update_passes(args: argparse.Namespace, how: Measuring) -> dict:
    """The update pass alone, by `--update-model`: over G, trick by trick, and its products."""
    width, height = (int(side) for side in args.update_size.split("x"))
    size = (height, width)
    words = [f"--model.device={args.device}", f"--model.dtype={args.dtype}"]
    groups = GROUPS[:2] if args.smoke else GROUPS
    with tempfile.TemporaryDirectory() as scratch:
        engine = engine_of(args.update_model, size, words, scratch)
        saved_at = groups[-1] if args.smoke else 8
        return {
            "group_scaling": [scaling_of(Update.of(engine, size, g), how) for g in groups],
            "tricks": tricks(Update.of(engine, size, saved_at), how),
            "shared_products": [shared_products(rows, engine, how) for rows in (128, 512)],
        }


def main(words: list[str]) -> None:
    """Measure, tell, and write where asked to."""
    args = parse(words)
    device = model.device_of(args.device)
    ceilings = rollout.start(device, args.smoke, args.dtype)
    steps = whole_steps(args, device, ceilings)
    passes = update_passes(args, Measuring(device, args.repeats))
    tell(passes["group_scaling"], passes["tricks"], passes["shared_products"])
    name = f"train_step-{args.model.replace('/', '_')}-{device.type}.json"
    place = _checkout.ROOT / "bench" / "results" / name
    if args.write:
        place.parent.mkdir(parents=True, exist_ok=True)
        plot(passes["group_scaling"], place.with_suffix(".png"))
    told = ("model", "preset", "update_model", "update_size", "dtype", "repeats")
    document = {
        "bench": "train_step",
        "machine": measure.machine(device),
        "ceilings": ceilings,
        "setting": {key: getattr(args, key) for key in told},
        "steps": steps,
        **passes,
    }
    measure.finish(document, place if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
