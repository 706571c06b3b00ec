"""Held-out figures of the embedded model while it is being made: reads images, asks, grounds and
judges through the quick forward.

Not here: the trainer's own evaluation (vise_fast/evaluate), which goes through the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vise_fast.images import geometry, scenes
from vise_fast.nano import blank, forward, lessons
from vise_fast.system.randomness import generator
from vise_fast.text import prompts

SEED = 77_001  # of the exam's scenes; pretraining draws from other names


class Read(NamedTuple):
    """Next-token logits (B, V) after what was read, keys and values of everything so far per layer,
    and the rope position that comes next.
    """

    logits: Tensor
    past: forward.Past
    following: int


class Pupil:
    """Answers questions about 128 x 128 images with weights in any floating dtype (forward.py)."""

    def __init__(self, weights: forward.Weights):
        self.weights = weights
        self.tokenizer = blank.tokenizer()
        self.vision_rope = forward.vision_rope()
        self.prefix = torch.tensor([blank.TOKEN[token] for token in lessons.PREFIX])

    @torch.no_grad()
    def look(self, pixels: Tensor) -> forward.Past:
        """uint8 (B, 128, 128, 3) → keys and values of the image prefix per layer."""
        main, deep = forward.vision(self.weights, forward.patches(pixels), self.vision_rope)
        x = forward.embed(self.weights, self.prefix.expand(len(pixels), -1)).clone()
        x[:, forward.IMAGE_START : -1] = main
        rope = forward.text_rope(forward.prefix_positions())
        bias = _causal(len(self.prefix), 0, x.dtype)
        _, past = forward.text(self.weights, x, rope, bias, deep)
        return past

    @torch.no_grad()
    def answer(
        self,
        past: forward.Past,
        questions: list[str],
        length: int,
        draw: torch.Generator | None = None,
    ) -> list[str]:
        """One answer of at most `length` tokens per image; greedy, or sampled at temperature 1 with
        `draw`.
        """
        read = self._read(past, questions, "")
        out = []
        for _ in range(length):
            ids = _next(read.logits, draw)
            out.append(ids)
            read = self._step(read.past, ids[:, None], read.following)
        return [self._text(row) for row in torch.stack(out, 1).tolist()]

    @torch.no_grad()
    def p_visible(self, past: forward.Past, questions: list[str]) -> Tensor:
        """(B,) probability of yes against no after `<visible>`."""
        logits = self._read(past, questions, "<visible>").logits
        return logits[:, [blank.TOKEN["no"], blank.TOKEN["yes"]]].softmax(-1)[:, 1]

    def _read(self, past: forward.Past, questions: list[str], opening: str) -> Read:
        """Questions behind the image prefix, and how their answers begin."""
        turn = "<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer([f"{question}{turn}{opening}" for question in questions])["input_ids"]
        return self._step(past, torch.tensor(ids), forward.TEXT_START)

    def _step(self, past: forward.Past, ids: Tensor, at: int) -> Read:
        """`ids` (B, S) behind `past`, from rope position `at` on."""
        length = ids.shape[1]
        before = past[0][0].shape[2]
        rope = forward.text_rope((at + torch.arange(length)).expand(3, -1))
        x = forward.embed(self.weights, ids)
        bias = _causal(length, before, x.dtype)
        hidden, new = forward.text(self.weights, x, rope, bias, past=past)
        grown = [forward.joined(old, late) for old, late in zip(past, new, strict=True)]
        return Read(forward.head(self.weights, hidden[:, -1]).float(), grown, at + length)

    def _text(self, ids: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        return str(self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids))


def _causal(length: int, before: int, dtype: torch.dtype) -> Tensor:
    """(S, before + S): 0 where a token may look and -inf elsewhere."""
    return torch.full((length, before + length), float("-inf"), dtype=dtype).triu(before + 1)


def _next(logits: Tensor, draw: torch.Generator | None) -> Tensor:
    """The next token (B,): the most likely one, or a sample."""
    if draw is None:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]


def held_out(weights: forward.Weights, count: int, seed: int = SEED) -> dict[str, float]:
    """Figures over `count` scenes: well_formed, iou, iou_50, sampled_iou, area, true_area, named,
    and visible_* accuracies.
    """
    pupil = Pupil(weights)
    drawn = [scenes.draw(generator(seed, 0, "exam", index)) for index in range(count)]
    return _grounding(pupil, drawn, seed) | _visibility(pupil, drawn, seed)


def boxes_of(answers: list[str]) -> tuple[Tensor, np.ndarray]:
    """(B, 4) boxes in 0..1000, zeros where unreadable, and which could be read."""
    boxes = [prompts.read_box(answer) for answer in answers]
    table = torch.tensor([box or (0.0,) * 4 for box in boxes], dtype=torch.float64)
    return table, np.array([box is not None for box in boxes])


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images))


def chosen(drawn: list[scenes.Scene], seed: int) -> list[scenes.Thing]:
    """The object of each scene that is asked for."""
    found = []
    for i, scene in enumerate(drawn):
        rng = generator(seed, 0, "choice", i)
        found.append(scene.objects[int(rng.integers(len(scene.objects)))])
    return found


def _grounding(pupil: Pupil, drawn: list[scenes.Scene], seed: int) -> dict[str, float]:
    things = chosen(drawn, seed)
    past = pupil.look(_stack([scene.pixels for scene in drawn]))
    ask = [prompts.SHORT.ground(thing.name) for thing in things]
    truth = torch.tensor([thing.box_1000 for thing in things])
    boxes, read = boxes_of(pupil.answer(past, ask, 18))
    draw = torch.Generator().manual_seed(seed)
    sampled, sampled_read = boxes_of(pupil.answer(past, ask, 18, draw))
    iou = geometry.iou(boxes, truth)
    return {
        "well_formed": float(read.mean()),
        "iou": float(iou.mean()),
        "iou_50": float((iou >= 0.5).double().mean()),
        "sampled_iou": float(geometry.iou(sampled, truth).mean()),
        "sampled_well_formed": float(sampled_read.mean()),
        "area": float(geometry.area_share(boxes).mean()),
        "true_area": float(geometry.area_share(truth).mean()),
        "named": _named(pupil, past, drawn),
    }


def _named(pupil: Pupil, past: forward.Past, drawn: list[scenes.Scene]) -> float:
    """The share of queries that name an object of their scene."""
    answers = pupil.answer(past, [prompts.SHORT.ask()] * len(drawn), 6)
    queries = [prompts.read_query(answer) for answer in answers]
    pairs = zip(queries, drawn, strict=True)
    return float(np.mean([query in scene.names for query, scene in pairs]))


class Question(NamedTuple):
    """Is `name` visible in `pixels`? `kind`: what was done to the object."""

    kind: str
    pixels: np.ndarray
    name: str
    visible: bool


def _visibility(pupil: Pupil, drawn: list[scenes.Scene], seed: int) -> dict[str, float]:
    """Accuracies of the verdict by kind of question; `visible` is the mean over all questions."""
    groups: dict[str, list[Question]] = {}
    for index, scene in enumerate(drawn):
        for question in _visibility_questions(generator(seed, 0, "see", index), scene):
            groups.setdefault(question.kind, []).append(question)
    right = {kind: _right(pupil, group) for kind, group in groups.items()}
    figures = {f"visible_{kind}": float(hits.mean()) for kind, hits in right.items()}
    return figures | {"visible": float(np.concatenate(list(right.values())).mean())}


def _right(pupil: Pupil, questions: list[Question]) -> np.ndarray:
    past = pupil.look(_stack([question.pixels for question in questions]))
    asked = [prompts.SHORT.verify(question.name) for question in questions]
    p = pupil.p_visible(past, asked)
    return (p.numpy() > 0.5) == np.array([question.visible for question in questions])


def _visibility_questions(rng: np.random.Generator, scene: scenes.Scene) -> Iterator[Question]:
    """The object there, an absent one, the object covered, all but it, and a ghost elsewhere."""
    target = int(rng.integers(len(scene.objects)))
    thing = scene.objects[target]
    x1, y1, x2, y2 = (round(edge * lessons.SIDE / 1000) for edge in thing.box_1000)
    yield Question("present", scene.pixels, thing.name, True)
    yield Question("absent", scene.pixels, scenes.absent_name(rng, scene.names), False)
    for method in ("blur", "mean"):
        covered = lessons.ghost(scene.pixels, (x1, y1, x2, y2), method, "inside")
        yield Question(f"{method}_covered", covered, thing.name, False)
        kept = lessons.ghost(scene.pixels, (x1, y1, x2, y2), method, "outside")
        yield Question(f"{method}_kept", kept, thing.name, True)
        width = x2 - x1
        height = y2 - y1
        x = int(rng.integers(0, lessons.SIDE - width + 1))
        y = int(rng.integers(0, lessons.SIDE - height + 1))
        mine = scene.owner == target
        if mine[y : y + height, x : x + width].sum() <= 0.1 * mine.sum():
            moved = (x, y, x + width, y + height)
            elsewhere = lessons.ghost(scene.pixels, moved, method, "inside")
            yield Question(f"{method}_elsewhere", elsewhere, thing.name, True)
