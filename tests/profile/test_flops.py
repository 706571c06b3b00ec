"""The closed form of the minimal step, the counters of executed work."""

from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from tiny import build

from vise_fast.method.step_plan import StepPlan
from vise_fast.model.attending import flash
from vise_fast.profile import minimal
from vise_fast.profile.flops import FORMULAS, executed_flops
from vise_fast.profile.host_syncs import Work
from vise_fast.profile.minimal import Shapes, encode_flops, minimal_step
from vise_fast.profile.roofline import Ceiling, decode_bytes

QWEN_2B = Shapes(
    hidden=2048,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    mlp=6144,
    vocabulary=151_936,
    depth=24,
    width=1024,
    vision_mlp=4096,
    patch=16,
    merge=2,
    taps=3,
    rank=16,
)


def test_minimal_step_of_2b_is_11_5_tflop():
    assert sum(minimal_step(QWEN_2B, StepPlan()).values()) == pytest.approx(11.5e12, rel=0.02)


def test_its_parts_are_the_known_ones():
    """A vision encode takes 0.93 TFLOP with the mergers, a forward of 472 tokens 1.35 TFLOP."""
    bare = replace(QWEN_2B, rank=0)
    encode = encode_flops(bare, 480, 640) + minimal.merge_flops(bare, 1200, False)
    forward = minimal.forward_flops(bare, 472, 0, False)
    assert encode == pytest.approx(0.93e12, rel=0.005)
    assert forward == pytest.approx(1.35e12, rel=0.005)
    share = minimal.attention_flops(bare, 472 * 473 / 2) / forward
    assert share == pytest.approx(0.02, abs=0.002)


def test_known_weights_of_2b():
    tower = QWEN_2B.decoder_weights() + QWEN_2B.head_weights()
    assert QWEN_2B.decoder_weights() == 1_409_286_144
    assert 1.7e9 < tower < 1.75e9


def test_decode_floor_of_2b():
    """0.82, 1.01 and 1.59 ms per step at 1, 16 and 64 rows, 4.3 TB/s."""
    for rows, milliseconds in ((1, 0.82), (16, 1.01), (64, 1.59)):
        floor = decode_bytes(QWEN_2B, rows, 450) / 4.3e12 * 1e3
        assert floor == pytest.approx(milliseconds, rel=0.02)


def test_a_shared_prefix_is_read_once():
    apart = decode_bytes(QWEN_2B, 8, 450)
    shared = decode_bytes(QWEN_2B, 8, 450, shared=305)
    assert apart - shared == 7 * 305 * 112 * 1024


def test_minimal_step_grows_with_what_it_is_told():
    plan = StepPlan(judges_ghosts=False)  # every box has ghosts of its own
    base = minimal_step(QWEN_2B, plan)
    more = minimal_step(QWEN_2B, replace(plan, samples=8))
    assert more["encode"] == base["encode"] and more["prefix"] == base["prefix"]
    # one shared question forward and backward, eight times the answers only
    assert more["update"] < 1.6 * base["update"]
    judged = minimal_step(QWEN_2B, replace(plan, policy_judges=False))
    assert judged["reference"] < 0.4 * base["reference"], "the judge's prefix serves the reference"


def test_words_that_must_come_back_cost_a_picture_and_an_answer():
    plan = StepPlan(names_again=True)
    base = minimal_step(QWEN_2B, StepPlan())
    again = minimal_step(QWEN_2B, plan)
    more = {name: again[name] - base[name] for name in base if again[name] != base[name]}
    assert set(more) == {"encode", "merge", "prefix", "prompt", "decode", "head"}
    assert more["encode"] == encode_flops(QWEN_2B, 480, 640)
    assert more["merge"] == minimal.merge_flops(QWEN_2B, 1200, True)
    assert more["prefix"] == minimal.forward_flops(QWEN_2B, 305, 0, True)
    reference = replace(plan, policy_asks=False)
    assert minimal_step(QWEN_2B, reference)["prefix"] < again["prefix"]


def test_executed_products_are_counted():
    a = torch.randn(3, 5)
    b = torch.randn(5, 7)
    with executed_flops() as counter:
        a @ b
        torch.zeros(3, 7).addmm_(a, b)
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("causal", [False, True])
def test_executed_cpu_attention_is_counted(causal):
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    pairs = 21 if causal else 36
    with executed_flops() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 4 * 8 * pairs
    assert counter.get_total_flops() - forward == 10 * 2 * 4 * 8 * pairs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [flash.FLASH, flash.EFFICIENT])
