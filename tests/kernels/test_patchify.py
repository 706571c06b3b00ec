"""patchify on every path against transformers' own image processor, the single-tap form against a
folded convolution, and the warp on the way against `warp` before.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import PATHS, device, noise, on
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vise_kernels import patchify, warp

SIZES = [(64, 96), (32, 32), (96, 64)]
NORMALS = [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.481, 0.457, 0.408), (0.268, 0.261, 0.275))]


def patches_of(images, path, **options):
    patches, grid = patchify(on(path, images), path=path, **options)
    return patches.cpu(), grid


def stock(images, patch, merge, mean, std, temporal=2):
    """The processor of Qwen3-VL checkpoints that runs without torchvision, on pixels that need no
    resizing.
    """
    options = {
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": temporal,
        "image_mean": mean,
        "image_std": std,
    }
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
    images = [noise(*size) for size in SIZES]
    options = {"patch": 8, "merge": 2, "mean": NORMALS[1][0], "std": NORMALS[1][1]}
    half, _ = patches_of(images, path, **options, dtype=dtype)
    full, _ = patches_of(images, "plain", **options)
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_a_single_tap_is_one_of_the_equal_taps(path):
    images = [noise(*size) for size in SIZES]
    options = {"patch": 8, "merge": 2}
    both, _ = patches_of(images, path, **options, temporal=2)
    one, _ = patches_of(images, path, **options, single_tap=True)
    both = both.view(-1, 3, 2, 64)
    assert torch.equal(both[:, :, 0], both[:, :, 1])
    assert torch.equal(both[:, :, 0].reshape(-1, 192), one)


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
    image[:, :, 0] = np.kron(rows, np.ones((4, 4)))
    image[:, :, 1] = np.kron(columns, np.ones((4, 4)))
    options = {"mean": (0, 0, 0), "std": (1 / 255,) * 3, "single_tap": True}
    patches, grid = patches_of([torch.from_numpy(image)], path, patch=4, merge=2, **options)
    assert grid.tolist() == [[1, 4, 6]]
    seen = [(int(row[0].round()), int(row[16].round())) for row in patches]
    order = itertools.product((0, 2), (0, 2, 4), (0, 1), (0, 1))
    assert seen == [(y + dy, x + dx) for y, x, dy, dx in order]


# identity, flip of 63 columns, enlarged crop, rotation with shear, a homography, everything out of
# sight
WARPS = [
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[-1, 0, 63], [0, 1, 0], [0, 0, 1]],
    [[1.25, 0, -3.3], [0, 1.25, -2.1], [0, 0, 1]],
    [[0.98, -0.17, 4.2], [0.21, 0.95, -3.1], [0, 0, 1]],
    [[0.9, 0.1, 1], [-0.05, 1.1, 2], [1e-3, 2e-3, 1]],
    [[1, 0, 500], [0, 1, 0], [0, 0, 1]],
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {"single_tap": True},
        {"temporal": 3, "dtype": torch.bfloat16},
        {"mean": NORMALS[1][0], "std": NORMALS[1][1], "fill": 7},
    ],
)
@pytest.mark.parametrize(
    "patch, merge, sizes",
    [
        (7, 3, [(21, 63), (42, 63), (63, 21), (21, 21), (84, 42), (42, 42)]),
        (8, 2, [(32, 48)] * 6),
        (1, 1, [(1, 63), (5, 63), (2, 3), (1, 1), (9, 1), (13, 11)]),
    ],
)
def test_a_warp_on_the_way_is_the_warp_before(path, patch, merge, sizes, options):
    images = [noise(*size) for size in sizes]
    matrices = torch.tensor(WARPS, dtype=torch.float64)
    before = {"fill": options["fill"]} if "fill" in options else {}
    after = {name: value for name, value in options.items() if name != "fill"}
    warped = warp(on(path, images), matrices, **before, path=path)
    truth, truth_grid = patches_of(warped, path, patch=patch, merge=merge, **after)
    patches, grid = patches_of(
        images, path, patch=patch, merge=merge, matrices_px=matrices, **options
    )
    assert torch.equal(grid, truth_grid) and patches.dtype == truth.dtype
    if device(path) == "cpu":
        assert torch.equal(patches, truth)
        return
    # a compiler may contract products differently in two kernels: a half may round the other way
    level = 1 / 255 / min(options.get("std", (0.5,)))
    rounding = (patches.dtype != torch.float32) * 2**-7
    assert (patches.float() - truth.float()).abs().max() <= 1.01 * level + rounding


@pytest.mark.parametrize("path", PATHS[:2])
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    st.integers(0, 255),
)
def test_any_affine_warp_on_the_way(path, rows, columns, entries, fill):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2] += torch.tensor(entries, dtype=torch.float64).view(2, 3) * torch.tensor([1, 1, 10])
    if matrix.det().abs() < 1e-3:
        return
    images = [noise(6 * rows, 6 * columns)]
    before = warp(images, matrix[None], fill=fill, path=path)
    patches, _ = patchify(images, patch=3, merge=2, matrices_px=matrix[None], fill=fill, path=path)
    assert torch.equal(patches, patchify(before, patch=3, merge=2, path=path)[0])


@pytest.mark.parametrize("path", PATHS)
def test_an_identity_reads_the_source_itself(path):
    images = [noise(32, 48), noise(16, 16)]
    patches, _ = patches_of(
        images, path, patch=8, merge=2, matrices_px=torch.eye(3).expand(2, 3, 3)
    )
    assert torch.equal(patches, patches_of(images, path, patch=8, merge=2)[0])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"images": []}, "image"),
        ({"images": [noise(16, 24)]}, "multiple"),
        ({"dtype": torch.float64}, "dtype"),
        ({"dtype": torch.int32}, "dtype"),
        ({"images": [noise(16, 16).float()]}, "uint8"),
        ({"matrices_px": torch.eye(3)}, "patchify: matrices_px"),
        ({"matrices_px": torch.zeros(1, 3, 3)}, "inverted"),
        ({"matrices_px": torch.eye(3)[None], "fill": -1}, "fill"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        patchify(**({"images": [noise(16, 16)], "patch": 8, "merge": 2} | changes))
