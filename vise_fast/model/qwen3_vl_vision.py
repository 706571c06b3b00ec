"""Qwen3-VL's frozen vision tower over transformers' own tensors: images to features, up to but not
including the mergers.

A still image shows the same pixels at every temporal tap, so the patch embedding is one product
with the taps folded. Each image attends to itself only; neighbours of equal size share a batched
attention. Position tables are made once per grid. Left out: video, gradients, the mergers, which
may carry LoRA (qwen3_vl.py).

Shapes: P patches, C vision width, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels import add_layer_norm, patchify, rotate
from vise_kernels.add_layer_norm import Affine

from vise_fast.model.products import linear_gelu_tanh
from vise_fast.model.tree import Features
from vise_fast.system.machine.staging import put

# On a CPU: patches that go through the tower together, so that a block's activations stay in the
# cache.
ENCODE_AT_ONCE = 1024


class Places(NamedTuple):
    """What the position of patches adds: embedding (P, C), rotary cos and sin (P, d / 2)."""

    embedding: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class SameSize:
    """Neighbouring images of equal size: one batched attention."""

    start: int
    images: int
    size: int

    @property
    def stop(self) -> int:
        """The first patch after it."""
        return self.start + self.images * self.size


class VisionTower:
    """The tower of one model. `at_once`: patches that go through it together, None: all."""

    def __init__(self, visual: Any) -> None:
        vision = visual.config
        self.visual = visual
        self.patch: int = vision.patch_size
        self.merge_size: int = vision.spatial_merge_size
        self.width: int = vision.hidden_size
        self.tanh_gelu = vision.hidden_act == "gelu_pytorch_tanh"
        self.taps: list[int] = list(visual.deepstack_visual_indexes)
        weight = visual.patch_embed.proj.weight
        self.dtype = weight.dtype
        self.device = weight.device
        self.patch_weight = weight.detach().float().sum(2).flatten(1).to(weight.dtype)
        self.patch_bias = visual.patch_embed.proj.bias
        self.poll: Callable[[], None] = lambda: None
        self.at_once = ENCODE_AT_ONCE if self.device.type == "cpu" else None
        self._places: dict[tuple[int, int], Places] = {}

    @torch.no_grad()
    def encode(self, images: list[Tensor]) -> Features:
        """uint8 (H, W, 3) images, sides multiples of patch times merge_size."""
        patches, _ = patchify(
            images, patch=self.patch, merge=self.merge_size, dtype=self.dtype, single_tap=True
        )
        grids = [(image.shape[0] // self.patch, image.shape[1] // self.patch) for image in images]
        return self.encode_patches(put(patches, self.device), grids)

    @torch.no_grad()
    def encode_patches(self, patches: Tensor, grids: list[tuple[int, int]]) -> Features:
        """The same from normalised patches (P, 3·patch²) in merge order, one temporal tap."""
        slices = _slices(patches, grids, self.at_once or len(patches))
        parts = [self._forward(part, some) for part, some in slices]
        if len(parts) == 1:
            return parts[0]
        columns = zip(*[part.taps for part in parts], strict=True)
        last = torch.cat([part.last for part in parts])
        return Features(last, [torch.cat(column) for column in columns], grids)

    def _forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Features:
        """Some images together."""
        places = self._places_of(grids)
        runs = _runs([rows * columns for rows, columns in grids])
        x = F.linear(patches, self.patch_weight, self.patch_bias) + places.embedding
        taps = []
        blocks = list(self.visual.blocks)
        normed = blocks[0].norm1(x)
        for index, block in enumerate(blocks):
            self.poll()
            attended = self._attention(block.attn, normed, places, runs)
            x, normed = add_layer_norm(x, attended, _affine(block.norm2))
            widened = self._mlp(block.mlp, normed)
            if index + 1 < len(blocks):
                x, normed = add_layer_norm(x, widened, _affine(blocks[index + 1].norm1))
            else:
                x = x + widened
            if index in self.taps:
                taps.append(x)
        return Features(x, taps, grids)

    def _attention(self, attn: Any, x: Tensor, places: Places, runs: list[SameSize]) -> Tensor:
        qkv = attn.qkv(x).view(x.shape[0], 3, attn.num_heads, -1)
        qk = rotate(qkv[:, :2].flatten(1, 2), places.cos, places.sin).unflatten(1, (2, -1))
        outs = [_attend(qk, qkv[:, 2], run) for run in runs]
        return attn.proj(outs[0] if len(outs) == 1 else torch.cat(outs))

    def _mlp(self, mlp: Any, x: Tensor) -> Tensor:
        first = mlp.linear_fc1
        if self.tanh_gelu:
            return mlp.linear_fc2(linear_gelu_tanh(x, first.weight, first.bias))
        return mlp.linear_fc2(mlp.act_fn(first(x)))

    def _places_of(self, grids: list[tuple[int, int]]) -> Places:
        """The patches of several images, one after the other."""
        tables = [self._place(grid) for grid in grids]
        return Places(*(torch.cat(column) for column in zip(*tables, strict=True)))

    def _place(self, grid: tuple[int, int]) -> Places:
        """The patches of one grid in merge order; computed once per grid."""
        if grid not in self._places:
            rows, columns = _merge_order(*grid, self.merge_size, self.device)
            weight = self.visual.pos_embed.weight
            table = _bilinear(weight.float(), grid, rows, columns).to(self.dtype)
            inverse = self.visual.rotary_pos_emb.inv_freq.float().to(self.device)
            angles = torch.cat([rows[:, None] * inverse, columns[:, None] * inverse], 1)
            self._places[grid] = Places(table, angles.cos(), angles.sin())
        return self._places[grid]


def _affine(norm: Any) -> Affine:
    return Affine(norm.weight, norm.bias, norm.eps)


def _attend(qk: Tensor, v: Tensor, run: SameSize) -> Tensor:
    """Images of one run, each over itself: qk (P, 2, H, d), v (P, H, d) to (run's patches, H·d)."""
    where = slice(run.start, run.stop)
    shape = (run.images, run.size)
    q = qk[where, 0].unflatten(0, shape).transpose(1, 2)
    k = qk[where, 1].unflatten(0, shape).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v[where].unflatten(0, shape).transpose(1, 2))
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _slices(
    patches: Tensor, grids: list[tuple[int, int]], most: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Neighbouring images of at most `most` patches together (or one larger one)."""
    start = 0
    first = 0
    while first < len(grids):
        stop = first
        size = 0
        while stop < len(grids) and (stop == first or size + _area(grids[stop]) <= most):
            size += _area(grids[stop])
            stop += 1
        yield patches[start : start + size], grids[first:stop]
        start += size
        first = stop


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _runs(sizes: list[int]) -> list[SameSize]:
    """Neighbours of equal size, in order."""
    runs: list[SameSize] = []
    start = 0
    for size in sizes:
        if runs and runs[-1].size == size:
            runs[-1] = SameSize(runs[-1].start, runs[-1].images + 1, size)
        else:
            runs.append(SameSize(start, 1, size))
        start += size
    return runs


def _merge_order(
    rows: int, columns: int, merge: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column of each patch in the order the merger wants: 2x2 blocks, row-major blocks,
    row-major inside.
    """

    def blocks(x: Tensor) -> Tensor:
        return x.view(rows // merge, merge, columns // merge, merge).transpose(1, 2).flatten()

    r, c = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    return blocks(r), blocks(c)


def _bilinear(table: Tensor, grid: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
    """The learned square position table (side², C) sampled at a rows×columns grid (corners
    aligned), for the given patches.
    """
    side = int(table.shape[0] ** 0.5)
    y = torch.linspace(0, side - 1, grid[0], device=table.device)[rows]
    x = torch.linspace(0, side - 1, grid[1], device=table.device)[columns]
    y0 = y.long()
    x0 = x.long()
    y1 = (y0 + 1).clamp(max=side - 1)
    x1 = (x0 + 1).clamp(max=side - 1)
    dy = (y - y0)[:, None]
    dx = (x - x0)[:, None]
    top = table[y0 * side + x0] * (1 - dx) + table[y0 * side + x1] * dx
    bottom = table[y1 * side + x0] * (1 - dx) + table[y1 * side + x1] * dx
    return top * (1 - dy) + bottom * dy
