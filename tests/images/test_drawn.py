"""The embedded scenes as a source."""

from itertools import chain

import numpy as np
import pytest
import torch

from vise_fast.config.schema import load
from vise_fast.images import scenes
from vise_fast.images.drawn import Scenes
from vise_fast.system import randomness
from vise_fast.system.errors import ConfigError


def keys(source, steps, count):
    """The keys of the batches of steps 0, 1, …"""
    batches = [source.batch(step, count) for step in range(steps)]
    return {image.key for image in chain.from_iterable(batches)}


def test_scenes_are_a_function_of_seed_and_step():
    first = Scenes(load())
    second = Scenes(load())
    other = Scenes(load(), seed=1)
    assert all(
        torch.equal(a.pixels, b.pixels) and a.key == b.key
        for a, b in zip(first.batch(5, 4), second.batch(5, 4), strict=True)
    )
    assert not torch.equal(first.batch(5, 1)[0].pixels, other.batch(5, 1)[0].pixels)
    assert not torch.equal(first.batch(5, 1)[0].pixels, first.batch(6, 1)[0].pixels)
    assert len(keys(first, 20, 8)) == 160


def test_the_truth_of_a_scene_is_found_by_its_key():
    source = Scenes(load())
    image = source.batch(3, 2)[1]
    scene = source.scene(image.key)
    assert np.array_equal(scene.pixels, image.pixels.numpy()) and scene.objects
    direct = scenes.draw(
        np.random.Generator(np.random.Philox(randomness.key(0, 3, "scene", 1))),
        size=128,
        max_objects=4,
    )
    assert np.array_equal(direct.pixels, scene.pixels)


def test_held_out_scenes_are_never_trained_on():
    source = Scenes(load(None, ["--eval.scenes", "40"]))
    held = {image.key for image in source.held_out()}
    assert len(held) == 40 and len(source.held_out(limit=7)) == 7
    assert not held & keys(source, 200, 1)


@pytest.mark.parametrize("size", [64, 128, 160])
def test_scene_size(size):
    source = Scenes(load(None, ["--scenes.size", str(size)]))
    assert source.sizes() == [(size, size)]
    assert source.batch(0, 1)[0].pixels.shape == (size, size, 3)
    assert str(size) in source.describe()
    source.close()


def test_scenes_off_the_grid_are_refused():
    config = load(None, ["--scenes.size", "100"])
    assert Scenes(config, multiple=20).batch(0, 1)[0].pixels.shape == (100, 100, 3)
    with pytest.raises(ConfigError, match="a multiple of 16"):
        Scenes(config, multiple=16)
