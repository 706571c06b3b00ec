"""An alarm has its zero where the base is: a base that reads few answers is no fault of the run."""

import json
import math
import re

import numpy as np
import pytest

from vise_fast.config import schema
from vise_fast.evaluate.results import Results
from vise_fast.report.alarms import SETTLE, Alarms, looked_at
from vise_fast.run.directory import alarms_of


def said(base, tau=0.02, **figures):
    alarms = Alarms(tau)
    alarms.begin_at(base)
    metrics = {"area": 0.1, "area_large": 0.0, "parse_rate": 1.0, "kl": 0.0} | figures
    for step in range(SETTLE):
        found = alarms.update(step, metrics)
    return {name for name, text in found.items() if text}


def test_few_readable_answers_are_an_alarm_only_below_the_base_s():
    assert said({}, parse_rate=0.42) == {"parse_rate"}
    assert said({"own_parse_rate": 0.42}, parse_rate=0.42) == set()
    assert said({"own_parse_rate": 0.42}, parse_rate=0.2) == {"parse_rate"}


def test_large_boxes_are_one_only_above_the_base_s():
    assert said({}, area_large=0.4) == {"area_large"}
    assert said({"own_area_large": 0.2}, area_large=0.4) == set()
    assert said({"own_area_large": 0.2}, area_large=0.6) == {"area_large"}


def test_boxes_without_area_are_one_only_above_the_base_s():
    assert said({}, zero_area=0.05) == set()
    assert said({}, zero_area=0.2) == {"zero_area"}
    assert said({"own_zero_area": 0.15}, zero_area=0.2) == set()
    assert said({"own_zero_area": 0.15}, zero_area=0.3) == {"zero_area"}


def test_answers_scored_otherwise_than_sampled():
    assert said({}, logprob_gap=0.015) == set()
    assert said({}, logprob_gap=0.03) == {"logprob_gap"}
    assert said({}, logprob_gap=math.nan) == said({}) == set(), "a step may score no answer"


@pytest.mark.parametrize(
    "words, gap, raised",
    [([], 0.05, True), (["--model.quant=int8"], 0.1, False), (["--model.quant=nf4"], 0.2, True)],
)
def test_a_quantised_base_may_be_further_off(words, gap, raised):
    alarms = alarms_of(schema.load(None, words))
    metrics = {"area": 0.1, "area_large": 0.0, "parse_rate": 1.0, "kl": 0.0, "logprob_gap": gap}
    for step in range(SETTLE):
        found = alarms.update(step, metrics)
    assert bool(found["logprob_gap"]) == raised


# ---- over evaluations ----------------------------------------------------------------------------


def measured(n=96, spread=0.01, seed=0, **areas):
    """Greedy areas with a mean, or ratios of them to the truth, a little different on each image.
    The truth's is .1.
    """
    rng = np.random.default_rng(seed)
    marks = {}
    for name, mean in areas.items():
        bottom = np.full(n, 0.1 if name.endswith("ratio") else 1.0)
        marks[name] = (bottom * (mean + rng.normal(0, spread, n)), bottom)
    return Results(n, marks)


GREEDY = [
    ("greedy_area_ratio", 1.07, 1.21, True),
    ("greedy_area_ratio", 1.07, 1.11, False),
    ("greedy_area_ratio", 0.8, 0.98, False),
    ("greedy_area_ratio", 1.3, 1.2, False),
    ("own_area", 0.1, 0.115, True),
    ("own_area", 0.1, 0.105, False),
    ("own_area", 0.1, 0.08, False),
]


@pytest.mark.parametrize("name, before, after, raised", GREEDY)
def test_greedy_boxes_that_grow(name, before, after, raised):
    """With truth against it, where growing towards it is none; without, against the base's own."""
    spread = 0.01 * before
    base = measured(spread=spread, **{name: before})
    found = looked_at(base, measured(spread=spread, seed=1, **{name: after}), 0.02)
    assert bool(found["greedy_area"]) == raised
    if raised:
        told = re.search(r"from (\S+) to (\S+) ", found["greedy_area"]).groups()
        assert [float(number) for number in told] == pytest.approx([before, after], rel=0.01)


def test_what_chance_explains_and_what_has_nothing_to_compare_with_is_none():
    base = measured(n=24, spread=2, greedy_area_ratio=1.07)
    wide = measured(n=24, spread=2, seed=1, greedy_area_ratio=1.21)
    assert looked_at(base, wide, 0.02)["greedy_area"] is None
    assert looked_at(None, wide, 0.02)["greedy_area"] is None
    assert looked_at(Results(), Results(), 0.02)["greedy_area"] is None
    other = measured(n=30, own_area=0.1)
    assert looked_at(other, measured(own_area=0.3), 0.02)["greedy_area"] is None


def test_it_stands_until_the_next_evaluation_and_ends_a_run_only_when_confirmed():
    alarms = Alarms(tau=0.02)
    metrics = {"area": 0.1, "area_large": 0.0, "parse_rate": 1.0, "kl": 0.0}
    assert not any(alarms.update(1, metrics).values()) and not alarms.on
    alarms.take({"greedy_area": "grew"})
    assert alarms.update(2, metrics) == {"greedy_area": "grew"} and alarms.on
    again = Alarms(tau=0.02)
    again.load(json.loads(json.dumps(alarms.state())))
    assert again == alarms and not again.stays_on(500, 10)
    again.take({"greedy_area": "grew"})
    assert again.stays_on(3, 10)
    again.take({"greedy_area": None})
    assert not again.on and not any(again.update(3, metrics).values())


def test_a_checkpoint_of_before_they_were_there_is_taken():
    old = Alarms(tau=0.02)
    metrics = {"area": 0.1, "area_large": 0.0, "parse_rate": 1.0, "kl": 0.0}
    old.update(1, metrics)
    state = old.state()
    del state["standing"], state["confirmed"]
    again = Alarms(tau=0.02)
    again.load(state)
    assert again == old
    with pytest.raises(ValueError, match="other figures"):
        again.load(state | {"averages": {"area": 0.1}})
