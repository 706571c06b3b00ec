"""What a group's boxes agree on, cut out of its image: a picture of its own for the model.

The box is the median of the group's, side by side; a margin is left around it, and it is resized
to the image's own area, on the model's grid. Left out: who looks at it (named_again.py).

Run: `pytest tests/method/groups/test_cutout.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import vise_kernels
from torch import Tensor

from vise_fast.images import geometry
from vise_fast.images.picture_file import grid_size

MARGIN = 1 / 8
"""Of each side of the box, at each of its ends."""
LONGEST = 4
"""The longer side of a cutout over its shorter one at most: a thinner one is widened."""


class Span(NamedTuple):
    """Pixels start..stop of an axis, half-open."""

    start: int
    stop: int


class Rectangle(NamedTuple):
    """The rows and columns of a cutout."""

    rows: Span
    columns: Span


def median_boxes(box_1000: Tensor, usable: Tensor, group: int) -> Tensor:
    """The median of each coordinate over the usable rows (N,) of every group of box_1000 (N, 4)
    float64; zeros where none is usable. (N / group, 4).

    Of an even number it is the mean of the two in the middle. Boxes with area have a median with
    area: x1 < x2 in every row holds for what stands in the middle too.
    """
    rows = box_1000.masked_fill(~usable[:, None], torch.nan).view(-1, group, 4)
    return rows.nanquantile(0.5, 1).nan_to_num(0.0)


def rectangle(box_1000: Tensor, height: int, width: int, least: int) -> Rectangle:
    """The whole pixels of a box (4,) with area and its margin, in an image of this size.

    Inside the image; no side is under `least` pixels, nor under the longer one / LONGEST, as far
    as the image allows: what is widened is so about its middle.
    """
    x1, y1, x2, y2 = geometry.to_px(geometry.clean_1000(box_1000), height, width).tolist()
    columns = _with_margin(x1, x2, width)
    rows = _with_margin(y1, y2, height)
    longer = max(columns.stop - columns.start, rows.stop - rows.start)
    side = max(least, math.ceil(longer / LONGEST))
    return Rectangle(_widened(rows, side, height), _widened(columns, side, width))


def _with_margin(low: float, high: float, length: int) -> Span:
    """The pixels that low..high and its margins touch."""
    margin = MARGIN * (high - low)
    # 0.4 * 640 is 256.00000000000006 in float64: a side on the grid must not grow by a pixel
    start = math.floor(max(low - margin, 0) + 1e-6)
    stop = math.ceil(min(high + margin, length) - 1e-6)
    start = min(start, length - 1)
    return Span(start, max(stop, start + 1))


def _widened(span: Span, side: int, length: int) -> Span:
    """As many pixels as `side` at least, moved into 0..length."""
    more = min(side, length) - (span.stop - span.start)
    if more <= 0:
        return span
    start = min(max(span.start - more // 2, 0), length - (span.stop - span.start) - more)
    return Span(start, start + span.stop - span.start + more)


def cutouts(images: list[Tensor], boxes_1000: Tensor, multiple: int) -> list[Tensor]:
    """N uint8 (H, W, 3) of N images and boxes (N, 4) with area: each enlarged, or shrunk, to sides
    that are multiples of `multiple` and an area as near below its image's as these allow.
    """
    found = []
    sizes = []
    for image, box in zip(images, boxes_1000, strict=True):
        height, width = image.shape[:2]
        rows, columns = rectangle(box, height, width, multiple)
        found.append(image[slice(*rows), slice(*columns)].contiguous())
        sides = (rows.stop - rows.start, columns.stop - columns.start)
        sizes.append(grid_size(*sides, multiple, height * width, height * width))
    return vise_kernels.resize(found, sizes)
