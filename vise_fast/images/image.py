"""One image on its way through the method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Image:
    """`pixels` uint8 (H, W, 3) on the CPU, H and W on the model's grid; `key` names the image in 63
    bits, the same in every run. What is asked for on it, where that is not left to the model:
    `given`, or the first of `tried` that is seen.
    """

    pixels: Tensor
    name: str
    key: int
    given: str | None = None
    tried: tuple[str, ...] = ()
