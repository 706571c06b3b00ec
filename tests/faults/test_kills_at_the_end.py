"""A run that is killed while it ends, or while it goes on after a kill, is the same run still: the
final checkpoint, evaluation, adapter and report; the cut of what is written again; the adapter of a
finished run that goes on for longer.
"""

import os
import shutil

import pytest
from faults.calls import Call
from faults.forked import KILLED, again, go, words
from faults.left import left, sound
from faults.places import Place, kill_at
from faults.test_kills import FIRST_EVALUATION, FIRST_UPDATE, SECOND_UPDATE, START

from vise_fast.model.saved import export

END = (
    "open .evaluation.json.partial",
    "write .evaluation.json.partial half",
    "rename evaluation.json",
    "make .adapter.partial",
    "write .adapter.partial/README.md",
    "write .adapter.partial/adapter_config.json half",
    "open .adapter.partial/generation_config.json",
    "write .adapter.partial/tokenizer.json half",
    "write .adapter.partial/README.md #2 half",
    "open .adapter.partial/manifest.json",
    "write .adapter.partial/manifest.json half",
    "sync .adapter.partial/adapter_model.safetensors",
    "sync .adapter.partial",
    "rename adapter",
    "make plots",
    "write plots/.reward.png.partial half",
    "rename plots/reward.png",
    "open plots/.kl.png.partial",
    "rename plots/kl.png",
    "sync plots #2",
    "open .report.html.partial",
    "write .report.html.partial half",
    "rename report.html",
)
GOING_ON = (
    "write .lock",
    "rename run.json",
    "write .config.yaml.partial half",
    "open .metrics.jsonl.partial",
    "write .metrics.jsonl.partial half",
    "rename metrics.jsonl",
    "open .samples.jsonl.partial",
    "rename samples.jsonl",
    "write metrics.jsonl half",
    "rename checkpoints/step_2",
    "rename checkpoints/.step_1.removed",
)
FOR_LONGER = (
    "rename config.yaml",
    "write checkpoints/.step_3.partial/adapter.safetensors half",
    "rename checkpoints/.step_2.removed",
    "make .adapter.partial",
    "rename .adapter.replaced",
    "rename adapter",
    "sync . #5",
    "remove .adapter.replaced/*",
    "remove .adapter.replaced/* #7",
    "rmdir .adapter.replaced",
    "rename report.html",
)


def prepared(tmp_path_factory, name, place=None, **settings):
    """A run that was killed at a place, or not at all, and its calls."""
    directory = tmp_path_factory.mktemp(name) / "run"
    act = None if place is None else kill_at(place)
    outcome = go(words(directory, **settings), directory, act)
    assert outcome.code == (0 if place is None else KILLED), outcome.err
    return directory, outcome.calls


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to, and its calls."""
    return prepared(tmp_path_factory, "undisturbed")


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The same of three updates."""
    return prepared(tmp_path_factory, "longer", train__steps=3)[0]


@pytest.fixture(scope="module")
def all_but_ended(tmp_path_factory):
    """A run that was killed after its last update was saved."""
    return prepared(tmp_path_factory, "ended", "open .evaluation.json.partial #2")[0]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed before its second update was saved: the lines of it are cut."""
    return prepared(tmp_path_factory, "killed", "make checkpoints/.step_2.partial")[0]


def killed_again(start, place, directory, **settings):
    """A copy of a run, going on, is killed at a place; then it goes on to its end."""
    shutil.copytree(start, directory)
    assert go(again(directory, **settings), directory, kill_at(place)).code == KILLED
    sound(directory)
    outcome = go(again(directory, **settings), directory)
    assert outcome.code == 0, outcome.err
    return left(directory)


@pytest.mark.parametrize("place", END)
def test_a_run_killed_at_its_end_ends_as_if_nothing_had_happened(
    undisturbed, all_but_ended, place, tmp_path
):
    assert killed_again(all_but_ended, place, tmp_path / "run") == left(undisturbed[0])


@pytest.mark.parametrize("place", GOING_ON)
def test_a_run_killed_while_it_goes_on_goes_on(undisturbed, killed, place, tmp_path):
    assert killed_again(killed, place, tmp_path / "run") == left(undisturbed[0])


@pytest.mark.parametrize("place", FOR_LONGER)
def test_a_finished_run_killed_while_it_goes_on_for_longer(undisturbed, longer, place, tmp_path):
    directory = tmp_path / "run"
    assert killed_again(undisturbed[0], place, directory, train__steps=3) == left(longer)


def test_half_an_adapters_weights_are_never_taken_for_an_adapter(
    undisturbed, all_but_ended, tmp_path
):
    """safetensors writes outside Python: here it is killed with half a file written."""
    directory = tmp_path / "run"
    shutil.copytree(all_but_ended, directory)
    assert go(again(directory), directory, prepare=half_of_the_weights).code == KILLED
    sound(directory)
    assert not (directory / "adapter").exists()
    assert go(again(directory), directory).code == 0
    assert left(directory) == left(undisturbed[0])


def half_of_the_weights():
    whole = export._save_weights

    def half(policy, config, folder):
        whole(policy, config, folder)
        weights = folder / "adapter_model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        os._exit(KILLED)

    export._save_weights = half


def test_every_file_that_a_run_writes_has_a_kill_point(undisturbed):
    """A new file wants a line in the lists above."""
    places = [
        Place.read(text) for text in START + FIRST_EVALUATION + FIRST_UPDATE + SECOND_UPDATE + END
    ]
    names = {place.name for place in places}
    for text in undisturbed[1]:
        call = Call(*text.split())
        known = any(Place(call.operation, name).fits(call) for name in names)
        assert known or "/.step_" in call.name or ".adapter.partial/" in call.name, text
