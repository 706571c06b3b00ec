"""Evaluations while it trains: they change nothing, outlive kills and signals, and choose the best
adapter of a run that collapses.
"""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from faults.forked import KILLED, again, go, restart, words
from faults.left import left, sound
from faults.places import kill_at
from safetensors.torch import load_file
from small_runs import CHANGING, adapter, lines
from small_runs import go as run_here

from vise_fast.config import schema
from vise_fast.evaluate.results import Results
from vise_fast.report import stored_run
from vise_fast.run import directory as run_directory
from vise_fast.run.interim import Interim, check, check_measured, record
from vise_fast.run.interim import said as told
from vise_fast.system import checkpoint
from vise_fast.system.errors import ConfigError

LOOKING = {"eval__every": 1, "eval__keep_best": "invariance", "eval__scenes": 2}
STEPS = {"train__steps": 3, "run__keep": 5}


def said(directory, **more):
    return words(directory, **(STEPS | LOOKING | more))


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A run of three updates with an evaluation after each, that nothing happened to."""
    directory = tmp_path_factory.mktemp("looked") / "run"
    outcome = go(said(directory), directory)
    assert outcome.code == 0, outcome.err
    return directory


def updates(directory):
    """The lines of the updates, times aside."""
    found = [line for line in lines(directory / "metrics.jsonl") if "reward" in line]
    return [{k: v for k, v in line.items() if k not in CHANGING} for line in found]


def course(directory):
    """The lines of the evaluations between updates, times aside."""
    found = [line for line in lines(directory / "metrics.jsonl") if "reward" not in line]
    return [{k: v for k, v in line.items() if k != "held_out/seconds"} for line in found]


# ---- nothing is disturbed ------------------------------------------------------------------------


def test_a_run_with_and_without_them_is_the_same_bit_for_bit(looked, tmp_path):
    """Adapter, every figure of the updates (counters too), every text; keep_best left out, which
    exports another step's adapter.
    """
    for every in (0, 1):
        run = tmp_path / str(every)
        more = {"eval__every": every, "eval__keep_best": "null"}
        assert go(said(run, **more), run).code == 0
    plain = left(tmp_path / "0")
    assert updates(tmp_path / "0") == updates(tmp_path / "1") == updates(looked)
    watched = left(tmp_path / "1")
    assert watched.samples == plain.samples and watched.evaluation == plain.evaluation
    saying = ("state.json", "training.yaml", "manifest.json")  # of the settings, which differ
    same = [name for name in plain.contents if not name.endswith(saying)]
    assert any("adapter_model" in name for name in same) and any("step_3" in name for name in same)
    for name in same:
        assert watched.contents[name] == plain.contents[name], name
    assert watched.names - plain.names == {"evaluations.jsonl"}


def test_figures_have_keys_of_their_own(looked):
    found = course(looked)
    assert [line["step"] for line in found] == [1, 2, 3]
    whole = stored_run.read(looked)
    assert list(whole.course) == [1, 2, 3] and len(whole.metrics) == 3
    for line in found:
        results = whole.course[line["step"]]
        assert {k for k in line if k.count("/") == 1} == {
            f"held_out/{name}" for name in [*results.values, "images"]
        }
        assert line["held_out/sampled_iou"] == results.values["sampled_iou"]


def test_the_short_table_s_figures_have_intervals_where_there_are_images_enough():
    values = np.linspace(0, 1, 30)
    marks = {"sampled_iou": (values, np.ones(30)), "greedy_area": (values, np.ones(30))}
    line = record(7, Results(30, marks, {"distinct_queries": 0.5}), 1.5)
    low = line.pop("held_out/sampled_iou/low")
    high = line.pop("held_out/sampled_iou/high")
    assert low < 0.5 < high and line == {
        "step": 7,
        "held_out/images": 30,
        "held_out/seconds": 1.5,
        "held_out/sampled_iou": 0.5,
        "held_out/greedy_area": 0.5,
        "held_out/distinct_queries": 0.5,
    }
    few = Results(19, {name: (top[:19], bottom[:19]) for name, (top, bottom) in marks.items()})
    assert not [name for name in record(7, few, 1.5) if name.count("/") > 1]


def test_the_last_one_is_the_evaluation_after_training(tmp_path, monkeypatch):
    """It is not made twice."""
    calls = []
    real = run_directory.held_out
    monkeypatch.setattr(
        run_directory, "held_out", lambda *given, **more: calls.append(1) or real(*given, **more)
    )
    quick = ["--run.report=false", "--train.steps=1", "--eval.every=1", "--eval.keep_best=null"]
    assert run_here(*said(tmp_path / "run"), *quick) == 0
    assert len(calls) == 2  # the base, and the adapter once
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    after = stored_run.read(tmp_path / "run").course[1].json()
    assert content["after"] == after


# ---- kills and signals ---------------------------------------------------------------------------

PLACES = (
    "write evaluations.jsonl",
    "write evaluations.jsonl #2 half",
    "write metrics.jsonl #4",  # the line of the second evaluation: the others stand before it
    "write checkpoints/.step_2.partial/best.safetensors half",
    "write metrics.jsonl #6 half",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_changes_nothing_of_it(looked, tmp_path, place):
    directory = tmp_path / "run"
    assert go(said(directory), directory, kill_at(place)).code == KILLED
    sound(directory)
    outcome = go(restart(directory, **(STEPS | LOOKING)), directory)
    assert outcome.code == 0, outcome.err
    mine = left(directory)
    truth = left(looked)
    assert mine.contents.keys() == truth.contents.keys() and mine.evaluation == truth.evaluation
    for name, content in truth.contents.items():
        assert mine.contents[name] == content, name
    assert course(directory) == course(looked) and updates(directory) == updates(looked)
    own = lines(directory / "evaluations.jsonl")
    assert own == lines(looked / "evaluations.jsonl")


def signalled(nth):
    """SIGTERM as the nth evaluation begins: the base's is the first."""

    def prepare():
        real = run_directory.held_out
        calls = []

        def held_out(*given):
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*given)

        run_directory.held_out = held_out

    return prepare


