"""Geometry: golden numbers, hygiene, projections against brute force, averages by simulation with a
fixed seed.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vise_fast.images import geometry as geo

H = 480
W = 640
COORDINATE = st.floats(-200, 1200, allow_nan=False)
BOX = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE)


def close(actual, expected, atol=1e-9):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0
    )


def test_flip_golden_numbers():
    close(geo.project_1000((100, 200, 400, 700), geo.flip_px(W), H, W), (600, 200, 900, 700))
    close(geo.project_1000((600, 300, 900, 700), geo.flip_px(W), H, W), (100, 300, 400, 700))


@pytest.mark.parametrize("mode", ["corners", "ellipse"])
def test_crop_golden_numbers(mode):
    matrix = geo.crop_px(32, 24, 576, 432, W, H)
    close(
        geo.project_1000((100, 200, 400, 700), matrix, H, W, mode),
        (500 / 9, 500 / 3, 3500 / 9, 6500 / 9),
    )


def test_giou_golden_numbers():
    close(geo.giou((0, 0, 10, 10), (0, 0, 10, 10)), 1.0)
    close(geo.giou((0, 0, 10, 10), (20, 0, 30, 10)), -1 / 3)
    close(geo.iou((0, 0, 10, 10), (5, 0, 15, 10)), 1 / 3)
    close(geo.giou((0, 0, 10, 10), (5, 0, 15, 10)), 1 / 3)
    close(geo.giou((0, 0, 10, 10), (10, 10, 20, 20)), -0.5)


def test_empty_boxes_compare_as_nothing():
    for other in ((0, 0, 0, 0), (5, 5, 5, 9)):
        close(geo.iou((0, 0, 0, 0), other), 0.0)
        assert geo.giou((0, 0, 0, 0), other) == -1


@given(a=BOX, b=BOX)
def test_giou_is_bounded_symmetric_and_below_iou(a, b):
    a = geo.clean_1000(a)
    b = geo.clean_1000(b)
    value = geo.giou(a, b)
    assert -1 <= value <= geo.iou(a, b) + 1e-12 <= 1 + 2e-12
    close(geo.giou(b, a), value.item())


@given(a=BOX, b=BOX)
def test_iou_counts_cells(a, b):
    """IoU of integer boxes on a 25-step grid equals counting cells."""
    a, b = ((geo.clean_1000(box) / 40).round() for box in (a, b))
    cells = torch.zeros(2, 25, 25, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(cells, (a.int().tolist(), b.int().tolist()), strict=True):
        mask[y1:y2, x1:x2] = True
    shared = (cells[0] & cells[1]).sum()
    union = (cells[0] | cells[1]).sum()
    close(geo.iou(a, b), float(shared / union) if union else 0.0, atol=1e-6)


def test_hygiene():
    close(geo.clean_1000((400, 700, 100, 200)), (100, 200, 400, 700))
    close(geo.clean_1000((-5, 10, 1100, 20)), (0, 10, 1000, 20))
    for bad in (math.nan, math.inf, -math.inf):
        close(geo.clean_1000((1, bad, 3, 4)), (0, 0, 0, 0))
        assert not geo.proper((1, bad, 3, 4))
    assert (
        not geo.proper((10, 10, 10, 20))
        and not geo.proper((0, 0, 0, 0))
        and not geo.proper((1200, 0, 1300, 50))
    )
    assert geo.proper((20, 20, 10, 10))
    close(geo.area_share([(0, 0, 1000, 1000), (500, 0, 0, 500), (0, 0, 0, 0)]), (1, 0.25, 0))


@given(box=BOX, height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_pixels_and_thousandths_are_inverse(box, height, width):
    close(geo.to_1000(geo.to_px(box, height, width), height, width), box, atol=1e-9)


def test_sizes_broadcast_per_image():
    boxes = torch.tensor([[0.0, 0, 1000, 1000]]).expand(2, 4)
    close(
        geo.to_px(boxes, torch.tensor([480, 31]), torch.tensor([640, 97])),
        [(0, 0, 640, 480), (0, 0, 97, 31)],
    )


AFFINE = st.builds(
    geo.affine_px,
    st.floats(-180, 180),
    st.floats(0.3, 2),
    st.floats(-90, 90),
    st.floats(-90, 90),
    st.just(W),
    st.just(H),
)


@given(box=BOX, matrix=AFFINE)
def test_corners_are_the_hull_of_mapped_corners(box, matrix):
    x1, y1, x2, y2 = geo.to_px(box, H, W).tolist()
    corners = (
        torch.tensor([(x1, y1, 1), (x2, y1, 1), (x1, y2, 1), (x2, y2, 1)], dtype=torch.float64)
        @ matrix.T
    )
    hull = torch.cat([corners.min(0).values[:2], corners.max(0).values[:2]])
    close(
        geo.project_1000(box, matrix, H, W, "corners", clamp=False),
        geo.to_1000(hull, H, W).tolist(),
        atol=1e-6,
    )


@given(box=BOX, matrix=AFFINE)
def test_ellipse_is_the_hull_of_mapped_outline(box, matrix):
    x1, y1, x2, y2 = geo.to_px(box, H, W).tolist()
    t = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)
    outline = (
        torch.stack(
            [
                (x1 + x2) / 2 + (x2 - x1) / 2 * t.cos(),
                (y1 + y2) / 2 + (y2 - y1) / 2 * t.sin(),
                torch.ones_like(t),
            ],
            -1,
        )
        @ matrix.T
    )
    hull = torch.cat([outline.min(0).values[:2], outline.max(0).values[:2]])
    close(
        geo.project_1000(box, matrix, H, W, "ellipse", clamp=False),
        geo.to_1000(hull, H, W).tolist(),
        atol=0.02,
    )


def test_projection_is_clamped_and_broadcasts():
    matrices = torch.stack([geo.flip_px(W), geo.affine_px(0, 1, -320, 0, W, H)])
    boxes = torch.tensor([[[100, 200, 400, 700.0]], [[0, 0, 1000, 1000]], [[500, 0, 600, 10]]])
    out = geo.project_1000(boxes, matrices, torch.tensor([[H]] * 3), torch.tensor([[W]] * 3))
    assert out.shape == (3, 2, 4)
    close(out[0], [(600, 200, 900, 700), (0, 200, 0, 700)])
    close(out[1], [(0, 0, 1000, 1000), (0, 0, 500, 1000)])
    away = [geo.affine_px(0, 1, dx, dy, W, H) for dx, dy in ((320, 240), (-320, -240))]
    out = geo.project_1000((300, 400, 700, 600.0), torch.stack(away), H, W)
    close(out, [(800, 900, 1000, 1000), (0, 0, 200, 100)])
    out = geo.project_1000((300, 400, 700, 600.0), torch.stack(away), H, W, clamp=False)
    close(out, [(800, 900, 1200, 1100), (-200, -100, 200, 100)])
    with pytest.raises(ValueError, match="known: corners, ellipse"):
        geo.project_1000(boxes, matrices, H, W, "hexagon")


@pytest.mark.parametrize("row, place", [(2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("change", [0.5, -1e-9])
def test_a_matrix_with_a_perspective_is_refused(row, place, change):
    """One among several is enough."""
    matrices = torch.stack([geo.flip_px(W)] * 3)
    matrices[1, row, place] += change
    with pytest.raises(ValueError, match="perspective"):
        geo.project_1000((100, 200, 400, 700.0), matrices, H, W)


def test_rotation_turns_counter_clockwise_as_seen_and_keeps_the_centre():
    matrix = geo.affine_px(90, 1, 0, 0, 97, 31)
    close(matrix @ torch.tensor([97 / 2, 31 / 2, 1], dtype=torch.float64), (97 / 2, 31 / 2, 1))
    right_of_centre = matrix @ torch.tensor([97 / 2 + 10, 31 / 2, 1], dtype=torch.float64)
    close(right_of_centre, (97 / 2, 31 / 2 - 10, 1))


def test_matrices_are_affine_and_shift_right_and_down():
    made = (
        geo.flip_px(97),
        geo.crop_px(3, 4, 50, 20, 97, 31),
        geo.affine_px(7, 1.1, 5, -6, 97, 31),
    )
    for matrix in made:
        assert matrix.dtype == torch.float64 and matrix[2].tolist() == [0, 0, 1]
    moved = geo.affine_px(0, 1, 5, -6, 97, 31) @ torch.tensor([10, 20, 1], dtype=torch.float64)
    close(moved, (15, 14, 1))
    close(
        made[2] @ torch.tensor([97 / 2, 31 / 2, 1], dtype=torch.float64),
        (97 / 2 + 5, 31 / 2 - 6, 1),
    )


def test_kept_share():
    close(geo.kept_share((0, 0, 1000, 1000), geo.flip_px(W), H, W), 1.0)
    close(geo.kept_share((0, 0, 1000, 1000), geo.affine_px(0, 1, 160, 0, W, H), H, W), 0.75)
    close(geo.kept_share((0, 0, 100, 1000), geo.affine_px(0, 1, -64, 0, W, H), H, W), 0.0)
    close(geo.kept_share((10, 10, 10, 10), geo.flip_px(W), H, W), 1.0)


# --- averages: 4,000 views drawn with the published ranges at 640x480, seed 0; standard errors are
# below .001 -----------------------


def random_affine(rng):
    return geo.affine_px(
        rng.uniform(-10, 10),
        rng.uniform(0.9, 1.1),
        rng.uniform(-50, 50),
        rng.uniform(-50, 50),
        W,
        H,
    )


def random_crop(rng):
    ratio = rng.uniform(0.8, 1)
    cw = W * ratio
    ch = H * ratio
    return geo.crop_px(rng.uniform(0, W - cw), rng.uniform(0, H - ch), cw, ch, W, H)


def r_geo(a, b):
    return (geo.giou(a, b) + 1) / 2


FULL = torch.tensor([0.0, 0, 1000, 1000], dtype=torch.float64)


def views(kind, count=4000):
    rng = np.random.default_rng(0)
    return torch.stack(
        [{"affine": random_affine, "crop": random_crop}[kind](rng) for _ in range(count)]
    )


def test_full_image_is_exactly_invariant_to_flip_and_crop():
    for mode in ("corners", "ellipse"):
        assert r_geo(geo.project_1000(FULL, geo.flip_px(W), H, W, mode), FULL) == 1
        assert (r_geo(geo.project_1000(FULL, views("crop"), H, W, mode), FULL) > 1 - 1e-12).all()


@pytest.mark.parametrize("mode, mean", [("corners", 0.979), ("ellipse", 0.952)])
def test_full_image_under_affine_on_average(mode, mean):
    assert r_geo(
        geo.project_1000(FULL, views("affine"), H, W, mode), FULL
    ).mean().item() == pytest.approx(mean, abs=0.003)


def test_full_image_over_all_views_on_average():
    affine = r_geo(geo.project_1000(FULL, views("affine"), H, W, "corners"), FULL).mean().item()
    assert (affine + 1 + 1) / 3 == pytest.approx(0.993, abs=0.001)


def random_boxes(rng, count):
    """Width and height uniform in 100..700, place uniform in the image."""
    sizes = rng.uniform(100, 700, (count, 2))
    corners = rng.uniform(0, 1, (count, 2)) * (1000 - sizes)
    return torch.as_tensor(np.concatenate([corners, corners + sizes], 1))


@pytest.mark.parametrize("mode, mean", [("ellipse", 1.0), ("corners", 0.921)])
def test_perfect_grounder_of_round_objects_under_affine(mode, mean):
    """Round: an ellipse with axes along the image's, so that the inscribed-ellipse hull is the
    truth; everything clamped to the view.
    """
    matrices = views("affine")
    boxes = random_boxes(np.random.default_rng(1), 4000)
    answer = geo.project_1000(boxes, matrices, H, W, "ellipse")
    value = r_geo(geo.project_1000(boxes, matrices, H, W, mode), answer).mean().item()
    assert value == pytest.approx(mean, abs=0.003)