def test_executed_gpu_attention_is_counted(kernel, causal):
    q = torch.empty(2, 4, 6, 8, dtype=torch.bfloat16, device="meta")
    inputs = flash.Inputs(q, q, q, None, causal, 0.3)
    pairs = 21 if causal else 36
    with executed_flops() as counter:
        result = kernel.forward(inputs)
        forward = counter.get_total_flops()
        kernel.backward(q, inputs, result)
    assert forward == 4 * 2 * 4 * 8 * pairs
    assert counter.get_total_flops() - forward == 10 * 2 * 4 * 8 * pairs


def test_executed_rows_side_by_side_are_counted():
    q = torch.empty(9, 6, 8, dtype=torch.bfloat16)
    k = torch.empty(9, 2, 8, dtype=torch.bfloat16)
    ends = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    pairs = 3 + 28
    forward = FORMULAS[torch.ops.aten._flash_attention_forward]
    assert forward(q, k, k, ends, ends, 7, 7, 0.0, True, False, scale=0.3) == 4 * 6 * 8 * pairs
    known = torch.empty(4, device="meta", dtype=torch.int32)  # three rows of seven, at most
    longest = forward(q, k, k, known, known, 7, 7, 0.0, True, False, scale=0.3)
    assert longest == 4 * 6 * 8 * 3 * 28
    backward = FORMULAS[torch.ops.aten._flash_attention_backward]
    spans = (ends, ends, 7, 7, 0.0, True, None, None)
    assert backward(q, q, k, k, q, None, *spans, scale=0.3) == 10 * 6 * 8 * pairs


def test_shapes_of_a_config_count_the_real_weights():
    model = build("gqa2").get_base_model()
    shapes = Shapes.of(model.config, rank=3)

    def count(place, kind):
        sizes = {n: p.numel() for n, p in model.named_parameters() if place in n}
        return sum(size for name, size in sizes.items() if kind in name)

    decoder = ".language_model.layers."
    assert shapes.decoder_weights() == count(decoder, "base_layer.weight")
    assert shapes.decoder_lora() == count(decoder, "lora_")
    assert shapes.merger_weights() == count("merger", "base_layer.weight")
    assert shapes.merger_lora() == count("merger", "lora_")


def test_syncs_are_seen():
    x = torch.arange(6.0)
    with Work() as work:
        x.sum().item()
        bool(x[0] > 1)
        x.nonzero()
        x[x > 2]
        x.tolist()
        x.numpy()
    assert work.syncs == {
        "_local_scalar_dense": 2,
        "nonzero": 1,
        "boolean index": 1,
        "tolist": 1,
        "numpy": 1,
    }
    assert work.total == 6


def test_quiet_code_has_no_syncs_and_views_launch_nothing():
    x = torch.randn(4, 4)
    with Work() as work:
        y = x.view(16).unsqueeze(0).T
        y * 2
    assert work.total == 0 and work.ops == 1


def test_only_what_would_live_on_a_device_counts_when_weights_are_named():
    weight = torch.randn(4, 4)
    host = torch.randn(4)
    with Work([weight]) as work:
        x = torch.zeros(4)
        x[:] = weight @ host
        y = (x * 2).relu().unsqueeze(0)[0]
        host.sum().item()
        host.tolist()
        host[host > 0]
        assert work.total == 0
        y.tolist()
        (y > 0).any().item()
        y[y > 0]
        home = y.cpu()
        home.tolist()
        table = torch.zeros(3, 4)
        table[torch.tensor([0, 2]), 1] = y[:2]
        table.tolist()
        (home * 2).sum().item()
    assert work.syncs == {"tolist": 2, "_local_scalar_dense": 1, "boolean index": 1, "cpu": 1}


def test_gradients_are_followed_through_custom_functions():
    model = build("gqa2")
    weights = list(model.parameters())
    leaf = next(p for p in weights if p.requires_grad)
    with Work(weights) as work:
        loss = torch.utils.checkpoint.checkpoint(lambda w: (w * 2).sum(), leaf, use_reentrant=False)
        loss.backward()
        float(leaf.grad.norm())
    assert work.syncs == {"_local_scalar_dense": 1}


def test_counting_stops_outside():
    with Work() as work:
        pass
    torch.ones(2).sum().item()
    assert work.total == 0 and work.ops == 0


def test_roofline_takes_the_slower_of_the_two():
    ceiling = Ceiling(flops=100.0, bandwidth=10.0)
    assert ceiling.seconds(200, 10) == 2 and ceiling.seconds(10, 50) == 5
    assert ceiling.share(4.0, 200, 10) == 0.5