def test_a_signal_while_it_looks_saves_the_update_and_the_look_is_made_up_for(looked, tmp_path):
    directory = tmp_path / "run"
    outcome = go(said(directory), directory, prepare=signalled(3))
    assert outcome.code == 143 and "saved after step 2" in outcome.err
    assert [line["step"] for line in course(directory)] == [1]
    # killed between its two lines, it is not made a third time, and the metrics get theirs
    killed = go(again(directory), directory, kill_at("write metrics.jsonl"))
    assert killed.code == KILLED
    assert [line["step"] for line in lines(directory / "evaluations.jsonl")] == [1, 2]
    assert go(again(directory), directory).code == 0
    assert course(directory) == course(looked)
    mine = left(directory).contents
    for name, content in left(looked).contents.items():
        assert mine[name] == content or name == "checkpoints/step_2/state.json", name


# ---- the best one --------------------------------------------------------------------------------

COLLAPSE = {
    "train__lr": 0.006,
    "train__warmup": 6,
    "train__steps": 6,
    "train__batch": 2,
    "eval__every": 2,
    "scenes__size": 128,
    "eval__scenes": 12,
    "eval__keep_best": "greedy_iou",
    "run__keep": 9,
}


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """A run whose learning rate climbs past what the model bears, and what it said."""
    directory = tmp_path_factory.mktemp("collapsed") / "run"
    outcome = go(words(directory, **COLLAPSE), directory)
    assert outcome.code == 0, outcome.err
    return directory, outcome


def test_the_best_adapter_of_a_collapse_is_exported_and_named(collapsed):
    directory, outcome = collapsed
    values = {line["step"]: line["held_out/greedy_iou"] for line in course(directory)}
    best = max(values, key=values.get)
    assert best < 6 and values[6] < values[best] - 0.1, ("this was to collapse", values)
    stored = load_file(directory / "checkpoints" / f"step_{best}" / "adapter.safetensors")
    exported = adapter(directory)
    assert len(stored) == len(exported)
    wanted = sorted(float(t.double().norm()) for t in stored.values())
    assert sorted(float(t.double().norm()) for t in exported.values()) == wanted
    content = json.loads((directory / "evaluation.json").read_text())
    assert content["after"]["values"]["greedy_iou"] == values[best]  # measured again, as exported
    assert content["best"] == {
        "figure": "greedy_iou",
        "step": best,
        "value": values[best],
        "last": 6,
        "patience": False,
    }
    name = f"the adapter after step {best} of 6, the best by greedy_iou"
    assert f"best     {name}" in outcome.out
    assert name in (directory / "adapter" / "README.md").read_text()
    assert f"step {best}, the best by" in (directory / "report.html").read_text()


