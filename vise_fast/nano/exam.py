"""Held-out figures of the embedded model while it is being made: reads images, asks, grounds and judges through the quick forward.

Not here: the trainer's own evaluation (evaluate.py), which goes through the engine.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vise_fast.images import geometry, scenes
from vise_fast.nano import blank, forward, lessons
from vise_fast.system.randomness import generator
from vise_fast.text import prompts

SEED = 77_001  # of the exam's scenes; pretraining draws from other names


class Pupil:
    """Answers questions about 128 x 128 images with weights in any floating dtype (see forward.py)."""

    def __init__(self, weights: forward.Weights):
        self.weights = weights
        self.tokenizer = blank.tokenizer()
        self.vision_rope = forward.vision_rope()
        self.prefix = torch.tensor([lessons.TOKEN[token] for token in lessons.PREFIX])

    @torch.no_grad()
    def look(self, pixels: Tensor) -> list:
        """uint8 (B, 128, 128, 3) → keys and values of the image prefix per layer."""
        main, deep = forward.vision(self.weights, forward.patches(pixels), self.vision_rope)
        x = forward.embed(self.weights, self.prefix.expand(len(pixels), -1)).clone()
        x[:, forward.IMAGE_START : -1] = main
        rope = forward.text_rope(forward.prefix_positions())
        return forward.text(self.weights, x, rope, self._bias(len(self.prefix), 0, x.dtype), deep)[
            1
        ]

    @torch.no_grad()
    def answer(
        self, past: list, questions: list[str], length: int, draw: torch.Generator | None = None
    ) -> list[str]:
        """One answer of at most `length` tokens per image; greedy, or sampled at temperature 1 with `draw`."""
        logits, past, at = self._read(past, questions, "")
        out = []
        for _ in range(length):
            ids = (
                logits.argmax(-1)
                if draw is None
                else torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
            )
            out.append(ids)
            logits, past, at = self._step(past, ids[:, None], at)
        return [self._text(row) for row in torch.stack(out, 1).tolist()]

    @torch.no_grad()
    def p_visible(self, past: list, questions: list[str]) -> Tensor:
        """(B,) probability of yes against no after `<visible>`."""
        logits, _, _ = self._read(past, questions, "<visible>")
        return logits[:, [lessons.TOKEN["no"], lessons.TOKEN["yes"]]].softmax(-1)[:, 1]

    def _read(self, past: list, questions: list[str], opening: str):
        texts = [
            f"{question}<|im_end|>\n<|im_start|>assistant\n{opening}" for question in questions
        ]
        return self._step(
            past, torch.tensor(self.tokenizer(texts)["input_ids"]), forward.TEXT_START
        )

    def _step(self, past: list, ids: Tensor, at: int):
        length = ids.shape[1]
        before = past[0][0].shape[2]
        rope = forward.text_rope((at + torch.arange(length)).expand(3, -1))
        x = forward.embed(self.weights, ids)
        hidden, new = forward.text(
            self.weights, x, rope, self._bias(length, before, x.dtype), past=past
        )
        grown = [
            tuple(torch.cat(pair, 2) for pair in zip(old, late)) for old, late in zip(past, new)
        ]
        return forward.head(self.weights, hidden[:, -1]).float(), grown, at + length

    @staticmethod
    def _bias(length: int, before: int, dtype: torch.dtype) -> Tensor:
        return torch.full((length, before + length), float("-inf"), dtype=dtype).triu(before + 1)

    def _text(self, ids: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


def held_out(weights: forward.Weights, count: int, seed: int = SEED) -> dict[str, float]:
    """Figures over `count` scenes: well_formed, iou, iou_50, sampled_iou, area, true_area, named, and visible_* accuracies."""
    pupil = Pupil(weights)
    drawn = [scenes.draw(generator(seed, 0, "exam", index)) for index in range(count)]
    figures = _grounding(pupil, drawn, seed)
    return figures | _visibility(pupil, drawn, seed)


def boxes_of(answers: list[str]) -> tuple[Tensor, np.ndarray]:
    """(B, 4) boxes in 0..1000, zeros where unreadable, and which could be read."""
    boxes = [prompts.read_box(answer) for answer in answers]
    return torch.tensor([box or (0.0,) * 4 for box in boxes], dtype=torch.float64), np.array(
        [box is not None for box in boxes]
    )


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images))


def _grounding(pupil: Pupil, drawn: list[scenes.Scene], seed: int) -> dict[str, float]:
    chosen = [
        scene.objects[generator(seed, 0, "choice", i).integers(len(scene.objects))]
        for i, scene in enumerate(drawn)
    ]
    past = pupil.look(_stack([scene.pixels for scene in drawn]))
    ask = [prompts.SHORT.ground(thing.name) for thing in chosen]
    truth = torch.tensor([thing.box_1000 for thing in chosen])
    boxes, read = boxes_of(pupil.answer(past, ask, 18))
    sampled, sampled_read = boxes_of(
        pupil.answer(past, ask, 18, torch.Generator().manual_seed(seed))
    )
    queries = [
        prompts.read_query(text)
        for text in pupil.answer(past, [prompts.SHORT.ask()] * len(drawn), 6)
    ]
    iou = geometry.iou(boxes, truth)
    return {
        "well_formed": float(read.mean()),
        "iou": float(iou.mean()),
        "iou_50": float((iou >= 0.5).double().mean()),
        "sampled_iou": float(geometry.iou(sampled, truth).mean()),
        "sampled_well_formed": float(sampled_read.mean()),
        "area": float(geometry.area_share(boxes).mean()),
        "true_area": float(geometry.area_share(truth).mean()),
        "named": float(np.mean([query in scene.names for query, scene in zip(queries, drawn)])),
    }


def _visibility(pupil: Pupil, drawn: list[scenes.Scene], seed: int) -> dict[str, float]:
    """Accuracies of the verdict by kind of question; `visible` is the mean of the asked questions."""
    groups: dict[str, list[tuple[np.ndarray, str, bool]]] = {}
    for index, scene in enumerate(drawn):
        for kind, pixels, name, seen in _visibility_questions(
            generator(seed, 0, "see", index), scene
        ):
            groups.setdefault(kind, []).append((pixels, name, seen))
    right = {kind: _right(pupil, group) for kind, group in groups.items()}
    return {f"visible_{kind}": float(hits.mean()) for kind, hits in right.items()} | {
        "visible": float(np.concatenate(list(right.values())).mean())
    }


def _right(pupil: Pupil, group: list[tuple[np.ndarray, str, bool]]) -> np.ndarray:
    past = pupil.look(_stack([pixels for pixels, _, _ in group]))
    p = pupil.p_visible(past, [prompts.SHORT.verify(name) for _, name, _ in group])
    return (p.numpy() > 0.5) == np.array([seen for _, _, seen in group])


def _visibility_questions(rng: np.random.Generator, scene: scenes.Scene):
    """Yields (kind, pixels, name, visible): the object there, an absent one, the object covered, all but it, and a ghost elsewhere."""
    target = int(rng.integers(len(scene.objects)))
    thing = scene.objects[target]
    x1, y1, x2, y2 = (round(edge * lessons.SIDE / 1000) for edge in thing.box_1000)
    yield "present", scene.pixels, thing.name, True
    yield "absent", scene.pixels, scenes.absent_name(rng, scene.names), False
    for method in ("blur", "mean"):
        yield (
            f"{method}_covered",
            lessons.ghost(scene.pixels, (x1, y1, x2, y2), method, "inside"),
            thing.name,
            False,
        )
        yield (
            f"{method}_kept",
            lessons.ghost(scene.pixels, (x1, y1, x2, y2), method, "outside"),
            thing.name,
            True,
        )
        width = x2 - x1
        height = y2 - y1
        x = int(rng.integers(0, lessons.SIDE - width + 1))
        y = int(rng.integers(0, lessons.SIDE - height + 1))
        mine = scene.owner == target
        if mine[y : y + height, x : x + width].sum() <= 0.1 * mine.sum():
            yield (
                f"{method}_elsewhere",
                lessons.ghost(scene.pixels, (x, y, x + width, y + height), method, "inside"),
                thing.name,
                True,
            )
