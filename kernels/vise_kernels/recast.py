"""Many small matrices copied into places of their own, scaled and cast, in one launch:

    target_i = scale_i · source_i

The LoRA masters are taken over into the compute dtype after every optimizer step: hundreds of
tensors, of which each alone is a cast, a scaling and a copy. Sources are float32 and contiguous;
targets may be parts of larger matrices (rows side by side in memory, as a block of a block-diagonal
one). The addresses are put on the device once.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from vise_kernels.dispatch import choose, jit, launch, tl, triton

VALUES = 1024  # of a Triton program
FIELDS = 6  # of a row of the table
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Recast:
    """sources[i] (rows, columns) in float32 to targets[i], of one dtype and the same shape, whose
    columns lie side by side. ValueError: what does not fit, a forced `path` that cannot run.
    """

    def __init__(
        self,
        sources: list[Tensor],
        targets: list[Tensor],
        scales: list[float],
        *,
        path: str | None = None,
    ) -> None:
        _check(sources, targets, scales)
        self.sources = sources
        self.targets = targets
        self.scales = scales
        self.path = path
        self.takes = targets[0].dtype in FLOATS and sources[0].dtype == torch.float32
        self._places: list[int] = []
        self._table: Tensor | None = None
        self._chosen()

    def _chosen(self) -> str:
        """Asked at every call: an op may be switched off after this was made."""
        chosen = choose("recast", self.targets[0].device, self.path).path
        return chosen if self.takes else "plain"

    def __call__(self) -> None:
        """Copy what the sources hold now."""
        if self._chosen() == "plain":
            self._plain()
            return
        if self._table is None or self._where() != self._places:
            self._places = self._where()
            self._table = self._located()
        most = max(source.numel() for source in self.sources)
        grid = (triton.cdiv(most, VALUES), len(self.sources))
        launch(_kernel, grid, self._table, self.targets[0], VALUES=VALUES, num_warps=4)

    @torch.no_grad()
    def _plain(self) -> None:
        for source, target, scale in zip(self.sources, self.targets, self.scales, strict=True):
            target.copy_(source if scale == 1 else source * scale)

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.sources, *self.targets)]

    def _located(self) -> Tensor:
        """int64 (tensors, FIELDS) on the device: addresses, rows, columns, the target's stride and
        the scale's bits.
        """
        rows = []
        for source, target, scale in zip(self.sources, self.targets, self.scales, strict=True):
            (bits,) = struct.unpack("<i", struct.pack("<f", scale))
            ends = [source.data_ptr(), target.data_ptr()]
            rows.append([*ends, *source.shape, target.stride(0), bits])
        return torch.tensor(rows, dtype=torch.int64).to(self.targets[0].device)


@jit
def _kernel(table, like, VALUES: tl.constexpr):
    """Grid (blocks of the largest source, tensors); `like` tells the targets' dtype."""
    at = table + tl.program_id(1) * 6
    source = tl.load(at).to(tl.pointer_type(tl.float32))
    target = tl.load(at + 1).to(tl.pointer_type(like.dtype.element_ty))
    columns = tl.load(at + 3)
    size = tl.load(at + 2) * columns
    stride = tl.load(at + 4)
    scale = tl.load(at + 5).to(tl.int32).to(tl.float32, bitcast=True)
    index = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    value = tl.load(source + index, mask=index < size, other=0.0) * scale
    place = index // columns * stride + index % columns
    tl.store(target + place, value.to(like.dtype.element_ty), mask=index < size)


def _check(sources: list[Tensor], targets: list[Tensor], scales: list[float]) -> None:
    if not sources or not len(sources) == len(targets) == len(scales):
        raise ValueError(
            f"recast: {len(sources)} sources, {len(targets)} targets and {len(scales)} scales; one "
            "or more, as many of each"
        )
    for source, target in zip(sources, targets, strict=True):
        if source.dim() != 2 or source.shape != target.shape or not source.is_contiguous():
            raise ValueError(
                f"recast: source {tuple(source.shape)} and target {tuple(target.shape)} do not fit"
            )
        if target.stride(1) != 1 or target.dtype != targets[0].dtype:
            raise ValueError("recast: targets must have one dtype, and columns side by side")
