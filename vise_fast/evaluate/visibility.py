"""Visibility: yes or no about what is there, what is not, and what was hidden; and what is answered
without looking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vise_fast.evaluate.look import Look, Tally
from vise_fast.evaluate.objects import Objects, Truths, somewhere_else
from vise_fast.evaluate.results import Mark, Marks
from vise_fast.images import geometry
from vise_fast.method.evidence import beaf_cells

GREY = 128


def measure(look: Look, truths: Truths, arm: bool) -> Marks:
    """Yes or no about each clearly visible object: as it is, an absent lookalike, hidden, and with
    another place hidden.
    """
    objects = truths.objects
    mark = Tally(objects.owner, len(look))
    clear = objects.clear
    prefixes = look.prefix(arm)
    seen = look.sees(prefixes, objects.owner, objects.names)
    gone = look.sees_in(truths.gone, objects.names, arm)
    aside = _with_another_place_hidden(look, truths, arm)
    far = clear & np.isin(np.arange(len(objects)), truths.far)
    kinds = {"visible_present": mark(seen, clear)}
    pope: Marks = {}
    if truths.lookalikes:
        absent = look.sees(prefixes, objects.owner, truths.lookalikes)
        kinds["visible_absent"] = mark(~absent, clear)
        pope = _pope(mark(seen, clear), mark(absent, clear))
    kinds["visible_hidden"] = mark(~gone, clear)
    kinds["visible_elsewhere"] = mark(aside, far)
    cells = {name: mark(cell, clear) for name, cell in beaf_cells(seen, gone).items()}
    return {
        **kinds,
        "changed_elsewhere": mark(aside != seen, far),
        "visible_accuracy": _pooled(list(kinds.values())),
        **pope,
        **cells,
    }


def of_absent(look: Look, arm: bool, absent: Sequence[str]) -> Marks:
    """No, or yes, to something that is in no picture: one phrase for each image."""
    names = [somewhere_else(look, i, 0, absent) for i in look.everyone]
    seen = look.sees(look.prefix(arm), look.everyone, names)
    return {"visible_absent": Tally(look.everyone, len(look))(~seen)}


def _with_another_place_hidden(look: Look, truths: Truths, arm: bool) -> Tensor:
    """Bool (N,): whether each object is seen; no where there is no other place."""
    seen = torch.zeros(len(truths.objects), dtype=torch.bool)
    if truths.aside is not None:
        names = [truths.objects.names[n] for n in truths.far]
        seen[truths.far] = look.sees_in(truths.aside, names, arm)
    return seen


def _pooled(marks: list[Mark]) -> Mark:
    """All questions together."""
    tops, bottoms = zip(*marks, strict=True)
    return np.sum(tops, 0), np.sum(bottoms, 0)


def _pope(present: Mark, absent: Mark) -> Marks:
    """POPE's figures from yes counts over as many present as absent names (arXiv 2305.10355,
    section 4).
    """
    hits, positives = present
    false_alarms, negatives = absent
    rejections = negatives - false_alarms
    misses = positives - hits
    said = hits + false_alarms
    return {
        "pope_accuracy": (hits + rejections, positives + negatives),
        "pope_precision": (hits, said),
        "pope_recall": (hits, positives),
        "pope_f1": (2 * hits, 2 * hits + false_alarms + misses),
        "pope_yes_rate": (said, positives + negatives),
    }


def blind(look: Look, objects: Objects, arm: bool) -> Marks:
    """What is answered without looking: the same questions about a grey image.

    One prefix serves all names of one image size, and a name is asked once per size.
    """
    mark = Tally(objects.owner, len(look))
    sizes = list(dict.fromkeys(pixels.shape for pixels in look.pixels))
    greys = [torch.full(size, GREY, dtype=torch.uint8) for size in sizes]
    prefixes = look.engine.prefill(look.engine.encode(greys), arm)
    places = [sizes.index(look.pixels[i].shape) for i in objects.owner]
    questions = list(zip(places, objects.names, strict=True))
    asked = list(dict.fromkeys(questions))
    where = [asked.index(question) for question in questions]
    images = [place for place, _ in asked]
    names = [name for _, name in asked]
    boxes = look.boxes(prefixes, images, names).box_1000[where]
    yes = look.sees(prefixes, images, names)[where]
    return {
        "blind_iou": mark(geometry.iou(boxes, objects.box_1000)),
        "blind_yes_rate": mark(yes),
    }
