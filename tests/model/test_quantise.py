"""Quantised bases: what is quantised, the fast forward and its gradients against the stock
bitsandbytes modules, random bases, 8-bit optimizers.
"""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_engines import ROWS, SIZES, leaves, relative, sampled, stock_logits, switched
from tiny import TinyTokens, build, images
from torch import nn
from transformers import AutoModelForImageTextToText

from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered, owners
from vise_fast.estimate.live_bytes import Live
from vise_fast.method.learner import make_optimizer
from vise_fast.model import quantise
from vise_fast.model.lora_linear import FusedLinear
from vise_fast.model.qwen3_vl import LORA_TARGETS, Qwen3VL
from vise_fast.profile.launches import Launches
from vise_fast.system import checkpoint
from vise_fast.system.errors import ConfigError, EnvironmentFault

KINDS = {
    "nf4": {"quant": "nf4"},
    "nf4_single": {"quant": "nf4", "double_quant": False},
    "int8": {"quant": "int8"},
    "llm_int8": {"quant": "int8", "int8_threshold": 6.0},
}
CONTINUOUS = ("nf4", "nf4_single", "int8")
"""Their activations are not rounded."""


def settings(kind):
    config = Config()
    for name, value in KINDS[kind].items():
        setattr(config.model, name, value)
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    where = tmp_path_factory.mktemp("tiny")
    build("gqa2", adapters=False).save_pretrained(where)
    return where


def loaded(saved, kind, adapters=True):
    bits = quantise.settings(settings(kind), torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(
        saved, dtype=torch.float32, quantization_config=bits, device_map={"": "cpu"}
    )
    base.requires_grad_(False).eval()
    quantise.settle(base)
    if not adapters:
        return base
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=LORA_TARGETS)).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.2
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_only_language_linears_are_quantised(saved, kind):
    base = loaded(saved, kind, adapters=False)
    layers = base.config.text_config.num_hidden_layers
    assert quantise.check(base, KINDS[kind]["quant"]) == 7 * layers
    core = base.model
    kept = [m for m in core.visual.modules() if isinstance(m, nn.Linear)]
    assert kept and {type(m) for m in [*kept, base.lm_head]} == {nn.Linear}
    assert {m.weight.dtype for m in core.modules() if "Norm" in type(m).__name__} == {torch.float32}
    assert core.language_model.embed_tokens.weight.dtype == torch.float32


