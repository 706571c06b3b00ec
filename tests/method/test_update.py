"""The update pass: work and gradients of the shared prefix against row by row, and what the fused
LoRA node saves.
"""

from functools import partial

import pytest
import torch
from small_engines import ROWS, SIZES, engine_of, leaves, sampled, worst
from tiny import SHAPES, TinyTokens, build, images
from torch.autograd.graph import saved_tensors_hooks
from vise_kernels import patchify

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered, Rollout, owners
from vise_fast.model.lora_linear import FusedLinear
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.profile.flops import executed_flops

OWNER = owners([3] * 4)


def double_ready(backbone, dtype, pictures):
    """`encode` for any float dtype; patchify makes none wider than fp32."""
    patches, grids = patchify(pictures, patch=4, merge=2, single_tap=True)
    sides = [tuple(grid) for grid in grids[:, 1:].tolist()]
    return backbone.vision.encode_patches(patches.to(dtype), sides)


def test_a_group_of_eight_costs_a_fifth_of_row_by_row():
    """Prefix 20 times the completion, G = 8: at most 0.22 of the FLOPs, forward and backward."""
    model, engine = engine_of("gqa2")
    features = engine.encode(images([(80, 128)]))
    question = [[9] * 4]
    answers = Rollout(torch.randint(8, 60, (8, 8)), torch.zeros(8, 8), [8] * 8)
    prefix = 80 * 128 // 64 + 3
    assert prefix + 4 >= 20 * 8
    with executed_flops() as shared:
        engine.score(features, Answered(question, answers, [0] * 8), True).sum().backward()
    with executed_flops() as rows:
        for n in range(8):
            alone = Answered(question, answers.select([n]), [0])
            engine.score(features, alone, True).sum().backward()
    ratio = shared.get_total_flops() / rows.get_total_flops()
    assert ratio <= 0.22, ratio


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_row_by_row(shape):
    """In double precision both agree to 1e-9, so the fp32 gap below is rounding; fp32: 1e-5 of each
    tensor's largest entry.
    """
    gaps = {}
    for dtype in (torch.float32, torch.float64):
        model = build(shape, dtype=dtype)
        for p in leaves(model):
            p.data = p.data.to(dtype)
        engine = FastEngine(Qwen3VL(model), TinyTokens())
        engine.encode = partial(double_ready, engine.backbone, dtype)
        features, answers = sampled(engine, images(SIZES))
        hidden = engine.score(features, Answered(ROWS, answers, OWNER), True)
        weights = torch.linspace(-1, 1, len(hidden), dtype=dtype)
        shared = torch.autograd.grad((hidden.sum(1) * weights).sum(), leaves(model))
        alone = 0.0
        start = 0
        for n, length in enumerate(answers.lengths):
            image = OWNER[n]
            answered = Answered([ROWS[image]], answers.select([n]), [0])
            row = engine.score(features.select([image]), answered, True)
            alone = alone + (row.sum(1) * weights[start : start + length]).sum()
            start += length
        gaps[dtype] = worst(shared, torch.autograd.grad(alone, leaves(model)))
    assert gaps[torch.float32] <= 1e-5, gaps
    assert gaps[torch.float64] <= 1e-9, gaps


def written_out(self, x, pack, before=None):
    """In place of `FusedLinear.__call__`: plain autograd."""
    return self.plain(x, self.pack(x.dtype), before)


def test_the_fused_node_equals_plain_autograd(monkeypatch):
    model, engine = engine_of("mha_untied")
    features, answers = sampled(engine, images(SIZES))

    def gradients():
        hidden = engine.score(features, Answered(ROWS, answers, OWNER), True)
        return torch.autograd.grad(hidden.square().sum(), leaves(model))

    fused = gradients()
    monkeypatch.setattr(FusedLinear, "__call__", written_out)
    assert worst(fused, gradients()) <= 1e-5


def saved(dtype):
    """Bytes kept for the backward pass of one score, by dtype: each storage once, parameters not
    counted.
    """
    model = build("gqa2", dtype=dtype)
    engine = FastEngine(Qwen3VL(model), TinyTokens())
    features, answers = sampled(engine, images(SIZES))
    held = [*model.parameters(), *model.buffers()]
    for fused in engine.backbone.fused():
        held += [*fused.cached.factors(), fused.weight]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (tensor.dtype, storage.nbytes())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = engine.score(features, Answered(ROWS, answers, OWNER), True)
    assert hidden.requires_grad
    bytes_of = dict.fromkeys((torch.float32, torch.bfloat16), 0)
    for kind, size in found.values():
        bytes_of[kind] = bytes_of.get(kind, 0) + size
    return bytes_of


def counted(kept):
    """Bytes of floats."""
    return kept[torch.float32] + kept[torch.bfloat16]


def test_bf16_compute_saves_no_fp32_activations():
    """fp32 in the graph of a bf16 pass: log-sum-exps, norms' scales and rotary tables, one number
    per row and head; never a row itself.
    """
    kept = saved(torch.bfloat16)
    assert kept[torch.float32] < 0.08 * kept[torch.bfloat16], kept


def test_the_fused_node_saves_less_than_three_quarters(monkeypatch):
    fused = counted(saved(torch.float32))
    monkeypatch.setattr(FusedLinear, "__call__", written_out)
    plain = counted(saved(torch.float32))
    assert fused < 0.75 * plain, (fused, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_separate_factors_equal_block_diagonal_ones(monkeypatch, shape):
    """Large models hold each module's B by itself; same hidden states, same gradients."""
    results = []
    for limit in (2**18, 0):
        monkeypatch.setattr("vise_fast.model.lora_linear.BLOCKS_UP_TO", limit)
        model, engine = engine_of(shape)
        assert len(engine.backbone.layers[0].linears[0].cached.up) == (1 if limit else 3)
        features, answers = sampled(engine, images(SIZES))
        hidden = engine.score(features, Answered(ROWS, answers, OWNER), True)
        grads = torch.autograd.grad(hidden.square().sum(), leaves(model))
        results.append([hidden.detach(), *grads])
        engine.backbone.refresh()
    assert worst(results[1], results[0]) <= 1e-5
