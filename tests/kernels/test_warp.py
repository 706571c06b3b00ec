"""warp on every path against bilinear sampling in float64, and where the answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import PATHS, noise, on, worst
from vise_kernels import warp


def see(images, matrices, path, **options):
    matrices = torch.as_tensor(np.stack(matrices), dtype=torch.float64)
    return [out.cpu() for out in warp(on(path, images), matrices, path=path, **options)]


def reference(image, matrix, fill=128):
    """Pixel centres at +0.5, bilinear, a constant border; unrounded float64."""
    image = image.numpy().astype(np.float64)
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v, depth = np.linalg.inv(matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        u = u / depth - 0.5
        v = v / depth - 0.5
    out = np.zeros((height * width, 3))
    near = (u > -2) & (u < width + 1) & (v > -2) & (v < height + 1)
    u = np.where(near, u, -2)
    v = np.where(near, v, -2)
    left = np.floor(u).astype(int)
    top = np.floor(v).astype(int)
    for dy, dx in itertools.product((0, 1), (0, 1)):
        sx = left + dx
        sy = top + dy
        weight = np.abs(1 - dx - (u - left)) * np.abs(1 - dy - (v - top))
        seen = (sx >= 0) & (sx < width) & (sy >= 0) & (sy < height)
        levels = image[sy.clip(0, height - 1), sx.clip(0, width - 1)]
        out += weight[:, None] * np.where(seen[:, None], levels, fill)
    return out.reshape(height, width, 3)


def turned(degrees, scale, dx, dy, width, height):
    c = scale * math.cos(math.radians(degrees))
    s = scale * math.sin(math.radians(degrees))
    x = width / 2
    y = height / 2
    return np.array([[c, -s, x - c * x + s * y + dx], [s, c, y - s * x - c * y + dy], [0, 0, 1.0]])


def cropped(x, y, share, width, height):
    return np.array([[1 / share, 0, -x / share], [0, 1 / share, -y / share], [0, 0, 1.0]])


def flipped(width):
    return np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1.0]])


def shifted(dx, dy):
    return np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1.0]])


SIZES = [(33, 47), (47, 33), (1, 19), (24, 1), (20, 28)]
MATRICES = [
    turned(9.7, 1.08, 4.2, -3.1, 47, 33),
    cropped(3.3, 2.1, 0.83, 33, 47),
    turned(-10, 0.9, 0, 0, 19, 1),
    shifted(0.25, -7.75),
    np.array([[0.9, 0.1, 1], [-0.05, 1.1, 2], [1e-3, 2e-3, 1.0]]),  # a homography
]


# 0.5 is rounding; coordinates in float32 are off by up to 2e-5 pixels here, by up to 510 levels a
# pixel
@pytest.mark.parametrize("path", PATHS)
def test_views_of_many_sizes_match_float64(path):
    images = [noise(*size) for size in SIZES]
    outs = see(images, MATRICES, path)
    for out, image, matrix in zip(outs, images, MATRICES, strict=True):
        assert out.shape == image.shape and out.dtype == torch.uint8
        assert worst(out, reference(image, matrix)) <= 0.52


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fill", [0, 77, 255])
def test_exact_views(path, fill):
    image = noise(21, 32, 1)
    matrices = [np.eye(3), flipped(32), shifted(3, -2), shifted(500, 0), shifted(0, -21)]
    same, mirrored, moved, away, above = see([image] * 5, matrices, path, fill=fill)
    assert torch.equal(same, image)
    assert torch.equal(mirrored, image.flip(1))
    assert torch.equal(moved[:19, 3:], image[2:, :29])
    assert (moved[19:] == fill).all() and (moved[:, :3] == fill).all()
    assert (away == fill).all() and (above == fill).all()


@pytest.mark.parametrize("path", PATHS)
def test_half_a_pixel_averages_neighbours_and_the_border(path):
    image = noise(1, 6, 2) // 2 * 2
    (out,) = see([image], [shifted(0.5, 0)], path, fill=100)
    before = torch.cat([torch.full((1, 1, 3), 100), image[:, :-1].int()], 1)
    assert worst(out, (before + image.int()) / 2) == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_horizon_in_the_picture_is_border(path):
    image = noise(16, 16, 3)
    horizon = np.linalg.inv(np.array([[1, 0, 0], [0, 1, 0], [0.25, 0, -2.0]]))
    (out,) = see([image], [horizon], path)
    seen = reference(image, horizon)
    # beside it a pixel spans the whole source
    steep = np.abs(0.25 * (np.arange(16) + 0.5) - 2) < 0.5
    assert worst(out[:, ~steep], seen[:, ~steep]) <= 0.52
    assert (out[:, steep] == 128).all()


@pytest.mark.parametrize("path", PATHS[:2])
@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(-180, 180),
    st.floats(0.5, 2),
    st.tuples(st.floats(-30, 30), st.floats(-30, 30)),
    st.integers(0, 255),
)
def test_any_affine_view(path, size, degrees, scale, shift, fill):
    image = noise(*size, 4)
    matrix = turned(degrees, scale, *shift, *size[::-1])
    (out,) = see([image], [matrix], path, fill=fill)
    assert worst(out, reference(image, matrix, fill)) <= 0.52


def test_no_images():
    assert warp([], torch.zeros(0, 3, 3)) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"matrices_px": torch.zeros(1, 3, 3)}, "inverted"),
        ({"matrices_px": torch.full((1, 3, 3), float("nan"))}, "inverted"),
        ({"matrices_px": torch.eye(3)}, "matrices_px"),
        ({"matrices_px": torch.zeros(1, 3, 3, device="meta")}, "CPU"),
        ({"fill": 256}, "fill"),
        ({"images": [noise(3, 3).int()]}, "uint8"),
        ({"images": [torch.zeros(0, 4, 3, dtype=torch.uint8)]}, "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    arguments = {"images": [noise(3, 3)], "matrices_px": torch.eye(3)[None]} | changes
    with pytest.raises(ValueError, match=words):
        warp(**arguments)
