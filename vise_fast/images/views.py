"""Views and ghosts: draw a random transform, warp an image by it, hide the inside or the outside of
a box.

A view is made before any box exists; its matrix and its pixels come from the same 3x3 float64
matrix (geometry.py's conventions), and it has the size of its source. Pixel work is done by
`vise_kernels.warp` and `vise_kernels.ghost`. Images are uint8 (H, W, 3) tensors. Lengths of the
settings (shift, sigma, feather) hold at a short side of 480 px and scale with the image's;
`literal` takes them as they are. Left out: who answers on a view (method/roles.py), what a dropped
view costs (method/rewards.py).

Run: `pytest tests/images/test_views.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import vise_kernels
from torch import Tensor

from vise_fast.config.schema import VIEW_KINDS, GhostConfig, ViewConfig
from vise_fast.images import geometry
from vise_fast.images.geometry import Box
from vise_fast.system.errors import ConfigError

SHORT_SIDE_PX = 480
BORDER = 128


@dataclass(frozen=True)
class View:
    """One transform of one image: its kind and its (3, 3) float64 matrix, source pixels to view
    pixels.
    """

    kind: str
    matrix_px: Tensor


def length_scale(height: int, width: int, literal: bool = False) -> float:
    """What a length stated at a short side of 480 px is multiplied with."""
    return 1.0 if literal else min(height, width) / SHORT_SIDE_PX


def draw_view(rng: np.random.Generator, height: int, width: int, settings: ViewConfig) -> View:
    """One transform, its kind uniform over `settings.kinds`, for an image of this size."""
    kind = settings.kinds[rng.integers(len(settings.kinds))]
    return View(kind, DRAWN[kind](rng, height, width, settings))


def _flip(rng: np.random.Generator, height: int, width: int, settings: ViewConfig) -> Tensor:
    """Horizontal; nothing is drawn."""
    return geometry.flip_px(width)


def _crop(rng: np.random.Generator, height: int, width: int, settings: ViewConfig) -> Tensor:
    """One uniform ratio for both sides, a uniform place, enlarged to the whole view."""
    ratio = rng.uniform(*settings.crop)
    x0, y0 = rng.uniform(0, 1, 2) * (1 - ratio) * (width, height)
    return geometry.crop_px(x0, y0, ratio * width, ratio * height, width, height)


def _affine(rng: np.random.Generator, height: int, width: int, settings: ViewConfig) -> Tensor:
    """Rotation about the centre, scale, shift, each uniform."""
    reach = settings.shift_px * length_scale(height, width, settings.literal_pixels)
    angle = rng.uniform(-settings.degrees, settings.degrees)
    scale = rng.uniform(*settings.scale)
    dx, dy = rng.uniform(-reach, reach, 2)
    return geometry.affine_px(angle, scale, dx, dy, width, height)


Draw = Callable[[np.random.Generator, int, int, ViewConfig], Tensor]
DRAWN: dict[str, Draw] = {
    "affine": _affine,
    "crop": _crop,
    "flip": _flip,
}
"""How the (3, 3) float64 matrix of each kind is drawn: (rng, height, width, settings)."""


def register(kind: str, draw: Draw) -> None:
    """Makes a kind of view known to `view.kinds`: an affine matrix, source pixels to view pixels.

    Raises ConfigError for a name that is taken.
    """
    if kind in DRAWN:
        raise ConfigError(f"a view {kind} is known already; names must differ; rename it")
    DRAWN[kind] = draw
    VIEW_KINDS.append(kind)


def matrices(views: Sequence[View]) -> Tensor:
    """K views -> float64 (K, 3, 3)."""
    return torch.stack([view.matrix_px for view in views])


def stack(views: Sequence[Sequence[View]]) -> Tensor:
    """N rows of K views -> their matrices, float64 (N, K, 3, 3)."""
    return torch.stack([matrices(row) for row in views])


def apply(
    images: Sequence[Tensor], views: Sequence[View], *, path: str | None = None
) -> list[Tensor]:
    """Each image through its view, bilinear, border grey 128.

    N uint8 (H, W, 3) -> N uint8 (H, W, 3).
    """
    return vise_kernels.warp(images, matrices(views), fill=BORDER, path=path)


def usable(
    views: Sequence[Sequence[View]],
    boxes_1000: Tensor,
    sided: Tensor,
    height: Sequence[int] | Tensor,
    width: Sequence[int] | Tensor,
    settings: ViewConfig,
) -> Tensor:
    """Which views of each sampled box enter its reward. N rows of K views, boxes (N, 4), `sided`
    (N,) bool: the row's query names left or right, sizes (N,) -> (N, K) bool on the CPU.

    Dropped: a view that keeps less than `min_kept` of the projected box, and a flip for a query
    that names a side when `side_words` is "drop". A box without area loses no view by the
    first rule (its reward is 0 in any case).
    """
    heights = torch.as_tensor(height, dtype=torch.float64)[:, None]
    widths = torch.as_tensor(width, dtype=torch.float64)[:, None]
    boxes = torch.as_tensor(boxes_1000).cpu()[:, None]
    kept = geometry.kept_share(boxes, stack(views), heights, widths) >= settings.min_kept
    if settings.side_words != "drop":
        return kept
    flipped = torch.stack([_flips(row) for row in views])
    return kept & ~(sided[:, None] & flipped)


def _flips(views: Sequence[View]) -> Tensor:
    return torch.tensor([view.kind == "flip" for view in views])


@dataclass(frozen=True)
class GhostLengths:
    """A ghost's lengths in pixels of one image."""

    sigma: float
    radius: int
    feather: float


