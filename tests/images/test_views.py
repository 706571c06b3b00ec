"""Views and ghosts: what is drawn, where a marked point lands, what is hidden and what is not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from vise_fast.config.schema import GhostConfig, ViewConfig
from vise_fast.images import geometry as geo
from vise_fast.images import views
from vise_fast.images.views import View

H = 480
W = 640
ODD = [(97, 131), (131, 97), (64, 64), (33, 210)]


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(kind, count=2000, height=H, width=W, **changes):
    generator = rng()
    return torch.stack(
        [
            views.draw_view(
                generator, height, width, ViewConfig(kinds=(kind,), **changes)
            ).matrix_px
            for _ in range(count)
        ]
    )


# -- drawing ---------------------------------------------------------------------------------------


def test_kinds_are_drawn_uniformly_and_only_from_the_list():
    generator = rng()
    counts = {"affine": 0, "crop": 0, "flip": 0}
    for _ in range(3000):
        counts[views.draw_view(generator, H, W, ViewConfig()).kind] += 1
    assert all(abs(count - 1000) < 110 for count in counts.values())  # 4 standard deviations
    assert {
        views.draw_view(generator, H, W, ViewConfig(kinds=("flip", "crop"))).kind for _ in range(50)
    } == {"flip", "crop"}


def test_the_same_generator_draws_the_same_view():
    first, second = (views.draw_view(rng(7), 31, 97, ViewConfig()) for _ in range(2))
    assert first.kind == second.kind and torch.equal(first.matrix_px, second.matrix_px)


def test_affine_ranges():
    matrices = drawn("affine")
    angle = torch.rad2deg(torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    scale = matrices[:, 0, :2].norm(dim=-1)
    centre = torch.tensor([W / 2, H / 2, 1], dtype=torch.float64)
    shift = (matrices @ centre)[:, :2] - centre[:2]
    for values, low, high in (
        (angle, -10, 10),
        (scale, 0.9, 1.1),
        (shift[:, 0], -50, 50),
        (shift[:, 1], -50, 50),
    ):
        span = high - low
        assert low <= values.min() < low + 0.02 * span and high - 0.02 * span < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * span


@pytest.mark.parametrize(
    "size, literal, reach",
    [((H, W), False, 50), ((96, 128), False, 10), ((128, 96), False, 10), ((96, 128), True, 50)],
)
def test_shifts_scale_with_the_short_side(size, literal, reach):
    matrices = drawn("affine", 500, *size, literal_pixels=literal)
    centre = torch.tensor([size[1] / 2, size[0] / 2, 1], dtype=torch.float64)
    largest = ((matrices @ centre)[:, :2] - centre[:2]).abs().max().item()
    assert 0.97 * reach < largest <= reach


def test_crops_are_one_ratio_at_a_random_place_inside():
    matrices = drawn("crop")
    ratio = 1 / matrices[:, 0, 0]
    torch.testing.assert_close(ratio, 1 / matrices[:, 1, 1])
    assert 0.8 <= ratio.min() < 0.81 and 0.99 < ratio.max() <= 1
    corners = (
        torch.linalg.inv(matrices) @ torch.tensor([(0, 0, 1), (W, H, 1)], dtype=torch.float64).T
    )
    assert (
        corners[:, :2].min() >= -1e-9
        and corners[:, 0].max() <= W + 1e-9
        and corners[:, 1].max() <= H + 1e-9
    )
    free = corners[:, 0, 0] / (W * (1 - ratio)).clamp_min(1e-6)
    assert abs(free.mean() - 0.5) < 0.03


# -- which views count -----------------------------------------------------------------------------

FLIP = View("flip", geo.flip_px(W))
HALF_AWAY = View("affine", geo.affine_px(0, 1, W / 2, 0, W, H))
LEFT_BOX = (0.0, 0, 400, 1000)
RIGHT_BOX = (600.0, 0, 1000, 1000)


def usable(rows, boxes, sided, **changes):
    config = ViewConfig(**changes)
    return views.usable(
        rows, torch.tensor(boxes), torch.tensor(sided), [H] * len(rows), [W] * len(rows), config
    ).tolist()


def test_views_that_lose_the_box_are_dropped():
    rows = [[FLIP, HALF_AWAY]] * 3
    boxes = [LEFT_BOX, RIGHT_BOX, (0.0, 0, 0, 0)]
    assert usable(rows, boxes, [False] * 3) == [[True, True], [True, False], [True, True]]
    assert usable(rows, boxes, [False] * 3, min_kept=0.0) == [[True, True]] * 3


@pytest.mark.parametrize("kept, expected", [(0.69, False), (0.71, True)])
def test_the_limit_is_seventy_percent(kept, expected):
    shift = View("affine", geo.affine_px(0, 1, (1 - kept) * 0.4 * W, 0, W, H))
    assert usable([[shift]], [RIGHT_BOX], [False]) == [[expected]]


def test_sizes_are_the_rows_own():
    shift = geo.affine_px(0, 1, 40, 0, 100, 50)
    out = views.usable(
        [[View("affine", shift)]] * 2,
        torch.tensor([RIGHT_BOX] * 2),
        torch.tensor([False, False]),
        [50, 500],
        [100, 1000],
        ViewConfig(),
    )
    assert out.tolist() == [[False], [True]]


def test_a_flip_is_dropped_where_the_query_names_a_side():
    rows = [[FLIP, HALF_AWAY]] * 2
    boxes = [LEFT_BOX] * 2
    assert usable(rows, boxes, [True, False]) == [[False, True], [True, True]]
    for choice in ("swap", "keep"):
        assert usable(rows, boxes, [True, False], side_words=choice) == [[True, True]] * 2


# -- control boxes ---------------------------------------------------------------------------------

BOXES = st.tuples(*[st.floats(0, 1000, allow_nan=False)] * 4).map(lambda box: geo.clean_1000(box))


def overlap(a, b):
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


@given(box=BOXES, seed=st.integers(0, 2**20))
@limits(deadline=None)
def test_controls_are_disjoint_where_they_fit(box, seed):
    control, kind = views.control_box(rng(seed), box)
    x1, y1, x2, y2 = box.tolist()
    assert control[2] - control[0] == pytest.approx(x2 - x1) and control[3] - control[
        1
    ] == pytest.approx(y2 - y1)
    assert min(control) >= 0 and max(control) <= 1000 + 1e-9
    fits = max(x1, 1000 - x2) >= x2 - x1 or max(y1, 1000 - y2) >= y2 - y1
    assert kind == ("far" if fits else "random")
    assert kind == "random" or overlap(box.tolist(), control) < 1e-6


def test_far_controls_are_uniform_over_the_free_places():
    """Against rejection sampling: uniform over all places, overlapping ones thrown away."""
    box = (200.0, 300.0, 450.0, 500.0)
    generator = rng()
    ours = np.array([views.control_box(generator, box)[0][:2] for _ in range(20_000)])
    places = generator.uniform((0, 0), (750, 800), (60_000, 2))
    free = (np.abs(places[:, 0] - 200) >= 250) | (np.abs(places[:, 1] - 300) >= 200)
    edges = [np.linspace(0, 750, 6), np.linspace(0, 800, 6)]
    got, expected = (
        np.histogram2d(*points.T, bins=edges)[0] / len(points) for points in (ours, places[free])
    )
    assert np.abs(got - expected).max() < 0.01


def test_free_places_reach_the_edges_and_do_not_overlap():
    """Beside the box over the whole height, above and below it over what is left."""
    spots = views._free_spots((100.0, 600.0, 400.0, 900.0))
    assert spots == [(400.0, 700.0, 0.0, 700.0), (0.0, 400.0, 0.0, 300.0)]
    spots = views._free_spots((500.0, 400.0, 600.0, 500.0))
    assert spots == [
        (0.0, 400.0, 0.0, 900.0),
        (600.0, 900.0, 0.0, 900.0),
        (400.0, 600.0, 0.0, 300.0),
        (400.0, 600.0, 500.0, 900.0),
    ]


def test_the_full_image_is_its_own_control():
    assert views.control_box(rng(), (0, 0, 1000, 1000)) == ((0, 0, 1000, 1000), "random")


def test_half_the_image_has_one_place_left():
    assert views.control_box(rng(), (0, 0, 500, 1000)) == ((500, 0, 1000, 1000), "far")


# -- ghost lengths and pixel boxes -----------------------------------------------------------------


def test_ghost_lengths_scale_with_the_short_side():
    config = GhostConfig(feather_px=10)
    assert views.ghost_lengths(480, 640, config) == views.GhostLengths(25, 75, 10)
    assert views.ghost_lengths(640, 480, config) == views.GhostLengths(25, 75, 10)
    small = views.ghost_lengths(128, 128, config)
    assert (
        small.sigma == pytest.approx(25 * 128 / 480)
        and small.radius == 20
        and small.feather == pytest.approx(10 * 128 / 480)
    )
    assert views.ghost_lengths(128, 128, config, literal=True) == views.GhostLengths(25, 75, 10)


@pytest.mark.parametrize("size", ODD + [(H, W)])
def test_pixel_boxes_cover_the_box_and_are_tight(size):
    h, w = size
    boxes = geo.clean_1000(
        torch.rand(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1200
        - 100
    )
    boxes = boxes[geo.proper(boxes)]
    exact = geo.to_px(boxes, h, w)
    whole = views.whole_pixels(boxes, h, w)
    inside = whole[:, :2] - exact[:, :2]
    outside = whole[:, 2:] - exact[:, 2:]
    assert (
        (inside <= 1e-6).all()
        and (inside > -1).all()
        and (outside >= -1e-6).all()
        and (outside < 1).all()
    )


def test_pixel_boxes_on_the_grid_do_not_grow():
    assert views.whole_pixels(torch.tensor([(400.0, 200, 700, 700)]), H, W).tolist() == [
        [256, 96, 448, 336]
    ]
    assert views.whole_pixels(
        torch.tensor([(0.0, 0, 1000, 1000), (5, 5, 5, 9), (math.nan, 0, 9, 9)]), H, W
    ).tolist() == [[0, 0, W, H], [0] * 4, [0] * 4]


# -- pixels ----------------------------------------------------------------------------------------


def blob(height, width, x, y, spread=2.5):
    """A soft white dot at continuous pixel coordinates (x, y) on black."""
    yy, xx = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    value = torch.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * spread**2))
    return (255 * value).round().to(torch.uint8)[..., None].expand(height, width, 3).contiguous()


def centre_of(image):
    """Centre of mass of what is brighter than the border could be, in continuous pixel
    coordinates.
    """
    weight = (image[..., 0].double() - 140).clamp_min(0)
    yy, xx = torch.meshgrid(
        torch.arange(image.shape[0]) + 0.5, torch.arange(image.shape[1]) + 0.5, indexing="ij"
    )
    return torch.stack([(weight * xx).sum(), (weight * yy).sum()]) / weight.sum()


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize("kind", ["affine", "crop", "flip"])
def test_a_marked_point_lands_where_the_matrix_says(size, kind):
    h, w = size
    generator = rng(1)
    for x, y in ((0.4 * w, 0.45 * h), (0.6 * w, 0.55 * h), (0.5 * w + 0.3, 0.5 * h)):
        view = views.draw_view(generator, h, w, ViewConfig(kinds=(kind,)))
        moved = views.apply([blob(h, w, x, y)], [view])[0]
        assert moved.shape == (h, w, 3) and moved.dtype == torch.uint8
        expected = (view.matrix_px @ torch.tensor([x, y, 1], dtype=torch.float64))[:2]
        torch.testing.assert_close(centre_of(moved), expected, atol=0.08, rtol=0)


@pytest.mark.parametrize("size", ODD)
def test_a_flip_is_exact(size):
    image = torch.randint(
        0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(views.apply([image], [View("flip", geo.flip_px(size[1]))])[0], image.flip(1))


def test_the_border_is_grey_and_sizes_may_differ():
    white = [torch.full((*size, 3), 255, dtype=torch.uint8) for size in ODD]
    away = [View("affine", geo.affine_px(0, 1, 2 * w, 0, w, h)) for h, w in ODD]
    for image, moved in zip(white, views.apply(white, away), strict=True):
        assert moved.shape == image.shape and (moved == 128).all()


def noise(height, width, seed=0):
    return torch.randint(
        0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("method", ["blur", "mean", "pixelate"])
@pytest.mark.parametrize("size", ODD)
def test_a_ghost_changes_its_region_only(method, size):
    image = noise(*size)
    box = torch.tensor([(200.0, 300, 700, 800)])
    x1, y1, x2, y2 = views.whole_pixels(box, *size)[0].tolist()
    inside = torch.zeros(size, dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    for region, mask in (("inside", inside), ("outside", ~inside)):
        hidden = views.ghost([image], torch.tensor([0]), box, GhostConfig(method=method), region)[0]
        assert torch.equal(hidden[~mask], image[~mask])
        assert hidden[mask].double().var() < 0.2 * image[mask].double().var()
    assert torch.equal(image, noise(*size))  # the source is untouched


def test_ghosts_of_many_rows_keep_their_images_and_sizes():
    images = [noise(*size, seed) for seed, size in enumerate(ODD)]
    index = torch.tensor([3, 0, 0, 2, 1, 3])
    boxes = torch.tensor(
        [
            (0.0, 0, 500, 500),
            (500, 500, 900, 900),
            (0, 0, 0, 0),
            (900, 900, 100, 100),
            (0, 0, 1000, 1000),
            (300, 0, 301, 1000),
        ]
    )
    for config in (GhostConfig(), GhostConfig(feather_px=20)):
        together = views.ghost(images, index, boxes, config)
        for n, (i, box) in enumerate(zip(index.tolist(), boxes, strict=True)):
            assert together[n].shape == images[i].shape
            alone = views.ghost([images[i]], torch.tensor([0]), box[None], config)[0]
            assert torch.equal(together[n], alone)
        assert torch.equal(together[2], images[0])  # a box without area hides nothing


def test_every_ghost_is_made_once(monkeypatch):
    """Three sizes have three feathers, and a call each."""
    images = [noise(96, 128), noise(240, 320), noise(480, 640)]
    index = torch.tensor([2, 0, 1, 0, 2])
    boxes = torch.tensor([(100.0, 100, 900, 900)] * 5)
    made = []
    real = views.vise_kernels.ghost

    def watched(images, index, *rest, **how):
        made.extend(index.tolist())
        return real(images, index, *rest, **how)

    monkeypatch.setattr(views.vise_kernels, "ghost", watched)
    views.ghost(images, index, boxes, GhostConfig(feather_px=20))
    assert sorted(made) == sorted(index.tolist())


def test_literal_lengths_blur_more_on_a_small_image():
    image = noise(96, 128)
    box = torch.tensor([(100.0, 100, 900, 900)])
    scaled, literal = (
        views.ghost([image], torch.tensor([0]), box, GhostConfig(), literal=flag)[0][20:76, 20:108]
        for flag in (False, True)
    )
    assert literal.double().var() < 0.5 * scaled.double().var()


def test_what_is_not_said_is_scaled_and_inside():
    image = noise(96, 128)
    box = torch.tensor([(100.0, 100, 900, 900)])
    one = torch.tensor([0])
    (plain,) = views.ghost([image], one, box, GhostConfig())
    (said,) = views.ghost([image], one, box, GhostConfig(), "inside", literal=False)
    assert torch.equal(plain, said)
    assert views.length_scale(96, 128) == views.length_scale(96, 128, False) == 0.2
    assert views.length_scale(128, 96) == 0.2 and views.length_scale(96, 128, True) == 1
    config = GhostConfig(feather_px=10)
    assert views.ghost_lengths(96, 128, config) == views.GhostLengths(5, 15, 2)


@pytest.mark.parametrize(
    "sigmas, sigma, radius",
    [(1, 1, 1), (1, 1.01, 2), (3, 1 / 3, 1), (2.2, 25.0, 55), (0.5, 0.1, 1), (2, 3.5, 7)],
)
def test_the_radius_is_rounded_up_and_is_at_least_one(sigmas, sigma, radius):
    """A product a rounding error above a whole number is that number."""
    config = GhostConfig(sigma_px=sigma, radius_sigmas=sigmas)
    assert views.ghost_lengths(480, 640, config).radius == radius
