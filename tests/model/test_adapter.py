"""An adapter as files: damaged, incomplete, foreign. What vise_fast wrote is held to its manifest
by every command that reads one; what others wrote must be a plain LoRA that fits.
"""

import json
import os
import shutil

import pytest
import stored
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import AutoModelForImageTextToText

from vise_fast import infer, merge, nano, train
from vise_fast.config import schema
from vise_fast.evaluate import __main__ as evaluate
from vise_fast.model import load as model
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, EnvironmentFault, NumericFault

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return stored.adapter(tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture
def copy(exported, tmp_path):
    """A copy as a run left it."""
    return shutil.copytree(exported, tmp_path / "adapter")


@pytest.fixture
def foreign(copy):
    """A copy as somebody else would have written it."""
    (copy / "manifest.json").unlink()
    return copy


def load(directory, say=None):
    return model.load(schema.load(None, []), str(directory), say=say or (lambda text: None))


def refusal(directory, kind, capfd):
    with pytest.raises(kind) as caught:
        load(directory)
    said = capfd.readouterr()
    assert "\n" not in str(caught.value) and said.out + said.err == "", said
    return str(caught.value)


# ---- the manifest --------------------------------------------------------------------------------


def test_a_whole_adapter_loads_in_silence(copy):
    said = []
    load(copy, said.append)
    assert said == []


@pytest.mark.parametrize(
    "name", sorted({WEIGHTS, SETTINGS, "preprocessor_config.json", "tokenizer.json"})
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "pipe", "grow"])
def test_every_damage_is_seen(copy, name, damage, capfd):
    file = copy / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage != "remove":
        kept = {"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b"", "grow": data + b" "}
        file.write_bytes(kept[damage])
    said = refusal(copy, EnvironmentFault, capfd)
    assert name in said and str(copy) in said


def test_the_model_card_may_be_edited(copy):
    (copy / "README.md").write_text("my own words")
    load(copy)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 1, "files": [1]}', "[" * 100_000, "\0"]
)
def test_a_damaged_manifest(copy, content, capfd):
    (copy / "manifest.json").write_text(content)
    assert "manifest.json cannot be read" in refusal(copy, EnvironmentFault, capfd)


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_a_manifest_that_does_not_know_what_is_loaded(copy, name, capfd):
    content = json.loads((copy / "manifest.json").read_text())
    del content["files"][name]
    (copy / "manifest.json").write_text(json.dumps(content))
    assert f"does not know {name}" in refusal(copy, EnvironmentFault, capfd)


ENTRIES = {
    "a NUL": ("a\0b", {"bytes": 0, "sha256": ""}),
    "the folder above": ("..", {"bytes": 0, "sha256": ""}),
    "no entry": (WEIGHTS, None),
    "a size in words": (WEIGHTS, {"bytes": "many", "sha256": ""}),
    "a list": (WEIGHTS, [1]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_manifest_of_odd_entries(copy, name, capfd):
    file, entry = ENTRIES[name]
    content = json.loads((copy / "manifest.json").read_text())
    content["files"][file] = entry
    (copy / "manifest.json").write_text(json.dumps(content))
    assert "the adapter" in refusal(copy, EnvironmentFault, capfd)


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, endless])
@pytest.mark.parametrize("name", ["manifest.json", SETTINGS, WEIGHTS, "tokenizer.json"])
def test_what_is_no_file_is_not_read(copy, make, name, capfd):
    """Neither waited for nor read without end, hashed or not."""
    (copy / name).unlink()
    make(copy / name)
    assert name in refusal(copy, EnvironmentFault, capfd)
    (copy / "manifest.json").unlink()
    if name != "manifest.json":
        assert name in refusal(copy, (ConfigError, EnvironmentFault), capfd)


def test_a_text_without_end_is_not_read(foreign, capfd):
    os.truncate(foreign / SETTINGS, 2**40)
    assert "larger than any such file" in refusal(foreign, EnvironmentFault, capfd)


def words_of(tmp_path, directory):
    """Every command that reads an adapter."""
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "x.png")
    small = ["--eval.attention", "false", "--scenes", "2"]
    picture = ["--image", str(tmp_path / "x.png"), "--query", "red"]
    run = ["--run.dir", str(tmp_path / "new"), "--train.steps", "1", "--eval.scenes", "0"]
    yield infer.main, ["--adapter", str(directory), *picture]
    yield evaluate.main, ["--adapter", str(directory), *small]
    yield merge.main, ["--adapter", str(directory), "--out", str(tmp_path / "out")]
    yield train.main, ["--lora.init_from", str(directory), *run, "--train.batch", "1"]


