"""Makes the embedded model: supervised pretraining on drawn scenes, on one CPU thread plus one
drawing process.

Four phases share one clock: "look" (vision only, with a throw-away dense head), "easy" (questions,
two objects at most, no ghosts), "full", and "judge" (as full, with more ghosts: hidden objects are
learned last). Interrupted runs go on from the last checkpoint in --out. Progress is CPU time of
this process, so that a busy machine changes nothing and the figures, not the exact weights, repeat
from run to run.

Run: python -m vise_fast.nano.pretrain --out DIR --minutes 14 --seed 0
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from vise_fast.images import scenes
from vise_fast.nano import blank, exam, forward, lessons
from vise_fast.nano.forward import Weights
from vise_fast.system.randomness import generator

BATCH = 32
DENSE = [len(scenes.COLORS) + 1, len(scenes.SHAPES), 4]
"""What the dense head says of each visual token: colour or ground, shape, box."""


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

    def rate(self, done: float) -> float:
        """The learning rate after a share `done` of the phase."""
        first, last = self.lr
        return first + done * (last - first)


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

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        index = self.start
        while True:
            rng = generator(self.seed, index, f"pretrain/{self.phase.name}")
            phase = self.phase
            batch = lessons.batch(rng, BATCH, phase.max_objects, phase.ghosted, phase.find)
            yield tuple(torch.from_numpy(part) for part in astuple(batch))
            index += 1


class Slots(NamedTuple):
    """A prefix followed by a lesson's slots as one sequence of S tokens."""

    positions: Tensor
    """(3, S): time, row, column"""
    bias: Tensor
    """(S, S): a slot reads the prefix and itself"""
    answers: Tensor
    """(K,): the places that predict an answer token"""


def slots() -> Slots:
    """The same for every lesson."""
    lengths = [lessons.LENGTH[kind] for kind in lessons.SLOTS]
    sizes = torch.tensor([forward.PREFIX, *lengths])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    allowed = ((owner[None] == 0) | (owner[None] == owner[:, None])).tril()
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    places = [torch.arange(length) for length in lengths]
    following = (forward.TEXT_START + torch.cat(places)).expand(3, -1)
    positions = torch.cat([forward.prefix_positions(), following], 1)
    firsts = [lessons.QUESTION[kind] - 1 for kind in lessons.SLOTS]
    answers = [place >= first for place, first in zip(places, firsts, strict=True)]
    return Slots(positions, bias, forward.PREFIX + torch.cat(answers).nonzero()[:, 0])


