"""Scenes: repeatable, boxes that bound exactly what is visible, names that are fair."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from vise_fast.images import scenes
from vise_fast.system.randomness import generator

SCENES = [scenes.draw(generator(3, 0, "scene", index)) for index in range(200)]
THINGS = list(chain.from_iterable(scene.objects for scene in SCENES))


def test_same_generator_same_scene():
    first, second = (scenes.draw(generator(3, 0, "scene", 7)) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels) and first.objects == second.objects
    assert not np.array_equal(first.pixels, scenes.draw(generator(3, 0, "scene", 8)).pixels)


@pytest.mark.parametrize("size", [64, 128, 160])
def test_form_of_a_scene(size):
    scene = scenes.draw(generator(3, size, "form"), size=size, max_objects=3)
    assert scene.pixels.shape == (size, size, 3) and scene.pixels.dtype == np.uint8
    assert scene.owner.shape == (size, size) and 1 <= len(scene.objects) <= 3


def test_boxes_bound_the_visible_pixels():
    for scene in SCENES:
        for index, thing in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.owner == index)
            bounds = (
                np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                * 1000
                / 128
            )
            assert thing.box_1000 == pytest.approx(bounds)


def test_the_owner_of_a_pixel_gives_it_its_colour():
    """Hue of an object's pixels is nearer to its own colour than to any other's, for nearly all of
    its inner pixels.
    """
    palette = np.array(list(scenes.COLORS.values()), float)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    right = []
    for scene in SCENES:
        for index, thing in enumerate(scene.objects):
            colors = scene.pixels[scene.owner == index].astype(float)
            nearest = (colors / np.linalg.norm(colors, axis=1, keepdims=True) @ palette.T).argmax(1)
            right.append(np.mean(nearest == list(scenes.COLORS).index(thing.color)))
    assert np.mean(right) > 0.9


def test_visible_share_and_occlusion_limit():
    shares = [thing.visible_share for thing in THINGS]
    assert min(shares) >= 1 - scenes.MAX_HIDDEN and max(shares) == 1.0
    assert 0.02 < np.mean(np.array(shares) < 0.95) < 0.5  # some are hidden in part, most are not


def test_the_last_object_hides_and_is_not_hidden():
    assert all(scene.objects[-1].visible_share == 1.0 for scene in SCENES)


def test_names_are_unique_and_all_occur():
    assert all(len(set(scene.names)) == len(scene.names) for scene in SCENES)
    assert {thing.name for thing in THINGS} == set(scenes.NAMES) and len(scenes.NAMES) == 32


def test_sizes_are_as_described():
    boxes = np.array([thing.box_1000 for thing in THINGS])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e6
    assert 0.09 < np.mean(areas) < 0.13


def test_absent_names_are_absent_and_mostly_similar():
    rng = generator(3, 0, "absent")
    present = ["red circle", "blue cross"]
    drawn = [scenes.absent_name(rng, present) for _ in range(1000)]
    assert not set(drawn) & set(present)
    similar = np.mean(
        [bool({"red", "circle", "blue", "cross"} & set(name.split())) for name in drawn]
    )
    expected = 0.7 + 0.3 * 18 / 30  # the unforced draws hit the 18 similar ones of 30 by chance
    assert similar == pytest.approx(expected, abs=0.04)


def test_box_of_an_empty_mask_is_zero():
    assert scenes.mask_box_1000(np.zeros((8, 8), bool)) == (0.0, 0.0, 0.0, 0.0)
