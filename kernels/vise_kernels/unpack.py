"""Frozen weights held in 4 or 8 bits, written out for a product in one launch:

    nf4    w[2i] = levels[byte_i >> 4] · s, w[2i+1] = levels[byte_i & 15] · s; s is their block's
           scale, or with scales held in 8 bits  codes[scale] · of + offset
    int8   w[r, c] = byte[r, c] · (peak_r / 127)

That is what bitsandbytes means by its bytes (Dettmers et al. 2023); it writes them out in up to
three launches (scales, offset, weights), which is most of what a step on small batches launches.
Sums and products in float32, each rounded, then one cast: equal to the library's to the last bit.
Leaves out quantising, and products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.dispatch import choose, jit, launch, tl, triton

BYTES = 1024  # of a Triton program


class Coarse(NamedTuple):
    """Scales held in 8 bits: `codes` fp32 (256,), `of` fp32, one for `block` of them, and `offset`
    fp32 ().
    """

    codes: Tensor
    of: Tensor
    offset: Tensor
    block: int


class Nibbles(NamedTuple):
    """Weights in 4 bits, two a byte, row after row: `bytes` uint8, `levels` fp32 (16,), `scales`
    one for `block` weights: fp32, or uint8 with `coarse`.
    """

    bytes: Tensor
    levels: Tensor
    scales: Tensor
    block: int
    coarse: Coarse | None = None


def unpack_nf4(
    weight: Nibbles, shape: tuple[int, int], dtype: torch.dtype, *, path: str | None = None
) -> Tensor:
    """`shape` in `dtype`. ValueError: too few bytes or scales, an odd block, a forced `path` that
    cannot run.
    """
    size = shape[0] * shape[1]
    held = min(2 * weight.bytes.numel(), weight.block * weight.scales.numel())
    coarse = weight.coarse
    if coarse is not None:
        held = min(held, weight.block * coarse.block * coarse.of.numel())
    if held < size or weight.block % 2:
        raise ValueError(
            f"unpack_nf4: {weight.bytes.numel()} bytes and {weight.scales.numel()} scales in "
            f"blocks of {weight.block} for {shape}"
        )
    if choose("unpack_nf4", weight.bytes.device, path).path == "plain":
        return plain_nf4(weight, shape, dtype)
    out = torch.empty(shape, dtype=dtype, device=weight.bytes.device)
    none = Coarse(weight.levels, weight.levels, weight.levels, 1)
    given = (weight.bytes, weight.levels, weight.scales, *(coarse or none)[:3], out, size)
    wide = (coarse or none).block
    blocks = {"BLOCK": weight.block, "WIDE": wide, "COARSE": coarse is not None}
    if size:
        grid = (triton.cdiv(size, 2 * BYTES),)
        launch(_nibble_kernel, grid, *given, **blocks, BYTES=BYTES, enable_fp_fusion=False)
    return out


def plain_nf4(weight: Nibbles, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The formula in PyTorch."""
    size = shape[0] * shape[1]
    flat = weight.bytes.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], 1).view(-1)[:size].long()
    scales = weight.scales
    if weight.coarse is not None:
        codes_of, of, offset, block = weight.coarse
        wide = of.repeat_interleave(block)[: len(scales)]
        scales = codes_of[scales.long()] * wide + offset
    spread = scales.repeat_interleave(weight.block)[:size]
    return (weight.levels[codes] * spread).to(dtype).view(shape)


def unpack_int8(
    weight: Tensor, peaks: Tensor, dtype: torch.dtype, *, path: str | None = None
) -> Tensor:
    """weight int8 (out, in), peaks fp32 (out,): (out, in) in `dtype`. ValueError: shapes that do
    not fit, a forced `path` that cannot run.
    """
    if weight.dim() != 2 or peaks.shape != weight.shape[:1]:
        raise ValueError(
            f"unpack_int8: weight {tuple(weight.shape)} and peaks {tuple(peaks.shape)} do not fit"
        )
    if choose("unpack_int8", weight.device, path).path == "plain":
        return plain_int8(weight, peaks, dtype)
    weight = weight.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, width = weight.shape
    if out.numel():
        grid = (rows, triton.cdiv(width, BYTES))
        launch(_byte_kernel, grid, weight, peaks, out, width, BYTES=BYTES)
    return out


def plain_int8(weight: Tensor, peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in PyTorch."""
    # in place: a scale in fp32, one rounding of the product
    return weight.to(dtype).mul_((peaks / 127.0)[:, None])


@jit
def _nibble_kernel(
    bytes,
    levels,
    scales,
    codes,
    of,
    offset,
    out,
    size,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COARSE: tl.constexpr,
    BYTES: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BYTES
    at = start + tl.arange(0, BYTES)
    there = 2 * at < size
    byte = tl.load(bytes + at, mask=there, other=0).to(tl.int32)
    block = 2 * at // BLOCK
    scale = tl.load(scales + block, mask=there, other=0)
    if COARSE:
        wide = tl.load(of + block // WIDE, mask=there, other=0.0)
        scale = tl.load(codes + scale.to(tl.int32)) * wide + tl.load(offset)
    high = tl.load(levels + (byte >> 4)) * scale
    low = tl.load(levels + (byte & 15)) * scale
    index = 2 * start + tl.arange(0, 2 * BYTES)
    value = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + index, value, mask=index < size)


@jit
def _byte_kernel(weight, peaks, out, width, BYTES: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    at = row.to(tl.int64) * width + column
    inside = column < width
    scale = tl.div_rn(tl.load(peaks + row), 127.0)
    value = tl.load(weight + at, mask=inside, other=0).to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