class Course(nn.Module):
    """The model's parameters, the throw-away dense head, and the two losses, computed in bf16 over
    fp32 master weights.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.names = [name for name, _ in net.named_parameters()]
        self.weights = nn.ParameterList([weight for _, weight in net.named_parameters()])
        self.dense_head = nn.Linear(128, sum(DENSE))
        self.dtype = dtype
        self.slots = slots()
        self.text_rope = forward.text_rope(self.slots.positions)
        self.vision_rope = forward.vision_rope()
        self.prefix = torch.tensor([blank.TOKEN[token] for token in lessons.PREFIX])

    def named(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name; the dense head is not among them."""
        return dict(zip(self.names, self.weights, strict=True))

    def forward(
        self,
        phase: Phase,
        pixels: Tensor,
        ids: Tensor,
        targets: Tensor,
        weights: Tensor,
        *truth: Tensor,
    ) -> dict[str, Tensor]:
        """Losses by name; their weighted sum is "total". Tensors as in lessons.Batch."""
        cast = {name: weight.to(self.dtype) for name, weight in self.named().items()}
        main, deep = self._seen(cast, pixels)
        losses = self._dense(main.float(), *truth)
        total = phase.dense * sum(losses.values(), torch.zeros(()))
        if phase.questions:
            logits = self._logits(cast, main, deep, ids)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses["answers"] = (loss * weights.flatten()).sum() / weights.sum()
            total = total + losses["answers"]
        return losses | {"total": total}

    def _dense(
        self, main: Tensor, color: Tensor, shape: Tensor, box: Tensor, sure: Tensor
    ) -> dict[str, Tensor]:
        said = self.dense_head(main)
        said_color, said_shape, said_box = said.split(DENSE, -1)
        thing = (color < 8).float()
        shape_loss = F.cross_entropy(said_shape.transpose(1, 2), shape, reduction="none")
        distance = (said_box - box).abs().mean(-1)
        return {
            "color": F.cross_entropy(said_color.transpose(1, 2), color),
            "shape": (shape_loss * thing).sum() / thing.sum().clamp(min=1),
            "box": 5 * (distance * sure).sum() / sure.sum().clamp(min=1),
        }

    def _seen(self, cast: Weights, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 64, 128): what stands at the image tokens, and what the first layer adds there."""
        return forward.vision(cast, forward.patches(pixels), self.vision_rope)

    def _hidden(self, cast: Weights, x: Tensor, deep: Tensor | None) -> Tensor:
        """(B, S, 128): final states of the embedded prefix and slots."""
        bias = self.slots.bias.to(self.dtype)
        return forward.text(cast, x, self.text_rope, bias, deep)[0]

    def _logits(self, cast: Weights, main: Tensor, deep: Tensor | None, ids: Tensor) -> Tensor:
        """(B, K, V): logits of the answer tokens, from image features and the slots' ids."""
        start = forward.IMAGE_START
        end = forward.IMAGE_START + forward.IMAGE_TOKENS
        told = forward.embed(cast, torch.cat([self.prefix.expand(len(ids), -1), ids], 1))
        x = torch.cat([told[:, :start], main, told[:, end:]], 1)
        hidden = self._hidden(cast, x, deep)
        return forward.head(cast, hidden[:, self.slots.answers]).float()


