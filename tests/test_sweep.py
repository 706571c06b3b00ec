"""A sweep: the runs that a file means, what is refused of it, and that it goes on where it was."""

import subprocess
from pathlib import Path

import fake_run
import pytest

from vise_fast import sweep
from vise_fast.system import console
from vise_fast.system.errors import ConfigError


def written(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    return file


GRID = """
dir: {home}/runs
config: nano
set: {{train.steps: 50, view.kinds: [flip, crop]}}
grid: {{train.lr: [3.0e-4, 7.0e-4], train.checkpointing: [false, true]}}
"""


def test_a_grid_is_every_combination(tmp_path):
    found = sweep.jobs(written(tmp_path, GRID.format(home=tmp_path)))
    assert [job.directory.name for job in found] == [
        "train.lr=0.0003_train.checkpointing=false",
        "train.lr=0.0003_train.checkpointing=true",
        "train.lr=0.0007_train.checkpointing=false",
        "train.lr=0.0007_train.checkpointing=true",
    ]
    words = found[1].words
    assert words[:2] == ["--config", "nano"] and words[-1] == "--resume=auto"
    assert {"--train.steps=50", "--view.kinds=flip,crop", "--train.checkpointing=true"} <= set(
        words
    )


def test_a_list_is_those_runs_alone(tmp_path):
    text = "runs: [{train.lr: 3.0e-4}, {train.lr: 7.0e-4, lora.r: 8}]"
    names = [str(job.directory) for job in sweep.jobs(written(tmp_path, text))]
    assert names == ["sweeps/sweep/train.lr=0.0003", "sweeps/sweep/train.lr=0.0007_lora.r=8"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("- 1", "is no sweep"),
        ("dir: x\nwhat: 1", "it may say dir"),
        ("dir: x", "either grid or runs"),
        ("grid: {train.lr: 1.0}", "grid: {train.seed: [0, 1]}"),
        ("runs: {}", "no list"),
        ("runs: [1]", "no mapping"),
        ("runs: [{train.lr: 1.0e-4}, {train.lr: 1.0e-4}]", "are the same"),
        ("runs: [{train.stepz: 1}]", "did you mean train.steps?"),
        ("runs: [{train.steps: 0}]", "train.steps cannot be"),
        ("runs: [{run.dir: x}]", "which a sweep gives itself"),
        ("config: [x]\nruns: [{train.lr: 1.0e-4}]", "no name"),
        ("a: [", "is no sweep"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(tmp_path, text, said, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(ConfigError) as fault:
        sweep.main([str(written(tmp_path, text))])
    assert said in str(fault.value)


@pytest.fixture
def trained(monkeypatch):
    """Runs that leave what a run leaves, without training; the exit codes by lr, and what ran."""
    ran = []
    codes = {}

    def run(command, check):
        place = next(word for word in command if word.startswith("--run.dir="))
        directory = Path(place.partition("=")[2])
        ran.append(directory.name)
        code = codes.get(directory.name, 0)
        if code == 0:
            fake_run.write(directory, steps=2)
            (directory / "adapter").mkdir()
            (directory / "adapter" / "adapter_config.json").write_text("{}")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return ran, codes


def test_what_failed_is_run_again_and_what_is_finished_is_not(tmp_path, trained, capsys):
    ran, codes = trained
    text = f"dir: {tmp_path}/runs\ngrid: {{train.seed: [0, 1, 2]}}"
    file = str(written(tmp_path, text))
    codes["train.seed=1"] = 6
    assert console.run(sweep.main, [file]) == 6
    assert ran == ["train.seed=0", "train.seed=1", "train.seed=2"]
    codes.clear()
    assert console.run(sweep.main, [file]) == 0
    assert ran[3:] == ["train.seed=1"]
    said = capsys.readouterr().out
    assert said.count("finished already") == 2 and "mean IoU, sampled" in said
    assert console.run(sweep.main, [file, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("finished vise-fast train") == 3 and len(ran) == 4


def test_a_stopped_run_stops_the_sweep(tmp_path, trained):
    ran, codes = trained
    file = str(written(tmp_path, f"dir: {tmp_path}/runs\ngrid: {{train.seed: [0, 1]}}"))
    codes["train.seed=0"] = 130
    assert console.run(sweep.main, [file]) == 130 and ran == ["train.seed=0"]
