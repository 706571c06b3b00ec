"""The image ops queue their work on a GPU and return: nothing in them waits for it."""

import pytest
import torch
from pictures import GPU, noise
from vise_kernels import ghost, patchify, resize, warp

CALLS = {
    "ghost blur": lambda images: ghost(
        images, [0, 1, 1], torch.tensor([[3, 4, 50, 40], [0, 0, 9, 9], [5, 5, 5, 8]])
    ),
    "ghost mean": lambda images: ghost(
        images, [1], torch.tensor([[3, 4, 50, 40]]), method="mean", region="outside", feather=2.0
    ),
    "warp": lambda images: warp(images, torch.eye(3, dtype=torch.float64).expand(2, 3, 3)),
    "resize": lambda images: resize(images, [(32, 48), (70, 21)]),
    "patchify": lambda images: patchify([images[0]], patch=8, merge=2, dtype=torch.bfloat16),
    "patchify, warped": lambda images: patchify(
        [images[0]], patch=8, merge=2, matrices_px=torch.eye(3)[None] * torch.tensor([-1, 1, 1])
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_gpu(name):
    images = [noise(48, 64).cuda(), noise(33, 51).cuda()]
    CALLS[name](images)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
