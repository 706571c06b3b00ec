"""The released code's arithmetic, kept for A/B studies of preset `as_released`; correct mathematics
lives in images/geometry.py and loss.py.

Four departures: the pixel matrix is applied to 0..1000 boxes without a change of units; the union
inside GIoU is (A1 + A2)(1 - IoU), so identical boxes do not score best; the log-prob is a mean over
everything after the prompt's length *before* image tokens were expanded; the ghost's Gaussian is
cut at one sigma (51 taps). The last is only a setting (`ghost.radius_sigmas: 1`), as is `update.kl:
k1_loss`.

Run the facts: `pytest tests/method/test_as_released.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vise_fast.images import geometry
from vise_fast.images.geometry import Boxes

SIGMA_PX = 25.0
RADIUS_PX = 25


def project(boxes_1000: Boxes, matrix_px: Tensor) -> Tensor:
    """Corner hull of M applied to the 0..1000 numbers as if they were pixels, clamped.

    (..., 4), (..., 3, 3) -> (..., 4).
    """
    return geometry.project_1000(boxes_1000, matrix_px, 1000, 1000, "corners")


def giou(a: Boxes, b: Boxes) -> Tensor:
    """GIoU with the released union term (A1 + A2)(1 - IoU). Sorted boxes (..., 4) x2 -> (...); an
    empty hull gives -1.
    """
    first = torch.as_tensor(a, dtype=torch.float64)
    second = torch.as_tensor(b, dtype=torch.float64)
    shared = geometry.iou(first, second)
    union = (_area(first) + _area(second)) * (1 - shared)
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = _area(torch.cat([low, high], -1))
    value = shared - (hull - union) / hull.clamp_min(1e-12)
    return torch.where(hull > 0, value, torch.full_like(hull, -1.0))


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def r_geo(boxes_1000: Boxes, view_boxes_1000: Boxes, matrix_px: Tensor) -> Tensor:
    """(GIoU + 1) / 2 of the released projection against the view's answer; boxes are cleaned.

    Broadcasts to (...).
    """
    projected = project(geometry.clean_1000(boxes_1000), matrix_px)
    return (giou(projected, geometry.clean_1000(view_boxes_1000)) + 1) / 2


def scored_span(unexpanded_prompt: int, length: int) -> slice:
    """The positions whose log-probs the released code averages: all from the unexpanded prompt's
    length on.

    One image placeholder becomes hundreds of image tokens in the model's input, so this span begins
    inside the image tokens and covers the rest of the prompt as well.
    """
    return slice(unexpanded_prompt, length)


def mean_logprob(logprob: Tensor, unexpanded_prompt: int) -> Tensor:
    """Mean of a full sequence's token log-probs (T,) over the released span. Scalar."""
    return logprob[scored_span(unexpanded_prompt, logprob.shape[-1])].mean()


def blur_spread_px(sigma: float = SIGMA_PX, radius: int = RADIUS_PX) -> float:
    """Standard deviation of the sampled Gaussian after cutting it at `radius` taps either side."""
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    return float(((weights * taps**2).sum() / weights.sum()).sqrt())
