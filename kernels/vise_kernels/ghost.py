"""Ghosting: hides what is inside boxes of uint8 images (or everything but the box), and nothing
else.

    blur      out = round(A_h X A_w^T) per channel, A[i, j] = sum over taps d with mirror(i + d) = j
              of taps(d): a separable Gaussian on the box alone, continued at the box's edges by
              reflection that does not repeat the edge (101), as often as the radius asks for; an
              axis of one pixel is left as it is
    mean      every pixel the rounded mean of the box
    pixelate  cells of sqrt(12) sigma a side, from the box's top left corner, each its rounded mean:
              a uniform square of that side spreads as far as the Gaussian does
    feather   out = round(x + a (ghost - x)), a = min(1, depth / feather), depth = distance of the
              pixel's centre to the box's nearest edge in pixels; edges on the image's border are
              not softened

region="outside" ghosts the whole image (its mean: of the pixels outside) and puts the box back.
Pixels outside the region keep their bytes. Leaves out what to hide and how strongly: the caller
chooses boxes and sigma.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vise_kernels import cosines
from vise_kernels.dispatch import choose, compiled, jit, launch, stands_for_a_gpu, tl
from vise_kernels.pixels import (
    Images,
    addresses,
    along_height,
    along_width,
    checked,
    copies,
    on_host,
    to_bytes,
)

METHODS = ("blur", "mean", "pixelate")
REGIONS = ("inside", "outside")
MOST_SIGMA = 2**14  # pixels; wider than a picture, and a box of it one colour
MOST_RADIUS = 2**16  # pixels
LEAST_SIGMA = 2**-10  # below it no neighbour's tap is above zero in float64


@dataclass(frozen=True)
class Plan:
    """What to do, box by box, on the host. Boxes are clipped to their image; empty ones are
    (0,0,0,0).
    """

    images: list[int]  # (N,) which image a box lies in
    boxes: Tensor  # (N,4) int64 x1,y1,x2,y2, half-open
    sigma: list[float]  # (N,) pixels
    radius: list[int]  # (N,) pixels
    method: str
    feather: float
    outside: bool

    def cell(self, n: int) -> int:
        """Side of a cell of box n, in pixels."""
        return max(1, round(math.sqrt(12) * self.sigma[n]))

    def kernels(self) -> list[tuple[float, int]]:
        """(sigma, radius) of each box."""
        return list(zip(self.sigma, self.radius, strict=True))


def ghost(
    images: Images,
    image_index: Tensor | Sequence[int],
    boxes_px: Tensor,
    *,
    method: str = "blur",
    sigma: float | Tensor = 25.0,
    radius: int | Tensor | None = None,
    feather: float = 0.0,
    region: str = "inside",
    path: str | None = None,
) -> list[Tensor]:
    """One ghosted copy per box: N uint8 (H,W,3) tensors, the n-th of images[image_index[n]] with
    boxes_px[n] hidden.

    images: uint8 (H,W,3) on one device, any sizes. image_index (N,) and boxes_px (N,4) integers
    x1,y1,x2,y2 (half-open, clipped to the image; empty ones leave an untouched copy) live on the
    CPU. sigma (at most MOST_SIGMA) and radius in pixels, one or (N,); radius None: ceil(3 sigma).
    path forces "plain", "native" or "triton". ValueError: what does not fit, or a path that cannot
    run.
    """
    images = checked("ghost", images)
    if method not in METHODS or region not in REGIONS or not feather >= 0:
        raise ValueError(
            f"ghost: method {method!r} of {METHODS}, region {region!r} of {REGIONS}, feather "
            f"{feather} >= 0"
        )
    index, boxes = _places(images, image_index, boxes_px)
    sigmas, radii = _lengths(sigma, radius, len(index))
    outside = region == "outside"
    plan = Plan(index, boxes, sigmas, radii, method, float(feather), outside)
    if not plan.images:
        return []
    device = images[0].device
    if images[0].is_meta and not stands_for_a_gpu(device):  # shapes only: what a step would hold
        return [torch.empty_like(images[i]) for i in plan.images]
    chosen = choose("ghost", device, path).path
    return {"plain": plain, "native": _native, "triton": _triton}[chosen](images, plan)


def _places(
    images: Images, image_index: Tensor | Sequence[int], boxes_px: Tensor
) -> tuple[list[int], Tensor]:
    """Which image each box lies in, and the boxes (N,4) clipped to them."""
    index = on_host("ghost", "image_index", torch.as_tensor(image_index, dtype=torch.int64))
    boxes = on_host("ghost", "boxes_px", boxes_px)
    if index.dim() != 1 or boxes.shape != (len(index), 4) or boxes.is_floating_point():
        raise ValueError(
            f"ghost: boxes_px must be integers ({len(index)},4), got {boxes.dtype} "
            f"{tuple(boxes.shape)}"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(images):
        raise ValueError(f"ghost: image_index must lie in 0..{len(images) - 1}")
    chosen = index.tolist()
    return chosen, _clip(boxes.long(), [images[i] for i in chosen])


def _lengths(
    sigma: float | Tensor, radius: int | Tensor | None, count: int
) -> tuple[list[float], list[int]]:
    """Sigma and radius of each box, in pixels. ValueError: not a number, or out of bounds."""
    sigmas = _per_box("sigma", sigma, count, torch.float64)
    if not bool((sigmas > 0).all() and (sigmas <= MOST_SIGMA).all()):
        raise ValueError(f"ghost: sigma must be above 0 and at most {MOST_SIGMA} pixels")
    if radius is None:
        radii = (3 * sigmas).ceil().long()
    else:
        radii = _per_box("radius", radius, count, torch.int64)
    if not bool((radii >= 0).all() and (radii <= MOST_RADIUS).all()):
        raise ValueError(f"ghost: radius must be 0 to {MOST_RADIUS} pixels")
    return sigmas.clamp(min=LEAST_SIGMA).tolist(), radii.tolist()


def _per_box(name: str, value: float | Tensor, count: int, dtype: torch.dtype) -> Tensor:
    values = on_host("ghost", name, torch.as_tensor(value, dtype=dtype))
    if values.shape not in ((), (count,)):
        raise ValueError(f"ghost: {name} must be a number or ({count},), got {tuple(values.shape)}")
    return values.expand(count)


def _clip(boxes: Tensor, images: Images) -> Tensor:
    most = torch.tensor(
        [[image.shape[1], image.shape[0]] * 2 for image in images], dtype=torch.int64
    ).view(-1, 4)
    clipped = boxes.clamp(min=0).minimum(most)
    proper = (clipped[:, 0] < clipped[:, 2]) & (clipped[:, 1] < clipped[:, 3])
    return torch.where(proper[:, None], clipped, 0)


# --------------------------------------------------------------------------------------------------


def plain(images: Images, plan: Plan) -> list[Tensor]:
    """The formula in PyTorch, box by box."""
    return [_ghost_one(images[i], n, plan) for n, i in enumerate(plan.images)]


def _ghost_one(image: Tensor, n: int, plan: Plan) -> Tensor:
    x1, y1, x2, y2 = plan.boxes[n].tolist()
    box = (slice(y1, y2), slice(x1, x2))
    out = image.clone()
    if not plan.outside and x1 == x2:
        return out
    if plan.outside:
        out[:] = _fill(image, n, plan, _outside_mean(image, box))
        out[box] = image[box]
    else:
        out[box] = _fill(image[box], n, plan, None)
    return _soften(image, out, (x1, y1, x2, y2), plan) if plan.feather else out


def _fill(crop: Tensor, n: int, plan: Plan, mean: Tensor | None) -> Tensor:
    if plan.method == "blur":
        weights = cosines.taps(plan.sigma[n], plan.radius[n]).to(crop.device, torch.float32)
        down, across = (blur_matrix(size, weights) for size in crop.shape[:2])
        return to_bytes(along_width(across, along_height(down, crop.float())))
    if plan.method == "mean":
        return _mean(crop.reshape(-1, 3)) if mean is None else mean
    out = torch.empty_like(crop)
    cell = plan.cell(n)
    for y in range(0, crop.shape[0], cell):
        for x in range(0, crop.shape[1], cell):
            at = (slice(y, y + cell), slice(x, x + cell))
            out[at] = _mean(crop[at].reshape(-1, 3))
    return out


def blur_matrix(size: int, weights: Tensor) -> Tensor:
    """(size, size): blurs a signal of `size` samples with `weights` (2 radius + 1,), mirrored (101)
    at both ends.
    """
    radius = len(weights) // 2
    at = torch.arange(size, device=weights.device)[:, None] + torch.arange(
        -radius, radius + 1, device=weights.device
    )
    period = max(2 * (size - 1), 1)
    at = at.abs() % period
    at = torch.where(at < size, at, period - at)
    return weights.new_zeros(size, size).scatter_add_(1, at, weights.expand(size, -1))


def _mean(pixels: Tensor) -> Tensor:
    """(P,3) -> (3,) rounded, halves up, in whole numbers."""
    count = max(len(pixels), 1)
    return ((2 * pixels.sum(0) + count) // (2 * count)).to(torch.uint8)


def _outside_mean(image: Tensor, box: tuple[slice, slice]) -> Tensor:
    count = max(image.shape[0] * image.shape[1] - image[box].shape[0] * image[box].shape[1], 1)
    total = image.sum((0, 1)) - image[box].sum((0, 1))
    return ((2 * total + count) // (2 * count)).to(torch.uint8)


def _soften(image: Tensor, ghosted: Tensor, box: tuple[int, int, int, int], plan: Plan) -> Tensor:
    height, width = image.shape[:2]
    across = _depth(box[0], box[2], width, plan.outside, image.device)
    down = _depth(box[1], box[3], height, plan.outside, image.device)
    depth = torch.minimum(across[None, :], down[:, None])
    into = (-depth if plan.outside else depth).clamp(min=0)
    alpha = (into / plan.feather).clamp(max=1)[:, :, None]
    return to_bytes(image + alpha * (ghosted.float() - image))


def _depth(low: int, high: int, size: int, outside: bool, device: torch.device) -> Tensor:
    """(size,) how deep each pixel's centre lies in [low, high), in pixels; for the inside, the
    image's border is no edge.
    """
    centre = torch.arange(size, dtype=torch.float32, device=device) + 0.5
    nowhere = torch.full_like(centre, torch.inf)
    from_low = nowhere if low == 0 and not outside else centre - low
    from_high = nowhere if high == size and not outside else high - centre
    return torch.minimum(from_low, from_high)


# --------------------------------------------------------------------------------------------------


def _native(images: Images, plan: Plan) -> list[Tensor]:
    sources = [images[i] for i in plan.images]
    outs = [torch.empty_like(source) for source in sources]
    keys = plan.kernels() if plan.method == "blur" else [(1.0, 0)] * len(sources)
    distinct = list(dict.fromkeys(keys))
    order = {key: k for k, key in enumerate(distinct)}
    compiled().ghost(
        sources,
        outs,
        plan.boxes.contiguous(),
        plan.method,
        [cosines.fit(*key) for key in distinct],
        torch.tensor([order[key] for key in keys]),
        torch.tensor([plan.cell(n) for n in range(len(sources))]),
        plan.feather,
        plan.outside,
        torch.get_num_threads(),
    )
    return outs


# --------------------------------------------------------------------------------------------------

# One row per box: addresses of source, out, scratch, taps; width, height; box; region; radius, cell
COLUMNS = 16
TILE = 64  # pixels of a program's tile along both axes
STRETCH = 16  # samples per tensor-core product
WARPS = 8  # of a tile: with fewer, or longer stretches, registers spill on sm_80 to sm_89
ALIGNED = 8  # halves, 16 bytes: where rows of the scratch begin, so that they are loaded by vectors
PIXELS = 1024  # per step of a cell's sum


@jit
def _mirror(t, n):
    period = tl.maximum(2 * (n - 1), 1)
    t = tl.abs(t) % period
    return tl.where(t < n, t, period - t)


@jit
def _number(row, column):
    return tl.load(row + column).to(tl.int32)


@jit
def _put(row, x, y, channel, inside, ghosted, feather, OUTSIDE: tl.constexpr):
    """Blends the grey levels `ghosted` into pixels (x, y) of a row's image, where `inside`; with
    OUTSIDE the box stays.
    """
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    out = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    width = _number(row, 4)
    height = _number(row, 5)
    x1 = _number(row, 6)
    y1 = _number(row, 7)
    x2 = _number(row, 8)
    y2 = _number(row, 9)
    left = x + 0.5 - x1
    right = x2 - x - 0.5
    top = y + 0.5 - y1
    bottom = y2 - y - 0.5
    if OUTSIDE:
        depth = -tl.minimum(tl.minimum(left, right), tl.minimum(top, bottom))
        inside = inside & (depth > 0)
    else:  # the image's border is no edge
        left = tl.where(x1 == 0, 1e9, left)
        right = tl.where(x2 == width, 1e9, right)
        top = tl.where(y1 == 0, 1e9, top)
        bottom = tl.where(y2 == height, 1e9, bottom)
        depth = tl.minimum(tl.minimum(left, right), tl.minimum(top, bottom))
    at = (y.to(tl.int64) * width + x) * 3 + channel
    before = tl.load(source + at, mask=inside, other=0).to(tl.float32)
    alpha = tl.where(
        feather > 0, tl.minimum(tl.maximum(depth, 0.0) / tl.maximum(feather, 1e-6), 1.0), 1.0
    )
    level = tl.floor(tl.minimum(tl.maximum(ghosted, 0.0), 255.0) + 0.5)
    level = tl.floor(before + alpha * (level - before) + 0.5)
    tl.store(out + at, level.to(tl.uint8), mask=inside)


@jit
def _band(taps, samples, outputs, radius):
    """Taps between mirrored samples and outputs: a band of the blur matrix, fp16 for the tensor
    cores.
    """
    distance = tl.abs(samples - outputs)
    return tl.load(taps + radius + distance, mask=distance <= radius, other=0).to(tl.float16)


@jit
def _pitch(width):
    """Halves from one row of the scratch to the next; see ALIGNED."""
    return tl.cdiv(width * 3, 8) * 8


@jit
def _across_kernel(table, COLUMNS: tl.constexpr, TILE: tl.constexpr, STRETCH: tl.constexpr):
    """Blurs a tile of a region along x, from uint8 into its fp16 scratch (height, 3 · width and
    what fills the row up), as levels minus 128: fp16's spacing is half of what it is at 255.
    """
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    scratch = tl.load(row + 2).to(tl.pointer_type(tl.float16))
    taps = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    left = _number(row, 10)
    top = _number(row, 11)
    radius = _number(row, 14)
    width = _number(row, 12) - left
    height = _number(row, 13) - top
    stride = _number(row, 4)
    tiles = tl.maximum(tl.cdiv(width, TILE), 1)
    x0 = tl.program_id(0) % tiles * TILE
    y0 = tl.program_id(0) // tiles * TILE
    if y0 < height:
        x = x0 + tl.arange(0, TILE)
        y = y0 + tl.arange(0, TILE)
        line = source + ((top + y).to(tl.int64) * stride + left)[:, None] * 3
        red = tl.zeros((TILE, TILE), tl.float32)
        green = tl.zeros((TILE, TILE), tl.float32)
        blue = tl.zeros((TILE, TILE), tl.float32)
        for start in range(x0 - radius, tl.minimum(x0 + TILE, width) + radius, STRETCH):
            sample = start + tl.arange(0, STRETCH)
            band = _band(taps, sample[:, None], x[None, :], radius)
            at = line + _mirror(sample, width)[None, :] * 3
            seen = (y < height)[:, None] & (sample < width + radius)[None, :]
            red += tl.dot(tl.load(at, mask=seen, other=128).to(tl.float16) - 128, band)
            green += tl.dot(tl.load(at + 1, mask=seen, other=128).to(tl.float16) - 128, band)
            blue += tl.dot(tl.load(at + 2, mask=seen, other=128).to(tl.float16) - 128, band)
        pitch = _pitch(width)
        j = x * 3
        to = scratch + y.to(tl.int64)[:, None] * pitch + j[None, :]
        there = (y < height)[:, None]
        # to the end of the row: what fills it up is loaded too, and must be numbers
        tl.store(to, red.to(tl.float16), mask=there & (j < pitch)[None, :])
        tl.store(to + 1, green.to(tl.float16), mask=there & (j + 1 < pitch)[None, :])
        tl.store(to + 2, blue.to(tl.float16), mask=there & (j + 2 < pitch)[None, :])


@jit
def _down_kernel(
    table,
    feather,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    STRETCH: tl.constexpr,
    OUTSIDE: tl.constexpr,
):
    """Blurs a tile of a region's scratch along y and blends it into the image; its columns are
    bytes, three per pixel.
    """
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    scratch = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float16)), 16)
    taps = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    left = _number(row, 10)
    top = _number(row, 11)
    radius = _number(row, 14)
    bytes = (_number(row, 12) - left) * 3
    height = _number(row, 13) - top
    pitch = tl.multiple_of(_pitch(_number(row, 12) - left), 8)
    tiles = tl.maximum(tl.cdiv(bytes, TILE), 1)
    j0 = tl.program_id(0) % tiles * TILE
    y0 = tl.program_id(0) // tiles * TILE
    if y0 < height:
        j = j0 + tl.arange(0, TILE)
        y = y0 + tl.arange(0, TILE)
        level = tl.zeros((TILE, TILE), tl.float32)
        for start in range(y0 - radius, tl.minimum(y0 + TILE, height) + radius, STRETCH):
            sample = start + tl.arange(0, STRETCH)
            at = scratch + _mirror(sample, height).to(tl.int64)[:, None] * pitch + j[None, :]
            # what fills a row up is loaded too, into columns that nobody stores
            seen = (sample < height + radius)[:, None] & (j < pitch)[None, :]
            level += tl.dot(
                _band(taps, sample[None, :], y[:, None], radius), tl.load(at, mask=seen, other=0)
            )
        inside = (y < height)[:, None] & (j < bytes)[None, :]
        _put(
            row,
            left + (j // 3)[None, :],
            top + y[:, None],
            (j % 3)[None, :],
            inside,
            level + 128,
            feather,
            OUTSIDE,
        )


@jit
def _cells_kernel(
    table,
    feather,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    HOLE: tl.constexpr,
    OUTSIDE: tl.constexpr,
):
    """Fills a cell of a region with its mean; with HOLE the box's pixels do not count."""
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    cell = _number(row, 15)
    stride = _number(row, 4)
    tiles = tl.maximum(tl.cdiv(_number(row, 12) - _number(row, 10), cell), 1)
    left = _number(row, 10) + tl.program_id(0) % tiles * cell
    top = _number(row, 11) + tl.program_id(0) // tiles * cell
    width = tl.minimum(cell, _number(row, 12) - left)
    height = tl.minimum(cell, _number(row, 13) - top)
    if height > 0:
        red = tl.zeros((PIXELS,), tl.int32)
        green = tl.zeros((PIXELS,), tl.int32)
        blue = tl.zeros((PIXELS,), tl.int32)
        counted = tl.zeros((PIXELS,), tl.int32)
        for start in range(0, width * height, PIXELS):
            p = start + tl.arange(0, PIXELS)
            x = left + p % width
            y = top + p // width
            counts = p < width * height
            if HOLE:
                counts &= (
                    (x < _number(row, 6))
                    | (x >= _number(row, 8))
                    | (y < _number(row, 7))
                    | (y >= _number(row, 9))
                )
            at = source + (y.to(tl.int64) * stride + x) * 3
            red += tl.load(at, mask=counts, other=0).to(tl.int32)
            green += tl.load(at + 1, mask=counts, other=0).to(tl.int32)
            blue += tl.load(at + 2, mask=counts, other=0).to(tl.int32)
            counted += counts.to(tl.int32)
        count = tl.maximum(tl.sum(counted.to(tl.int64), 0), 1)
        red_mean = (2 * tl.sum(red.to(tl.int64), 0) + count) // (2 * count)
        green_mean = (2 * tl.sum(green.to(tl.int64), 0) + count) // (2 * count)
        blue_mean = (2 * tl.sum(blue.to(tl.int64), 0) + count) // (2 * count)
        for start in range(0, width * height, PIXELS):
            p = start + tl.arange(0, PIXELS)
            x = left + p % width
            y = top + p // width
            inside = p < width * height
            _put(row, x, y, 0, inside, red_mean.to(tl.float32), feather, OUTSIDE)
            _put(row, x, y, 1, inside, green_mean.to(tl.float32), feather, OUTSIDE)
            _put(row, x, y, 2, inside, blue_mean.to(tl.float32), feather, OUTSIDE)


