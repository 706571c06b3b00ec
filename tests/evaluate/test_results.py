"""Results: ratios of sums, bootstrap intervals against known sampling distributions, pairing,
JSON.
"""

import json

import numpy as np
import pytest

from vise_fast.evaluate import results
from vise_fast.evaluate.results import FEW, Results, difference, join


def figures(**marks):
    n = len(next(iter(marks.values()))[0])
    return Results(
        n,
        {
            name: (np.asarray(top, float), np.asarray(bottom, float))
            for name, (top, bottom) in marks.items()
        },
    )


def test_a_figure_is_the_ratio_of_sums_not_the_mean_of_ratios():
    f = figures(share=([1, 0, 3], [1, 2, 3]))
    assert f.values["share"] == pytest.approx(4 / 6)


def test_a_figure_without_anything_to_count_is_left_out_of_values_and_nan_as_estimate():
    f = figures(empty=([0, 0], [0, 0]), full=([1, 1], [1, 1]))
    assert set(f.values) == {"full"}
    assert np.isnan(f.estimate("empty").value) and np.isnan(f.estimate("empty").low)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(
        e.low <= 0.3 <= e.high
        for e in (figures(x=(rng.random(80) < 0.3, np.ones(80))).estimate("x") for _ in range(300))
    )
    assert 0.90 <= hits / 300 <= 0.985, hits / 300


def coverage(n, draws=400):
    """How often the 95 % interval of a skewed figure's mean, from n images, holds the truth (1)."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(draws):
        mark = (rng.exponential(1.0, n), np.ones(n))
        value = results._interval(results._value(mark), results._resampled(mark), FEW)
        hits += value.low <= 1 <= value.high
    return hits / draws


def test_what_is_called_few_is_where_intervals_fail():
    """From two images an interval that says 95 % holds the truth half of the time; from FEW on nine
    times in ten (within what 400 draws tell, .03).
    """
    assert coverage(2) < 0.53 and coverage(5) < 0.83 and coverage(10) < 0.88
    assert coverage(FEW) > 0.88 and coverage(60) > 0.92


@pytest.mark.parametrize("n, told", [(2, False), (FEW - 1, False), (FEW, True)])
def test_a_handful_gives_no_interval_however_clear_it_looks(n, told):
    before = figures(x=(np.zeros(n), np.ones(n)))
    after = figures(x=(np.ones(n), np.ones(n)))
    gain = difference(before, after, "x")
    assert gain.value == 1 and gain.told == told and (gain.low > 0) == told
    assert gain.interval() == ("95 % +1.000 to +1.000" if told else "too few to tell")


def test_images_that_have_nothing_to_say_do_not_make_it_more():
    """96 images, of which three have a box with area."""
    has = np.arange(96) < 3
    before = figures(x=(np.zeros(96), has))
    gain = difference(before, figures(x=(has * 1.0, has)), "x")
    assert gain.value == 1 and not gain.told and gain.high == np.inf


def test_interval_of_clustered_rows_is_that_of_the_clusters():
    """Ten identical rows per scene are worth one: the interval must not shrink."""
    rng = np.random.default_rng(1)
    values = rng.random(60)
    one, ten = (
        figures(x=(values, np.ones(60))).estimate("x"),
        figures(x=(10 * values, np.full(60, 10))).estimate("x"),
    )
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))


def test_pairing_removes_what_both_arms_share():
    rng = np.random.default_rng(2)
    scene = rng.random(100)
    before, after = (
        figures(x=(scene, np.ones(100))),
        figures(x=(scene + 0.02 + rng.normal(0, 0.01, 100), np.ones(100))),
    )
    gain = difference(before, after, "x")
    assert gain.low > 0 and gain.value == pytest.approx(0.02, abs=0.005)
    unpaired = difference(
        before, figures(x=(rng.permutation(after.marks["x"][0]), np.ones(100))), "x"
    )
    assert unpaired.high - unpaired.low > 8 * (gain.high - gain.low)


def test_difference_of_an_arm_with_itself_is_exactly_zero():
    f = figures(x=(np.arange(29.0), np.ones(29)))
    assert difference(f, f, "x") == type(difference(f, f, "x"))(0.0, 0.0, 0.0)


def test_arms_over_different_scenes_are_not_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(figures(x=([1], [1])), figures(x=([1, 2], [1, 1])), "x")


def test_intervals_repeat():
    f = figures(x=(np.arange(20.0), np.ones(20)))
    assert f.estimate("x") == f.estimate("x")


def test_join_fills_what_a_batch_had_nothing_to_say_about():
    one, two = (
        {"a": (np.array([1.0]), np.array([1.0]))},
        {"a": (np.array([0.0, 1]), np.ones(2)), "b": (np.array([2.0, 3]), np.ones(2))},
    )
    whole = join([one, two])
    assert (
        whole["a"][0].tolist() == [1, 0, 1]
        and whole["b"][0].tolist() == [0, 2, 3]
        and whole["b"][1].tolist() == [0, 1, 1]
    )


def test_json_round_trip():
    f = figures(x=([1, 2], [3, 4]), empty=([0, 0], [0, 0]))
    f.plain["scale"], f.layers = 0.9, [0.1, 0.2]
    again = Results.read(json.loads(json.dumps(f.json())))
    assert again.values == f.values and again.n == 2 and again.layers == f.layers
    assert again.estimate("x") == f.estimate("x")


@pytest.mark.parametrize(
    "content", [{}, {"n": 1, "marks": {"x": {"top": [1]}}, "plain": {}, "layers": []}]
)
def test_foreign_json_is_refused(content):
    with pytest.raises(KeyError):
        Results.read(content)
