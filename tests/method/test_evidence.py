"""Evidence: which rows were asked what, means within groups, slices joined, the verdict table."""

import dataclasses

import pytest
import torch
from torch import Tensor

from vise_fast.images import geometry
from vise_fast.method.evidence import VISIBLE, Evidence, beaf_cells, join, r_geo
from vise_fast.system.errors import NumericFault

BOX = (100.0, 200.0, 400.0, 700.0)
FLAT = (100.0, 200.0, 400.0, 200.0)


def evidence(rows=4, group=2, first=0, **changes):
    """Sound rows, told apart by p(seen)."""
    every = torch.ones(rows, dtype=torch.bool)
    fields = {
        "box_1000": torch.tensor(BOX).double().repeat(rows, 1),
        "readable": every.clone(),
        "view_box_1000": torch.tensor(BOX).double().repeat(rows, 1, 1),
        "view_readable": every[:, None].clone(),
        "view_usable": every[:, None].clone(),
        "matrix_px": torch.eye(3, dtype=torch.float64).repeat(rows, 1, 1, 1),
        "height": torch.full((rows,), 480),
        "width": torch.full((rows,), 640),
        "seen": (first + torch.arange(rows)).double() / 100,
        "gone": torch.zeros(rows),
        "query_readable": every.clone(),
        "group_size": group,
    }
    return Evidence(**fields | changes)


def test_rows_fill_whole_groups():
    assert len(evidence(rows=1, group=1).box_1000) == 1
    for rows, group in ((0, 1), (3, 2), (1, 2)):
        with pytest.raises(ValueError, match=f"{rows} rows are not groups of {group}"):
            evidence(rows, group)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Evidence)][1:])
def test_every_tensor_has_all_rows(name):
    value = getattr(evidence(), name)
    if isinstance(value, Tensor):
        with pytest.raises(ValueError, match=f"{name} has 3 rows, box_1000 has 4"):
            evidence(**{name: value[:3]})


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        evidence().seen = torch.ones(4)


def test_a_verdict_that_was_asked_for_is_a_probability():
    """Of a row whose ghost was judged and nothing further, its controls may be anything."""
    judged = torch.tensor([True, True, False, False])
    further = torch.tensor([True, False, False, False])
    p = torch.tensor([0.5, 0.5, torch.nan, torch.nan])
    rest = torch.tensor([0.5, torch.nan, torch.nan, torch.nan])
    told = {"judged": judged, "further": further, "keep": rest, "control": rest[:, None]}
    evidence(gone=p, **told)
    for name, wrong in (("gone", rest), ("keep", p.roll(2)), ("control", p.roll(2)[:, None])):
        with pytest.raises(NumericFault, match=rf"p\({name}\)"):
            evidence(**({"gone": p} | told | {name: wrong}))


def test_which_rows_have_verdicts():
    boxes = torch.tensor([BOX, FLAT, BOX, BOX]).double()
    readable = torch.tensor([True, True, False, True])
    known = evidence(box_1000=boxes, readable=readable)
    assert known.placed.tolist() == known.has_verdicts.tolist() == [True, False, False, True]
    asked = torch.tensor([False, False, True, True])
    known = evidence(box_1000=boxes, readable=readable, query_readable=asked)
    assert known.has_verdicts.tolist() == [False, False, False, True]
    judged = torch.tensor([True, True, True, False])
    known = evidence(box_1000=boxes, readable=readable, judged=judged)
    assert known.has_verdicts.tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["readable", "query_readable"])
def test_nothing_was_asked_of_rows_that_could_not_be_read(name):
    seen = torch.tensor([0.5, float("nan"), 0.5, 0.5])
    evidence(seen=seen, **{name: torch.tensor([True, False, True, True])})
    with pytest.raises(NumericFault, match="seen"):
        evidence(seen=seen, **{name: torch.tensor([True, True, False, True])})


def test_a_box_without_area_was_asked_for_on_the_image_alone():
    boxes = torch.tensor([BOX, FLAT, BOX, BOX]).double()
    unknown = torch.tensor([0.5, float("nan"), 0.5, 0.5])
    evidence(box_1000=boxes, gone=unknown)
    with pytest.raises(NumericFault, match="seen"):
        evidence(box_1000=boxes, seen=unknown)


@pytest.mark.parametrize("name", ["seen", "gone", "control", "keep"])
def test_probabilities_reach_from_zero_to_one_and_no_further(name):
    """Every entry of every judged row is looked at."""
    shape = (4, 3) if name == "control" else (4,)
    for sound in (0.0, 1.0):
        evidence(**{name: torch.full(shape, sound, dtype=torch.float64)})
    for bad in (-1e-9, 1 + 1e-9, float("nan"), float("inf"), -float("inf")):
        for place in (0, -1):
            p = torch.full(shape, 0.5, dtype=torch.float64)
            p.view(-1)[place] = bad
            with pytest.raises(NumericFault, match=rf"p\({name}\) is not within 0..1"):
                evidence(**{name: p})


def test_verdicts_on_ghosts_are_looked_at_where_they_were_judged():
    unknown = torch.tensor([0.5, float("nan"), 0.5, 0.5])
    judged = torch.tensor([True, False, True, True])
    for name in ("gone", "keep"):
        evidence(judged=judged, **{name: unknown})
        with pytest.raises(NumericFault, match=name):
            evidence(judged=~judged, **{name: unknown})


def test_means_are_taken_within_groups_over_the_chosen_rows():
    of = torch.tensor([True, True, True, False, False, False])
    values = torch.tensor([1.0, 3.0, 5.0, 100.0, 7.0, 9.0], dtype=torch.float64)
    mean, any_there = evidence(rows=6).group_mean(values, of)
    assert mean.tolist() == [2, 2, 5, 5, 0, 0]
    assert any_there.tolist() == [True, True, True, True, False, False]


def test_slices_are_joined_in_order():
    truth = torch.tensor([BOX, BOX]).double()
    parts = [evidence(rows=2, first=first, truth_1000=truth) for first in (0, 2, 4)]
    whole = join(parts)
    assert whole.group_size == 2 and whole.seen.tolist() == [0, 0.01, 0.02, 0.03, 0.04, 0.05]
    assert whole.truth_1000.shape == (6, 4) and whole.matrix_px.shape == (6, 1, 3, 3)
    assert whole.control is whole.keep is whole.judged is whole.named_again is None
    back = torch.tensor([True, False])
    parts = [evidence(rows=2, named_again=again) for again in (back, ~back)]
    assert join(parts).named_again.tolist() == [True, False, False, True]


def test_geometric_agreement_is_the_shifted_giou():
    other = (100.0, 200.0, 400.0, 450.0)
    expected = torch.tensor([BOX, BOX, BOX]).double()
    found = torch.tensor([BOX, other, FLAT]).double()
    value = r_geo(expected, found)
    assert value.tolist() == [1, (geometry.giou(BOX, other).item() + 1) / 2, 0]
    assert value[1].item() == pytest.approx(0.75)


def test_the_verdict_table():
    before = torch.tensor([True, False, True, False])
    after = torch.tensor([False, True, True, False])
    cells = {name: cell.tolist() for name, cell in beaf_cells(before, after).items()}
    assert cells == {
        "TU": [True, False, False, False],
        "IG": [False, True, False, False],
        "SB": [False, False, True, False],
        "ID": [False, False, False, True],
    }
    assert VISIBLE == 0.5
