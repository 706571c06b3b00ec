"""Bytes a decode step must move, and the roofline a measured time is held against."""

from __future__ import annotations

from dataclasses import dataclass

from vise_fast.profile.minimal import Shapes


def decode_bytes(
    s: Shapes,
    rows: int,
    context: int,
    bytes_per_weight: float = 2.0,
    bytes_per_value: int = 2,
    shared: int = 0,
) -> float:
    """Bytes one decode step must move: decoder, LoRA and head once, and each row's keys and values.

    context: tokens each row sees; the first `shared` of them belong to one prefix that is read once
    for all rows.
    """
    weights = s.decoder_weights() * bytes_per_weight + (s.decoder_lora() + s.head_weights()) * 2.0
    per_token = 2 * s.layers * s.kv_heads * s.head_dim * bytes_per_value
    return weights + per_token * (rows * (context - shared) + shared)


@dataclass(frozen=True)
class Ceiling:
    """What a machine can do: FLOP/s of its matrix units and bytes/s of its memory, measured in the
    same run.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline (Williams et al. 2009): neither compute nor memory can be faster."""
        return max(flops / self.flops, moved / self.bandwidth)

    def share(self, seconds: float, flops: float, moved: float) -> float:
        """Which part of the ceiling a measured time reaches, 0..1."""
        return self.seconds(flops, moved) / seconds
