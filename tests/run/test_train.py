"""The command, end to end on the embedded model: what a run leaves behind, resume, photographs,
faults, signals.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from peft import PeftModel
from small_runs import CHANGING, SMALL, adapter, go, lines
from transformers import AutoModelForImageTextToText

from vise_fast.nano import DIRECTORY as NANO
from vise_fast.system.console import read_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of four steps with a checkpoint after two."""
    directory = tmp_path_factory.mktemp("run") / "whole"
    assert go("--run.dir", directory, "--train.steps", 4, "--run.checkpoint_every", 2, *SMALL) == 0
    return directory


def test_a_run_leaves_everything_behind(finished):
    expected = {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.json",
        "checkpoints",
        "adapter",
        "report.html",
        "plots",
        "samples",
    }
    assert expected <= {path.name for path in finished.iterdir()}
    assert [record["step"] for record in lines(finished / "metrics.jsonl")] == [1, 2, 3, 4]
    exported = {path.name for path in (finished / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "training.yaml",
        "README.md",
    } <= exported
    assert "config.json" not in exported, "from_pretrained would take it for a whole model"
    assert set(json.loads((finished / "evaluation.json").read_text())) == {"before", "after"}


def test_attention_as_a_training_figure_changes_nothing_else(finished, tmp_path):
    assert (
        go(
            "--run.dir",
            tmp_path / "run",
            "--train.steps",
            3,
            "--train.attention_every",
            2,
            "--run.report",
            "false",
            *SMALL,
        )
        == 0
    )
    records, plain = lines(tmp_path / "run" / "metrics.jsonl"), lines(finished / "metrics.jsonl")
    assert ["attention_share" in record for record in records] == [True, False, True]
    assert all(0 < record.pop("attention_share", 0.5) < 1 for record in records)
    for record in records + plain:
        for name in CHANGING:
            record.pop(name, None)
    assert records == plain[:3]


def test_peft_loads_the_adapter_and_gives_the_policys_logits(finished):
    from vise_fast.config import schema as configuration
    from vise_fast.model import load as model

    config = configuration.load(finished / "config.yaml", [])
    policy = model.load(config, adapter=str(finished / "adapter"))
    base = AutoModelForImageTextToText.from_pretrained(NANO, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, str(finished / "adapter")).eval()
    ids = torch.tensor([[policy.tokens.ids("find red circle")]]).view(1, -1)
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, policy.model(input_ids=ids).logits)
        with stock.disable_adapter():
            assert not torch.equal(stock(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_resume_is_bitwise(finished, tmp_path):
    first = tmp_path / "resumed"
    common = ["--run.dir", first, "--run.checkpoint_every", 2, *SMALL]
    assert go("--train.steps", 2, *common) == 0
    assert go("--train.steps", 4, "--resume", "auto", *common) == 0
    whole, resumed = adapter(finished), adapter(first)
    assert whole.keys() == resumed.keys() and all(
        torch.equal(whole[name], resumed[name]) for name in whole
    )
    for a, b in zip(lines(finished / "metrics.jsonl"), lines(first / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k not in CHANGING} == {
            k: v for k, v in b.items() if k not in CHANGING
        }
    assert (
        lines(finished / "samples.jsonl")[-1]["written"]
        == lines(first / "samples.jsonl")[-1]["written"]
    )


def test_an_earlier_run_is_never_overwritten(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    assert go("--run.dir", finished, "--train.steps", 1, *SMALL) == 0
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert (finished.with_name("whole-2") / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """scikit-image's bundled photographs in mixed sizes, modes and formats, and one file that is no
    picture.
    """
    folder = tmp_path_factory.mktemp("photos")
    pictures = {
        "astronaut.png": skimage.data.astronaut(),
        "coffee.jpg": skimage.data.coffee(),
        "chelsea.webp": skimage.data.chelsea(),
    }
    for name, pixels in pictures.items():
        PIL.Image.fromarray(pixels).save(folder / name)
    PIL.Image.fromarray(skimage.data.camera()).save(folder / "camera.png")
    PIL.Image.fromarray(
        np.dstack([skimage.data.rocket()[:300, :301], np.full((300, 301), 200, np.uint8)]), "RGBA"
    ).save(folder / "rocket.png")
    (folder / "sub").mkdir()
    PIL.Image.fromarray(skimage.data.coffee()).convert("P").save(folder / "sub" / "palette.png")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    return folder


def test_trains_on_photographs_of_mixed_sizes_and_modes(photographs, tmp_path):
    run = tmp_path / "photos"
    assert (
        go(
            "--data.dir",
            photographs,
            "--train.steps",
            5,
            "--run.dir",
            run,
            "--data.max_bad_share",
            0.5,
            "--data.holdout",
            0.2,
            *SMALL,
        )
        == 0
    )
    assert len(lines(run / "metrics.jsonl")) == 5
    assert [record["name"] for record in lines(run / "bad_images.jsonl")] == ["broken.jpg"]


def faults(tmp):
    empty, broken, junk = tmp / "empty", tmp / "broken", tmp / "junk.yaml"
    empty.mkdir(), broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no"), (broken / "b.png").write_bytes(b"")
    junk.write_text("train: [")
    return {
        "missing folder": (3, ["--data.dir", tmp / "nowhere"]),
        "empty folder": (3, ["--data.dir", empty]),
        "broken files": (3, ["--data.dir", broken]),
        "unknown key": (2, ["--train.stepz", 5]),
        "wrong type": (2, ["--train.steps", "many"]),
        "negative": (2, ["--train.batch", "-1"]),
        "no such model": (2, ["--model.path", tmp / "model"]),
        "not a model": (2, ["--model.path", empty]),
        "no such adapter": (2, ["--lora.init_from", tmp / "adapter"]),
        "no such config": (2, ["--config", tmp / "nope.yaml"]),
        "bad yaml": (2, ["--config", junk]),
        "no such checkpoint": (2, ["--resume", tmp / "step_9"]),
        "no gpu": (4, ["--model.device", "cuda"]),
        "unknown reward": (2, ["--reward.name", "visse"]),
    }


FAULTS = (
    "missing folder",
    "empty folder",
    "broken files",
    "unknown key",
    "wrong type",
    "negative",
    "no such model",
    "not a model",
    "no such adapter",
    "no such config",
    "bad yaml",
    "no such checkpoint",
    "no gpu",
    "unknown reward",
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_users_fault_is_one_line_and_leaves_nothing(name, tmp_path, capsys):
    code, words = faults(tmp_path)[name]
    run = tmp_path / "runs" / "x"
    if name == "no gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert go(*words, "--run.dir", run) == code
    said = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert not run.exists() or {p.name for p in run.iterdir()} <= {"bad_images.jsonl"}


def test_an_adapter_of_another_base_is_refused(finished, tmp_path, capsys):
    other = tmp_path / "adapter"
    other.mkdir()
    for name in ("adapter_config.json", "README.md"):
        (other / name).write_bytes((finished / "adapter" / name).read_bytes())
    from safetensors.torch import save_file

    save_file(
        {k: torch.cat([v, v], 1) if ".lora_A." in k else v for k, v in adapter(finished).items()},
        other / "adapter_model.safetensors",
    )
    assert go("--lora.init_from", other, "--run.dir", tmp_path / "x", *SMALL) == 2
    assert "another base" in capsys.readouterr().err


@contextlib.contextmanager
def started(run: Path) -> Iterator[subprocess.Popen]:
    """A run in a process of its own, which ends with the block, whatever happens there."""
    words = [sys.executable, "-m", "vise_fast.train", "--run.dir", str(run), "--train.steps", "500"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*words, *SMALL, "--eval.scenes", "0"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(number, code, tmp_path):
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    with started(run) as process:
        while len(read_lines(metrics)) < 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)  # it stands still while its steps are counted
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        before = len(read_lines(metrics))
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate()
        assert process.returncode == code, errors
    done = len(lines(metrics))
    assert done <= before + 1  # no other step is begun
    assert (run / "checkpoints" / f"step_{done}").is_dir()
    more = ("--train.steps", done + 1, *SMALL, "--eval.scenes", 0)
    assert go("--resume", "auto", "--run.dir", run, *more) == 0
    assert [record["step"] for record in lines(metrics)] == list(range(1, done + 2))


def test_dry_run_explains_what_is_missing(capsys):
    assert go("--config", ROOT / "configs" / "qwen3-vl-2b.yaml", "--dry-run") in (3, 4)
    captured = capsys.readouterr()
    assert "500 updates" in captured.out and "Qwen/Qwen3-VL-2B-Instruct" in captured.out
    assert "error:" in captured.err


def test_dry_run_of_the_default_tries_one_step(capsys, tmp_path):
    assert go("--dry-run", "--run.dir", tmp_path / "x", *SMALL) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_stop_on_alarm_keeps_the_last_healthy_checkpoint(tmp_path, monkeypatch, capsys):
    from vise_fast.report import alarms

    monkeypatch.setattr(
        alarms.Alarms, "_said", lambda self: {"area": "boxes grow" if self.seen > 6 else None}
    )
    run = tmp_path / "run"
    assert (
        go(
            "--run.dir",
            run,
            "--train.steps",
            40,
            "--run.checkpoint_every",
            2,
            "--train.stop_on_alarm",
            "true",
            *SMALL,
            "--eval.scenes",
            0,
        )
        == 7
    )
    assert len(lines(run / "metrics.jsonl")) < 40
    assert "last healthy checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--model.engine", "stock"],
        ["--model.kernels", "plain"],
        ["--model.attention", "plain"],
        ["--train.deterministic", "true"],
    ],
)
def test_every_choice_of_engine_and_kernels_writes_the_same(words, tmp_path):
    common = ["--train.steps", 1, *SMALL, "--eval.scenes", 0, "--run.report", "false"]
    assert go(*common, "--run.dir", tmp_path / "usual") == 0
    assert go(*common, *words, "--run.dir", tmp_path / "other") == 0
    torch.use_deterministic_algorithms(False)
    usual, other = (
        [record["written"] for record in lines(tmp_path / name / "samples.jsonl")]
        for name in ("usual", "other")
    )
    assert usual == other
