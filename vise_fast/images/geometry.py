"""Boxes and 3x3 matrices: clean, compare, project. Nothing here knows about images, models or text.

Boxes are (..., 4) x1, y1, x2, y2; a name ends in `_1000` (0..1000 of the image's width and height)
or `_px`. Pixel coordinates are continuous: pixel (row i, column j) covers [j, j+1) x [i, i+1), an
image of width w spans 0..w. Matrices are (..., 3, 3), affine (last row 0, 0, 1), and map source
pixels to view pixels; a view has its source's size. Everything is computed and returned in float64.
Left out: perspective (a projected box would need a division).

Run the golden numbers: `pytest tests/images/test_geometry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
Projection = Literal["ellipse", "corners"]
Length = float | int | Tensor
Boxes = Tensor | Sequence[Any]
"""(..., 4): a tensor of any dtype, or numbers."""

AFFINE = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def _double(value: Boxes | Length) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _hull(a: Tensor, b: Tensor) -> Tensor:
    """Two opposite corners (..., 2) in any order -> box (..., 4)."""
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], dim=-1)


def _area(boxes: Tensor) -> Tensor:
    """Area of sorted boxes (..., 4); never negative."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp_min(0)
    return sides[..., 0] * sides[..., 1]


def _size(height: Length, width: Length, device: torch.device) -> Tensor:
    """Numbers or tensors (...) -> (..., 4): width, height, width, height."""
    high, wide = torch.broadcast_tensors(_double(height), _double(width))
    return torch.stack([wide, high, wide, high], dim=-1).to(device)


def clean_1000(boxes_1000: Boxes) -> Tensor:
    """Sort x1/x2 and y1/y2, clamp to 0..1000; a box with any non-finite number becomes (0, 0, 0,
    0). (..., 4) -> (..., 4).
    """
    boxes = _double(boxes_1000)
    finite = boxes.isfinite().all(-1, keepdim=True)
    boxes = torch.where(finite, boxes, torch.zeros_like(boxes)).clamp(0, 1000)
    return _hull(boxes[..., :2], boxes[..., 2:])


def proper(boxes_1000: Boxes) -> Tensor:
    """Whether a box is finite and has area inside the image. (..., 4) -> bool (...)."""
    return _area(clean_1000(boxes_1000)) > 0


def area_share(boxes_1000: Boxes) -> Tensor:
    """Area of the cleaned box as a share 0..1 of the image. (..., 4) -> (...)."""
    return _area(clean_1000(boxes_1000)) / 1e6


def to_px(boxes_1000: Boxes, height: Length, width: Length) -> Tensor:
    """0..1000 -> pixels; height and width broadcast with the boxes' leading dimensions."""
    boxes = _double(boxes_1000)
    return boxes * _size(height, width, boxes.device) / 1000


def to_1000(boxes_px: Boxes, height: Length, width: Length) -> Tensor:
    """Pixels -> 0..1000; height and width broadcast with the boxes' leading dimensions."""
    boxes = _double(boxes_px)
    return boxes * 1000 / _size(height, width, boxes.device)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union areas of sorted boxes."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    shared = _area(torch.cat([low, high], dim=-1))
    return shared, _area(a) + _area(b) - shared


