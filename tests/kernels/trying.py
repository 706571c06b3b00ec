"""What the tests of every op begin with: a path that runs here or a skip, and numbers that are the
same wherever they are drawn.
"""

import pytest
import torch
from vise_kernels.dispatch import choose


def runs(op, path, device="cpu"):
    """Skips where `path` of `op` cannot run."""
    try:
        choose(op, torch.device(device), path)
    except ValueError as obstacle:
        pytest.skip(str(obstacle))


def draw(*shape, seed=0):
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
