"""uint8 images to rows of normalised patches, in the order Qwen3-VL's vision tower reads them.

    value = (level / 255 - mean) / std
    rows: images, then squares of merge x merge patches row by row, then a square's patches
    within a row: channel, temporal tap, y, x

The taps of a still are the same picture `temporal` times. single_tap leaves out the repeats, half
the bytes, for a patch embedding whose temporal taps were added up. matrices_px warps on the way:
each value is read through its image's matrix, to the byte that `warp` would have written, and no
warped image is. Leaves out resizing, and ghosts: a blurred box needs all its pixels before the
first is known (docs/LOG.md has what fusing could save).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vise_kernels.dispatch import choose, compiled, jit, launch, tl, triton
from vise_kernels.pixels import Images, addresses, checked
from vise_kernels.warp import inverted, sampled
from vise_kernels.warp import plain as warp_plain


def patchify(
    images: Images,
    *,
    patch: int,
    merge: int,
    temporal: int = 2,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    dtype: torch.dtype = torch.float32,
    single_tap: bool = False,
    matrices_px: Tensor | None = None,
    fill: int = 128,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(patches (sum of tokens, 3 * temporal * patch^2) of dtype, grid_thw (N,3) int64 on the CPU)
    of uint8 (H,W,3) images.

    H and W are multiples of patch * merge. With single_tap a row has 3 * patch^2 values.
    matrices_px (N,3,3), fill: the images are those of `warp(images, matrices_px, fill=fill)`; an
    identity costs nothing. path forces "plain", "native" or "triton". ValueError: no image, sizes
    off the grid, a dtype that is not float16, bfloat16 or float32, what `warp` refuses, a path that
    cannot run.
    """
    images = checked("patchify", images)
    layout = Layout(patch, merge, 1 if single_tap else temporal)
    values = Values(tuple(mean), tuple(std), dtype)
    _check(images, layout, values)
    inverses = None if matrices_px is None else inverted("patchify", images, matrices_px, fill)
    grid = torch.tensor([[1, image.shape[0] // patch, image.shape[1] // patch] for image in images])
    chosen = choose("patchify", images[0].device, path).path
    run = {"plain": plain, "native": _native, "triton": _triton}[chosen]
    return run(images, layout, values, inverses, fill), grid


@dataclass(frozen=True)
class Layout:
    """Pixels along a patch's side, patches along a square's, repeats of each channel."""

    patch: int
    merge: int
    taps: int

    @property
    def row(self) -> int:
        """Values of one patch."""
        return 3 * self.taps * self.patch**2


@dataclass(frozen=True)
class Values:
    """What a grey level becomes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype


def _check(images: Images, layout: Layout, values: Values) -> None:
    if not images or values.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"patchify: needs an image and a float dtype of at most 32 bits, got {len(images)} and "
            f"{values.dtype}"
        )
    if min(layout.patch, layout.merge, layout.taps) < 1:
        raise ValueError(
            f"patchify: patch {layout.patch}, merge {layout.merge} and temporal {layout.taps} must "
            "be at least 1"
        )
    side = layout.patch * layout.merge
    for image in images:
        if image.shape[0] % side or image.shape[1] % side:
            raise ValueError(
                f"patchify: {tuple(image.shape[:2])} is not a multiple of {side} (patch "
                f"{layout.patch} x merge {layout.merge})"
            )


def normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3) grey levels to float32, rounded where transformers' image processors round: after
    the float64 product too.
    """
    scaled = (levels.double() * (1 / 255)).float()
    return (scaled - scaled.new_tensor(mean)) / scaled.new_tensor(std)


def plain(
    images: Images, layout: Layout, values: Values, inverses: Tensor | None, fill: int
) -> Tensor:
    """A view of each image, warped where it is to be, in nine axes, permuted."""
    images = images if inverses is None else warp_plain(images, inverses, fill)
    numbers = [normalise(image, values.mean, values.std).to(values.dtype) for image in images]
    return torch.cat([_patchify_one(image, layout) for image in numbers])


def _patchify_one(values: Tensor, layout: Layout) -> Tensor:
    """(H,W,3) numbers to (patches, layout.row)."""
    patch = layout.patch
    merge = layout.merge
    rows, columns = (size // (patch * merge) for size in values.shape[:2])
    squares = values.view(rows, merge, patch, columns, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    taps = squares.unsqueeze(5).expand(-1, -1, -1, -1, -1, layout.taps, -1, -1)
    return taps.reshape(-1, layout.row)


@functools.lru_cache(maxsize=16)
def _levels(values: Values, device: torch.device) -> Tensor:
    """(3,256): the value of every grey level of every channel, so that the fast paths look up
    instead of computing.
    """
    every = torch.arange(256)[:, None].expand(-1, 3)
    table = normalise(every, values.mean, values.std).to(values.dtype).T.contiguous()
    return table.to(device, non_blocking=True)


def _native(
    images: Images, layout: Layout, values: Values, inverses: Tensor | None, fill: int
) -> Tensor:
    out = _allocate(images, layout, values)
    inverses = None if inverses is None else inverses.contiguous()
    table = _levels(values, out.device)
    threads = torch.get_num_threads()
    compiled().patchify(
        images, out, table, layout.patch, layout.merge, layout.taps, threads, inverses, float(fill)
    )
    return out


def _allocate(images: Images, layout: Layout, values: Values) -> Tensor:
    tokens = sum(image.shape[0] * image.shape[1] for image in images) // layout.patch**2
    return torch.empty(tokens, layout.row, dtype=values.dtype, device=images[0].device)


# of the table: address of the image, first row of the output, width in patches, patches
COLUMNS = 4
VALUES = 1024  # per program
PIXELS = 512  # per program, warped


@jit
def _patchify_kernel(
    table,
    levels,
    out,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TAPS: tl.constexpr,
):
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    begin = tl.load(row + 1)
    columns = tl.load(row + 2).to(tl.int32)
    patches = tl.load(row + 3).to(tl.int32)
    plane: tl.constexpr = PATCH * PATCH
    p = tl.program_id(0) * VALUES + tl.arange(0, VALUES)  # counts patches, channels, y, x
    inside = p < patches * 3 * plane
    token = p // (3 * plane)
    channel = p // plane % 3
    y = p // PATCH % PATCH
    x = p % PATCH
    square = token // (MERGE * MERGE)
    member = token % (MERGE * MERGE)
    squares = columns // MERGE
    line = (square // squares * MERGE + member // MERGE) * PATCH + y
    column = (square % squares * MERGE + member % MERGE) * PATCH + x
    level = tl.load(
        source + (line.to(tl.int64) * columns * PATCH + column) * 3 + channel, mask=inside, other=0
    )
    value = tl.load(levels + channel * 256 + level, mask=inside)
    to = out + ((begin + token) * 3 + channel) * TAPS * plane + y * PATCH + x
    for tap in tl.static_range(TAPS):
        tl.store(to + tap * plane, value, mask=inside)


@jit
def _warped_kernel(
    table,
    levels,
    out,
    inverses,
    fill,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TAPS: tl.constexpr,
):
    """The same through a warp: a program's pixels in the order of the output, so that the three
    channels share their coordinates.
    """
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    begin = tl.load(row + 1)
    columns = tl.load(row + 2).to(tl.int32)
    patches = tl.load(row + 3).to(tl.int32)
    plane: tl.constexpr = PATCH * PATCH
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)  # counts patches, y, x
    inside = p < patches * plane
    token = p // plane
    y = p // PATCH % PATCH
    x = p % PATCH
    square = token // (MERGE * MERGE)
    member = token % (MERGE * MERGE)
    squares = columns // MERGE
    line = (square // squares * MERGE + member // MERGE) * PATCH + y
    column = (square % squares * MERGE + member % MERGE) * PATCH + x
    width = columns * PATCH
    height = patches // columns * PATCH
    red, green, blue = sampled(
        source, inverses + tl.program_id(1) * 9, column + 0.5, line + 0.5, width, height, fill
    )
    to = out + (begin + token) * (3 * TAPS * plane) + p % plane
    for channel in tl.static_range(3):
        level = red if channel == 0 else green if channel == 1 else blue
        value = tl.load(levels + channel * 256 + level, mask=inside)
        for tap in tl.static_range(TAPS):
            tl.store(to + (channel * TAPS + tap) * plane, value, mask=inside)


def _triton(
    images: Images, layout: Layout, values: Values, inverses: Tensor | None, fill: int
) -> Tensor:
    out = _allocate(images, layout, values)
    area = layout.patch**2
    device = out.device
    width = torch.tensor([image.shape[1] // layout.patch for image in images])
    patches = torch.tensor([image.shape[0] * image.shape[1] // area for image in images])
    rows = torch.stack([addresses(images), patches.cumsum(0) - patches, width, patches], 1)
    table = rows.to(device, non_blocking=True)
    levels = _levels(values, device)
    most = int(patches.max()) * area
    shape = (layout.patch, layout.merge, layout.taps)
    if inverses is None:
        grid = (triton.cdiv(3 * most, VALUES), len(images))
        launch(_patchify_kernel, grid, table, levels, out, COLUMNS, VALUES, *shape)
    else:
        turns = inverses.float().contiguous().to(device, non_blocking=True)
        grid = (triton.cdiv(most, PIXELS), len(images))
        given = (table, levels, out, turns, float(fill), COLUMNS, PIXELS, *shape)
        launch(_warped_kernel, grid, *given)
    return out
