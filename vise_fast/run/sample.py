"""One image's part of a step as JSON: query, boxes, verdicts, views. What the report shows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vise_fast.images.views import View
from vise_fast.method.experience import Played


def sample(played: Played, index: int) -> dict[str, Any]:
    """Image `index` of a slice that the learner has scored."""
    evidence = played.evidence
    group = evidence.group_size
    rows = slice(index * group, (index + 1) * group)

    def listed(values: Tensor | None) -> list | None:
        return None if values is None else values[rows].tolist()

    return {
        "name": played.images[index].name,
        "query": played.queries.texts[index],
        "query_written": played.queries.written[index],
        "boxes_1000": listed(evidence.box_1000),
        "readable": listed(evidence.readable),
        "written": played.boxes.written[rows],
        "seen": float(evidence.seen[rows][0]),
        "gone": listed(evidence.gone),
        "control": listed(evidence.control),
        "keep": listed(evidence.keep),
        "rewards": listed(played.rewards),
        "judged": listed(evidence.judged),
        "further": listed(evidence.further),
        "views": [_view(view) for view in played.views[index]],
        "view_boxes_1000": evidence.view_box_1000[rows][0].tolist(),
    }


def _view(view: View) -> dict[str, Any]:
    return {"kind": view.kind, "matrix_px": view.matrix_px.tolist()}
