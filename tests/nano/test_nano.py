"""The embedded model: loads offline through transformers, its quick forward equals the stock one,
its answers are well formed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import astuple

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from vise_fast import nano
from vise_fast.images import scenes
from vise_fast.nano import blank, exam, forward, lessons, pretrain
from vise_fast.system.randomness import generator
from vise_fast.text import prompts

SENTENCES = [
    "<query> red circle </query>",
    "<box>012,345,678,999</box>",
    "<visible>yes</visible>",
    "<visible>no</visible>",
    "name an object",
    "find white cross",
    "see purple triangle ?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(nano.DIRECTORY, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(
        nano.DIRECTORY, local_files_only=True, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def weights(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_tokenizer_round_trip(tokenizer, sentence):
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence


@pytest.mark.parametrize("token", blank.VOCABULARY)
def test_every_token_is_one_id(tokenizer, token):
    assert tokenizer(token)["input_ids"] == [blank.VOCABULARY.index(token)]


def test_whitespace_only_separates(tokenizer):
    assert (
        tokenizer(" see\nred  circle?")["input_ids"] == tokenizer("see red circle ?")["input_ids"]
    )


def test_unknown_words_are_unknown(tokenizer):
    assert tokenizer("find red elephant")["input_ids"][-1] == tokenizer.unk_token_id


def test_special_tokens(tokenizer):
    config = AutoConfig.from_pretrained(nano.DIRECTORY, local_files_only=True)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.text_config.vocab_size == len(tokenizer) == len(blank.VOCABULARY)
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_chat_template_equals_the_pieces(tokenizer):
    message = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "find red circle"}],
        }
    ]
    said = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    pieces = (
        "<|im_start|>user\n<|vision_start|>",
        "<|image_pad|>",
        "<|vision_end|>",
        "find red circle<|im_end|>\n<|im_start|>assistant\n",
    )
    assert list(said) == [token for piece in pieces for token in tokenizer(piece)["input_ids"]]


def test_config_asks_for_short_prompts():
    config = AutoConfig.from_pretrained(nano.DIRECTORY, local_files_only=True)
    assert config.vise_prompts == "short" and prompts.style_for(config) is prompts.SHORT


def test_sizes(model):
    assert 1.5e6 < sum(weight.numel() for weight in model.parameters()) < 5e6
    assert (
        sum(file.stat().st_size for file in nano.DIRECTORY.iterdir() if file.is_file()) < 10_000_000
    )
    with safe_open(nano.DIRECTORY / "model.safetensors", "pt") as stored:
        names = stored.keys()
    assert "lm_head.weight" not in names  # tied


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_preprocessor_config(name):
    settings = json.loads((nano.DIRECTORY / name).read_text())
    assert (settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]) == (
        8,
        2,
        2,
    )
    assert settings["image_mean"] == settings["image_std"] == [0.5, 0.5, 0.5]


def _drawn(count: int, name: str = "nano-test") -> list[scenes.Scene]:
    return [scenes.draw(generator(5, 0, name, index)) for index in range(count)]


def _pixels(drawn: list[scenes.Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([scene.pixels for scene in drawn]))


def _stock(model, tokenizer, pixels: torch.Tensor, text: str) -> torch.Tensor:
    """Logits of transformers' own forward, given the question and the beginning of its answer."""
    head = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>"
    ids = torch.tensor([tokenizer(head + text)["input_ids"]] * len(pixels))
    taps = forward.patches(pixels).view(-1, 3, 1, 64).expand(-1, -1, 2, -1).reshape(-1, 384)
    return model(
        input_ids=ids,
        pixel_values=taps,
        image_grid_thw=torch.tensor([[1, 16, 16]] * len(pixels)),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        attention_mask=torch.ones_like(ids),
    ).logits


@torch.no_grad()
def test_quick_forward_equals_stock(model, tokenizer, weights):
    pixels = _pixels(_drawn(3))
    question = "find red circle<|im_end|>\n<|im_start|>assistant\n<box>012,"
    stock = _stock(model, tokenizer, pixels, question)[:, -1]
    pupil = exam.Pupil(weights)
    ids = torch.tensor([tokenizer(question)["input_ids"]] * 3)
    quick = pupil._step(pupil.look(pixels), ids, forward.TEXT_START).logits
    assert (quick - stock).abs().max() <= 1e-4 * stock.abs().max()


@torch.no_grad()
def test_packed_questions_equal_separate_ones(model, tokenizer, weights):
    """The lesson's packed row gives each answer token the loss it has when its question is asked
    alone.
    """
    batch = lessons.batch(generator(5, 0, "packed"), 2)
    course = pretrain.Course(model, torch.float32)
    parts = [
        torch.from_numpy(getattr(batch, name))
        for name in ("pixels", "ids", "targets", "weights", "color", "shape", "box", "sure")
    ]
    packed = course(pretrain.PHASES[-1], *parts)["answers"]
    pupil = exam.Pupil(weights)
    total = 0.0
    at = 0
    told = 0
    past = pupil.look(parts[0])
    for kind in lessons.SLOTS:
        ids = parts[1][:, at : at + lessons.LENGTH[kind]]
        for row in range(2):
            for place in range(lessons.ANSWER[kind]):
                read = ids[:, : lessons.QUESTION[kind] + place]
                logits = pupil._step(past, read, forward.TEXT_START).logits
                logprob = logits[row].log_softmax(-1)[batch.targets[row, told + place]]
                total -= float(logprob) * batch.weights[row, told + place]
        at += lessons.LENGTH[kind]
        told += lessons.ANSWER[kind]
    assert float(packed) == pytest.approx(total / batch.weights.sum(), rel=1e-4)


