"""A rehearsal is asked for once: the second planner reads it, a damaged or foreign file is ignored,
and nothing that a rehearsal depends on is missing from its name.
"""

import json

import pytest

from vise_fast.config.schema import Config
from vise_fast.estimate import planner, remembered
from vise_fast.estimate.planner import Planner
from vise_fast.estimate.rehearsal import Rehearsed

FOUND = Rehearsed({"update": {"weights": 7, "activations": 5}})


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """How often a step was rehearsed; the rehearsal itself is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def rehearsed(case, model_config):
        calls.append(case)
        return FOUND

    monkeypatch.setattr(planner, "rehearsed", rehearsed)
    return calls


def place(config, **changes):
    known = Planner(config)
    fields = {
        "config": config,
        "sizes": known._largest(config),
        "dtype": known.dtype,
        "lengths": known.lengths,
        "device": known.device,
    }
    case = planner.Case(**(fields | changes))
    return remembered.place_of(case, known.model_config)


def test_the_second_planner_reads_what_the_first_found(asked):
    first = Planner(Config()).rehearse(Config())
    second = Planner(Config()).rehearse(Config())
    assert len(asked) == 1 and first.phases == second.phases == FOUND.phases


def test_the_run_directory_is_no_part_of_the_question(asked):
    Planner(Config()).rehearse(Config())
    other = Config()
    other.run.dir = "elsewhere"
    Planner(other).rehearse(other)
    assert len(asked) == 1


def cut(text):
    return text[: len(text) // 2]


def another_number(text):
    return text.replace(": 7", ": 8")


def no_object(text):
    return json.dumps([1])


def numbers_missing(text):
    return json.dumps({"sha256": ""})


@pytest.mark.parametrize("damage", [cut, another_number, no_object, numbers_missing, lambda _: ""])
def test_a_damaged_file_is_ignored_and_written_anew(asked, damage):
    Planner(Config()).rehearse(Config())
    path = place(Config())
    whole = path.read_text()
    path.write_text(damage(whole))
    assert Planner(Config()).rehearse(Config()).phases == FOUND.phases
    assert len(asked) == 2 and path.read_text() == whole


def test_a_folder_that_cannot_be_written_costs_seconds_only(asked, monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    for _ in range(2):
        assert Planner(Config()).rehearse(Config()).phases == FOUND.phases
    assert len(asked) == 2


def test_whatever_it_depends_on_is_in_the_name(asked, monkeypatch):
    config = Config()
    places = [place(config)]
    for section, name, value in [
        ("lora", "r", 3),
        ("train", "micro_batch", 1),
        ("rollout", "box_tokens", 5),
        ("optim", "name", "adamw8bit"),
        ("model", "quant", "nf4"),
    ]:
        other = Config()
        setattr(getattr(other, section), name, value)
        places.append(place(other))
    places.append(place(config, sizes=[(64, 64)]))
    places.append(place(config, device="cuda"))
    monkeypatch.setattr(remembered, "_code", lambda: ("another source",))
    places.append(place(config))
    assert len(set(places)) == len(places)


def test_the_source_is_part_of_it():
    versions = remembered._code()
    assert len(versions) == 4 and all(versions)
