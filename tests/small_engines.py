"""Engines over the models of tiny.py, with the stock modules' answers beside them."""

import contextlib

import torch
from tiny import TinyTokens, build
from vise_kernels import patchify

from vise_fast.engine.fast import FastEngine
from vise_fast.model.qwen3_vl import Qwen3VL

SIZES = [(16, 24), (8, 8), (24, 16), (16, 24)]
ROWS = [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]]


def engine_of(shape, adapters=True):
    model = build(shape, adapters=adapters)
    return model, FastEngine(Qwen3VL(model), TinyTokens())


def stock_inputs(engine, image, row):
    """input_ids, pixel_values and grid for transformers' forward, one image."""
    pixels, grid = patchify([image], patch=4, merge=2)
    tokens = engine.tokens
    ids = tokens.head + [tokens.image_token] * (int(grid.prod()) // 4) + tokens.tail + row
    ids = torch.tensor([ids])
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == tokens.image_token).int(),
    }


def switched(model, adapters):
    """The stock modules with their adapters on or off."""
    return contextlib.nullcontext() if adapters else model.disable_adapter()


def stock_logits(model, engine, image, row):
    return model(**stock_inputs(engine, image, row), use_cache=False).logits[0].float()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def sampled(engine, pictures, fan=3, limit=12):
    count = len(pictures)
    features = engine.encode(pictures)
    prompts = engine.prompt(engine.prefill(features, True), list(range(count)), ROWS[:count])
    return features, engine.generate(prompts, [fan] * count, limit, list(range(fan * count)))


def worst(found, truth):
    """Largest difference of any gradient, relative to the largest entry of its own tensor."""
    return max(relative(a, b) for a, b in zip(found, truth, strict=True))


def leaves(model):
    return [p for p in model.parameters() if p.requires_grad]
