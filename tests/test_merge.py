"""Merging: equal to the adapter in fp32, and honest about what a coarse dtype takes away."""

import pytest
import torch
from small_engines import ROWS, SIZES, stock_inputs
from tiny import SHAPES, TinyTokens, build, images

from vise_fast import merge
from vise_fast.config import schema as config
from vise_fast.engine.fast import FastEngine
from vise_fast.model import load as model
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.model.saved import export as adapter
from vise_fast.system.errors import ConfigError


def shrunk(policy, size):
    for name, p in policy.named_parameters():
        if "lora_" in name:
            p.data *= size**0.5
    return policy


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_merged_fp32_model_equals_base_with_adapter(shape):
    policy = build(shape)
    inputs = stock_inputs(
        FastEngine(Qwen3VL(build(shape)), TinyTokens()), images(SIZES)[0], ROWS[0]
    )
    truth = policy(**inputs, use_cache=False).logits
    count = sum("lora_A" in name for name, _ in policy.named_parameters())
    loss = merge.merge(policy)
    plain = policy.base_model.unload()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert (plain(**inputs, use_cache=False).logits - truth).abs().max() / truth.abs().max() < 1e-5
    assert (
        loss.kept == pytest.approx(1.0, abs=1e-5)
        and loss.relative < 1e-5
        and loss.matrices == count
    )


@torch.no_grad()
def test_bf16_keeps_a_large_update_and_loses_a_small_one():
    large, small = (
        merge.merge(shrunk(build("gqa2").to(torch.bfloat16), size)) for size in (1.0, 1e-6)
    )
    assert large.kept > 0.98 and large.relative < 0.1
    assert small.relative > 0.5, "most of a tiny update is rounding noise"
    assert small.unmoved > 0.9 * small.touched and large.unmoved < 0.2 * large.touched


@torch.no_grad()
def test_rounding_figures_by_hand():
    loss = merge.Loss()
    loss.add(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 0.0, 0.0]))
    assert (loss.relative, loss.kept, loss.touched, loss.unmoved) == (0.8, 9 / 25, 2, 1)


def test_an_empty_update_loses_nothing():
    policy = build("gqa2")
    shrunk(policy, 0.0)
    loss = merge.merge(policy)
    assert (loss.relative, loss.kept, loss.touched) == (0.0, 1.0, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with an adapter on the shipped model."""
    settings = config.load(None, [])
    policy = model.load(settings)
    torch.manual_seed(0)
    for name, p in policy.parameters().items():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    policy.backbone.refresh()
    run = tmp_path_factory.mktemp("run")
    adapter.export(policy, settings, run / "adapter")
    (run / "config.yaml").write_text(config.to_yaml(settings))
    return run, policy


@torch.no_grad()
def test_the_command_makes_a_model_that_answers_like_the_adapter(trained, tmp_path, capsys):
    run, policy = trained
    assert merge.main(["--adapter", str(run / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "stored as float32" in said and "rounding" in said
    merged = model.load(config.load(None, ["--model.path", str(tmp_path / "merged")]))
    assert merged.tokens.style.name == policy.tokens.style.name, (
        "the prompt style travels with the model"
    )
    pictures, row = (
        images([(128, 128)]),
        [policy.tokens.verdict_row(policy.tokens.style.verify("red circle"))],
    )
    one, two = (FastEngine(p.backbone, p.tokens) for p in (policy, merged))
    a, b = (
        one.verdict_logits(one.encode(pictures), row, True),
        two.verdict_logits(two.encode(pictures), row, False),
    )
    assert (a - b).abs().max() / a.abs().max() < 1e-4
    assert not list(tmp_path.glob("*.partial"))


def test_dtype_of_the_base_is_kept_and_the_loss_is_a_warning(trained, tmp_path, capsys):
    run, _ = trained
    base = tmp_path / "bf16"
    merge.main(["--adapter", str(run / "adapter"), "--out", str(base)])
    half = model.load(config.load(None, ["--model.path", str(base), "--model.dtype=bfloat16"]))
    half.model.base_model.unload().save_pretrained(str(base))
    shy = model.load(config.load(None, []))
    for name, p in shy.parameters().items():
        if "lora_B" in name:
            p.data.normal_(0, 1e-7)
    adapter.export(shy, config.load(None, []), tmp_path / "shy")
    capsys.readouterr()
    assert (
        merge.main(
            [
                "--adapter",
                str(tmp_path / "shy"),
                "--model",
                str(base),
                "--out",
                str(tmp_path / "out"),
                "--lossy",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert "stored as bfloat16" in shown.out and "too coarse" in shown.err
    again = model.load(
        config.load(None, ["--model.path", str(tmp_path / "out"), "--model.dtype=bfloat16"])
    )
    assert again.backbone.dtype == torch.bfloat16


def test_nothing_is_overwritten(trained, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        merge.main(["--adapter", str(trained[0] / "adapter"), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--adapter", "x"],
        ["--out", "x"],
        ["--adapter", "nowhere", "--out", "x"],
        ["--adaptor", "x"],
    ],
)
def test_wrong_words_are_config_errors(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        merge.main(words)
    assert not list(tmp_path.iterdir())
