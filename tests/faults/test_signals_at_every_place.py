"""A signal ends a run at whatever it does, in good order: exit code 129, 130 or 143, saved after
the last complete update, and the words that are printed lead to the result of a run that was not
stopped.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest
import torch
from faults.forked import again, go, words
from faults.left import left, sound, steps_saved

from vise_fast import train
from vise_fast.method import experience, queries
from vise_fast.method.learner import Learner
from vise_fast.method.token_scores import TokenScorer
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.model.saved import export
from vise_fast.report import page
from vise_fast.run import directory as run_directory
from vise_fast.run.directory import Run
from vise_fast.system import checkpoint

CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
PLACES = {  # what is called there, the how manieth call, the update that is saved
    "loading": (train.model, "load", 1, None),
    "opening": (Run, "opening", 1, 0),
    "first evaluation": (run_directory, "held_out", 1, 0),
    "views": (experience, "draw_views", 2, 1),
    "ask": (queries, "ask", 2, 1),
    "ground": (experience, "_ground", 2, 1),
    "verify": (experience, "judge", 1, 0),
    "update forward": (TokenScorer, "score", 2, 1),
    "backward": (torch.Tensor, "backward", 1, 0),
    "optimizer": (Learner, "_apply", 1, 1),
    "metrics": (run_directory.Steps, "advance", 1, 1),
    "checkpoint": (checkpoint, "_write_all", 1, 1),
    "final evaluation": (run_directory, "held_out", 2, 2),
    "export": (export, "_save_weights", 1, 2),
    "report": (page, "render", 1, 2),
}
CASES = [(place, number) for place in PLACES for number in CODES]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert go(words(directory), directory).code == 0
    return directory


def sending(number, owner, name, nth):
    """Sends this process a signal when a function is called for the nth time."""
    plain = getattr(owner, name)
    calls = []

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return plain(*args, **kwargs)

    return lambda: setattr(owner, name, called)


@pytest.mark.parametrize("place, number", CASES, ids=[f"{p} {n.name}" for p, n in CASES])
def test_a_signal_saves_and_the_printed_words_go_on(place, number, undisturbed, tmp_path):
    owner, name, nth, saved = PLACES[place]
    directory = tmp_path / "run"
    outcome = go(words(directory), directory, prepare=sending(number, owner, name, nth))
    assert outcome.code == CODES[number], outcome.err
    assert len(outcome.complaints) == 1 and f"signal {int(number)}" in outcome.err, outcome.err
    if saved is None:
        assert "start again as you did" in outcome.err and not directory.exists()
        return
    sound(directory)
    assert steps_saved(directory) == saved and f"saved after step {saved};" in outcome.err
    printed = shlex.split(re.search(r"go on with (.*)", outcome.err)[1])
    assert printed == again(directory)
    assert go(printed, directory).code == 0
    assert left(directory) == left(undisturbed)


@pytest.mark.parametrize("place", ["opening", "views", "verify", "metrics", "final evaluation"])
def test_what_was_changed_when_it_went_on_is_part_of_the_words(place, undisturbed, tmp_path):
    """A finished run goes on for longer and is stopped: the words need not say for how long."""
    longer = tmp_path / "longer"
    assert go(words(longer, train__steps=3), longer).code == 0
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    owner, name, _, _ = PLACES[place]
    send = sending(signal.SIGTERM, owner, name, 1)
    assert go(again(directory, train__steps=3), directory, prepare=send).code == 143
    assert go(again(directory), directory).code == 0
    assert left(directory) == left(longer)


def test_before_anything_is_written_the_words_are_those_that_were_said(undisturbed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    owner, name, _, _ = PLACES["loading"]
    send = sending(signal.SIGTERM, owner, name, 1)
    outcome = go(again(directory, train__steps=3), directory, prepare=send)
    assert outcome.code == 143 and "start again as you did" in outcome.err
    assert left(directory) == left(undisturbed)


@pytest.mark.parametrize("name", ["my first run", "it's mine", "a;b", "$HOME", "-rf", "é*?"])
def test_the_printed_words_can_be_pasted_whatever_the_run_is_called(name, tmp_path):
    directory = tmp_path / name
    place = sending(signal.SIGTERM, experience, "judge", 2)
    outcome = go(words(directory), directory, prepare=place)
    assert outcome.code == 143, outcome.err
    printed = re.search(r"go on with (.*)", outcome.err)[1]
    shell = f"printf '%s\\n' {printed}"
    pasted = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert pasted.stdout.splitlines() == again(directory)
    assert go(pasted.stdout.splitlines(), directory).code == 0


# ---- how soon ------------------------------------------------------------------------------------


def counting(name, nth, log):
    """SIGTERM at the nth call of something that a layer does in the update; every call from then on
    is written down.
    """
    plain = getattr(Qwen3VL, name)
    calls = []

    def called(self, *args):
        if name == "_heard" or torch.is_grad_enabled():
            calls.append(name)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(calls) >= nth:
                with open(log, "a") as file:
                    file.write("layer\n")
        return plain(self, *args)

    return lambda: setattr(Qwen3VL, name, called)


@pytest.mark.parametrize("name", ["layer", "_heard"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_signal_in_an_update_is_heard_before_the_next_layer(name, nth, tmp_path):
    """Forwards and backwards: on a busy machine an update takes minutes."""
    directory = tmp_path / "run"
    log = tmp_path / "layers"
    outcome = go(words(directory), directory, prepare=counting(name, nth, log))
    assert outcome.code == 143, outcome.err
    assert log.read_text().splitlines() == ["layer"]
    assert steps_saved(directory) == 0
