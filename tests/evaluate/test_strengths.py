"""Figures over alpha: what a share of the update is, that nothing of it stays, what is written."""

import json

import pytest
import stored
import torch

from vise_fast.config import schema
from vise_fast.engine.choose import open_engine
from vise_fast.evaluate import __main__ as command
from vise_fast.evaluate import strengths
from vise_fast.evaluate.held_out import compare
from vise_fast.images.sources import open_source
from vise_fast.model import load as model
from vise_fast.model.load import grid_multiple
from vise_fast.system import console
from vise_fast.system.errors import ConfigError


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return stored.adapter(tmp_path_factory.mktemp("strengths") / "adapter")


@pytest.fixture(scope="module")
def loaded(adapter):
    words = ["--lora.r", "4", "--lora.alpha", "8", "--eval.scenes", "4"]
    config = schema.load(None, words)
    policy = model.load(config, str(adapter))
    source = open_source(config, grid_multiple("nano"), say=print)
    return config, policy, source, open_engine(policy, config, print)


def masters(policy):
    return {name: factor.detach().clone() for name, factor in policy.parameters().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_only_the_up_factors_are_scaled_and_all_are_laid_back(loaded):
    _, policy, _, _ = loaded
    before = masters(policy)
    with strengths.strength(policy, 0.3):
        for name, factor in policy.parameters().items():
            share = 0.3 if ".lora_B." in name else 1.0
            assert torch.equal(factor, before[name] * share), name
    assert same(masters(policy), before), ".3 times a number, over .3, is not always the number"


def test_they_are_laid_back_after_a_fault(loaded):
    _, policy, _, _ = loaded
    before = masters(policy)
    with pytest.raises(RuntimeError), strengths.strength(policy, 0.0):
        raise RuntimeError
    assert same(masters(policy), before)


def test_none_is_the_base_and_one_the_adapter(loaded):
    config, policy, source, engine = loaded
    base, whole = compare(engine, source, config)
    found = dict(strengths.measure(policy, engine, source, config, [0.0, 0.5, 1.0]))
    assert found[0.0].values == base.values and found[1.0].values == whole.values
    assert found[0.5].values not in (base.values, whole.values)
    assert compare(engine, source, config)[1].values == whole.values


def test_what_is_written_is_what_is_read(loaded):
    config, policy, source, engine = loaded
    found = dict(strengths.measure(policy, engine, source, config, [0.0, 2.0]))
    again = strengths.read(json.loads(json.dumps(strengths.write_down(found))))
    assert {a: r.json() for a, r in again.items()} == {a: r.json() for a, r in found.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"strengths": {}},
        {"strengths": [1]},
        {"strengths": [{"alpha": "1"}]},
        {"strengths": [{"alpha": float("nan")}]},
        {"strengths": [{"alpha": 1.0}]},
        {
            "strengths": [
                {"alpha": a, "n": a, "marks": {}, "plain": {}, "layers": []} for a in (1, 2)
            ]
        },
    ],
)
def test_what_was_not_written_by_it_is_refused(content):
    with pytest.raises(ValueError, match=r"."):
        strengths.read(content)


@pytest.mark.parametrize("words", ["", "a", "0,,1", "-1", "nan", "inf", "0,5"])
def test_alphas_that_cannot_be_meant(words):
    with pytest.raises(ConfigError, match="write --alphas"):
        strengths.parsed(words)


def test_the_command_writes_what_the_report_reads(adapter, tmp_path, capsys):
    file = tmp_path / strengths.FILE
    words = ["--adapter", str(adapter), "--model", "nano", "--alphas", "1,0", "--scenes", "2"]
    assert console.run(command.main, [*words, "--json", str(file)]) == 0
    assert "alpha 1" in capsys.readouterr().out
    assert list(strengths.read(json.loads(file.read_text()))) == [0.0, 1.0]
    assert console.run(command.main, ["--alphas", "0,1"]) == 2
    assert "--adapter" in capsys.readouterr().err
