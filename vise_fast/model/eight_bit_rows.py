"""An embedding whose rows are held in 8 bits each, with a scale of their own: half of what 16 bits
take, and a lookup reads only the rows it returns.

    row_v ≈ scale_v · code_v          scale_v = max |row_v| / 127, code_v whole numbers in ±127

Symmetric rounding to the nearest, as of int8 weights (Dettmers et al. 2022, section 2.1). Frozen:
no gradient. Left out: heads, whose every row enters every product (quantise.py says why they stay
16 bit), so a model whose head is its embedding has no use for this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vise_fast.system.errors import ConfigError

LARGEST = 127
ROWS_AT_ONCE = 8192
"""That are rounded together: what it takes beside table and codes is small."""


class EightBitRows(nn.Module):
    """Stands for an `nn.Embedding`; ids (...) int64 to (..., E) in the table's dtype."""

    code: Tensor
    """(V, E) int8"""
    scale: Tensor
    """(V, 1) float32"""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        weight = table.weight.data
        self.num_embeddings = len(weight)
        self.embedding_dim = weight.shape[1]
        self.dtype = weight.dtype
        code = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            scale[part], code[part] = rounded(weight[part])
        self.register_buffer("code", code)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        wide = F.embedding(ids, self.code).float() * F.embedding(ids, self.scale)
        return wide.to(self.dtype)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (n, E) -> scale (n, 1) float32, code (n, E) int8; a row of zeros has scale 0."""
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True) / LARGEST
    return scale, (wide / scale.clamp_min(1e-30)).round().to(torch.int8)


def replace_embedding(model: PreTrainedModel, path: str) -> None:
    """The model's table of tokens becomes `EightBitRows`, in place. ConfigError where the head is
    the same table.
    """
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        raise ConfigError(
            f"model.int8_embedding does nothing for {path}; its embedding is its head as well, "
            "which stays whole; leave it out"
        )
    model.set_input_embeddings(EightBitRows(table))
