"""Warps uint8 images by 3x3 matrices: rotations, crops, flips and any other view of the same size.

    out(p) = round(sum over the 4 samples s around M^-1 p of weight(s) source(s)), bilinear;
             samples outside the source have the value `fill`

Pixel (i, j) covers [j, j+1) x [i, i+1) in continuous coordinates and its centre is at +0.5: output
pixel (i, j) is sampled at M^-1 (j + 0.5, i + 0.5, 1), where M maps source to view. Leaves out
drawing the matrices, and antialiasing: views enlarge or shrink by little.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from vise_kernels.dispatch import choose, compiled, jit, launch, stands_for_a_gpu, tl, triton
from vise_kernels.pixels import (
    Images,
    addresses,
    checked,
    on_host,
    packed,
    size_of,
    to_bytes,
)


def warp(
    images: Images, matrices_px: Tensor, *, fill: int = 128, path: str | None = None
) -> list[Tensor]:
    """N uint8 (H,W,3) images seen through matrices_px (N,3,3), source -> view in pixels, each at
    its own size.

    matrices_px is a CPU tensor, inverted in float64. fill: grey level 0..255 around the source.
    path forces "plain", "native" or "triton". ValueError: what does not fit, a matrix that cannot
    be inverted, or a path that cannot run.
    """
    images = checked("warp", images)
    inverses = inverted("warp", images, matrices_px, fill)
    if not images:
        return []
    device = images[0].device
    if images[0].is_meta and not stands_for_a_gpu(device):  # shapes only: what a step would hold
        return [torch.empty_like(image) for image in images]
    path = choose("warp", device, path).path
    return {"plain": plain, "native": _native, "triton": _triton}[path](images, inverses, fill)


def inverted(op: str, images: Images, matrices_px: Tensor, fill: int) -> Tensor:
    """(N,3,3) float64, view -> source, of `warp`'s arguments. ValueError: what does not fit, or a
    matrix that cannot be inverted.
    """
    matrices = on_host(op, "matrices_px", matrices_px).detach().double()
    if matrices.shape != (len(images), 3, 3):
        raise ValueError(
            f"{op}: matrices_px must be ({len(images)},3,3), got {tuple(matrices.shape)}"
        )
    if not 0 <= fill <= 255:
        raise ValueError(f"{op}: fill must be a grey level 0..255, got {fill}")
    inverses, fault = torch.linalg.inv_ex(matrices)
    bad = (fault != 0) | ~inverses.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(f"{op}: matrix {int(bad.nonzero()[0])} cannot be inverted")
    return inverses


def plain(images: Images, inverses: Tensor, fill: int) -> list[Tensor]:
    """PyTorch's grid_sample, which shares the convention; its border of zeros becomes `fill` by a
    shift of the levels.
    """
    pairs = zip(images, inverses, strict=True)
    return [_warp_one(image, inverse, fill) for image, inverse in pairs]


def _warp_one(image: Tensor, inverse: Tensor, fill: int) -> Tensor:
    height, width = image.shape[:2]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    u, v, depth = (torch.stack([x, y, torch.ones_like(x)], -1).double() @ inverse.T).unbind(-1)
    grid = torch.stack([2 * u / depth / width - 1, 2 * v / depth / height - 1], -1)
    grid = grid.nan_to_num(-9.0, -9.0, -9.0).clamp(-9, 9).to(image.device, torch.float32)
    levels = image.permute(2, 0, 1)[None].float() - fill
    seen = F.grid_sample(
        levels, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return to_bytes(seen[0] + fill).permute(1, 2, 0).contiguous()


def _native(images: Images, inverses: Tensor, fill: int) -> list[Tensor]:
    outs = [torch.empty_like(image) for image in images]
    compiled().warp(images, outs, inverses.contiguous(), float(fill), torch.get_num_threads())
    return outs


COLUMNS = 4  # of the table of whole numbers: addresses of source and out; width, height
PIXELS = 512  # per program


@jit
def sampled(source, m, x, y, width, height, fill):
    """Red, green and blue (int32) of the view's pixels in columns x and rows y; m points at nine
    floats, view -> source.
    """
    depth = tl.load(m + 6) * x + tl.load(m + 7) * y + tl.load(m + 8)
    u = (tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2)) / depth - 0.5
    v = (tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5)) / depth - 0.5
    # far points and points at infinity meet one pixel outside, where every sample is `fill`
    u = tl.where((u > -1) & (u < width), u, -1.0)
    v = tl.where((v > -1) & (v < height), v, -1.0)
    left = tl.floor(u)
    top = tl.floor(v)
    across = u - left
    down = v - top
    red = across * 0
    green = across * 0
    blue = across * 0
    for tap in tl.static_range(4):
        sx = left.to(tl.int32) + tap % 2
        sy = top.to(tl.int32) + tap // 2
        weight = (across if tap % 2 == 1 else 1 - across) * (down if tap // 2 == 1 else 1 - down)
        seen = (sx >= 0) & (sx < width) & (sy >= 0) & (sy < height)
        at = source + (sy.to(tl.int64) * width + sx) * 3
        red += weight * tl.where(seen, tl.load(at, mask=seen, other=0).to(tl.float32), fill)
        green += weight * tl.where(seen, tl.load(at + 1, mask=seen, other=0).to(tl.float32), fill)
        blue += weight * tl.where(seen, tl.load(at + 2, mask=seen, other=0).to(tl.float32), fill)
    return (
        tl.floor(red + 0.5).to(tl.int32),
        tl.floor(green + 0.5).to(tl.int32),
        tl.floor(blue + 0.5).to(tl.int32),
    )


@jit
def _warp_kernel(table, inverses, fill, COLUMNS: tl.constexpr, PIXELS: tl.constexpr):
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    out = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    width = tl.load(row + 2).to(tl.int32)
    height = tl.load(row + 3).to(tl.int32)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = p < width * height
    red, green, blue = sampled(
        source,
        inverses + tl.program_id(1) * 9,
        p % width + 0.5,
        p // width + 0.5,
        width,
        height,
        fill,
    )
    to = out + p.to(tl.int64) * 3
    tl.store(to, red.to(tl.uint8), mask=inside)
    tl.store(to + 1, green.to(tl.uint8), mask=inside)
    tl.store(to + 2, blue.to(tl.uint8), mask=inside)


def _triton(images: Images, inverses: Tensor, fill: int) -> list[Tensor]:
    device = images[0].device
    outs = packed([size_of(image) for image in images], device)
    size = torch.tensor([[image.shape[1], image.shape[0]] for image in images])
    table = torch.cat([addresses(images)[:, None], addresses(outs)[:, None], size], 1).to(
        device, non_blocking=True
    )
    grid = (triton.cdiv(int(size.prod(1).max()), PIXELS), len(images))
    turns = inverses.float().contiguous().to(device, non_blocking=True)
    launch(_warp_kernel, grid, table, turns, float(fill), COLUMNS, PIXELS)
    return outs
