"""What an engine takes and gives: owners, counters, answers cut and packed, prefixes and prompts
selected and stacked.
"""

import torch

from vise_fast.engine.rollout import Answered, Counters, Prefixes, Prompts, Rollout, owners
from vise_fast.model.tree import Segment


def test_owners_follow_the_fan():
    assert owners([2, 0, 1]) == [0, 0, 2]
    assert owners([]) == []


def test_counters_begin_at_zero_and_begin_anew():
    counters = Counters()
    fresh = counters.take()
    names = set(fresh)
    assert len(names) == 7 and set(fresh.values()) == {0}
    for n, name in enumerate(sorted(names), 3):
        setattr(counters, name, n)
    assert counters.take() == dict(zip(sorted(names), range(3, 10), strict=True))
    assert set(counters.take().values()) == {0}


def test_how_far_wordings_lie_apart_is_a_mean_over_the_verdicts():
    counters = Counters()
    assert "verdict_spread" not in counters.take()
    counters.spread(0.5, 4)
    counters.spread(1.0, 2)
    assert counters.take()["verdict_spread"] == 0.25
    assert "verdict_spread" not in counters.take()


# ---- answers -------------------------------------------------------------------------------------


def answers(home=True):
    ids = torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0], [8, 9, 10, 11]])
    logprob = -torch.arange(12.0).view(3, 4)
    return Rollout(ids, logprob, [3, 2, 4], ids.tolist() if home else None)


def test_answers_are_read_up_to_their_length():
    rows = [[5, 6, 1], [7, 1], [8, 9, 10, 11]]
    assert answers().rows() == answers(home=False).rows() == rows
    assert answers().packed().tolist() == [5, 6, 1, 7, 1, 8, 9, 10, 11]
    mask = answers().mask()
    assert mask.dtype == torch.float32
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_rows_come_from_the_host_where_they_are_there():
    """No second read of the device."""
    held = answers()
    held.home = [[50 + token for token in row] for row in held.home]
    assert held.rows()[1] == [57, 51]


def test_some_answers_in_any_order():
    for home in (True, False):
        some = answers(home).select([2, 0])
        assert some.rows() == [[8, 9, 10, 11], [5, 6, 1]]
        assert some.lengths == [4, 3]
        assert torch.equal(some.logprob, answers().logprob[[2, 0]])
        assert (some.home is None) == (not home)


def test_one_each_is_one_answer_to_every_question_in_order():
    for owner, one_each in (
        ([0, 1, 2], True),
        ([0, 2, 1], False),
        ([0, 1], False),
        ([0, 1, 1], False),
        ([0, 1, 2, 2], False),
    ):
        assert Answered([[5], [6, 7], [8]], answers(), owner).one_each == one_each


# ---- prefixes and prompts ------------------------------------------------------------------------


def segment(*marks, tokens=3):
    """One layer, a row per mark, which fills its keys; the values are their negatives."""
    keys = torch.stack([torch.full((2, tokens, 4), float(mark)) for mark in marks])
    return Segment([keys], [-keys])


def marks(held):
    return held.segment.keys[0][:, 0, 0, 0].tolist()


def test_prefixes_are_selected_with_their_positions():
    held = Prefixes(segment(1, 2, 3), [10, 20, 30], adapters=True)
    assert len(held) == 3
    assert held.select([0, 1, 2]) is held
    for rows in ([2, 0], [0, 1], [1], [2, 1, 0], [1, 1, 2, 0]):
        some = held.select(rows)
        assert some.following == [10 * (row + 1) for row in rows]
        assert marks(some) == [row + 1 for row in rows]
        assert some.adapters


def test_prefixes_are_stacked_in_order_and_stay_who_they_were():
    one = Prefixes(segment(1), [10], adapters=False)
    both = one.stack(Prefixes(segment(2, 3), [20, 30], adapters=False))
    assert both.following == [10, 20, 30] and marks(both) == [1, 2, 3]
    assert not both.adapters


def test_detached_prefixes_share_keys_but_no_graph():
    held = Prefixes(segment(1), [10], adapters=True)
    held.segment.keys[0].requires_grad_()
    free = held.detach()
    assert not free.segment.keys[0].requires_grad
    assert free.segment.keys[0].data_ptr() == held.segment.keys[0].data_ptr()
    assert (free.following, free.adapters) == ([10], True)


def prompts():
    """Three questions about images 2, 0 and 1."""
    prefixes = Prefixes(segment(1, 2, 3), [10, 20, 30], adapters=True)
    last = torch.arange(12.0).view(3, 4).requires_grad_()
    return Prompts(prefixes, [2, 0, 1], segment(7, 8, 9), [35, 15, 25], last)


def test_prompts_are_selected_with_their_images():
    held = prompts()
    assert len(held) == 3 and held.select([0, 1, 2]) is held
    some = held.select([2, 0])
    assert some.owner == [0, 1]
    assert marks(some.prefixes) == [2, 3] and some.prefixes.following == [20, 30]
    assert marks(some) == [9, 7] and some.following == [25, 35]
    assert torch.equal(some.last, held.last[[2, 0]])


def test_prompts_over_other_prefixes_lose_their_graph_only():
    held = prompts()
    more = Prefixes(segment(1, 2, 3, 4), [10, 20, 30, 40], adapters=True)
    free = held.over(more)
    assert free.prefixes is more and not free.last.requires_grad
    assert (free.owner, free.following) == (held.owner, held.following)
    assert torch.equal(free.last, held.last)


def test_prompts_are_stacked_in_order():
    held = prompts()
    below = Prompts(held.prefixes, [1], segment(5, tokens=2), [22], torch.zeros(1, 4))
    both = held.stack(below)
    assert both.owner == [2, 0, 1, 1] and both.following == [35, 15, 25, 22]
    assert marks(both) == [7, 8, 9, 5]
    assert both.segment.counts().tolist() == [3, 3, 3, 2]
    assert torch.equal(both.last, torch.cat([held.last, torch.zeros(1, 4)]))