@dataclass(frozen=True)
class _Table:
    """What the kernels' tables hold of each box, on the host."""

    source: Tensor  # (N,) addresses
    out: Tensor  # (N,) addresses
    geometry: Tensor  # (N,10) width, height; box; region
    extent: Tensor  # (N,2) width and height of the region
    device: torch.device

    def on_device(self, scratch: Tensor, taps: Tensor, radius: Tensor, cell: Tensor) -> Tensor:
        """(N, COLUMNS) int64."""
        columns = [self.source, self.out, scratch, taps, *self.geometry.unbind(1), radius, cell]
        return torch.stack(columns, 1).to(self.device, non_blocking=True)


def _triton(images: Images, plan: Plan) -> list[Tensor]:
    sources = [images[i] for i in plan.images]
    outs = copies(sources)
    size = torch.tensor([[source.shape[1], source.shape[0]] for source in sources])
    region = torch.cat([torch.zeros_like(size), size], 1) if plan.outside else plan.boxes
    extent = region[:, 2:] - region[:, :2]
    if int(extent.max()) == 0:
        return outs
    geometry = torch.cat([size, plan.boxes, region], 1)
    table = _Table(addresses(sources), addresses(outs), geometry, extent, sources[0].device)
    run = _launch_blur if plan.method == "blur" else _launch_cells
    run(table, plan)
    return outs