def test_lessons_repeat_and_differ():
    first, second, other = (lessons.batch(generator(5, step, "lesson"), 4) for step in (0, 0, 1))
    assert np.array_equal(first.pixels, second.pixels) and np.array_equal(first.ids, second.ids)
    assert not np.array_equal(first.pixels, other.pixels)


def test_lesson_answers_are_read_back(tokenizer):
    """What is taught is what the parsers read: the truth's box, a present name, a verdict."""
    box = (12.4, 100.0, 700.6, 1000.0)
    assert prompts.read_box(_said(tokenizer, lessons.find_row("red circle", box))) == (
        12,
        100,
        701,
        999,
    )
    assert prompts.read_query(_said(tokenizer, lessons.name_row("blue cross"))) == "blue cross"
    assert prompts.read_verdict(_said(tokenizer, lessons.see_row("blue cross", True))) is True
    assert prompts.read_verdict(_said(tokenizer, lessons.see_row("blue cross", False))) is False


def _said(tokenizer, row: lessons.Row) -> str:
    assert len(row.answer) == len(row.weights) == lessons.ANSWER[row.kind]
    return tokenizer.decode(tokenizer.convert_tokens_to_ids(row.answer), skip_special_tokens=True)


@pytest.mark.parametrize("height, width", [(50, 55), (7, 3), (1, 30), (128, 128)])
def test_ghost_blur_agrees_with_opencv(height, width):
    pixels = _drawn(1)[0].pixels
    ours = lessons.ghost(pixels, (0, 0, width, height), "blur", "inside")[:height, :width]
    theirs = cv2.GaussianBlur(
        pixels[:height, :width], (41, 41), lessons.SIGMA_PX, borderType=cv2.BORDER_REFLECT_101
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("method", ["blur", "mean"])
def test_ghost_touches_its_region_only(method):
    pixels = _drawn(1)[0].pixels
    box = (20, 30, 70, 90)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[30:90, 20:70] = True
    hidden = lessons.ghost(pixels, box, method, "inside")
    kept = lessons.ghost(pixels, box, method, "outside")
    assert np.array_equal(hidden[~inside], pixels[~inside]) and not np.array_equal(
        hidden[inside], pixels[inside]
    )
    assert np.array_equal(kept[inside], pixels[inside]) and not np.array_equal(
        kept[~inside], pixels[~inside]
    )


@pytest.fixture(scope="module")
def figures(weights):
    return exam.held_out(weights, 64, seed=5)


def _arguments(out) -> argparse.Namespace:
    return argparse.Namespace(
        out=str(out),
        minutes=1.0,
        seed=0,
        muon_lr=3e-3,
        adam_lr=1.5e-3,
        save_every=1.0,
        compile=False,
    )


def _one_step(run: pretrain.Pretraining, index: int) -> float:
    batch = lessons.batch(generator(5, index, "step"), 2)
    parts = [torch.from_numpy(part) for part in astuple(batch)]
    return float(run._step(pretrain.PHASES[-1], parts, 1.0)["total"].detach())


def test_pretraining_resumes_where_it_stopped(tmp_path):
    """Two steps in a row and a step, a restart, a step give the same losses: weights, both
    optimisers, dense head, clock.
    """
    run = pretrain.Pretraining(_arguments(tmp_path))
    _one_step(run, 0)
    run.clock = pretrain.Clock(step=1)
    run.save()
    straight = [_one_step(run, 1), _one_step(run, 2)]
    again = pretrain.Pretraining(_arguments(tmp_path))
    assert again.clock.step == 1
    assert [_one_step(again, 1), _one_step(again, 2)] == pytest.approx(straight, rel=1e-3)
    assert straight[0] != pytest.approx(
        straight[1], rel=1e-3
    )  # the second loss does depend on the first update


def test_boxes_on_held_out_scenes(figures):
    """Bounds are below the measured figures (vise_fast/nano/README.md) by three standard errors of
    64 scenes or more.
    """
    assert figures["well_formed"] >= 0.96
    assert figures["iou"] >= 0.38 and figures["named"] >= 0.9
    assert figures["area"] == pytest.approx(figures["true_area"], rel=0.25)


def test_sampled_boxes_leave_room(figures):
    """The base is meant to have something to learn: neither saturated nor deterministic."""
    assert figures["iou"] < 0.7
    assert 0.03 < figures["iou"] - figures["sampled_iou"] < 0.25


@pytest.mark.parametrize(
    "kind",
    [
        "present",
        "absent",
        "blur_covered",
        "mean_covered",
        "blur_kept",
        "mean_kept",
        "blur_elsewhere",
        "mean_elsewhere",
    ],
)
def test_verdicts_on_held_out_scenes(figures, kind):
    assert figures[f"visible_{kind}"] >= 0.87
