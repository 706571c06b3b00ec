"""The whole step by NAIVE, NAIVE+ and ours, and the update pass alone: shared prefix against row by
row, what each trick saves.

    python bench/train_step.py                        the embedded model, and a mid-size random one
    for the update pass; a CPU
    python bench/train_step.py --model qwen3-vl-2b --update-model qwen3-vl-2b --update-size 640x480
    --dtype bfloat16 --batch 1 32     (a GPU)
    python bench/train_step.py --smoke                does everything run? a minute on a CPU

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

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import _measure as measure  # noqa: E402
import _subjects as subjects  # noqa: E402
import memory  # noqa: E402
import rollout  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from vise_kernels import linear_logprob_kl  # noqa: E402

from vise_fast.engine.fast import FastEngine  # noqa: E402
from vise_fast.engine.rollout import Answered  # noqa: E402
from vise_fast.method import roles  # noqa: E402
from vise_fast.method.roles import Question, Sampling  # noqa: E402
from vise_fast.model import load as model
from vise_fast.model import lora_linear as linear  # noqa: E402
from vise_fast.model import qwen3_vl
from vise_fast.model.tree import Features  # noqa: E402
from vise_fast.profile import flops as perf
from vise_fast.system import allocator

GROUPS = (1, 2, 4, 8, 16)


@dataclass
class Update:
    """One image, G locked answers, and the passes over them."""

    engine: FastEngine
    features: Features
    answered: Answered

    @classmethod
    def of(cls, engine: FastEngine, size: tuple[int, int], group: int) -> Update:
        features = engine.encode([image.pixels for image in subjects.pictures(*size, 1)])
        query = subjects.QUERIES[engine.tokens.style.name]
        questions = [Question(0, query, list(range(group)))]
        sampling = Sampling(subjects.BOX_TOKENS)
        boxes = roles.ground(engine, engine.prefill(features, True), questions, sampling)
        return cls(engine, features, Answered(boxes.rows, boxes.answers, boxes.owner))

    def shared(self, recompute: bool = False) -> None:
        self._one(self.features, self.answered, recompute)

    def row_wise(self) -> None:
        answered = self.answered
        group = len(answered.owner)
        alone = Answered(answered.rows * group, answered.answers, list(range(group)))
        self._one(self.features.select([0] * group), alone)

    def plain(self) -> None:
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
    kept = linear.FusedLinear.__call__, qwen3_vl.recomputed
    linear.FusedLinear.__call__ = lambda self, x, pack, before=None: self.plain(
        x, pack and self.pack(x.dtype), before
    )
    qwen3_vl.recomputed = lambda function, x: function(x)
    try:
        yield
    finally:
        linear.FusedLinear.__call__, qwen3_vl.recomputed = kept


def group_scaling(
    engine: FastEngine,
    size: tuple[int, int],
    groups: tuple[int, ...],
    device: torch.device,
    repeats: int,
) -> list[dict]:
    """Shared against row by row for each G: FLOPs, time and memory of the update of one image."""
    found = []
    for group in groups:
        update = Update.of(engine, size, group)
        runs = {"shared": update.shared, "row-wise": update.row_wise}
        times = measure.interleaved(runs, device, repeats, least_s=0.0)
        row = {"group": group, "prefix_over_answer": _prefix(update) / subjects.BOX_TOKENS}
        for name, run in runs.items():
            row[name] = {"flops": _flops(run), "bytes": measure.extra_bytes(run, device)} | times[
                name
            ].summary()
        ratios = rollout._ratio(times["row-wise"].seconds, times["shared"].seconds)
        found.append(
            row
            | {
                "flop_fraction": row["shared"]["flops"] / row["row-wise"]["flops"],
                "speedup": ratios,
            }
        )
    return found


def tricks(
    engine: FastEngine, size: tuple[int, int], group: int, device: torch.device, repeats: int
) -> dict:
    """The update pass as it is, in plain autograd, and with checkpointing: time and memory relative
    to the first.
    """
    update = Update.of(engine, size, group)
    runs = {
        "shared": update.shared,
        "plain autograd": update.plain,
        "checkpointing": lambda: update.shared(recompute=True),
    }
    times = measure.interleaved(runs, device, repeats, least_s=0.0)
    held = {name: measure.extra_bytes(run, device) for name, run in runs.items()}
    base = times["shared"].seconds
    return {
        name: {
            "time": rollout._ratio(times[name].seconds, base),
            "bytes": held[name],
            "bytes_ratio": held[name] / held["shared"],
        }
        for name in runs
    }


def shared_products(
    rows: int, width: int, out: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict:
    """Policy and reference rows through a frozen weight in one product against two: is anything
    won?
    """
    x, y, weight = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, rows, out))
    both = torch.cat([x, y])
    runs = {
        "two products": lambda: (F.linear(x, weight), F.linear(y, weight)),
        "one product": lambda: F.linear(both, weight),
    }
    times = measure.interleaved(runs, device, repeats, least_s=0.2)
    return {
        "rows": rows,
        "width": width,
        "out": out,
        "two_over_one": rollout._ratio(times["two products"].seconds, times["one product"].seconds),
    }


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
    subject = (
        subjects.Subject(name, subjects._write(memory.shape_of(name), scratch), True)
        if name in memory.MODELS
        else subjects.find(name, True, scratch)
    )
    config = subject.config("robust", 1, [*words, f"--data.max_pixels={size[0] * size[1]}"])
    policy = model.load(config, weights=subject.weights)
    policy.tokens = subjects.Locked(policy.tokens)
    return FastEngine(policy.backbone, policy.tokens)


def tell(scaling: list[dict], saved: dict, products: list[dict]) -> None:
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
    axes.plot(
        groups,
        [1 / row["flop_fraction"] for row in scaling],
        marker="o",
        label="FLOPs, row-wise / shared",
    )
    axes.plot(
        groups,
        [row["speedup"]["median"] for row in scaling],
        marker="s",
        label="time, row-wise / shared",
    )
    axes.plot(groups, groups, color="grey", linewidth=1, label="all prefix")
    axes.set(
        xlabel="G, answers per image",
        ylabel="times less",
        xscale="log",
        yscale="log",
        xticks=groups,
        xticklabels=groups,
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="nano",
        help="of the whole step: nano, a name in configs/models, or a directory",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--size", help="WIDTHxHEIGHT of the whole step's images")
    parser.add_argument("--preset", choices=("paper", "robust"), default="paper")
    parser.add_argument(
        "--update-model",
        default="wide",
        help=(
            "of the update pass: narrow, wide, vocal (memory.py), nano, or a name in configs/models"
        ),
    )
    parser.add_argument("--update-size", default="192x192")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="put document and PNG under bench/results/"
    )
    parser.add_argument("--smoke", action="store_true")
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
    words = [
        "--model",
        args.model,
        "--preset",
        args.preset,
        "--device",
        args.device,
        "--dtype",
        args.dtype,
        "--repeats",
        str(args.repeats),
        "--batch",
        *map(str, args.batch),
    ]
    steps = rollout.parse(words + (["--size", args.size] if args.size else []))
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(args.model, False, scratch)
        results = [rollout.run(subject, steps, batch, device, ceilings) for batch in args.batch]
    for result in results:
        print(rollout.table(result, ceilings, device))
    return results


def main(words: list[str]) -> None:
    args = parse(words)
    device = model.device_of(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    allocator.keep_freed_memory()  # as a run does; here for every engine
    torch.manual_seed(0)
    ceilings = measure.ceilings(device, args.smoke, args.dtype)
    print(
        f"ceilings measured in this run: {ceilings['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s, "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s copied"
    )
    steps = whole_steps(args, device, ceilings)
    width, height = (int(side) for side in args.update_size.split("x"))
    with tempfile.TemporaryDirectory() as scratch:
        engine = engine_of(
            args.update_model,
            (height, width),
            [f"--model.device={args.device}", f"--model.dtype={args.dtype}"],
            scratch,
        )
        groups = GROUPS[:2] if args.smoke else GROUPS
        scaling = group_scaling(engine, (height, width), groups, device, args.repeats)
        saved = tricks(
            engine, (height, width), groups[-1] if args.smoke else 8, device, args.repeats
        )
        text = engine.backbone.config.text_config
        products = [
            shared_products(
                n,
                text.hidden_size,
                2 * text.intermediate_size,
                device,
                engine.backbone.dtype,
                args.repeats,
            )
            for n in (128, 512)
        ]
    tell(scaling, saved, products)
    place = (
        measure.ROOT
        / "bench"
        / "results"
        / f"train_step-{args.model.replace('/', '_')}-{device.type}.json"
        if args.write
        else None
    )
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        plot(scaling, place.with_suffix(".png"))
    setting = {
        key: getattr(args, key)
        for key in ("model", "preset", "update_model", "update_size", "dtype", "repeats")
    }
    results = {
        "steps": steps,
        "group_scaling": scaling,
        "tricks": saved,
        "shared_products": products,
    }
    measure.finish(
        {
            "bench": "train_step",
            "machine": measure.machine(device),
            "ceilings": ceilings,
            "setting": setting,
        }
        | results,
        place,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
