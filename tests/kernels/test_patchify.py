"""patchify on every path against transformers' own image processor, and the single-tap form against a folded convolution."""

import numpy as np
import pytest
import torch
from pictures import PATHS, noise, on
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vise_kernels import patchify

SIZES = [(64, 96), (32, 32), (96, 64)]
NORMALS = [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.481, 0.457, 0.408), (0.268, 0.261, 0.275))]


def patches_of(images, path, **options):
    patches, grid = patchify(on(path, images), path=path, **options)
    return patches.cpu(), grid


def stock(images, patch, merge, mean, std, temporal=2):
    """The processor of Qwen3-VL checkpoints that runs without torchvision, on pixels that need no resizing."""
    options = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": temporal, "image_mean": mean, "image_std": std}
    processor = Qwen2VLImageProcessorPil(do_resize=False, **options)
    out = processor([image.numpy() for image in images], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mean, std", NORMALS)
@pytest.mark.parametrize("patch, merge", [(16, 2), (8, 2), (4, 4), (32, 1)])
def test_equal_to_the_stock_processor(path, patch, merge, mean, std):
    images = [noise(*size) for size in SIZES]
    truth, truth_grid = stock(images, patch, merge, list(mean), list(std))
    patches, grid = patches_of(images, path, patch=patch, merge=merge, mean=mean, std=std)
    assert torch.equal(grid, truth_grid)
    assert patches.shape == truth.shape and patches.dtype == torch.float32
    assert torch.equal(patches, truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(path, dtype):
    images, options = [noise(*size) for size in SIZES], {"patch": 8, "merge": 2, "mean": NORMALS[1][0], "std": NORMALS[1][1]}
    half, _ = patches_of(images, path, **options, dtype=dtype)
    full, _ = patches_of(images, "plain", **options)
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_a_single_tap_is_one_of_the_equal_taps(path):
    images, options = [noise(*size) for size in SIZES], {"patch": 8, "merge": 2}
    both, _ = patches_of(images, path, **options, temporal=2)
    one, _ = patches_of(images, path, **options, single_tap=True)
    both = both.view(-1, 3, 2, 64)
    assert torch.equal(both[:, :, 0], both[:, :, 1]) and torch.equal(both[:, :, 0].reshape(-1, 192), one)


def test_a_single_tap_serves_a_folded_embedding():
    conv = torch.nn.Conv3d(3, 5, (2, 8, 8), (2, 8, 8)).double()
    both, _ = patches_of([noise(32, 48)], "plain", patch=8, merge=2)
    one, _ = patches_of([noise(32, 48)], "plain", patch=8, merge=2, single_tap=True)
    full = conv(both.double().view(-1, 3, 2, 8, 8)).flatten(1)
    folded = one.double() @ conv.weight.sum(2).flatten(1).T + conv.bias
    assert torch.allclose(full, folded, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_merged_squares_stay_together(path):
    """Row and column of each patch, written into its pixels, come back in merge order."""
    rows, columns = np.mgrid[:4, :6]
    image = np.zeros((4 * 4, 6 * 4, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = np.kron(rows, np.ones((4, 4))), np.kron(columns, np.ones((4, 4)))
    patches, grid = patches_of([torch.from_numpy(image)], path, patch=4, merge=2, mean=(0, 0, 0), std=(1 / 255,) * 3, single_tap=True)
    assert grid.tolist() == [[1, 4, 6]]
    seen = [(int(row[0].round()), int(row[16].round())) for row in patches]
    squares = [(y, x) for y in (0, 2) for x in (0, 2, 4)]
    assert seen == [(y + dy, x + dx) for y, x in squares for dy in (0, 1) for dx in (0, 1)]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"images": []}, "image"),
        ({"images": [noise(16, 24)]}, "multiple"),
        ({"dtype": torch.float64}, "dtype"),
        ({"dtype": torch.int32}, "dtype"),
        ({"images": [noise(16, 16).float()]}, "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        patchify(**({"images": [noise(16, 16)], "patch": 8, "merge": 2} | changes))
