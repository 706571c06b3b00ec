"""The model of a second family: what its lessons teach is what the trainer asks it."""

import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import second_family

from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.model import load
from vise_fast.nano import blank, lessons
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
    course = second_family.StockCourse(second_family.model(0), torch.float32)
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
