"""Images to test with, and the paths an op can take here."""

import numpy as np
import pytest
import torch
from vise_kernels.dispatch import native, triton

GPU = torch.cuda.is_available()

PATHS = [
    "plain",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(native() is None, reason="the native module was not built"),
    ),
    pytest.param(
        "triton",
        marks=[pytest.mark.gpu] if GPU else pytest.mark.skipif(triton is None, reason="no Triton"),
    ),
]


def device(path):
    """Triton runs on the GPU where there is one, else in its interpreter; the other paths are
    tested on the CPU.
    """
    return "cuda" if GPU and path == "triton" else "cpu"


def noise(height, width, seed=0):
    """uint8 (H,W,3), every level equally likely: the hardest picture for anything that rounds or
    clips.
    """
    return torch.from_numpy(
        np.random.default_rng((seed, height, width)).integers(
            0, 256, (height, width, 3), dtype=np.uint8
        )
    )


def on(path, images):
    return [image.to(device(path)) for image in images]


def worst(image, truth):
    """The largest distance in grey levels between two images, whatever their types."""
    return float(
        np.abs(image.cpu().numpy().astype(np.float64) - np.asarray(truth, dtype=np.float64)).max()
    )
