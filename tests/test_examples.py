"""Every script of examples/ is run on the embedded model, with fewer updates and scenes."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import skimage.data

from vise_fast import train
from vise_fast.system import console

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = [
    "--train.steps=2",
    "--train.batch=2",
    "--rollout.samples=2",
    "--rollout.views=1",
    "--eval.scenes=4",
]
WORDS = {
    "train_on_a_folder": ["photos", *SMALL, "--run.dir=runs/photos"],
    "resume_a_run": [],
    "evaluate_an_adapter": ["runs/nano", "4"],
    "ask_about_one_picture": ["photos/chelsea.png", "runs/nano/adapter"],
    "estimate_memory": ["nano", "8"],
    "train_from_python": ["2"],
    "read_metrics": ["runs/nano"],
}
"""What each script is given; reward_plugin.py is no script but what the trainer is given."""
SAYS = {
    "resume_a_run": "[1, 2, 3, 4]",
    "evaluate_an_adapter": "greedy_iou",
    "ask_about_one_picture": "it names",
    "estimate_memory": "GiB",
    "train_from_python": "rank 16",
    "read_metrics": "2 updates of 2 images",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with photographs and one finished run, as the scripts expect them."""
    home = tmp_path_factory.mktemp("examples")
    (home / "photos").mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        picture = PIL.Image.fromarray(getattr(skimage.data, name)())
        picture.resize((160, 120)).save(home / "photos" / f"{name}.png")
    assert console.run(train.main, [*SMALL, f"--run.dir={home / 'runs' / 'nano'}"]) == 0
    return home


def run(path, words, monkeypatch):
    """The exit code of a script that is run as it would be typed."""
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("name", sorted(WORDS))
def test_an_example_runs(name, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert run(ROOT / "examples" / f"{name}.py", WORDS[name], monkeypatch) == 0
    assert SAYS.get(name, "") in capsys.readouterr().out


@pytest.mark.slow
def test_the_first_real_run_ends_with_a_report_and_goes_on_where_it_was(workplace):
    """On the embedded model; again, it finds the run finished and ends well."""
    script = ROOT / "examples" / "first_real_run.sh"
    # both prompts and pictures as small as they go
    small = [*SMALL[1:], "--data.max_pixels=16384"]
    environment = os.environ | {
        "CONFIGS": "nano",
        "STEPS": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    command = ["bash", str(script), "photos", "runs/first", *small]
    for _ in range(2):
        options = {"capture_output": True, "text": True, "env": environment, "cwd": workplace}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    run = workplace / "runs" / "first" / "nano"
    assert (run / "report.html").is_file() and (run / "adapter").is_dir()
    assert len(console.read_lines(run / "metrics.jsonl")) == 1
    assert "vise-fast table" in done.stdout


def test_the_first_real_run_ends_at_what_is_wrong(workplace):
    script = ROOT / "examples" / "first_real_run.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=workplace)
    assert done.returncode != 0 and "give a folder of images" in done.stderr


def test_the_reward_of_the_example_trains(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    plugin = ROOT / "examples" / "reward_plugin.py"
    words = [*SMALL, f"--reward.plugin={plugin}", "--reward.name=product", "--run.dir=runs/product"]
    assert console.run(train.main, words) == 0
    records = console.read_lines("runs/product/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert all(-2 <= record["reward"] <= 1 for record in records)


def test_every_example_is_run_here():
    plugins = {"reward_plugin", "view_plugin", "family_plugin"}  # test_plugins.py
    assert {path.stem for path in EXAMPLES} == {*WORDS, *plugins}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert re.search(rf"\n    python .*examples/{path.name}", ast.get_docstring(ast.parse(text)))
