"""Whole runs of the embedded model on int8 and nf4 bases: they train, resume bitwise, evaluate and
export an adapter PEFT loads.
"""

import json

import peft
import pytest
import torch
from small_runs import CHANGING, SMALL, adapter, go, lines
from transformers import AutoModelForImageTextToText

from vise_fast import nano
from vise_fast.config import schema as configuration
from vise_fast.model import load as model

KINDS = {
    "int8": ["--model.quant=int8", "--optim.name=adamw8bit", "--lora.r=32"],
    "nf4": [
        "--model.quant=nf4",
        "--optim.name=paged_adamw8bit",
        "--train.micro_batch=1",
        "--train.checkpointing=true",
    ],
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    words = [*SMALL, *KINDS[request.param], "--run.report=false"]
    directory = tmp_path_factory.mktemp(request.param) / "whole"
    assert go("--run.dir", directory, "--train.steps", 3, "--run.checkpoint_every", 1, *words) == 0
    return directory, words


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_it_resumes_bitwise(run, tmp_path):
    whole, words = run
    common = ["--run.dir", tmp_path / "resumed", "--run.checkpoint_every", 1, *words]
    assert go("--train.steps", 1, *common) == 0
    assert go("--train.steps", 3, "--resume", "auto", *common) == 0
    straight, resumed = adapter(whole), adapter(tmp_path / "resumed")
    assert straight.keys() == resumed.keys() and all(
        torch.equal(straight[name], resumed[name]) for name in straight
    )
    for a, b in zip(
        lines(whole / "metrics.jsonl"), lines(tmp_path / "resumed" / "metrics.jsonl"), strict=True
    ):
        assert {k: v for k, v in a.items() if k not in CHANGING} == {
            k: v for k, v in b.items() if k not in CHANGING
        }


def test_it_trains_and_is_evaluated(run):
    directory, _ = run
    assert {"before", "after"} <= set(json.loads((directory / "evaluation.json").read_text()))
    assert any(
        tensor.abs().max() > 0 for name, tensor in adapter(directory).items() if "lora_B" in name
    )
    assert any(record["grad_norm"] > 0 for record in lines(directory / "metrics.jsonl"))


def test_the_adapter_is_fp32_and_loads_on_the_unquantised_base(run):
    directory, _ = run
    assert {tensor.dtype for tensor in adapter(directory).values()} == {torch.float32}
    base = AutoModelForImageTextToText.from_pretrained(nano.DIRECTORY)
    loaded = peft.PeftModel.from_pretrained(base, str(directory / "adapter"))
    stored = adapter(directory)
    live = {
        name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name
    }
    assert live.keys() == stored.keys() and all(
        torch.equal(live[name], stored[name]) for name in stored
    )


def test_it_starts_from_its_own_adapter(run):
    directory, words = run
    config = configuration.load(
        None, [*map(str, words), f"--lora.init_from={directory / 'adapter'}"]
    )
    policy = model.load(config)
    stored = adapter(directory)
    assert all(
        torch.equal(p, stored[name.replace(".default", "")])
        for name, p in policy.parameters().items()
    )
