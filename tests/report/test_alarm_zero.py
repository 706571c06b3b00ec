"""An alarm has its zero where the base is: a base that reads few answers is no fault of the run."""

from vise_fast.report.alarms import SETTLE, Alarms


def said(base, **figures):
    alarms = Alarms(tau=0.02)
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
