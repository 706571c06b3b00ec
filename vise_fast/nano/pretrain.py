"""Makes the embedded model: supervised pretraining on drawn scenes, on one CPU thread plus one
drawing process.

Four phases share one clock: "look" (vision only, with a throw-away dense head), "easy" (questions,
two objects at most, no ghosts), "full", and "judge" (as full, with more ghosts: hidden objects are
learned last). Interrupted runs go on from the last checkpoint in --out. Progress is time, so that
the figures, not the exact weights, repeat from run to run.

Run: python -m vise_fast.nano.pretrain --out DIR --minutes 14 --seed 0
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from vise_fast.nano import blank, exam, forward, lessons
from vise_fast.system.randomness import generator

BATCH = 32


@dataclass(frozen=True)
class Phase:
    """A stretch of the run: `share` of its minutes, learning rate at both ends (as a share of the
    peak), what is drawn and asked; `find` scales the loss of the boxes.
    """

    name: str
    share: float
    lr: tuple[float, float]
    questions: bool = True
    dense: float = 0.3
    max_objects: int = 4
    ghosted: float = lessons.GHOSTED
    find: float = 1.0


PHASES = (
    Phase("look", 0.24, (1.0, 1.0), questions=False, dense=1.0, ghosted=0.0),
    Phase("easy", 0.08, (1.0, 0.9), max_objects=2, ghosted=0.0),
    Phase("full", 0.38, (0.9, 0.4)),
    Phase("judge", 0.30, (0.4, 0.03), ghosted=0.7, find=0.5),
)


class Lessons(IterableDataset):
    """Endless batches of one phase, from `start` on; each is a function of (seed, phase, index)."""

    def __init__(self, phase: Phase, seed: int, start: int):
        self.phase = phase
        self.seed = seed
        self.start = start

    def __iter__(self):
        index = self.start
        while True:
            rng = generator(self.seed, index, f"pretrain/{self.phase.name}")
            batch = lessons.batch(
                rng, BATCH, self.phase.max_objects, self.phase.ghosted, self.phase.find
            )
            yield tuple(torch.from_numpy(part) for part in astuple(batch))
            index += 1


def slots() -> tuple[Tensor, Tensor, Tensor]:
    """positions (3, S), bias (S, S) and the (K,) places that predict an answer token, for a prefix
    followed by the lesson's slots.
    """
    lengths = [lessons.LENGTH[kind] for kind in lessons.SLOTS]
    owner = torch.repeat_interleave(
        torch.arange(len(lengths) + 1), torch.tensor([forward.PREFIX, *lengths])
    )
    places = [torch.arange(lessons.LENGTH[kind]) for kind in lessons.SLOTS]
    positions = torch.cat(
        [forward.prefix_positions(), (forward.TEXT_START + torch.cat(places)).expand(3, -1)], 1
    )
    allowed = ((owner[None] == 0) | (owner[None] == owner[:, None])).tril()
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    answers = torch.cat(
        [place >= lessons.QUESTION[kind] - 1 for kind, place in zip(lessons.SLOTS, places)]
    )
    return positions, bias, forward.PREFIX + answers.nonzero()[:, 0]


class Course(nn.Module):
    """The model's parameters, the throw-away dense head, and the two losses, computed in bf16 over
    fp32 master weights.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.names = [name for name, _ in net.named_parameters()]
        self.weights = nn.ParameterList([weight for _, weight in net.named_parameters()])
        self.dense_head = nn.Linear(
            128, len(lessons.scenes.COLORS) + 1 + len(lessons.scenes.SHAPES) + 4
        )
        self.dtype = dtype
        positions, self.bias, self.answers = slots()
        self.text_rope = forward.text_rope(positions)
        self.vision_rope = forward.vision_rope()
        self.register_buffer(
            "prefix",
            torch.tensor([lessons.TOKEN[token] for token in lessons.PREFIX]),
            persistent=False,
        )

    def cast(self) -> forward.Weights:
        return {name: weight.to(self.dtype) for name, weight in zip(self.names, self.weights)}

    def forward(self, phase: Phase, pixels, ids, targets, weights, *truth) -> dict[str, Tensor]:
        """Losses by name; their weighted sum is "total"."""
        cast = self.cast()
        main, deep = forward.vision(cast, forward.patches(pixels), self.vision_rope)
        losses = self._dense(main.float(), *truth)
        total = phase.dense * sum(losses.values())
        if phase.questions:
            losses["answers"] = self._answers(cast, main, deep, ids, targets, weights)
            total = total + losses["answers"]
        return losses | {"total": total}

    def _dense(
        self, main: Tensor, color: Tensor, shape: Tensor, box: Tensor, sure: Tensor
    ) -> dict[str, Tensor]:
        said_color, said_shape, said_box = self.dense_head(main).split([9, 4, 4], -1)
        thing = (color < 8).float()
        shape_loss = F.cross_entropy(said_shape.transpose(1, 2), shape, reduction="none")
        distance = (said_box - box).abs().mean(-1)
        return {
            "color": F.cross_entropy(said_color.transpose(1, 2), color),
            "shape": (shape_loss * thing).sum() / thing.sum().clamp(min=1),
            "box": 5 * (distance * sure).sum() / sure.sum().clamp(min=1),
        }

    def _answers(
        self,
        cast: forward.Weights,
        main: Tensor,
        deep: Tensor,
        ids: Tensor,
        targets: Tensor,
        weights: Tensor,
    ) -> Tensor:
        start = forward.IMAGE_START
        end = forward.IMAGE_START + forward.IMAGE_TOKENS
        told = forward.embed(cast, torch.cat([self.prefix.expand(len(ids), -1), ids], 1))
        x = torch.cat([told[:, :start], main, told[:, end:]], 1)
        hidden, _ = forward.text(cast, x, self.text_rope, self.bias.to(self.dtype), deep)
        logits = forward.head(cast, hidden[:, self.answers]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (loss * weights.flatten()).sum() / weights.sum()


class Optimizers:
    """Muon for the hidden matrices, AdamW for embeddings, norms, biases and the dense head; both
    follow one schedule.
    """

    def __init__(self, course: Course, muon_lr: float, adam_lr: float):
        def hidden(name: str, weight: Tensor) -> bool:
            return weight.dim() == 2 and "embed" not in name

        matrices = [w for name, w in zip(course.names, course.weights) if hidden(name, w)]
        others = [w for name, w in zip(course.names, course.weights) if not hidden(name, w)]
        others += list(course.dense_head.parameters())
        self.all = [torch.optim.AdamW(others, adam_lr, (0.9, 0.98), weight_decay=0.02, fused=True)]
        if muon_lr > 0:
            self.all.append(
                torch.optim.Muon(
                    matrices, muon_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
                )
            )
        else:
            self.all[0].add_param_group({"params": matrices})
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.all]

    def step(self, share: float) -> None:
        for optimizer, peak in zip(self.all, self.peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor under a flat name."""
        return {
            f"{which}/{index}/{key}": value
            for which, optimizer in enumerate(self.all)
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        for which, optimizer in enumerate(self.all):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                owner, index, key = name.split("/")
                if int(owner) == which:
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )


class Run:
    """One pretraining run in a directory: clock, log, checkpoints."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.net = blank.model(args.seed)
        self.course = Course(self.net)
        self.optimizers = Optimizers(self.course, args.muon_lr, args.adam_lr)
        self.clock = {"minutes": 0.0, "images": 0, "step": 0}
        if (self.out / "state.json").exists():
            self._resume()
        self.loss = torch.compile(self.course) if args.compile else self.course

    def progress(self) -> float:
        return self.clock["minutes"] / self.args.minutes

    def log(self, **entry) -> None:
        entry = self.clock | entry
        with open(self.out / "log.jsonl", "a") as file:
            file.write(
                json.dumps(
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
                )
                + "\n"
            )

    def examine(self, count: int) -> None:
        weights = {
            name: weight.detach() for name, weight in zip(self.course.names, self.course.weights)
        }
        self.log(exam=count, **exam.held_out(weights, count))

    def save(self) -> None:
        """A loadable model directory and, beside it, what a resumed run needs; the clock is written
        last.
        """
        blank.save(self.net, self.out / "model")
        save_file(
            {k: v.contiguous() for k, v in self.optimizers.tensors().items()},
            self.out / "optimizers.safetensors",
        )
        save_file(dict(self.course.dense_head.state_dict()), self.out / "dense_head.safetensors")
        (self.out / "state.json").write_text(json.dumps(self.clock) + "\n")

    def _resume(self) -> None:
        self.clock = json.loads((self.out / "state.json").read_text())
        self.net.load_state_dict(load_file(self.out / "model" / "model.safetensors"), strict=False)
        self.course.dense_head.load_state_dict(load_file(self.out / "dense_head.safetensors"))
        self.optimizers.load(load_file(self.out / "optimizers.safetensors"))

    def train(self) -> None:
        start = 0.0
        for phase in PHASES:
            if self.progress() < start + phase.share:
                self._teach(phase, start)
            start += phase.share
        self.examine(400)
        self.save()

    def _teach(self, phase: Phase, start: float) -> None:
        batches = DataLoader(
            Lessons(phase, self.args.seed, self.clock["step"]),
            batch_size=None,
            num_workers=1,
            prefetch_factor=8,
        )
        began = saved = None  # the first step compiles: off the clock
        spent = self.clock["minutes"]
        for batch in batches:
            done = (self.progress() - start) / phase.share
            if done >= 1:
                break
            warm = min(1.0, (self.clock["step"] + 1) / 100)
            losses = self._step(
                phase, batch, warm * (phase.lr[0] + done * (phase.lr[1] - phase.lr[0]))
            )
            if began is None:
                began = saved = time.monotonic()
            self.clock = {
                "minutes": spent + (time.monotonic() - began) / 60,
                "images": self.clock["images"] + BATCH,
                "step": self.clock["step"] + 1,
            }
            if self.clock["step"] % 50 == 0:
                self.log(phase=phase.name, **{name: value.item() for name, value in losses.items()})
            if time.monotonic() - saved > 60 * self.args.save_every:
                if phase.questions:
                    self.examine(128)
                self.save()
                saved = time.monotonic()

    def _step(self, phase: Phase, batch: list[Tensor], lr_share: float) -> dict[str, Tensor]:
        losses = self.loss(phase, *batch)
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.course.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at step {self.clock['step']}")
        self.optimizers.step(lr_share)
        return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="directory of the run; the model is in its folder 'model'"
    )
    parser.add_argument(
        "--minutes", type=float, default=14, help="on the run's clock, compilation excluded"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--muon-lr",
        type=float,
        default=3e-3,
        help="peak rate of the hidden matrices; 0: AdamW for all",
    )
    parser.add_argument(
        "--adam-lr", type=float, default=1.5e-3, help="peak rate of everything else"
    )
    parser.add_argument("--save-every", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    Run(args).train()


if __name__ == "__main__":
    main()