class Optimizers:
    """Muon for the hidden matrices, AdamW for embeddings, norms, biases and the dense head; both
    follow one schedule.
    """

    def __init__(self, course: Course, muon_lr: float, adam_lr: float):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in course.named().items():
            hidden = weight.dim() == 2 and "embed" not in name
            (matrices if hidden else others).append(weight)
        others += list(course.dense_head.parameters())
        adam = torch.optim.AdamW(others, adam_lr, (0.9, 0.98), weight_decay=0.02, fused=True)
        self.all: list[torch.optim.Optimizer] = [adam]
        if muon_lr > 0:
            adjust = "match_rms_adamw"
            muon = torch.optim.Muon(matrices, muon_lr, weight_decay=0.02, adjust_lr_fn=adjust)
            self.all.append(muon)
        else:
            adam.add_param_group({"params": matrices})
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.all]

    def step(self, share: float) -> None:
        """One step at `share` of the peak rates; gradients are cleared."""
        for optimizer, peak in zip(self.all, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor under a flat name: optimizer/parameter/key."""
        found: dict[str, Tensor] = {}
        for which, optimizer in enumerate(self.all):
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"{which}/{index}/{key}": value for key, value in state.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors` gave."""
        for which, optimizer in enumerate(self.all):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                owner, index, key = name.split("/")
                if int(owner) == which:
                    state.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Clock:
    """How far a pretraining is, in CPU minutes; compilation is not counted."""

    minutes: float = 0.0
    images: int = 0
    step: int = 0


class Pretraining:
    """One pretraining in a directory: clock, log, checkpoints. Another model is taught by a
    subclass that says how it begins, how it is written and how it is examined.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.net, self.course = self.begin(args.seed)
        self.optimizers = Optimizers(self.course, args.muon_lr, args.adam_lr)
        self.clock = Clock()
        if (self.out / "state.json").exists():
            self._resume()
        self.loss = torch.compile(self.course) if args.compile else self.course

    def begin(self, seed: int) -> tuple[PreTrainedModel, Course]:
        """The model before its first lesson, and its losses."""
        net = blank.model(seed)
        return net, Course(net)

    def write(self, directory: Path) -> None:
        """The model as transformers loads it."""
        blank.save(self.net, directory)

    def progress(self) -> float:
        """The share of the minutes that is over."""
        return self.clock.minutes / self.args.minutes

    def log(self, **entry: object) -> None:
        """A line of log.jsonl: the clock and `entry`."""
        line = asdict(self.clock) | entry
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(rounded) + "\n")

    def examine(self, count: int) -> None:
        """Logs the figures on `count` held-out scenes."""
        weights = {name: weight.detach() for name, weight in self.course.named().items()}
        self.log(exam=count, **exam.held_out(weights, count))

    def save(self) -> None:
        """A loadable model directory and, beside it, what a resumed run needs; the clock is written
        last.
        """
        self.write(self.out / "model")
        states = {name: state.contiguous() for name, state in self.optimizers.tensors().items()}
        save_file(states, self.out / "optimizers.safetensors")
        save_file(dict(self.course.dense_head.state_dict()), self.out / "dense_head.safetensors")
        (self.out / "state.json").write_text(json.dumps(asdict(self.clock)) + "\n")

    def _resume(self) -> None:
        self.clock = Clock(**json.loads((self.out / "state.json").read_text()))
        stored = type(self.net).from_pretrained(
            self.out / "model", dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        self.net.load_state_dict(stored.state_dict())
        self.course.dense_head.load_state_dict(load_file(self.out / "dense_head.safetensors"))
        self.optimizers.load(load_file(self.out / "optimizers.safetensors"))

    def train(self) -> None:
        """What is left of the four phases, then the last exam."""
        start = 0.0
        for phase in PHASES:
            if self.progress() < start + phase.share:
                self._teach(phase, start)
            start += phase.share
        self.examine(400)
        self.save()

    def _teach(self, phase: Phase, start: float) -> None:
        """One phase, which begins at the share `start` of the minutes."""
        stream = Lessons(phase, self.args.seed, self.clock.step)
        batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8))
        spent = self.clock.minutes
        began: float | None = None  # the first step compiles: off the clock
        saved = 0.0
        while (done := (self.progress() - start) / phase.share) < 1:
            losses = self._step(phase, next(batches), self._warm_up() * phase.rate(done))
            now = time.process_time()
            if began is None:
                began = saved = now
            minutes = spent + (now - began) / 60
            self.clock = Clock(minutes, self.clock.images + BATCH, self.clock.step + 1)
            if self.clock.step % 50 == 0:
                self.log(phase=phase.name, **{name: value.item() for name, value in losses.items()})
            if now - saved > 60 * self.args.save_every:
                self._checkpoint(phase)
                saved = time.monotonic()

    def _warm_up(self) -> float:
        """The share of the learning rate in the first hundred steps."""
        return min(1.0, (self.clock.step + 1) / 100)

    def _checkpoint(self, phase: Phase) -> None:
        if phase.questions:
            self.examine(128)
        self.save()

    def _step(self, phase: Phase, batch: list[Tensor], lr_share: float) -> dict[str, Tensor]:
        losses = self.loss(phase, *batch)
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.course.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at step {self.clock.step}")
        self.optimizers.step(lr_share)
        return losses


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, help="directory of the run; the model is in its folder 'model'")
    add("--minutes", type=float, default=14, help="of CPU time, compilation excluded")
    add("--seed", type=int, default=0)
    muon = "peak rate of the hidden matrices; 0: AdamW for all"
    add("--muon-lr", type=float, default=3e-3, help=muon)
    add("--adam-lr", type=float, default=1.5e-3, help="peak rate of everything else")
    add("--save-every", type=float, default=3.0, help="minutes between checkpoints")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    Pretraining(arguments().parse_args()).train()


if __name__ == "__main__":
    main()
