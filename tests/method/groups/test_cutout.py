"""The median box and its cutout, on boxes as ugly as they come."""

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from vise_fast.images import geometry
from vise_fast.method.groups.cutout import (
    LONGEST,
    MARGIN,
    cutouts,
    median_boxes,
    rectangle,
)

BOXES = {
    "middle": (250.0, 250.0, 750.0, 500.0),
    "corner": (0.0, 0.0, 100.0, 60.0),
    "far corner": (930.0, 950.0, 1000.0, 1000.0),
    "everything": (0.0, 0.0, 1000.0, 1000.0),
    "a point": (500.0, 500.0, 500.0001, 500.0001),
    "a point at the far edge": (999.9999, 999.9999, 1000.0, 1000.0),
    "a thread": (0.0, 333.3, 1000.0, 333.4),
    "a pole": (999.0, 0.0, 999.5, 1000.0),
    "on pixels": (400.0, 100.0, 600.0, 300.0),
}
SIZES = [(480, 640), (128, 128), (32, 960), (640, 48), (16, 16), (17, 31)]


def sides(found):
    return [span.stop - span.start for span in found]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BOXES)
def test_a_cutout_lies_in_the_image_and_holds_its_box(name, size):
    height, width = size
    found = rectangle(torch.tensor(BOXES[name], dtype=torch.float64), height, width, 16)
    x1, y1, x2, y2 = geometry.to_px(BOXES[name], height, width).tolist()
    assert 0 <= found.rows.start <= y1 + 1e-5 and y2 - 1e-5 <= found.rows.stop <= height
    assert 0 <= found.columns.start <= x1 + 1e-5 and x2 - 1e-5 <= found.columns.stop <= width
    short, long = sorted(sides(found))
    assert short >= min(16, height, width)
    assert long <= LONGEST * short or short == min(height, width)


@pytest.mark.parametrize("name", ["middle", "on pixels", "corner", "everything"])
def test_the_margin_is_a_share_of_each_side(name):
    """By pixels: inside are those that the widened box touches."""
    height, width = 480, 640
    x1, y1, x2, y2 = geometry.to_px(BOXES[name], height, width).tolist()
    for span, low, high, length in zip(
        rectangle(torch.tensor(BOXES[name]), height, width, 1),
        (y1, x1),
        (y2, x2),
        (height, width),
        strict=True,
    ):
        more = MARGIN * (high - low)
        touched = [p for p in range(length) if p + 1 > low - more + 1e-5 and p < high + more - 1e-5]
        assert list(range(*span)) == touched


def test_what_is_widened_is_so_about_its_middle_where_there_is_room():
    box = torch.tensor([500.0, 200.0, 510.0, 300.0], dtype=torch.float64)
    found = rectangle(box, 1000, 1000, 64)
    assert found.rows == (187, 313)  # 100 and an eighth at either end
    assert found.columns == (473, 537)
    assert rectangle(box, 1000, 1000, 1).columns == (489, 521)  # a quarter of 126


def test_the_median_is_that_of_each_side():
    """An outlier moves nothing; of two the mean; unusable rows say nothing."""
    box = torch.tensor(
        [
            [100, 100, 200, 200],
            [110, 90, 210, 190],
            [0, 0, 1000, 1000],
            [10, 20, 30, 40],
            [20, 40, 50, 80],
            [0, 0, 0, 0],
            [0, 0, 0, 0],
            [0, 0, 0, 0],
            [5, 5, 5, 5],
        ],
        dtype=torch.float64,
    )
    usable = torch.tensor([True] * 3 + [True, True, False] + [False] * 3)
    found = median_boxes(box, usable, 3)
    assert found.tolist() == [[100, 90, 210, 200], [15, 30, 40, 60], [0, 0, 0, 0]]


@pytest.mark.parametrize("group", [1, 2, 5, 8])
def test_boxes_with_area_have_a_median_with_area(group):
    draws = np.random.default_rng(group)
    corner = draws.uniform(0, 990, (60 * group, 2))
    box = torch.from_numpy(
        np.concatenate([corner, corner + draws.uniform(1e-6, 10, (60 * group, 2))], 1)
    )
    usable = torch.from_numpy(draws.random(60 * group) < 0.7)
    found = median_boxes(box, usable, group)
    any_there = usable.view(-1, group).any(1)
    assert any_there.any() and torch.equal(geometry.proper(found), any_there)


@pytest.mark.parametrize("multiple", [1, 16, 28])
def test_a_cutout_has_sides_on_the_grid_and_the_area_of_its_image_at_most(multiple):
    sizes = [(112, 168), (28 * 16, 28 * 16), (112, 1008)]
    images = [torch.zeros(h, w, 3, dtype=torch.uint8) for h, w in sizes for _ in BOXES]
    boxes = torch.tensor([*BOXES.values()] * len(sizes), dtype=torch.float64)
    for image, found in zip(images, cutouts(images, boxes, multiple), strict=True):
        height, width = found.shape[:2]
        assert height % multiple == width % multiple == 0
        area = image.shape[0] * image.shape[1]
        assert 0.4 * area <= height * width <= area


def test_a_cutout_is_what_pillow_cuts_out_and_resizes():
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (96, 128, 3), np.uint8)
    box = torch.tensor([[300.0, 200.0, 700.0, 900.0]], dtype=torch.float64)
    (found,) = cutouts([torch.from_numpy(pixels)], box, 16)
    rows, columns = rectangle(box[0], 96, 128, 16)
    cut = Pillow.fromarray(pixels).crop((columns.start, rows.start, columns.stop, rows.stop))
    truth = cut.resize((found.shape[1], found.shape[0]), Pillow.Resampling.BICUBIC)
    assert np.abs(np.asarray(truth).astype(int) - found.numpy()).max() <= 1


def test_without_pixels_there_are_shapes():
    meta = torch.empty(96, 128, 3, dtype=torch.uint8, device="meta")
    box = torch.tensor([BOXES["middle"]], dtype=torch.float64)
    (found,) = cutouts([meta], box, 16)
    (real,) = cutouts([torch.zeros(96, 128, 3, dtype=torch.uint8)], box, 16)
    assert found.is_meta and found.shape == real.shape and found.dtype == torch.uint8
