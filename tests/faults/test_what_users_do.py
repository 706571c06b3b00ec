"""What happens around a run that is under way: images that go away or break, numbers that are not
finite, memory that is not there, a bug, an exit in somebody's reward. Saved first, then said.
"""

import math
import os
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from faults.forked import again, go, words
from faults.left import left, sound, steps_saved
from small_runs import lines

from vise_fast.method import experience
from vise_fast.method.learner import Learner
from vise_fast.run.directory import Steps

UNSAVED = {"run__checkpoint_every": 0}
"""Nothing is saved but by the end."""
PHOTOS = {"data__holdout": 0.2, "data__workers": 0, "train__steps": 3} | UNSAVED


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten small pictures."""
    folder = tmp_path_factory.mktemp("images") / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def after(nth, happens, owner=Steps, name="advance"):
    """Lets something happen before the nth call of a function in a run."""
    plain = getattr(owner, name)
    calls = []

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            happens()
        return plain(*args, **kwargs)

    return lambda: setattr(owner, name, called)


def raising(fault, owner, name, first, last=10**9):
    """Lets calls number `first` to `last` of a function fail."""
    plain = getattr(owner, name)
    calls = []

    def called(*args, **kwargs):
        calls.append(name)
        if first <= len(calls) <= last:
            raise fault
        return plain(*args, **kwargs)

    return lambda: setattr(owner, name, called)


def ended(outcome, directory, *, code, saved):
    """One error, after a checkpoint of the last complete update."""
    assert outcome.code == code, outcome.err
    assert len(outcome.errors) == 1 and "Traceback" not in outcome.err, outcome.err
    sound(directory)
    assert steps_saved(directory) == saved and f"saved after step {saved}" in outcome.out


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["moved", "emptied"])
def test_a_folder_that_goes_away_is_one_fault_and_the_run_goes_on_with_it(
    how, workers, photographs, tmp_path
):
    """As an unmounted disk: the folder is not there, or empty."""
    folder = tmp_path / "here"
    photographs_again = tmp_path / "elsewhere"
    os.symlink(photographs, photographs_again)
    settings = PHOTOS | {"data__workers": workers, "data__dir": folder, "train__steps": 6}
    folder.symlink_to(photographs)

    def gone():
        folder.unlink()
        if how == "emptied":
            folder.mkdir()

    directory = tmp_path / "run"
    outcome = go(words(directory, **settings), directory, prepare=after(2, gone))
    done = steps_saved(directory)
    assert done >= 2
    ended(outcome, directory, code=3, saved=done)
    assert "the images are gone" in outcome.err
    assert not (directory / "bad_images.jsonl").exists()
    whole = tmp_path / "whole"
    back = settings | {"data__dir": photographs_again}
    assert go(words(whole, **back), whole).code == 0
    assert go(again(directory, data__dir=photographs_again), directory).code == 0
    assert left(directory) == left(whole)


def test_a_file_that_breaks_on_the_way_is_passed_over_and_listed(photographs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def cut():
        for path in sorted(folder.iterdir())[:3]:
            os.truncate(path, path.stat().st_size - 40)

    directory = tmp_path / "run"
    settings = PHOTOS | {"data__dir": folder, "train__steps": 12, "data__max_bad_share": 0.5}
    settings |= {"eval__scenes": 0}  # which would read more files after the last update
    outcome = go(words(directory, **settings), directory, prepare=after(1, cut))
    assert outcome.code == 0, outcome.err
    bad = {line["name"] for line in lines(directory / "bad_images.jsonl")}
    assert bad and bad <= {"0.png", "1.png", "2.png"}
    assert lines(directory / "metrics.jsonl")[-1]["bad_images"] == len(bad)


@pytest.mark.parametrize("how", ["cut short", "emptied", "deleted", "no picture any more"])
def test_too_many_files_that_break_end_the_run(how, photographs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def breaks():
        for path in list(folder.iterdir()):
            if how == "deleted" and path.name != "0.png":
                path.unlink()
            else:
                content = {"cut short": path.read_bytes()[:60], "emptied": b""}
                path.write_bytes(content.get(how, b"a letter"))

    directory = tmp_path / "run"
    settings = PHOTOS | {"data__dir": folder, "train__steps": 6}
    outcome = go(words(directory, **settings), directory, prepare=after(2, breaks))
    ended(outcome, directory, code=3, saved=2)
    assert "none of the" in outcome.err and "can be used" in outcome.err


@pytest.mark.parametrize("name", ["ENOSPC", "EACCES", "EIO"])
def test_a_disk_that_refuses_the_list_of_bad_images(name, photographs, tmp_path):
    from faults.places import refuse_at

    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no")
    directory = tmp_path / "run"
    settings = PHOTOS | {"data__dir": folder, "data__max_bad_share": 0.5}
    place = "open bad_images.jsonl" if name == "EACCES" else "write bad_images.jsonl half"
    outcome = go(words(directory, **settings), directory, refuse_at(place, name))
    assert outcome.code == 4 and len(outcome.errors) == 1, outcome.err
    assert not directory.exists() or not (directory / "bad_images.jsonl").read_bytes()


# ---- numbers and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_stay_not_finite_end_a_run_after_saving_it(value, tmp_path):
    plain = Learner._totals

    def totals(self, sums):
        found = plain(self, sums)
        return found | {"grad_norm": value} if calls.append(1) or len(calls) > 1 else found

    calls = []
    directory = tmp_path / "run"
    settings = UNSAVED | {
        "train__batch": 4,
        "update__advantage": "ema",
        "update__tempered": True,
        "train__steps": 9,
    }
    said = words(directory, **settings)
    outcome = go(said, directory, prepare=lambda: setattr(Learner, "_totals", totals))
    ended(outcome, directory, code=6, saved=5)
    norms = [line["grad_norm"] for line in lines(directory / "metrics.jsonl")]
    assert len(norms) == 5 and norms[1:] == [None] * 4


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("fault", [OOM, MemoryError("no memory")], ids=["torch", "python"])
def test_memory_that_does_not_hold_one_image(fault, tmp_path):
    directory = tmp_path / "run"
    place = raising(fault, Learner, "_gradient", 2)
    outcome = go(words(directory, train__batch=2, **UNSAVED), directory, prepare=place)
    ended(outcome, directory, code=5, saved=1)


def test_memory_that_is_short_once_changes_no_step(tmp_path):
    directory = tmp_path / "run"
    place = raising(OOM, Learner, "_gradient", 2, 2)
    outcome = go(words(directory, train__batch=2), directory, prepare=place)
    assert outcome.code == 0 and not outcome.complaints, outcome.err
    assert lines(directory / "metrics.jsonl")[-1]["memory_halvings"] == 1


def test_an_adapter_that_is_half_moved_is_not_saved(tmp_path):
    directory = tmp_path / "run"
    place = raising(OOM, torch.optim.AdamW, "step", 2)
    outcome = go(words(directory), directory, prepare=place)
    assert outcome.code == 5 and len(outcome.errors) == 1, outcome.err
    assert steps_saved(directory) == 1 and "may be half moved and is not saved" in outcome.err
    assert go(again(directory), directory).code == 0


def test_an_adapter_that_is_half_moved_is_not_saved_even_where_none_is(tmp_path):
    directory = tmp_path / "run"
    place = raising(OOM, torch.optim.AdamW, "step", 2)
    outcome = go(words(directory, **UNSAVED), directory, prepare=place)
    assert outcome.code == 5 and "the last good checkpoint is none" in outcome.err, outcome.err
    assert steps_saved(directory) == -1
    assert go(again(directory), directory).code == 0


# ---- other people's code -------------------------------------------------------------------------


def test_a_bug_keeps_its_traceback_and_the_run_is_saved(tmp_path):
    directory = tmp_path / "run"
    place = raising(RuntimeError("a bug"), experience, "judge", 2)
    outcome = go(words(directory), directory, prepare=place)
    assert outcome.code == 1 and "RuntimeError: a bug" in outcome.err
    assert steps_saved(directory) == 1
    assert go(again(directory), directory).code == 0


def test_an_exit_in_a_reward_saves_the_run(tmp_path):
    directory = tmp_path / "run"
    place = after(2, lambda: sys.exit(7), Learner, "_score")
    assert go(words(directory), directory, prepare=place).code != 0
    assert steps_saved(directory) == 1
    sound(directory)


# ---- files of the run ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{", "[]", "", '{"before": 3}', '{"before": {"n": 1}}', "\0"])
def test_a_damaged_evaluation_is_made_again(content, tmp_path):
    directory = tmp_path / "run"
    assert go(words(directory), directory).code == 0
    whole = left(directory)
    (directory / "evaluation.json").write_text(content)
    outcome = go(again(directory), directory)
    assert outcome.code == 0 and len(outcome.complaints) == 1, outcome.err
    assert "evaluated again" in outcome.err
    assert left(directory) == whole


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[1]\n{}\n", b'{"step": "one"}\n'])
def test_damaged_lines_are_dropped_and_said(name, content, tmp_path):
    directory = tmp_path / "run"
    assert go(words(directory), directory).code == 0
    (directory / name).write_bytes(content)
    outcome = go(again(directory, train__steps=3), directory)
    assert outcome.code == 0, outcome.err
    assert [line["step"] for line in lines(directory / name) if "step" in line] == [3]
    assert ("1 damaged lines are dropped" in outcome.err) == content.startswith(b"[")
    if name == "metrics.jsonl":
        assert "lacks 2 of the 2 steps" in outcome.err


def test_a_run_that_is_moved_away_under_way(tmp_path):
    """What it writes next is refused or lands with it; the run can go on where it is then."""
    directory = tmp_path / "run"
    moved = tmp_path / "moved"
    outcome = go(words(directory), directory, prepare=after(2, lambda: directory.rename(moved)))
    assert outcome.code == 4 and len(outcome.errors) == 1, outcome.err
    assert go(again(moved), moved).code == 0
    undisturbed = tmp_path / "undisturbed"
    assert go(words(undisturbed), undisturbed).code == 0
    assert left(moved) == left(undisturbed)
