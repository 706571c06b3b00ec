"""What a resumed run is: the same run, and what is refused; where it is written; which folder is a
run; one process at a time.
"""

import json
import os
import shutil
import subprocess
import sys

import PIL.Image
import pytest
import skimage.data
from small_runs import SMALL, go, lines

from vise_fast.config import schema, settings
from vise_fast.config.schema import Config
from vise_fast.run import identity
from vise_fast.run.resume import MAY_CHANGE, resolve
from vise_fast.system.errors import ConfigError, EnvironmentFault

QUICK = [*SMALL, "--eval.scenes", "0", "--run.report", "false"]
OTHER = {  # one value per type that is neither the default nor what SMALL says
    "train.seed": 4,
    "train.batch": 3,
    "train.lr": 1e-5,
    "lora.alpha": 8.0,
    "reward.preset": "paper",
    "reward.w_geo": 0.1,
    "rollout.samples": 3,
    "scenes.size": 64,
    "optim.name": "adamw8bit",
    "update.advantage": "grpo",
    "model.dtype": "bfloat16",
    "ghost.method": "mean",
    "view.degrees": 3.0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    directory = tmp_path_factory.mktemp("resume") / "own"
    words = ("--train.steps", 2, "--run.checkpoint_every", 1, "--run.keep", 5)
    assert go("--run.dir", directory, *words, *QUICK) == 0
    return directory


@pytest.fixture
def photographs(tmp_path):
    """Three small pictures in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        picture = PIL.Image.fromarray(getattr(skimage.data, name)())
        picture.resize((96, 64)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def listing(directory):
    """Every file with its content, but the lock."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files if p.name != ".lock"}


def start(words, *, stated=None):
    """What `resolve` makes of settings as typed."""
    typed = schema.stated(None, words)
    return resolve(schema.load(None, words), typed if stated is None else stated)


# ---- the run's own configuration ---------------------------------------------------------------


def test_the_printed_words_alone_go_on_with_the_same_run(copy):
    config = schema.load(copy / "config.yaml")
    assert go("--train.resume", "auto", "--run.dir", copy) == 0
    after = schema.load(copy / "config.yaml")
    same = {key for key, _ in settings.fields(Config)} - {"run.dir", "train.resume"}
    assert all(settings.get(after, key) == settings.get(config, key) for key in same)
    assert [record["step"] for record in lines(copy / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("key", OTHER)
def test_a_change_that_makes_another_run_is_refused(run, key, capsys):
    before = listing(run)
    assert go("--train.resume", "auto", "--run.dir", run, f"--{key}", OTHER[key]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and key in said[0] and "--lora.init_from" in said[0]
    assert settings.show(settings.get(schema.load(run / "config.yaml"), key)) in said[0]
    assert listing(run) == before


def test_every_setting_either_may_change_or_is_refused(run):
    """No setting passes in silence: what is not on the list is refused by name."""
    own = schema.load(run / "config.yaml")
    for key, _ in settings.fields(Config):
        if key in MAY_CHANGE | {"train.resume", "run.dir"}:
            continue
        config = own.model_copy(deep=True)
        config.train.resume = "auto"
        config.run.dir = str(run)
        section, name = key.split(".")
        object.__setattr__(getattr(config, section), name, "something else")
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            resolve(config, {key: "something else"})


def test_stating_an_equal_value_is_no_change(run, tmp_path):
    words = ["--train.resume=auto", f"--run.dir={run}", "--train.batch=2", "--train.seed=0"]
    assert start(words).checkpoint.name == "step_2"
    file = tmp_path / "again.yaml"
    shutil.copyfile(run / "config.yaml", file)
    config = schema.load(file, ["--train.resume=auto", f"--run.dir={run}"])
    found = resolve(config, schema.stated(file, ["--train.resume=auto", f"--run.dir={run}"]))
    assert found.config.train.steps == 2


@pytest.mark.parametrize(
    "key, value",
    [("train.steps", 3), ("train.micro_batch", 1), ("eval.scenes", 2), ("run.keep", 1)],
)
def test_what_may_change_does(run, key, value):
    found = start(["--train.resume=auto", f"--run.dir={run}", f"--{key}={value}"])
    assert settings.get(found.config, key) == value


def test_a_cosine_schedule_keeps_its_length(tmp_path, capsys):
    words = ("--train.steps", 1, "--train.schedule", "cosine", "--train.warmup", 0)
    small = [w for w in QUICK if w not in ("--train.schedule", "constant")]
    assert go("--run.dir", tmp_path / "run", *small, *words) == 0
    assert go("--train.resume", "auto", "--run.dir", tmp_path / "run", "--train.steps", 4) == 2
    assert "cosine" in capsys.readouterr().err


# ---- where it is written -----------------------------------------------------------------------


def test_a_checkpoint_of_one_run_goes_on_elsewhere_and_leaves_it_alone(run, tmp_path):
    before = listing(run)
    step = run / "checkpoints" / "step_1"
    words = ("--resume", step, "--run.dir", tmp_path / "other", "--train.steps", 3)
    assert go(*words) == 0
    assert listing(run) == before
    assert [record["step"] for record in lines(tmp_path / "other" / "metrics.jsonl")] == [2, 3]
    assert identity.is_run(tmp_path / "other")


def test_a_copied_checkpoint_touches_nothing_around_it(run, tmp_path, capsys):
    home = tmp_path / "grandparent"
    shutil.copytree(run / "checkpoints" / "step_1", home / "checkpoints" / "copy")
    for name in ("config.yaml", "metrics.jsonl", "adapter"):
        (home / name).write_text("mine")
    assert go("--resume", home / "checkpoints" / "copy") == 2
    assert "--run.dir" in capsys.readouterr().err
    assert go("--resume", home / "checkpoints" / "copy", "--run.dir", tmp_path / "new") == 0
    assert all(
        (home / n).read_text() == "mine" for n in ("config.yaml", "metrics.jsonl", "adapter")
    )
    assert [record["step"] for record in lines(tmp_path / "new" / "metrics.jsonl")] == [2]


def test_another_runs_folder_is_not_overwritten(run, copy, capsys):
    before = listing(copy)
    assert go("--resume", run / "checkpoints" / "step_1", "--run.dir", copy) == 2
    assert "overwritten" in capsys.readouterr().err and listing(copy) == before


def test_a_moved_run_goes_on_where_it_is(copy):
    assert go("--resume", copy, "--train.steps", 3) == 0
    assert [record["step"] for record in lines(copy / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_of_version_0_1_is_recognised(copy):
    (copy / identity.MARKER).unlink()
    for checkpoint in (copy / "checkpoints").iterdir():
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["files"]["config.yaml"]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        (checkpoint / "config.yaml").unlink()
    assert go("--train.resume", "auto", "--run.dir", copy, "--train.steps", 3) == 0
    assert len(lines(copy / "metrics.jsonl")) == 3


# ---- auto, where there is nothing --------------------------------------------------------------


@pytest.mark.parametrize("exists", [False, True])
def test_auto_starts_in_an_empty_or_new_folder_and_says_so(tmp_path, exists, capsys):
    place = tmp_path / "new"
    if exists:
        place.mkdir()
    assert go("--train.resume", "auto", "--run.dir", place, "--train.steps", 1, *QUICK) == 0
    assert "no run at" in capsys.readouterr().err


def test_auto_is_refused_where_a_run_has_no_checkpoint(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    assert go("--train.resume", "auto", "--run.dir", copy) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_auto_is_refused_in_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    assert go("--train.resume", "auto", "--run.dir", tmp_path / "letters") == 2
    assert "neither a run nor empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["letter.txt"]


def test_a_new_run_takes_a_free_folder(run, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    assert start([f"--run.dir={tmp_path / 'letters'}"]).directory.name == "letters-2"
    beside = start([f"--run.dir={run}"])
    assert beside.directory.name == f"{run.name}-2" and beside.notes == [
        f"{run} is taken, so this run goes into {beside.directory}"
    ]


def test_missing_metrics_are_said(copy, capsys):
    kept = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)[1:]
    (copy / "metrics.jsonl").write_text("".join(kept))
    assert go("--train.resume", "auto", "--run.dir", copy) == 0
    assert "lacks 1 of the 2 steps" in capsys.readouterr().err


# ---- the images --------------------------------------------------------------------------------


def test_a_moved_folder_is_the_same_and_other_files_are_not(tmp_path, photographs, capsys):
    words = ["--data.dir", photographs, "--data.max_bad_share", 1, *QUICK]
    place = tmp_path / "run"
    assert go("--run.dir", place, "--train.steps", 1, *words) == 0
    moved = photographs.rename(tmp_path / "moved")
    more = ("--train.resume", "auto", "--run.dir", place, "--train.steps", 2)
    assert go(*more, "--data.dir", moved) == 0
    next(moved.glob("*.png")).unlink()
    assert go(*more[:-1], 3, "--data.dir", moved) == 3
    assert "the images are not those" in capsys.readouterr().err


# ---- adapters to start from --------------------------------------------------------------------


def test_the_rank_is_the_adapters(run, tmp_path, capsys):
    words = ("--lora.init_from", run / "adapter", "--run.dir", tmp_path / "next", *QUICK)
    assert go(*words, "--train.steps", 1, "--lora.r", 4) == 2
    assert "lora.r '4' is not that of the adapter" in capsys.readouterr().err
    assert go(*words, "--train.steps", 1) == 0
    own = schema.load(run / "config.yaml")
    assert schema.load(tmp_path / "next" / "config.yaml").lora.r == own.lora.r


# ---- one process at a time ---------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from vise_fast.run.identity import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_a_run(copy, capsys):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert holder.stdout.readline() == "held\n"
    before = listing(copy)
    assert go("--train.resume", "auto", "--run.dir", copy) == 4
    said = capsys.readouterr().err
    assert "in use by another process" in said and str(holder.pid) in said
    assert listing(copy) == before
    holder.kill()  # the system releases the lock of a process that dies
    holder.wait()
    assert go("--train.resume", "auto", "--run.dir", copy) == 0


def test_a_lock_is_released_at_the_end(tmp_path):
    first = identity.Lock(tmp_path)
    with pytest.raises(EnvironmentFault, match="in use"):
        identity.Lock(tmp_path)
    first.release()
    identity.Lock(tmp_path).release()
