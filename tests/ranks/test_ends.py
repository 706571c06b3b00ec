"""How ranks end together: one is killed, one is another, a signal arrives; and how a run goes on
with another number of them.

The long form, a random rank killed twenty times under torchrun, is `bench/ranks.py kills`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.forked import again, go, words
from forked_ranks import apart, go_apart, go_together

from vise_fast.method.learner import Learner
from vise_fast.ranks.together import Together
from vise_fast.run import agreement
from vise_fast.system.console import read_lines
from vise_fast.system.signals import Interrupted

ROOT = Path(__file__).parents[2]
BOUND = 1e-4
SETTINGS = {"train__batch": 3, "train__steps": 4, "eval__scenes": 0, "run__checkpoint_every": 0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    assert go(words(run, **SETTINGS), run).code == 0
    return run


def dying(victim, step):
    """The rank kills itself when its update of that step begins."""

    def prepare(rank):
        learn = Learner.learn

        def learn_or_die(self, slices, number):
            if rank == victim and number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return learn(self, slices, number)

        Learner.learn = learn_or_die

    return prepare


def interrupted_behind(step):
    """A signal arrives behind the optimizer of that update, while the others' figures are waited
    for.
    """

    def prepare(rank):
        work = Together.work

        def work_or_stop(self, counts, images, device):
            prepare.calls += 1
            if prepare.calls == step:
                raise Interrupted(128 + signal.SIGTERM)
            return work(self, counts, images, device)

        prepare.calls = 0
        Together.work = work_or_stop

    return prepare


def complaints(outcomes):
    return [line for outcome in outcomes for line in outcome.complaints]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line_and_saved_work(alone, tmp_path, victim):
    run = tmp_path / "run"
    outcomes = go_together(words(run, **SETTINGS), run, 3, dying(victim, 2))
    codes = [outcome.code for outcome in outcomes]
    assert codes.pop(victim) == -signal.SIGKILL and codes == [4, 4], outcomes
    (line,) = complaints(outcomes)
    assert f"rank {victim} is gone without a word" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_2"]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    for count, steps in ((1, 3), (2, 4)):  # 3 ranks, then 1, then 2
        said = [*again(run, train__steps=steps)]
        outcome = go(said, run) if count == 1 else go_together(said, run, count)[0]
        assert outcome.code == 0, outcome.err
    assert max(apart(run, alone).values()) <= BOUND


def test_an_update_that_is_made_counts_though_a_signal_stops_its_figures(alone, tmp_path):
    run = tmp_path / "run"
    outcomes = go_together(words(run, **SETTINGS), run, 2, interrupted_behind(2))
    assert {outcome.code for outcome in outcomes} == {128 + signal.SIGTERM}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_2"]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert go_together(again(run), run, 2)[0].code == 0
    assert max(apart(run, alone).values()) <= BOUND


PLUGIN = """
import torch
from vise_fast.images import views
views.register("still", lambda rng, height, width, settings: torch.eye(3, dtype=torch.float64))
"""


def test_a_resumed_runs_plugins_are_there_on_every_rank(tmp_path):
    (tmp_path / "still.py").write_text(PLUGIN)
    run = tmp_path / "run"
    more = {"run__plugins": tmp_path / "still.py", "view__kinds": "[still]"}
    said = words(run, **(SETTINGS | {"train__steps": 1} | more))
    assert [outcome.code for outcome in go_together(said, run, 2)] == [0, 0]
    outcomes = go_together(again(run, train__steps=2), run, 2)
    assert [outcome.code for outcome in outcomes] == [0, 0], complaints(outcomes)


def test_a_rank_with_other_settings_is_refused(tmp_path):
    run = tmp_path / "run"
    said = [words(run, **SETTINGS), words(run, **SETTINGS, train__lr=2e-4)]
    outcomes = go_apart(said, run)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    (line,) = complaints(outcomes)
    assert "train.lr is" in line and "on rank 1" in line
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "what,code", [("weights", 4), ("_code", 4), ("images", 3)], ids=["weights", "code", "images"]
)
def test_a_rank_with_other_inputs_is_refused(tmp_path, what, code):
    def other(rank):
        if rank == 1 and what == "images":
            from vise_fast.images.drawn import Scenes

            Scenes.identity = lambda self: {"images": 7}
        elif rank == 1:
            setattr(agreement, what, lambda given: "another")

    run = tmp_path / "run"
    outcomes = go_together(words(run, **SETTINGS), run, 2, other)
    assert [outcome.code for outcome in outcomes] == [code, code]
    (line,) = complaints(outcomes)
    assert "rank 1" in line and "rank 0" in line
    assert not (run / "metrics.jsonl").exists(), "refused before the first step"


def test_more_ranks_than_images_are_refused_in_one_line(tmp_path):
    run = tmp_path / "run"
    outcomes = go_together(words(run, **SETTINGS | {"train__batch": 2}), run, 3)
    assert {outcome.code for outcome in outcomes} == {2}
    (line,) = complaints(outcomes)
    assert "3 ranks share batches of 2 images" in line


def test_torchrun_ended_by_a_signal_leaves_saved_work(tmp_path):
    run = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = words(run, **SETTINGS | {"train__steps": 500})
    process = subprocess.Popen(
        [*launcher, "-m", "vise_fast.train", *said],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(read_lines(run / "metrics.jsonl")) < 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    finally:
        process.kill()
    said = [line for line in errors.splitlines() if line.startswith(("warning:", "error:"))]
    assert len(said) == 1 and "stopped by signal 15; saved after step" in said[0], errors
    done = read_lines(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / f"step_{done}").is_dir()
