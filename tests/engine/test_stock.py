"""The stock engine: the same ids and scores as the fast one, and families that it does not know."""

import pytest
import torch
from small_engines import ROWS, SIZES, relative, stock_inputs
from tiny import IMAGE, SHAPES, VOCAB, TinyTokens, build, images
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.model.qwen3_vl import Qwen3VL

OWNER = [0, 1, 2, 3]


def both(shape):
    model = build(shape)
    return FastEngine(Qwen3VL(model), TinyTokens()), StockEngine(StockBackbone(model), TinyTokens())


def played(engine, fan=(2, 1, 1, 2), limit=10, adapters=True, temperature=1.0):
    features = engine.encode(images(SIZES))
    prompts = engine.prompt(engine.prefill(features, adapters), OWNER, ROWS)
    seeds = list(range(40, 40 + sum(fan)))
    return features, engine.generate(prompts, list(fan), limit, seeds, temperature)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize(
    "temperature, fan", [(0.0, (2, 1, 1, 2)), (1.0, (2, 1, 1, 2)), (1.0, (1, 1, 1, 1))]
)
def test_same_seeds_sample_the_same_ids(shape, adapters, temperature, fan):
    fast, stock = both(shape)
    _, a = played(fast, fan, adapters=adapters, temperature=temperature)
    _, b = played(stock, fan, adapters=adapters, temperature=temperature)
    assert a.rows() == b.rows()
    assert len(set(map(tuple, a.rows()))) > 2, "the fixture should sample different answers"
    assert (a.logprob - b.logprob).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_same_scores_and_gradients(shape, recompute):
    fast, stock = both(shape)
    leaves = {name: p for name, p in stock.backbone.model.named_parameters() if p.requires_grad}
    features, answers = played(fast)
    answered = Answered(ROWS, answers, [0, 0, 1, 2, 3, 3])
    a = fast.score(features, answered, True, recompute=recompute)
    b = stock.score(stock.encode(images(SIZES)), answered, True, recompute=recompute)
    assert relative(a, b) < 1e-4
    weights = torch.linspace(-1, 1, a.numel()).view_as(a)
    fast_grads = torch.autograd.grad((a * weights).sum(), list(leaves.values()))
    stock_grads = torch.autograd.grad((b * weights).sum(), list(leaves.values()))
    for name, x, y in zip(leaves, fast_grads, stock_grads, strict=True):
        assert relative(x, y) < 1e-4, f"{name}: {relative(x, y)}"


def test_same_released_span():
    fast, stock = both("gqa2")
    features, answers = played(fast)
    answered = Answered(ROWS, answers, [0, 0, 1, 2, 3, 3])
    a = fast.score_released(features, answered, True)
    b = stock.score_released(stock.encode(images(SIZES)), answered, True)
    assert relative(a.hidden, b.hidden) < 1e-4
    assert a.ids.tolist() == b.ids.tolist() and a.lengths == b.lengths


@pytest.mark.parametrize("adapters", [True, False])
def test_same_verdicts(adapters):
    fast, stock = both("gqa2")
    a = fast.verdict_logits(fast.encode(images(SIZES)), ROWS, adapters)
    b = stock.verdict_logits(stock.encode(images(SIZES)), ROWS, adapters)
    prefixes = stock.prefill(stock.encode(images(SIZES)), adapters)
    c = stock.forked_verdict_logits(prefixes, [2, 0], [ROWS[2], ROWS[0]])
    assert relative(a, b) < 1e-4
    assert relative(c, b[[2, 0]]) < 1e-5


def test_the_counters_show_the_repeated_work():
    _, stock = both("gqa2")
    played(stock)
    counted = stock.counters.take()
    assert counted["images_encoded"] == counted["prefixes"] == 6, "once per answer"
    assert counted["decode_steps"] == counted["tokens_decoded"]


def qwen2_5_vl():
    """A random Qwen2.5-VL: windowed vision attention, no deepstack, other normalised patches."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def test_a_family_without_a_fast_forward_generates_as_its_own_generate_does():
    model = qwen2_5_vl()
    engine = StockEngine(StockBackbone(model), TinyTokens())
    features = engine.encode(images(SIZES))
    prompts = engine.prompt(engine.prefill(features, True), OWNER, ROWS)
    answers = engine.generate(prompts, [1] * 4, 8, [0] * 4, temperature=0.0)
    banned = torch.where(engine.banned)[0].tolist()
    for i, row in enumerate(answers.rows()):
        inputs = stock_inputs(engine, images(SIZES)[i], ROWS[i])
        inputs["pixel_values"], _ = engine.backbone.pixels([images(SIZES)[i]])
        out = model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=banned,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert row == out[0, inputs["input_ids"].shape[1] :].tolist()
