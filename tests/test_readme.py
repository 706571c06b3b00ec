"""Every command of the README is run: as written where it is small, with fewer updates and scenes
where it is not.
"""

import re
import shlex
import shutil
from pathlib import Path

import PIL.Image
import pytest
import skimage.data

from vise_fast import train
from vise_fast.__main__ import main
from vise_fast.system import console

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAIN = [
    "--train.steps",
    "2",
    "--train.batch",
    "2",
    "--rollout.samples",
    "2",
    "--rollout.views",
    "1",
    "--eval.scenes",
    "4",
]
# What is added to a command to make it small, and the exit code it has on a machine without the
# real weights.
SMALL = {
    "vise-fast train": ([*TRAIN, "--run.dir", "{tmp}/fresh"], 0),
    "vise-fast train --help": ([], 0),
    "python -m vise_fast.train": (["--help"], 0),
    "vise-fast doctor": ([], None),
    "vise-fast data photos": (["--html", "{tmp}/data.html", "--png", "{tmp}/data.png"], 0),
    "vise-fast probe --data.dir photos": (["--html", "{tmp}/probe.html"], 0),
    "vise-fast evaluate --adapter runs/nano/adapter --alphas 0,0.5,1 "
    "--json runs/nano/strengths.json": (["--scenes", "4"], 0),
    "vise-fast table --adapter runs/nano/adapter --out tables/nano --tasks drawn": (
        ["--dry-run"],
        None,
    ),
    "vise-fast compare runs/nano runs/nano-2": (["--out", "{tmp}/compare.html"], 0),
    "vise-fast sweep sweep.yaml": (["--dry-run"], 0),
    "vise-fast train --config qwen3-vl-2b --data.dir photos --dry-run": (
        [],
        4,
    ),
    "vise-fast train --config qwen3-vl-2b --data.dir photos": (
        ["--model.path", "nano", *TRAIN, "--run.dir", "{tmp}/real"],
        0,
    ),
    "vise-fast evaluate --adapter runs/nano/adapter": (["--scenes", "4"], 0),
    "vise-fast report runs/nano": ([], 0),
    "vise-fast infer --adapter runs/nano/adapter --image photo.jpg": ([], 0),
    "vise-fast merge --adapter runs/nano/adapter --out merged": ([], 0),
    "vise-fast export --form linked --adapter runs/nano/adapter --out linked": ([], 0),
    "vise-fast estimate --config qwen3-vl-8b": (
        ["--data.dir", "photos"],
        None,
    ),
}
ELSEWHERE = {
    "make train",
    "make test",
    "pip install -c constraints.txt -e .",
    "vise-fast demo --adapter runs/nano/adapter",  # tests/demo
    "vise-fast report runs/nano --live",  # tests/report/test_live.py
}  # .ci/run and test_packaging.py


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:vise-fast|python -m) [^`]+)`", README)
    return list(dict.fromkeys(line for line in [*lines, *inline] if line))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with what the README's commands find: a finished run, photographs, one
    photograph, the configs.
    """
    home = tmp_path_factory.mktemp("readme")
    (home / "photos").mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        PIL.Image.fromarray(getattr(skimage.data, name)()).resize((160, 120)).save(
            home / "photos" / f"{name}.png"
        )
    PIL.Image.fromarray(skimage.data.chelsea()).save(home / "photo.jpg")
    (home / "configs").symlink_to(ROOT / "configs")
    assert console.run(train.main, [*TRAIN, "--run.dir", str(home / "runs" / "nano")]) == 0
    shutil.copytree(home / "runs" / "nano", home / "runs" / "nano-2")
    (home / "sweep.yaml").write_text("config: nano\ngrid: {train.seed: [0, 1]}\n")
    return home


@pytest.mark.parametrize("command", commands())
def test_command_runs(command, workplace, tmp_path, monkeypatch, capsys):
    if command in ELSEWHERE:
        return
    assert command in SMALL, f"a new command in the README: {command}"
    extra, code = SMALL[command]
    monkeypatch.chdir(workplace)
    words = shlex.split(command.replace("python -m vise_fast.", "vise-fast "))[1:]
    got = console.run(main, [*words, *(word.format(tmp=tmp_path) for word in extra)])
    assert got == code or code is None and got in (0, 4, 5), capsys.readouterr().err


def test_ci_runs_what_is_not_run_here():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script and "make train" in script


def test_reading_order_names_files_that_exist():
    section = README.split("## Read the code in this order")[1].split("\n## ")[0]
    names = re.findall(r"`((?:vise_fast/|kernels/)?[\w/]+(?:\.py|/))`", section)
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "vise_fast" / name).exists(), name


def test_linked_files_exist():
    for name in re.findall(
        r"`?((?:docs|configs|bench|tests)/[\w./-]+\.(?:md|yaml|py|json|sh))`?", README
    ):
        assert (ROOT / name).exists(), name
