"""The model of a second family: what its lessons teach is what the trainer asks it."""

import json
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import fake_run
import second_family

from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.model import load
from vise_fast.nano import blank, lessons, pretrain
from vise_fast.system.randomness import generator
from vise_fast.text import prompts

SEE = lessons.QUESTION["see"] - len(lessons.TURN)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    home = tmp_path_factory.mktemp("internvl")
    second_family.save(second_family.model(0), home)
    return home


@pytest.fixture(scope="module")
def policy(directory):
    config = Config.model_validate({"model": {"path": str(directory), "device": "cpu"}})
    return load.load(config)


def asked(ids: list[int]) -> str:
    """The question of a slot "see", as the trainer writes it."""
    words = [blank.VOCABULARY[token] for token in ids[1 : SEE - 1]]
    return prompts.SHORT.verify(" ".join(words))


@torch.no_grad()
def test_a_lesson_is_what_the_trainer_asks(policy):
    """The verdict behind a packed lesson's third "see" is the engine's: pixels, tokens, positions
    and passes are the same.
    """
    batch = lessons.batch(generator(5, 0, "second"), 3)
    pixels, ids = (torch.from_numpy(part) for part in astuple(batch)[:2])
    course = second_family.Course(second_family.model(0), torch.float32)
    features, deep = course._seen(course.named(), pixels)
    logits = course._logits(course.named(), features, deep, ids)
    kinds = lessons.SLOTS[:6]
    first = sum(lessons.LENGTH[kind] for kind in kinds)
    place = sum(lessons.ANSWER[kind] for kind in kinds) + 1  # behind <visible>
    questions = [asked(row[first : first + SEE].tolist()) for row in ids]
    rows = [policy.tokens.verdict_row(question) for question in questions]
    config = Config.model_validate({"model": {"path": policy.source, "device": "cpu"}})
    engine = open_engine(policy, config)
    found = engine.verdict_logits(engine.encode(list(pixels)), rows, False)
    assert (found - logits[:, place]).abs().max() < 1e-4 * found.abs().max()
    assert (found[0] - logits[1, place]).abs().max() > 1e-2 * found.abs().max()


def test_a_lesson_moves_every_weight_and_is_written(tmp_path):
    """One step in bf16 as the command takes it; what is written loads as what was learned."""
    words = ["--out", str(tmp_path), "--minutes", "1", "--no-compile"]
    run = second_family.Pretraining(pretrain.arguments().parse_args(words))
    before = {name: weight.detach().clone() for name, weight in run.course.named().items()}
    batch = lessons.batch(generator(5, 1, "second"), 2)
    parts = [torch.from_numpy(part) for part in astuple(batch)]
    assert torch.isfinite(run._step(pretrain.PHASES[-1], parts, 1.0)["total"])
    unmoved = [name for name, w in run.course.named().items() if torch.equal(w, before[name])]
    assert unmoved == [], "tower, projector and decoder are all taught"
    run.save()
    config = Config.model_validate({"model": {"path": str(tmp_path / "model"), "device": "cpu"}})
    loaded = load.load(config).model.get_base_model()
    assert torch.equal(loaded.lm_head.weight, run.net.lm_head.weight)
    again = second_family.Pretraining(pretrain.arguments().parse_args(words))
    assert torch.equal(again.net.lm_head.weight, run.net.lm_head.weight), "goes on from there"


def test_the_table_says_what_runs_gained(tmp_path):
    taught = tmp_path / "taught"
    words = ["--model.path", str(taught / "model")]
    run = fake_run.write(tmp_path / "healthy", steps=6, config_words=words)
    taught.mkdir()
    (taught / "state.json").write_text('{"minutes": 4.0, "images": 640, "step": 20}')
    found = second_family.gains(run)
    assert found["lessons"] == {"minutes": 4.0, "images": 640, "step": 20}
    assert (found["scenes"], found["updates"]) == (fake_run.SCENES, 6)
    figure = found["figures"]["sampled_iou"]
    value, low, high = figure["gain"]
    assert value == pytest.approx(figure["after"] - figure["before"])
    assert low < value < high
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["after"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(SystemExit, match="let the run end"):
        second_family.gains(run)