def test_a_quantised_vision_tower_is_refused(saved):
    base = loaded(saved, "nf4", adapters=False)
    mlp = base.model.visual.blocks[0].mlp
    mlp.linear_fc1 = quantise.quantised(mlp.linear_fc1, settings("nf4"))
    with pytest.raises(ConfigError, match="visual.blocks.0.mlp.linear_fc1"):
        quantise.check(base, "nf4")
    with pytest.raises(ConfigError, match="q_proj"):
        quantise.check(build("gqa2", adapters=False), "nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [True, False])
def test_logits_equal_the_stock_modules(saved, kind, adapters):
    """One image at a time: LLM.int8's outlier columns are a property of the whole product, so
    neighbours may change digits. bitsandbytes' own int8 always rounds activations: where ours does
    not, the stock forward over the dequantised weights is the truth.
    """
    model = loaded(saved, kind)
    engine = FastEngine(Qwen3VL(model), TinyTokens())
    stock = loaded(saved, kind)
    if kind == "int8":
        dequantise(stock)
    for image, row in zip(images(SIZES), ROWS, strict=True):
        fast = engine.verdict_logits(engine.encode([image]), [row], adapters)[0]
        with torch.no_grad(), switched(stock, adapters):
            truth = stock_logits(stock, engine, image, row)[-1]
        # LLM.int8 rounds activations: a value within one fp32 rounding of a rounding boundary may
        # land a whole int8 step away.
        assert relative(fast, truth) < (1e-4 if kind in CONTINUOUS else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_the_dequantised_base(saved, kind, recompute):
    """The backward pass multiplies by the weight the packed one stands for; where activations are
    not rounded that is plain autograd over the dequantised base.
    """
    model = loaded(saved, kind)
    engine = FastEngine(Qwen3VL(model), TinyTokens())
    features, answers = sampled(engine, images(SIZES))
    answered = Answered(ROWS, answers, owners([3] * 4))
    hidden = engine.score(features, answered, True, recompute=recompute)
    grads = torch.autograd.grad(hidden.square().sum(), leaves(model))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
    dequantise(model)
    hidden = FastEngine(Qwen3VL(model), TinyTokens()).score(features, answered, True)
    truth = torch.autograd.grad(hidden.square().sum(), leaves(model))
    for a, b in zip(grads, truth, strict=True):
        assert relative(a, b) < (1e-4 if kind in CONTINUOUS else 0.1)


def dequantise(model):
    """A plain linear in place of every quantised one."""
    for wrapper in list(model.get_base_model().model.language_model.layers.modules()):
        base = getattr(wrapper, "base_layer", None)
        if base is None:
            continue
        plain = nn.Linear(base.in_features, base.out_features, bias=False)
        weight = quantise.dequantised(base, torch.float32)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        wrapper.base_layer = plain


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_a_row_does_not_depend_on_its_neighbours(saved, kind):
    engine = FastEngine(Qwen3VL(loaded(saved, kind)), TinyTokens())
    prefixes = engine.prefill(engine.encode(images(SIZES)), True)
    together = engine.prompt(prefixes, [0, 1, 2, 3], ROWS).last
    for i in range(4):
        alone = engine.prompt(prefixes, [i], [ROWS[i]]).last[0]
        assert relative(alone, together[i]) < 1e-5


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_an_answer_is_worth_the_same_alone_and_in_the_batch(saved, kind):
    """Log-probs of every token, in nat."""
    engine = FastEngine(Qwen3VL(loaded(saved, kind)), TinyTokens())
    features, answers = sampled(engine, images(SIZES))
    owner = owners([3] * 4)
    with torch.no_grad():
        together = logprobs(engine, features, Answered(ROWS, answers, owner))
        pieces = together.split(answers.lengths)
        for n, image in enumerate(owner):
            alone = Answered([ROWS[image]], answers.select([n]), [0])
            found = logprobs(engine, features.select([image]), alone)
            assert (found - pieces[n]).abs().max() < 1e-5


def logprobs(engine, features, answered):
    """(tokens,) of the sampled ids, packed."""
    logits = engine.backbone.logits(engine.score(features, answered, True))
    return logits.log_softmax(-1).gather(1, answered.answers.packed()[:, None])[:, 0]


def held(linear, kind):
    """A quantised linear, ready for products."""
    modules = nn.ModuleList([quantise.quantised(linear, settings(kind))])
    quantise.settle(modules)
    return modules[0]


def test_int8_rounds_weights_alone():
    """Each by half a 127th of its row's largest, after fp16, and the product is that of the rounded
    ones.
    """
    torch.manual_seed(0)
    linear = nn.Linear(64, 40)
    x = torch.randn(9, 64)
    x[3, 7] = 80.0
    base = held(linear, "int8")
    weight = quantise.dequantised(base, torch.float64)
    largest = linear.weight.abs().amax(1, keepdim=True)
    assert ((weight - linear.weight).abs() <= largest * (0.5 / 127 + 2**-10)).all()
    truth = (x.double() @ weight.T + linear.bias.double()).detach()
    assert (quantise.product(base, x) - truth).abs().max() < 1e-5


def test_int8_weights_are_rounded_once_to_bf16():
    """No scale of its own in bf16, which would be a bias of up to a 256th per output."""
    torch.manual_seed(0)
    base = held(nn.Linear(64, 40), "int8")
    exact = quantise.dequantised(base, torch.float64)
    half = quantise.dequantised(base, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert ((half.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()
    assert torch.equal(half, exact.bfloat16())


def test_a_threshold_makes_it_llm_int8():
    """Within the rounding of weights and activations: a column with an outlier is exact in the
    16-bit part, so rows without one keep their own scale.
    """
    torch.manual_seed(0)
    linear = nn.Linear(64, 40, bias=False)
    x = torch.randn(9, 64)
    x[3, 7] = 80.0
    exact = x @ linear.weight.T
    found = quantise.product(held(linear, "llm_int8"), x)
    assert (found - exact).abs().max() < 0.06
    weights_alone = quantise.product(held(linear, "int8"), x)
    assert (found - weights_alone).abs().max() > 1e-3, "its activations are rounded"


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_random_bases_never_exist_in_full_precision(quant):
    config = Config()
    config.model.quant = quant
    model_config = build("gqa2", adapters=False).config
    model_config.text_config.num_hidden_layers = 12
    model_config.text_config.hidden_size = 256
    model_config.text_config.intermediate_size = 1024
    model_config.vision_config.out_hidden_size = 256
    with torch.device("meta"):
        shell = AutoModelForImageTextToText.from_config(model_config, dtype=torch.float32)
    with Live() as live:
        base = quantise.random_model(shell, config, torch.device("cpu"))
    assert not any(t.is_meta for t in [*base.parameters(), *base.buffers()])
    assert base.lm_head.weight is base.model.language_model.embed_tokens.weight
    assert quantise.check(base, quant) == (0 if quant == "none" else 84)
    largest = 4 * 256 * 1024
    # at most a few copies of one weight beside the model
    assert live.peak <= live.now + 4 * largest
    if quant != "none":
        modules = [m for name, m in base.named_modules() if quantise.LANGUAGE.match(name)]
        linears = [m for m in modules if hasattr(m, "in_features")]
        assert live.peak < 0.6 * 4 * sum(m.in_features * m.out_features for m in linears)


def fresh():
    """Parameters: one that 8-bit optimizers hold in 8 bits, and one that they do not."""
    torch.manual_seed(3)
    return {"big": nn.Parameter(torch.randn(16, 512)), "small": nn.Parameter(torch.randn(8, 8))}


def advance(parameters, optimizer, steps):
    for step in steps:
        torch.manual_seed(100 + step)
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_optimizer_state_round_trips_bitwise(tmp_path, name):
    config = Config()
    config.optim.name = name
    config.train.lr = 1e-2
    straight = fresh()
    optimizer = make_optimizer(list(straight.values()), config)
    advance(straight, optimizer, range(3))
    moments, numbers = checkpoint.moments(optimizer, straight)
    if name != "adamw":
        assert moments["big/state1"].dtype == torch.uint8
        assert moments["small/state1"].dtype == torch.float32
    tensors = {"adapter": straight, "optimizer": moments}
    path = checkpoint.save(tmp_path, 3, tensors, {"numbers": numbers}, keep=1)
    advance(straight, optimizer, range(3, 6))

    tensors, state = checkpoint.load(path)
    resumed = fresh()
    for key, p in resumed.items():
        p.data.copy_(tensors["adapter"][key])
    again = make_optimizer(list(resumed.values()), config)
    checkpoint.restore_moments(again, resumed, tensors["optimizer"], state["numbers"])
    advance(resumed, again, range(3, 6))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    left, _ = checkpoint.moments(optimizer, straight)
    right, _ = checkpoint.moments(again, resumed)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = Config()
    config.optim.name = "adamw8bit"
    with pytest.raises(EnvironmentFault, match="need bitsandbytes"):
        make_optimizer([nn.Parameter(torch.zeros(3))], config)
    with pytest.raises(EnvironmentFault, match="need bitsandbytes"):
        quantise.settings(settings("nf4"), torch.float32)


def test_nothing_upcasts_the_base():
    files = list((Path(__file__).parents[2] / "vise_fast").rglob("*.py"))
    assert files
    for file in files:
        assert "prepare_model_for_kbit_training(" not in file.read_text(), file


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("rows", [1, 7])
def test_weights_written_out_in_one_launch_give_the_same(monkeypatch, kind, rows):
    """As on a card: each product goes straight to its columns."""
    torch.manual_seed(4)
    linears = [nn.Linear(64, outs, bias=False) for outs in (48, 80)]
    group = FusedLinear([held(linear, kind) for linear in linears])
    x = torch.randn(rows, 64)
    grad = torch.randn(rows, 128)
    wanted = [group(x, None), group._input_gradient(grad)]
    monkeypatch.setattr(quantise, "_in_one_launch", lambda base, device: True)
    with Launches("cpu") as seen, torch.no_grad():
        found = [group(x, None), group._input_gradient(grad)]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    copies = seen.total.names["aten.copy_"]
    assert copies == (2 if kind != "int8" and rows <= quantise.FEW_ROWS else 0)