def test_patience_ends_a_run_after_so_many_without_a_best(collapsed, tmp_path):
    directory = tmp_path / "run"
    outcome = go(words(directory, **COLLAPSE, eval__patience=1), directory)
    assert outcome.code == 0, outcome.err
    whole = course(collapsed[0])
    values = [line["held_out/greedy_iou"] for line in whole]
    first = next(n for n in range(1, len(values)) if values[n] <= max(values[:n]))
    assert course(directory) == whole[: first + 1]
    assert len(updates(directory)) == whole[first]["step"] < 6
    assert f"stopped  after step {whole[first]['step']}: 1 evaluations" in outcome.out
    page = (directory / "report.html").read_text()
    assert "Stopped early" in page and "The run ended after" not in page
    # it is over: said again, it does not train on
    assert go(again(directory), directory).code == 0
    assert len(updates(directory)) == whole[first]["step"]


# ---- alarms --------------------------------------------------------------------------------------


def growing(from_step):
    """Greedy boxes that are said to grow from a step on."""

    def prepare():
        real = run_directory.Run._look

        def look(self, engine, source):
            seen = real(self, engine, source)
            grown = "they grew" if self.done >= from_step else None
            self.console.alarm("greedy_area", grown)
            return seen._replace(alarms={"greedy_area": grown})

        run_directory.Run._look = look

    return prepare


def test_one_that_a_second_evaluation_confirms_ends_the_run_in_good_order(looked, tmp_path):
    """With the adapter of the last healthy checkpoint, and an exit code of its own."""
    run = tmp_path / "run"
    more = {"train__stop_on_alarm": "true", "train__steps": 6, "eval__keep_best": "null"}
    outcome = go(said(run, **more), run, prepare=growing(2))
    assert outcome.code == 7, outcome.err
    assert [line["alarms"] for line in updates(run)] == [[], [], ["greedy_area"]]
    assert "alarm: they grew" in outcome.err and "the adapter is the one of step 1" in outcome.err
    assert (run / "report.html").exists()
    healthy = load_file(looked / "checkpoints" / "step_1" / "adapter.safetensors")
    norms = sorted(float(t.double().norm()) for t in healthy.values())
    assert sorted(float(t.double().norm()) for t in adapter(run).values()) == norms


def test_without_stop_on_alarm_it_is_said_and_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    outcome = go(said(run, eval__keep_best="null"), run, prepare=growing(1))
    assert outcome.code == 0 and "alarm: they grew" in outcome.err
    assert [line["alarms"] for line in updates(run)] == [[], ["greedy_area"], ["greedy_area"]]


# ---- the rules -----------------------------------------------------------------------------------


def settings(*said):
    return schema.load(None, ["--eval.every=1", *said]).eval


def fed(interim, *values, name="sampled_iou"):
    for step, value in enumerate(values, 1):
        figures = {} if value is None else {name: value}
        interim.take(step, figures, lambda step=step: {"a": torch.full((2,), float(step))})
    return interim


def test_only_a_better_one_is_a_new_best():
    one = fed(Interim(settings("--eval.keep_best=sampled_iou")), None, 0.4, 0.5, 0.5, None, 0.3)
    assert (one.best.step, one.best.value, one.without) == (3, 0.5, 3)
    assert one.best.adapter["a"].tolist() == [3.0, 3.0]


def test_where_less_is_better_less_wins():
    one = Interim(settings("--eval.keep_best=greedy_centre_error"))
    fed(one, 0.2, 0.1, 0.3, name="greedy_centre_error")
    assert one.best.step == 2


def test_it_is_due_every_so_often_and_at_the_end_and_once():
    one = Interim(settings("--eval.every=4"))
    assert [done for done in range(11) if one.due(done, 10)] == [4, 8, 10]
    one.take(8, {}, dict)
    assert [done for done in range(11) if one.due(done, 10)] == [10]
    assert not any(Interim(settings("--eval.every=0")).due(done, 3) for done in range(4))


