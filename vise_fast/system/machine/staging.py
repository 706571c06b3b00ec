"""What the host has made, on the device, without waiting for the device.

`torch.tensor(list, device="cuda")`, `.to("cuda")` and a list as an index wait until everything that
was launched before is done. Through pinned memory the copy takes its place in the queue. torch's
allocator of pinned memory gives a piece back only when the copy out of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def put(values: Sequence | Tensor, device: torch.device | str) -> Tensor:
    """A list as torch.tensor takes it, or a tensor of the CPU, on `device`."""
    here = values if isinstance(values, Tensor) else torch.tensor(values)
    kind = torch.device(device).type
    if kind == "cpu" or here.device.type != "cpu":
        return here.to(device)
    if kind == "cuda":
        here = here.pin_memory()
    return here.to(device, non_blocking=True)
