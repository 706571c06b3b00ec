"""Queries that name a side: which they are, and how a flip changes them."""

import pytest

from vise_fast.config.schema import ViewConfig
from vise_fast.images import geometry
from vise_fast.images.views import View
from vise_fast.text.sides import named_in, names_side, query_for, swap_sides

FLIP = View("flip", geometry.flip_px(640))
SHIFT = View("affine", geometry.affine_px(0, 1, 320, 0, 640, 480))


@pytest.mark.parametrize(
    "query",
    [
        "the left cup",
        "cup on the RIGHT",
        "leftmost dog",
        "right-hand door",
        "the righthand door",
        "left-most",
        "cup (left)",
    ],
)
def test_side_words(query):
    assert names_side(query)


@pytest.mark.parametrize(
    "query",
    [
        "bright lamp",
        "copyright sign",
        "upright piano",
        "leftover pizza",
        "red circle",
        "cleft rock",
        "",
    ],
)
def test_no_side_words(query):
    assert not names_side(query)


def test_queries_of_a_batch():
    assert named_in(["the left cup", "the bright cup", None]).tolist() == [True, False, False]


def test_only_a_flip_swaps_and_only_where_that_is_set():
    swap = ViewConfig(side_words="swap")
    assert query_for("the left cup", FLIP, swap) == "the right cup"
    assert query_for("the left cup", SHIFT, swap) == "the left cup"
    assert query_for("the left cup", FLIP, ViewConfig()) == "the left cup"


@pytest.mark.parametrize(
    "query, swapped",
    [
        ("the left cup", "the right cup"),
        ("Right of the LEFT door", "Left of the RIGHT door"),
        ("leftmost, right-hand, lefthand", "rightmost, left-hand, righthand"),
        ("bright leftover on the copyright sign", "bright leftover on the copyright sign"),
    ],
)
def test_swap_sides(query, swapped):
    assert swap_sides(query) == swapped
    assert swap_sides(swapped) == query