def test_it_comes_back_from_a_checkpoint():
    words = ("--eval.keep_best=sampled_iou", "--eval.patience=2")
    one = fed(Interim(settings(*words)), 0.5, 0.4)
    other = Interim(settings(*words))
    state = json.loads(json.dumps(one.state()))
    assert other.load(state, one.tensors()["best"], {"a": torch.zeros(2)}) is None
    assert (other.last, other.without, other.best.step) == (2, 1, 1)
    assert not other.over and fed(other, 0.45).over


def test_a_best_by_other_settings_is_forgotten_and_that_is_said():
    one = fed(Interim(settings("--eval.keep_best=sampled_iou")), 0.5)
    other = Interim(settings("--eval.keep_best=sampled_iou", "--eval.scenes=7"))
    note = other.load(one.state(), one.tensors()["best"], {"a": torch.zeros(2)})
    assert "other settings" in note and other.best is None and other.last == 1
    same = Interim(settings("--eval.keep_best=sampled_iou", "--eval.batch=3", "--eval.patience=1"))
    assert same.load(one.state(), one.tensors()["best"], {"a": torch.zeros(2)}) is None
    assert same.best is not None


@pytest.mark.parametrize(
    "craft",
    [
        lambda state, stored: state.update(last=-1),
        lambda state, stored: state.update(without="2"),
        lambda state, stored: state["best"].update(value=math.inf),
        lambda state, stored: state["best"].pop("step"),
        lambda state, stored: stored["a"].fill_(math.nan),
        lambda state, stored: stored.update(a=torch.zeros(3)),
        lambda state, stored: stored.clear(),
    ],
)
def test_what_no_checkpoint_says_is_refused(craft):
    one = fed(Interim(settings("--eval.keep_best=sampled_iou")), 0.5)
    state = one.state()
    stored = one.tensors()["best"]
    craft(state, stored)
    other = Interim(one.settings)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        other.load(state, stored, {"a": torch.zeros(2)})
    assert other.last == 0 and other.best is None


def test_it_is_told_in_a_line_of_80_columns():
    one = (np.full(30, 0.5), np.ones(30))
    names = ("sampled_iou_rescaled", "sampled_iou", "invariance", "own_TU")
    whole = Results(30, dict.fromkeys(names, one))
    config = settings("--eval.keep_best=sampled_iou_rescaled")
    line = told(123456, whole, whole, config)
    assert len(line) <= 80 and line.startswith("held out, step 123456: sampled_iou_rescaled 0.500")
    assert line.endswith("(base 0.500)") and "sampled_iou 0.5" in told(1, None, whole, config)
    assert told(1, None, Results(), config) == "held out, step 1: nothing could be measured"


@pytest.mark.parametrize(
    "said, why",
    [
        (["--eval.every=5", "--eval.scenes=0"], "looks at no image"),
        (["--eval.keep_best=sampled_iou"], "set eval.every"),
        (["--eval.every=5", "--eval.patience=2"], "eval.keep_best"),
    ],
)
def test_settings_that_want_figures_nobody_takes(said, why):
    with pytest.raises(ConfigError, match=why):
        schema.load(None, said)


@pytest.mark.parametrize(
    "name, why", [("sampled_iuo", "is no figure"), ("own_area", "not to be raised")]
)
def test_a_figure_that_cannot_choose_is_refused_before_a_model_is_loaded(
    name, why, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("vise_fast.model.load.load", None)
    run = tmp_path / "run"
    assert run_here("--eval.every=1", f"--eval.keep_best={name}", "--run.dir", run) == 2
    assert why in capsys.readouterr().err and not run.exists()


def test_a_figure_that_these_images_cannot_have_is_refused():
    base = Results(1, {"invariance": (torch.ones(1).numpy(), torch.ones(1).numpy())})
    check(settings("--eval.keep_best=sampled_iou"))
    with pytest.raises(ConfigError, match="take one of invariance"):
        check_measured(settings("--eval.keep_best=sampled_iou"), base)


def test_without_them_a_checkpoint_is_what_it_was(tmp_path):
    run = tmp_path / "run"
    assert go(words(run, train__steps=1, eval__scenes=0), run).code == 0
    tensors, state = checkpoint.load(run / "checkpoints" / "step_1")
    assert tensors.keys() == {"adapter", "optimizer"} and "interim" not in state
