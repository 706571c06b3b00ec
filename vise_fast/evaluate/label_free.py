"""What needs no labels: boxes for the base's own queries, whether they agree across views, whether
hiding them hides the object, and how much attention the image gets.

Both arms are asked the same queries and judged by the same judge (the base), so that the difference
is the boxes'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vise_fast.engine.attention_meter import image_share
from vise_fast.engine.rollout import owners
from vise_fast.evaluate.look import Look, Tally
from vise_fast.evaluate.results import Mark, Marks
from vise_fast.images import geometry, views
from vise_fast.method import roles
from vise_fast.method.evidence import beaf_cells, r_geo
from vise_fast.method.rewards import LARGE_AREA
from vise_fast.text import sides


def measure(look: Look, arm: bool, own: roles.Queries) -> tuple[Marks, Tensor | None]:
    """The marks, and the attention share (layers, images) where it can be measured. `own`: what the
    arm itself would ask.
    """
    mark = Tally(look.everyone, len(look))
    boxes = look.boxes(look.prefix(arm), look.everyone, look.queries)
    placed = geometry.proper(boxes.box_1000)
    area = geometry.area_share(boxes.box_1000)
    marks = {
        "query_parse_rate": mark(own.readable),
        "own_parse_rate": mark(boxes.readable),
        "own_area": mark(area, placed),
        "own_area_large": mark(area > LARGE_AREA, placed),
        "own_zero_area": mark(~placed, boxes.readable),
        "invariance": _invariance(look, arm, boxes.box_1000, placed),
    }
    marks |= _hiding(look, boxes.box_1000, placed)
    share = _attention(look, arm, boxes)
    if share is not None:
        marks["attention_share"] = mark(share.mean(0))
    return marks, share


def _invariance(look: Look, arm: bool, box_1000: Tensor, placed: Tensor) -> Mark:
    """R_geo (method/evidence.py) of greedy boxes in the views; a box that cannot be read, or has no
    area, in a view agrees by 0.
    """
    config = look.config
    drawn, features = look.views
    owner = owners([len(row) for row in drawn])
    texts = []
    for query, row in zip(look.queries, drawn, strict=True):
        texts += [sides.query_for(query, view, config.view) for view in row]
    prefixes = look.engine.prefill(features, arm)
    found = look.boxes(prefixes, list(range(len(texts))), texts).box_1000
    height = torch.tensor([pixels.shape[0] for pixels in look.pixels])
    width = torch.tensor([pixels.shape[1] for pixels in look.pixels])
    expected = geometry.project_1000(
        box_1000[owner],
        views.stack(drawn).flatten(0, 1),
        height[owner],
        width[owner],
        config.reward.projection,
    )
    sided = sides.named_in(look.queries)
    usable = views.usable(drawn, box_1000, sided, height, width, config.view).flatten()
    return Tally(owner, len(look))(r_geo(expected, found), usable & placed[owner])


def _hiding(look: Look, box_1000: Tensor, placed: Tensor) -> Marks:
    """The 2x2 table of (seen, seen after the arm's box was ghosted), judged by the base: TU means
    the box held the object.
    """
    mark = Tally(look.everyone, len(look))
    rows = placed.nonzero()[:, 0].tolist()
    seen = look.sees(look.prefix(False), look.everyone, look.queries)
    gone = torch.zeros(len(look), dtype=torch.bool)
    if rows:
        names = [look.queries[i] for i in rows]
        gone[rows] = look.sees_in(look.hidden(rows, box_1000[rows]), names, arm=False)
    cells = beaf_cells(seen, gone)
    return {f"own_{name}": mark(cell, placed) for name, cell in cells.items()}


def _attention(look: Look, arm: bool, boxes: roles.Boxes) -> Tensor | None:
    """(layers, images) while the boxes were written; None where it is not wanted, or the engine
    cannot measure it.
    """
    if not (look.config.eval.attention and look.engine.measures_attention):
        return None
    return image_share(look.engine, look.prefix(arm), look.everyone, boxes.rows, boxes.answers)
