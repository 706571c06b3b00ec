"""Antialiased bicubic resizing of uint8 images, as Pillow's `resize(size, BICUBIC)` does it.

    one axis   out[i] = clip(floor(sum_j w[i, j] in[j] + 1/2)),   w[i, j] ~ k((j + 1/2 - c_i) / s),
               summing to 1 over the j whose centres lie within 2 s of c_i,
               c_i = (i + 1/2) in/out,  s = max(in/out, 1),  k Keys' cubic with a = -1/2

(R. Keys, "Cubic convolution interpolation for digital image processing", 1981.)

One axis after the other, rounded and clipped to bytes in between, so the order decides where
overshoot is cut. It is Pillow 13's: along y first where the image loses height and more than twice
as many rows as columns, else along x first (Pillow 12 always goes along x first). Leaves out other
filters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vise_kernels.dispatch import choose, compiled, jit, launch, stands_for_a_gpu, tl, triton
from vise_kernels.pixels import (
    Images,
    Size,
    addresses,
    check_size,
    checked,
    packed,
    size_of,
)


def resize(images: Images, sizes: Sequence[Size], *, path: str | None = None) -> list[Tensor]:
    """N uint8 (H,W,3) images at sizes [(height, width)], within one grey level of Pillow's BICUBIC.

    path forces "plain", "native" or "triton". ValueError: what does not fit, or a path that cannot
    run.
    """
    images = checked("resize", images)
    sizes = [(int(height), int(width)) for height, width in sizes]
    if len(sizes) != len(images) or any(min(size) < 1 for size in sizes):
        raise ValueError(f"resize: need {len(images)} sizes of at least one pixel, got {sizes}")
    for size in sizes:
        check_size("resize", size)
    if not images:
        return []
    if images[0].is_meta and not stands_for_a_gpu(images[0].device):  # shapes only
        return [image.new_empty(*size, 3) for image, size in zip(images, sizes, strict=True)]
    path = choose("resize", images[0].device, path).path
    return {"plain": plain, "native": _native, "triton": _triton}[path](images, sizes)


def down_first(old: Size, new: Size) -> bool:
    """Whether (height, width) `old` becomes `new` along y first: observed of Pillow 13.0, tested
    against it.
    """
    return new[0] < old[0] and old[0] - new[0] > 2 * (old[1] - new[1])


@functools.lru_cache(maxsize=256)
def taps(size: int, out: int) -> tuple[Tensor, Tensor]:
    """(first (out,) int64, weights (out,K) float32): output i is the sum of weights[i, t] *
    input[first[i] + t].
    """
    scale = size / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    low = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), size)
    count = int((high - low).max())
    first = np.minimum(low, size - count)  # so that every row reads `count` samples that exist
    at = first[:, None] + np.arange(count)
    within = (at >= low[:, None]) & (at < high[:, None])
    weights = _cubic((at + 0.5 - centre[:, None]) / stretch) * within
    weights *= 1 / weights.sum(1, keepdims=True)
    # Pillow's whole numbers; exact in float32
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)) / 2**22
    return torch.from_numpy(first), torch.from_numpy(weights.astype(np.float32))


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def plain(images: Images, sizes: Sequence[Size]) -> list[Tensor]:
    """Tap by tap in whole numbers, which is exact."""
    return [_resize_one(image, size) for image, size in zip(images, sizes, strict=True)]


def _resize_one(image: Tensor, size: Size) -> Tensor:
    if down_first(size_of(image), size):
        return _across(_down(image, size[0]), size[1])
    return _down(_across(image, size[1]), size[0])


def _down(image: Tensor, height: int) -> Tensor:
    """(H,W,3) uint8 -> (height,W,3) uint8."""
    first, weights = (part.to(image.device) for part in taps(image.shape[0], height))
    whole = (weights * 2**22).int()[:, :, None, None]
    total = torch.full((height, *image.shape[1:]), 2**21, dtype=torch.int32, device=image.device)
    for t in range(whole.shape[1]):
        total.addcmul_(whole[:, t], image[first + t].int())
    return (total >> 22).clamp_(0, 255).to(torch.uint8)


def _across(image: Tensor, width: int) -> Tensor:
    return _down(image.transpose(0, 1).contiguous(), width).transpose(0, 1).contiguous()


def _native(images: Images, sizes: Sequence[Size]) -> list[Tensor]:
    outs = []
    across = []
    down = []
    for image, (height, width) in zip(images, sizes, strict=True):
        outs.append(image.new_empty(height, width, 3))
        across.append(taps(image.shape[1], width))
        down.append(taps(image.shape[0], height))
    orders = _orders(images, sizes)
    compiled().resize(images, outs, across, down, orders, torch.get_num_threads())
    return outs


def _orders(images: Images, sizes: Sequence[Size]) -> list[bool]:
    """`down_first` of each image."""
    return [down_first(size_of(image), size) for image, size in zip(images, sizes, strict=True)]


# Of the table: addresses of input, output, first and weights; samples along the axis and of a step
# of it, before and after; taps
COLUMNS = 9
VALUES = 512  # per program


@jit
def _axis_kernel(table, COLUMNS: tl.constexpr, VALUES: tl.constexpr):
    """One axis of one image: input (outer, samples, inner) to output (outer, outputs, inner)."""
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    out = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    first = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    weights = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    outer = tl.load(row + 4)
    samples = tl.load(row + 5).to(tl.int32)
    inner = tl.load(row + 6).to(tl.int32)
    outputs = tl.load(row + 7).to(tl.int32)
    taps = tl.load(row + 8).to(tl.int32)
    p = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = p < outer * outputs * inner
    line = p // (outputs * inner)
    i = (p // inner % outputs).to(tl.int32)
    column = p % inner
    begin = tl.load(first + i, mask=inside, other=0)
    total = tl.zeros((VALUES,), tl.float32)
    for t in range(taps):
        weight = tl.load(weights + i * taps + t, mask=inside, other=0)
        level = tl.load(
            source + (line * samples + begin + t) * inner + column, mask=inside, other=0
        )
        total += weight * level.to(tl.float32)
    level = tl.floor(tl.minimum(tl.maximum(total, 0.0), 255.0) + 0.5)
    tl.store(out + p, level.to(tl.uint8), mask=inside)


def _triton(images: Images, sizes: Sequence[Size]) -> list[Tensor]:
    device = images[0].device
    orders = _orders(images, sizes)
    between = [
        (size[0], image.shape[1]) if down else (image.shape[0], size[1])
        for image, size, down in zip(images, sizes, orders, strict=True)
    ]
    halfway = packed(between, device)
    outs = packed(sizes, device)
    _launch(images, halfway, orders)
    _launch(halfway, outs, [not down for down in orders])
    return outs


@dataclass(frozen=True)
class _Axis:
    """The taps of an axis, and a source as (outer, samples, inner) around it."""

    first: Tensor
    weights: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, source: Tensor, out: Tensor, down: bool) -> _Axis:
        height, width = size_of(source)
        if down:
            return cls(*taps(height, out.shape[0]), (1, height, 3 * width))
        return cls(*taps(width, out.shape[1]), (height, width, 3))


def _launch(sources: Images, outs: Images, downs: list[bool]) -> None:
    """One axis of every image in one launch."""
    device = sources[0].device
    axes = [_Axis.of(*row) for row in zip(sources, outs, downs, strict=True)]
    distinct = {id(axis.weights): axis for axis in axes}  # of the cache of `taps`
    first = torch.cat([axis.first for axis in distinct.values()]).to(device, non_blocking=True)
    every = torch.cat([axis.weights.view(-1) for axis in distinct.values()])
    weights = every.to(device, non_blocking=True)
    places = {}
    first_at = first.data_ptr()
    weights_at = weights.data_ptr()
    for name, axis in distinct.items():
        places[name] = (first_at, weights_at)
        first_at += 8 * len(axis.first)
        weights_at += 4 * axis.weights.numel()
    rows = [[*places[id(axis.weights)], *axis.shape, *axis.weights.shape] for axis in axes]
    ends = [addresses(sources)[:, None], addresses(outs)[:, None]]
    table = torch.cat([*ends, torch.tensor(rows)], 1).to(device, non_blocking=True)
    grid = (triton.cdiv(max(out.numel() for out in outs), VALUES), len(outs))
    launch(_axis_kernel, grid, table, COLUMNS, VALUES)
