"""resize on every path against Pillow: the plain path bit for bit, the others within one grey
level.
"""

import importlib

import numpy as np
import PIL
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pictures import PATHS, noise, on, worst
from PIL import Image
from vise_kernels import resize

module = importlib.import_module("vise_kernels.resize")  # the package's name `resize` is the op
down_first = module.down_first
taps = module.taps
PILLOW = int(PIL.__version__.split(".")[0])
# height and width, before and after: down, up, both, to the grid, one pixel, tall (rows first),
# unchanged in one axis or both
SIZES = [
    ((48, 70), (32, 40)),
    ((19, 31), (33, 48)),
    ((50, 23), (17, 31)),
    ((31, 43), (32, 48)),
    ((3, 5), (1, 1)),
    ((1, 1), (7, 9)),
    ((80, 26), (34, 14)),
    ((40, 37), (40, 20)),
    ((37, 40), (20, 40)),
    ((24, 25), (24, 25)),
    ((120, 3), (2, 3)),
]
LEVELS = {"plain": 0, "native": 1, "triton": 1}


def pillow(image, size):
    return np.asarray(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))


def comparable(old, new):
    """Pillow before 13 never goes along y first."""
    return PILLOW >= 13 or not down_first(old, new)


@pytest.mark.parametrize("path", PATHS)
def test_many_sizes_in_one_call_match_pillow(path):
    images = [noise(*old) for old, _ in SIZES]
    news = [new for _, new in SIZES]
    outs = resize(on(path, images), news, path=path)
    for image, new, out in zip(images, news, outs, strict=True):
        assert out.shape == (*new, 3) and out.is_contiguous()
        if comparable(image.shape[:2], new):
            assert worst(out, pillow(image, new)) <= LEVELS[path], (image.shape, new)


@pytest.mark.parametrize("path", PATHS[:2])
@settings(deadline=None, max_examples=80)
@given(*[st.integers(1, 90)] * 4)
def test_any_size_matches_pillow(path, height, width, new_height, new_width):
    assume(comparable((height, width), (new_height, new_width)))
    image = noise(height, width, 1)
    size = (new_height, new_width)
    assert worst(resize([image], [size], path=path)[0], pillow(image, size)) <= LEVELS[path]


@pytest.mark.parametrize("path", PATHS)
def test_overshoot_is_cut_between_the_axes_as_pillow_does(path):
    stripes = torch.from_numpy(np.indices((40, 40)).sum(0) % 7 > 2)
    board = stripes[:, :, None].expand(-1, -1, 3).to(torch.uint8) * 255
    for size in ((64, 64), (64, 33)):
        (out,) = resize(on(path, [board]), [size], path=path)
        assert worst(out, pillow(board, size)) <= LEVELS[path]


@pytest.mark.parametrize("path", PATHS)
def test_flat_pictures_stay_flat(path):
    for level in (0, 37, 255):
        (out,) = resize(
            on(path, [torch.full((31, 17, 3), level, dtype=torch.uint8)]), [(13, 29)], path=path
        )
        assert (out == level).all()


def test_weights_sum_to_one_and_read_only_what_exists():
    for size, out in ((640, 480), (3, 1000), (1000, 3), (1, 5), (7, 7)):
        first, weights = taps(size, out)
        assert (weights.double().sum(1) - 1).abs().max() < weights.shape[1] * 2**-23
        assert first.min() >= 0 and (first + weights.shape[1]).max() <= size


@pytest.mark.parametrize("sizes", [[(4, 4), (4, 4)], [(0, 4)], []])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes"):
        resize([noise(5, 5)], sizes)


def test_no_images():
    assert resize([], []) == []