def ghost_lengths(
    height: int, width: int, settings: GhostConfig, literal: bool = False
) -> GhostLengths:
    """The settings' lengths for an image of this size; the radius is `radius_sigmas` times the
    scaled sigma, rounded up, at least 1.
    """
    scale = length_scale(height, width, literal)
    sigma = settings.sigma_px * scale
    radius = max(1, math.ceil(settings.radius_sigmas * sigma - 1e-9))
    return GhostLengths(sigma, radius, settings.feather_px * scale)


def whole_pixels(boxes_1000: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Boxes (N, 4), sizes numbers or (N,) -> the half-open pixel rectangles that cover them, int64
    (N, 4); all zero without area.
    """
    boxes = geometry.clean_1000(boxes_1000)
    boxes_px = geometry.to_px(boxes, height, width)
    # 0.4 * 640 is 256.00000000000006 in float64: a box on the pixel grid must not grow by a pixel
    covered = torch.cat(
        [(boxes_px[..., :2] + 1e-6).floor(), (boxes_px[..., 2:] - 1e-6).ceil()], dim=-1
    )
    return covered.long() * geometry.proper(boxes)[..., None]


def ghost(
    images: Sequence[Tensor],
    image_index: Tensor,
    boxes_1000: Tensor,
    settings: GhostConfig,
    region: Literal["inside", "outside"] = "inside",
    *,
    literal: bool = False,
    path: str | None = None,
) -> list[Tensor]:
    """Copies of images with the inside (or the outside) of one box hidden: N uint8 (H, W, 3).

    images: any number, of any sizes; image_index (N,) says which one row n copies; boxes (N, 4),
    cleaned here. A box without area hides nothing inside.
    """
    shapes = torch.tensor([images[i].shape for i in image_index.tolist()])
    height, width, _ = shapes.unbind(1)
    boxes_px = whole_pixels(boxes_1000.cpu(), height, width).int()
    lengths = [ghost_lengths(h, w, settings, literal) for h, w, _ in shapes.tolist()]
    result: dict[int, Tensor] = {}
    # the kernel takes one feather per call; sizes rarely differ
    for feather in {length.feather for length in lengths}:
        chosen = [n for n, length in enumerate(lengths) if length.feather == feather]
        hidden = vise_kernels.ghost(
            images,
            image_index[chosen],
            boxes_px[chosen],
            method=settings.method,
            sigma=torch.tensor([lengths[n].sigma for n in chosen]),
            radius=torch.tensor([lengths[n].radius for n in chosen]),
            feather=feather,
            region=region,
            path=path,
        )
        result.update(zip(chosen, hidden, strict=True))
    return [result[n] for n in range(len(lengths))]


def _free_spots(box: Box) -> list[tuple[float, float, float, float]]:
    """Ranges (x_low, x_high, y_low, y_high) of the top-left corner where a box of this size clears
    `box`; they do not overlap.
    """
    x1, y1, x2, y2 = box
    w = x2 - x1
    h = y2 - y1
    right = 1000 - w
    bottom = 1000 - h
    left_edge = max(0.0, x1 - w)
    right_edge = min(right, x2)
    spots = [
        (0.0, x1 - w, 0.0, bottom),
        (x2, right, 0.0, bottom),
        (left_edge, right_edge, 0.0, y1 - h),
        (left_edge, right_edge, y2, bottom),
    ]
    return [spot for spot in spots if spot[0] <= spot[1] and spot[2] <= spot[3]]


def control_box(
    rng: np.random.Generator, box_1000: Sequence[float] | Tensor
) -> tuple[Box, Literal["far", "random"]]:
    """A box of the same size elsewhere: "far" is uniform over all places disjoint from the cleaned
    box, in 0..1000; where it fits nowhere, "random" is uniform over all places. A place of zero
    measure (a box of exactly half the width has one spot left) is taken only when there is no
    other.
    """
    x1, y1, x2, y2 = geometry.clean_1000(box_1000).tolist()
    w = x2 - x1
    h = y2 - y1
    free = _free_spots((x1, y1, x2, y2))
    spots = free or [(0.0, 1000 - w, 0.0, 1000 - h)]
    corners = np.array(spots)
    weights = (corners[:, 1] - corners[:, 0] + 1e-9) * (corners[:, 3] - corners[:, 2] + 1e-9)
    x_low, x_high, y_low, y_high = spots[rng.choice(len(spots), p=weights / weights.sum())]
    x = rng.uniform(x_low, x_high)
    y = rng.uniform(y_low, y_high)
    return (x, y, x + w, y + h), "far" if free else "random"