def test_every_command_refuses_a_damaged_adapter(copy, tmp_path, capsys):
    """Exit 4 and one line, before a base is loaded; nothing is left behind."""
    stored.cut(copy / WEIGHTS, 0.5)
    for main, words in words_of(tmp_path, copy):
        assert console.run(main, words) == 4
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "the adapter" in said[0] and WEIGHTS in said[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_a_foreign_adapter_is_taken_and_said_so(foreign, tmp_path, capsys):
    for main, words in words_of(tmp_path, foreign):
        assert console.run(main, words) == 0
        assert "has no manifest.json" in capsys.readouterr().err


# ---- foreign ones --------------------------------------------------------------------------------


def set_to(**changes):
    return lambda directory: stored.edit(directory / SETTINGS, **changes)


def tensors(change):
    return lambda directory: stored.edit_tensors(directory / WEIGHTS, change)


def renamed(new):
    return lambda found: found.update({new: found.pop(KEY)})


def retyped(dtype):
    return lambda found: found.update({KEY: found[KEY].to(dtype)})


REFUSED = {
    # name: (damage, kind, part of the line)
    "another kind": (set_to(peft_type="LOHA"), ConfigError, "of kind LOHA"),
    "no kind": (set_to(peft_type=None), ConfigError, "of kind None"),
    "DoRA": (set_to(use_dora=True), ConfigError, "sets use_dora"),
    "trained biases": (set_to(bias="all"), ConfigError, "sets bias"),
    "whole modules": (set_to(modules_to_save=["lm_head"]), ConfigError, "sets modules_to_save"),
    "layers twice": (set_to(layer_replication=[[0, 4]]), ConfigError, "sets layer_replication"),
    "ranks by layer": (set_to(rank_pattern={"q_proj": 2}), ConfigError, "sets rank_pattern"),
    "another rank": (set_to(r=5), ConfigError, "another base"),
    "rank 0": (set_to(r=0), EnvironmentFault, "the adapter"),
    "a rank that is text": (set_to(r="many"), EnvironmentFault, "rank is 'many'"),
    "no number for alpha": (set_to(lora_alpha=float("nan")), EnvironmentFault, "alpha is nan"),
    "a list for alpha": (set_to(lora_alpha=[1]), EnvironmentFault, "the adapter"),
    "targets that are nowhere": (set_to(target_modules=["zzz"]), EnvironmentFault, "the adapter"),
    "a broken pattern": (set_to(target_modules="(((("), EnvironmentFault, "the adapter"),
    "a tensor of nobody": (tensors(renamed("base_model.model.x.lora_A.weight")), ConfigError, "x"),
    "a tensor without a name": (tensors(renamed("x")), ConfigError, "another base"),
    "a third factor": (tensors(renamed(KEY.replace("_A", "_C"))), ConfigError, "another base"),
    "a bias": (tensors(renamed(KEY.replace("lora_A.weight", "bias"))), ConfigError, "another base"),
    "whole numbers": (tensors(retyped(torch.int32)), ConfigError, "another base"),
    "a tensor that is missing": (tensors(lambda t: t.pop(KEY)), EnvironmentFault, f"{KEY} is miss"),
    "no tensors": (tensors(lambda t: t.clear()), EnvironmentFault, "is missing"),
    "a number that is none": (
        tensors(lambda t: t[KEY].view(-1)[0].fill_(float("nan"))),
        NumericFault,
        "q_proj.lora_A",
    ),
    "cut weights": (lambda d: stored.cut(d / WEIGHTS, 0.7), EnvironmentFault, "the adapter"),
    "empty weights": (lambda d: stored.cut(d / WEIGHTS, 0), EnvironmentFault, "the adapter"),
    "garbage settings": (lambda d: stored.cut(d / SETTINGS, 0.5), EnvironmentFault, "the adapter"),
    "no settings": (lambda d: (d / SETTINGS).unlink(), ConfigError, f"no {SETTINGS}"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), ConfigError, f"no {WEIGHTS}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_foreign_adapter_that_does_not_fit_is_one_line(foreign, name, capfd):
    damage, kind, part = REFUSED[name]
    damage(foreign)
    assert part in refusal(foreign, kind, capfd)


class Loud:
    """Unpickled, it leaves a folder."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_pickled_adapter_is_not_read(foreign, tmp_path, capfd):
    (foreign / WEIGHTS).unlink()
    torch.save({"w": Loud(tmp_path / "proof")}, foreign / "adapter_model.bin")
    assert f"no {WEIGHTS}" in refusal(foreign, ConfigError, capfd)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("way", ["pissa", "olora", "gaussian", "loftq", False])
def test_how_others_began_changes_no_base(foreign, way):
    """PEFT would begin anew in that way, and some change the base's own weights."""
    stored.edit(foreign / SETTINGS, init_lora_weights=way)
    found = load(foreign).model.get_base_model().state_dict()
    plain = AutoModelForImageTextToText.from_pretrained(nano.DIRECTORY).state_dict()
    for name, weight in found.items():
        if "lora_" not in name:
            assert torch.equal(weight, plain[name.replace("base_layer.", "")]), name


def scalings(peft_model):
    layers = [(n, m) for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)]
    return {name: layer.scaling["default"] for name, layer in layers}


def test_scaled_as_peft_scales(foreign):
    """alpha_pattern and use_rslora are PEFT's own business and end up in the same numbers."""
    stored.edit(foreign / SETTINGS, use_rslora=True, alpha_pattern={"q_proj": 3})
    base = AutoModelForImageTextToText.from_pretrained(nano.DIRECTORY)
    stock = PeftModel.from_pretrained(base, str(foreign))
    ours = load(foreign).model
    found, wanted = map(scalings, (ours, stock))
    assert found == wanted and len(set(found.values())) == 2


def test_peft_loads_what_was_exported(exported):
    """The manifest beside it is no hindrance."""
    base = AutoModelForImageTextToText.from_pretrained(nano.DIRECTORY)
    stock = PeftModel.from_pretrained(base, str(exported))
    ours = load(exported).parameters()
    for name, factor in stock.named_parameters():
        if "lora_" in name:
            assert torch.equal(factor, ours[name])
    content = json.loads((exported / "manifest.json").read_text())
    assert {WEIGHTS, SETTINGS} <= content["files"].keys()