def _ratio(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    """part / whole, and `empty` where the whole is zero."""
    return torch.where(
        whole > 0,
        part / whole.where(whole > 0, torch.ones_like(whole)),
        torch.full_like(whole, empty),
    )


def iou(a: Boxes, b: Boxes) -> Tensor:
    """Intersection over union of sorted boxes in the same units; 0 when both are empty.

    (..., 4) x2 -> (...).
    """
    shared, union = _overlap(_double(a), _double(b))
    return _ratio(shared, union, empty=0.0)


def giou(a: Boxes, b: Boxes) -> Tensor:
    """Generalised IoU, -1..1 (Rezatofighi et al., arXiv 1902.09630); -1 when the common hull is
    empty. (..., 4) x2 -> (...).
    """
    first = _double(a)
    second = _double(b)
    shared, union = _overlap(first, second)
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = _area(torch.cat([low, high], dim=-1))
    return _ratio(shared, union, empty=0.0) - _ratio(hull - union, hull, empty=1.0)


def flip_px(width: float) -> Tensor:
    """Horizontal mirror of an image of this width. (3, 3)."""
    return _double([[-1, 0, width], [0, 1, 0], [0, 0, 1]])


def crop_px(
    x0: float, y0: float, crop_width: float, crop_height: float, width: float, height: float
) -> Tensor:
    """The rectangle at (x0, y0) enlarged to the whole view. (3, 3)."""
    fx = width / crop_width
    fy = height / crop_height
    return _double([[fx, 0, -x0 * fx], [0, fy, -y0 * fy], [0, 0, 1]])


def affine_px(
    angle_deg: float, scale: float, dx: float, dy: float, width: float, height: float
) -> Tensor:
    """Rotate (positive: counter-clockwise as seen) and scale about the centre, then shift by (dx,
    dy) pixels. (3, 3).
    """
    c = scale * math.cos(math.radians(angle_deg))
    s = scale * math.sin(math.radians(angle_deg))
    cx = width / 2
    cy = height / 2
    return _double(
        [[c, s, cx - c * cx - s * cy + dx], [-s, c, cy + s * cx - c * cy + dy], [0, 0, 1]]
    )


def _reach(half: Tensor, matrix: Tensor, mode: Projection) -> Tensor:
    """Half-sides of the hull of a centred box, or of its inscribed ellipse, under the linear part.

    (..., 2).
    """
    parts = matrix[..., :2, :2] * half.unsqueeze(-2)
    if mode == "corners":
        return parts.abs().sum(-1)
    if mode == "ellipse":
        return torch.hypot(parts[..., 0], parts[..., 1])
    raise ValueError(f"projection {mode!r}; known: corners, ellipse")


def project_1000(
    boxes_1000: Boxes,
    matrix_px: Tensor,
    height: Length,
    width: Length,
    mode: Projection = "corners",
    clamp: bool = True,
) -> Tensor:
    """The box a perfect grounder would answer in the view, N M N^-1 with N = diag(1000/w, 1000/h,
    1).

    boxes (..., 4), matrix (..., 3, 3), height and width (...) broadcast together; returns (..., 4).
    corners: hull of the four mapped corners. ellipse: hull of the mapped inscribed ellipse, exact
    for round objects. An affine map keeps the centre, so both hulls are centre -+ reach.

    Raises ValueError for a matrix that is not affine (last row 0, 0, 1).
    """
    matrix = _double(matrix_px)
    if not (matrix[..., 2, :] == AFFINE.to(matrix.device)).all():
        raise ValueError("boxes are projected by affine matrices only; this one has a perspective")
    boxes_px = to_px(boxes_1000, height, width)
    centre = (boxes_px[..., :2] + boxes_px[..., 2:]) / 2
    half = (boxes_px[..., 2:] - boxes_px[..., :2]).abs() / 2
    centre = (matrix[..., :2, :2] * centre.unsqueeze(-2)).sum(-1) + matrix[..., :2, 2]
    reach = _reach(half, matrix, mode)
    boxes = to_1000(torch.cat([centre - reach, centre + reach], dim=-1), height, width)
    return boxes.clamp(0, 1000) if clamp else boxes


def kept_share(boxes_1000: Boxes, matrix_px: Tensor, height: Length, width: Length) -> Tensor:
    """Share of the projected (corner) hull's area that lies inside the view; 1 for a box without
    area. Broadcasts like project_1000.
    """
    hull = project_1000(clean_1000(boxes_1000), matrix_px, height, width, "corners", clamp=False)
    return _ratio(_area(hull.clamp(0, 1000)), _area(hull), empty=1.0)