def _launch_blur(boxes: _Table, plan: Plan) -> None:
    keys = plan.kernels()
    parts = {key: cosines.taps(*key).float() for key in keys}
    starts = _starts(torch.tensor([len(part) for part in parts.values()])).tolist()
    begin = dict(zip(parts, starts, strict=True))
    taps = torch.cat(list(parts.values())).to(boxes.device, non_blocking=True)
    taps_at = taps.data_ptr() + 4 * torch.tensor([begin[key] for key in keys])
    pitch = (3 * boxes.extent[:, 0] + ALIGNED - 1) // ALIGNED * ALIGNED
    values = pitch * boxes.extent[:, 1]
    scratch = torch.empty(int(values.sum()), dtype=torch.float16, device=boxes.device)
    scratch_at = scratch.data_ptr() + 2 * _starts(values)
    radius = torch.tensor(plan.radius)
    table = boxes.on_device(scratch_at, taps_at, radius, torch.ones_like(radius))
    tiles = (boxes.extent + TILE - 1) // TILE
    grid = (int(tiles.prod(1).max()), len(table))
    launch(_across_kernel, grid, table, COLUMNS, TILE, STRETCH, num_warps=WARPS)
    tiles = (boxes.extent * torch.tensor([3, 1]) + TILE - 1) // TILE
    grid = (int(tiles.prod(1).max()), len(table))
    sizes = (COLUMNS, TILE, STRETCH, plan.outside)
    launch(_down_kernel, grid, table, plan.feather, *sizes, num_warps=WARPS)


def _launch_cells(boxes: _Table, plan: Plan) -> None:
    """One cell over the whole region, or the rounded root of 12 sigma a side."""
    if plan.method == "mean":
        cell = boxes.extent.max(1).values.clamp(min=1)
    else:
        cell = torch.tensor([plan.cell(n) for n in range(len(plan.images))])
    none = torch.zeros_like(boxes.source)
    table = boxes.on_device(none, none, none, cell)
    tiles = (boxes.extent + cell[:, None] - 1) // cell[:, None]
    hole = plan.outside and plan.method == "mean"
    grid = (int(tiles.prod(1).max()), len(table))
    launch(_cells_kernel, grid, table, plan.feather, COLUMNS, PIXELS, hole, plan.outside)


def _starts(counts: Tensor) -> Tensor:
    """Where each of several stretches begins when they lie one after the other."""
    return counts.cumsum(0) - counts
