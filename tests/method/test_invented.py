"""Invented evidence, row by row: what its first docstring says happens to one happens, and to no
other.
"""

from dataclasses import fields, replace

import pytest
import torch

from vise_fast.config.schema import RewardConfig
from vise_fast.images import geometry
from vise_fast.method import invented

EVERYTHING = RewardConfig(controls=3, sem="contrast", sufficiency=True)


def made(truth=True):
    return invented.evidence(EVERYTHING, truth)


def only(mask):
    """The one row (N,) or (N, K) in which it is true; over all K, if there are any."""
    if mask.dim() == 2:
        assert torch.equal(mask.any(1), mask.all(1))
        mask = mask.any(1)
    (row,) = mask.nonzero()[:, 0].tolist()
    return row


def rows_but(*rows):
    """Bool (12,)."""
    found = torch.ones(12, dtype=torch.bool)
    found[list(rows)] = False
    return found


def flat_row(e):
    return only(e.readable & ~geometry.proper(e.box_1000))


def test_four_groups_of_three_boxes_with_two_views():
    e = made()
    assert e.group_size == 3
    assert e.matrix_px.tolist() == torch.eye(3).expand(12, 2, 3, 3).tolist()
    assert e.view_box_1000.shape == (12, 2, 4)
    assert e.control.shape == (12, 3) and e.keep.shape == e.gone.shape == (12,)


def test_every_fault_has_a_row_of_its_own():
    e = made()
    assert only(~e.view_usable) in (0, 1, 2)
    faults = {only(~e.readable), flat_row(e), only(~e.view_readable)}
    assert faults == {3, 4, 5}
    assert e.query_readable.view(4, 3).tolist() == [[True] * 3, [True] * 3, [False] * 3, [True] * 3]


def test_nan_stands_where_nothing_was_asked_and_nowhere_else():
    e = made()
    asked = rows_but(only(~e.readable), 6, 7, 8)
    judged = rows_but(only(~e.readable), flat_row(e), 6, 7, 8)
    assert torch.equal(e.seen.isfinite(), asked)
    assert torch.equal(e.judged, judged)
    for verdicts in (e.gone, e.keep, *e.control.T):
        assert torch.equal(verdicts.isfinite(), judged)


def test_the_object_is_seen_in_every_group_but_the_last():
    e = made()
    asked = e.seen.isfinite()
    assert ((e.seen >= 0.5) == rows_but(9, 10, 11))[asked].all()
    assert ((e.seen > 0) & (e.seen < 1))[asked].all()


def test_verdicts_differ_and_lie_on_both_sides_of_one_half():
    e = made()
    columns = torch.stack([e.gone, e.keep, *e.control.T])[:, e.judged]
    assert len(set(columns.flatten().tolist())) == columns.numel()
    assert (columns >= 0.5).any(1).all() and (columns < 0.5).any(1).all()


def test_boxes_are_boxes_of_different_places_and_shapes():
    """In the image, larger than a speck; wide and tall ones. Unreadable answers are zeros."""
    e = made()
    unread = only(~e.readable)
    assert e.box_1000[unread].tolist() == [0] * 4
    x1, y1, x2, y2 = e.box_1000[flat_row(e)].flatten().tolist()
    assert x1 == x2 and y1 == y2
    sound = rows_but(unread, flat_row(e))
    boxes = e.box_1000[sound]
    assert boxes.min() >= 0 and boxes.max() <= 1000
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 50
    assert (sides[:, 0] > sides[:, 1]).any() and (sides[:, 0] < sides[:, 1]).any()
    assert len(set(boxes[:, 0].tolist())) == len(boxes)
    assert not set(e.height.tolist()) & set(e.width.tolist())


def test_a_view_shows_the_box_where_its_answer_can_be_read():
    e = made()
    unread = only(~e.view_readable)
    assert e.view_box_1000[unread].abs().max() == 0
    rest = rows_but(unread, only(~e.readable))
    for k in range(2):
        assert torch.equal(e.view_box_1000[rest, k], e.box_1000[rest])
    assert torch.equal(e.truth_1000[rest], e.box_1000[rest])
    assert geometry.proper(e.truth_1000).sum() == 11


def test_it_has_only_what_the_reward_asks_for():
    plain = RewardConfig(sem="paper", sufficiency=False)
    e = invented.evidence(plain, truth=False)
    assert e.control is e.keep is e.truth_1000 is None
    one = RewardConfig(sem="contrast", controls=1, sufficiency=False)
    assert invented.evidence(one, truth=False).control.shape == (12, 1)
    assert made().truth_1000 is not made().box_1000


# ---- the same ------------------------------------------------------------------------------------


def test_it_is_always_the_same():
    assert invented.same(made(), made())


@pytest.mark.parametrize("name", [field.name for field in fields(made())])
def test_one_other_number_anywhere_is_noticed(name):
    value = getattr(made(), name)
    if not isinstance(value, torch.Tensor):
        return
    changed = value.clone()
    if changed.dtype == torch.bool:
        changed[0] = ~changed[0]
    else:
        changed[0] += 1e-3 if changed.is_floating_point() else 1
    other = made()
    object.__setattr__(other, name, changed)  # as a reward that writes into it would
    assert not invented.same(made(), other) and not invented.same(other, made())


def test_a_number_in_the_place_of_nan_is_noticed():
    for number in (0.0, 0.5, 1.0):
        gone = made().gone.nan_to_num(number)
        assert not invented.same(made(), replace(made(), gone=gone))


def test_a_field_that_is_missing_or_of_another_shape_is_noticed():
    assert not invented.same(made(), made(truth=False))
    assert not invented.same(made(truth=False), made())
    assert invented.same(made(truth=False), made(truth=False))
    cut = replace(made(), control=made().control[:, :1])
    assert not invented.same(made(), cut) and not invented.same(cut, made())
    assert not invented.same(made(), replace(made(), group_size=4))
