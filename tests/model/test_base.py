"""A base as files: damaged, incomplete, hostile. Each is one line with its exit code, before
anything is computed with it; nothing that lies beside the weights runs.
"""

import json
import operator
import os
import re

import pytest
import stored
import torch
from PIL import Image
from safetensors.torch import load_file

from vise_fast import infer, nano
from vise_fast.config import schema
from vise_fast.estimate import planner
from vise_fast.model import base
from vise_fast.model import load as model
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, EnvironmentFault, NumericFault

PROOF = "import pathlib; pathlib.Path({proof!r}).write_text('ran')\nclass Mine:\n    pass\n"


def load(directory):
    return model.load(schema.load(None, ["--model.path", str(directory)]))


def refusal(directory, kind, capfd):
    """The one line that loading ends in; nothing else is said."""
    with pytest.raises(kind) as caught:
        load(directory)
    said = capfd.readouterr()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and said.out + said.err == "", said
    return text


# ---- code beside the weights ---------------------------------------------------------------------


def with_code(directory):
    proof = directory.parent / "proof"
    (directory / "code.py").write_text(PROOF.format(proof=str(proof)))
    return proof


@pytest.mark.parametrize("family", ["mine", "qwen3_vl"])
def test_code_beside_a_config_never_runs_and_nobody_is_asked(tmp_path, family, monkeypatch, capfd):
    directory = stored.base(tmp_path / "m")
    proof = with_code(directory)
    classes = {"AutoConfig": "code.Mine", "AutoModelForImageTextToText": "code.Mine"}
    stored.edit(directory / "config.json", model_type=family, auto_map=classes)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is told yes
    if family == "qwen3_vl":
        load(directory)  # the family is known without that code
    else:
        assert "family mine" in refusal(directory, ConfigError, capfd)
    assert not proof.exists()


def test_code_beside_a_tokenizer_never_runs(tmp_path, monkeypatch):
    directory = stored.base(tmp_path / "m")
    proof = with_code(directory)
    stored.edit(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["code.Mine", "code.Mine"]},
        tokenizer_class="Mine",
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = schema.load(None, ["--model.path", str(directory)])
    load(directory)
    planner.lengths_of(config, model.read_config(str(directory)))
    assert not proof.exists()


class Loud:
    """Unpickled, it leaves a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_unread(tmp_path, name, monkeypatch, capfd):
    directory = stored.base(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    torch.save({"w": Loud(tmp_path / "proof")}, directory / "pytorch_model.bin")
    (directory / name).touch()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    said = refusal(directory, ConfigError, capfd)
    assert "no model.safetensors" in said and "is a pickle" in said
    assert not (tmp_path / "proof").exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path, monkeypatch):
    directory = stored.base(tmp_path / "m")
    (directory / "pytorch_model.bin").write_bytes(b"garbage")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    load(directory)


# ---- damaged files -------------------------------------------------------------------------------


def written(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def shortened(name, kept):
    return lambda directory: stored.cut(directory / name, kept)


def removed(name):
    return lambda directory: (directory / name).unlink()


def changed(**changes):
    return lambda directory: stored.edit(directory / "config.json", **changes)


def index_of(content):
    def damage(directory):
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(content)

    return damage


DAMAGES = {
    # name: (damage, part of the line)
    "weights without content": (written("model.safetensors", b""), "model.safetensors"),
    "garbage for weights": (written("model.safetensors", b"garbage" * 99), "model.safetensors"),
    "weights cut in the header": (shortened("model.safetensors", 0.0005), "model.safetensors"),
    "weights cut near the end": (shortened("model.safetensors", 0.999), "model.safetensors"),
    "weights whose header is 2^63 long": (
        written("model.safetensors", b"\xff" * 7 + b"\x7f{}"),
        "model.safetensors",
    ),
    "a garbage index": (index_of("{x"), "model.safetensors.index.json"),
    "an index without a map": (index_of("{}"), "model.safetensors.index.json"),
    "an index of nothing": (index_of('{"weight_map": {}}'), "a file is missing"),
    "an index of a list": (index_of('{"weight_map": [1]}'), "model.safetensors.index.json"),
    "an index of an absent file": (
        index_of('{"weight_map": {"a": "gone.safetensors"}}'),
        "gone.safetensors is missing",
    ),
    "an index without end": (index_of("[" * 100_000), "model.safetensors.index.json"),
    "garbage for a tokenizer": (written("tokenizer.json", b"{garbage"), "the tokenizer of"),
    "a tokenizer that is a list": (written("tokenizer.json", b"[]"), "the tokenizer of"),
    "an empty tokenizer": (written("tokenizer.json", b"{}"), "the tokenizer of"),
    "a cut tokenizer": (shortened("tokenizer.json", 0.5), "the tokenizer of"),
    "a binary tokenizer": (written("tokenizer.json", bytes(range(256))), "the tokenizer of"),
    "no tokenizer": (removed("tokenizer.json"), "the tokenizer of"),
    "garbage for its settings": (written("tokenizer_config.json", b"{x"), "the tokenizer of"),
    "settings that are a list": (written("tokenizer_config.json", b"[1]"), "the tokenizer of"),
    "a binary chat template": (written("chat_template.jinja", b"\xff\xfe{%"), "the tokenizer of"),
    "a garbage config": (written("config.json", b"{x"), "config.json of"),
    "a config that is a list": (written("config.json", b"[1]"), "config.json of"),
    "a config without end": (written("config.json", b"[" * 100_000), "config.json of"),
    "a binary config": (written("config.json", bytes(range(256))), "config.json of"),
    "negative sizes": (changed(text_config__hidden_size=-3), "the weights of"),
    "a size that is text": (changed(text_config__hidden_size="wide"), "config.json of"),
    "no heads": (changed(text_config__num_attention_heads=0), "the weights of"),
    "no patches": (changed(vision_config__patch_size=0), "the weights of"),
    "no vision": (changed(vision_config=None), "the weights of"),
    "an unknown activation": (changed(text_config__hidden_act="evil"), "the weights of"),
    "a foreign quantisation": (changed(quantization_config={"quant_method": "gptq"}), "weights of"),
    "a head that is not stored": (changed(tie_word_embeddings=False), "lack lm_head.weight;"),
    "too many layers": (changed(text_config__num_hidden_layers=5), "layers.4."),
    "ten million layers": (changed(text_config__num_hidden_layers=10**7), "promises 10000004"),
    "ten million vision layers": (changed(vision_config__depth=10**7), "promises 10000004"),
    "a vocabulary of another size": (changed(text_config__vocab_size=10**9), "the weights of"),
    "an image token beyond the head": (changed(image_token_id=10**6), "image_token_id 1000000"),
    "a negative image token": (changed(image_token_id=-1), "image_token_id -1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_one_line(tmp_path, name, capfd):
    directory = stored.base(tmp_path / "m")
    damage, part = DAMAGES[name]
    damage(directory)
    assert part in refusal(directory, EnvironmentFault, capfd)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null", "folder", "dangling"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_what_is_no_file_is_not_opened(tmp_path, kind, file):
    directory = stored.base(tmp_path / "m")
    path = directory / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(ConfigError, match=f"no {file}"):
        load(directory)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "terabyte"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_library_is_not_left_alone_with_what_is_no_text(tmp_path, kind, file, capfd):
    """It would wait, or read without end."""
    directory = stored.base(tmp_path / "m")
    path = directory / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "terabyte":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.symlink_to(kind)
    assert file in refusal(directory, EnvironmentFault, capfd)


def test_every_tensor_is_missed_by_its_name(tmp_path):
    """A base that lacks any one of its tensors is refused; transformers would draw it anew."""
    names = sorted(load_file(nano.DIRECTORY / "model.safetensors"))
    for number, name in enumerate([*names[::9], names[-1]]):
        directory = stored.base(tmp_path / str(number))
        stored.edit_tensors(directory / "model.safetensors", operator.methodcaller("pop", name))
        with pytest.raises(EnvironmentFault, match=f"lack .*{re.escape(name)}"):
            load(directory)


def test_a_tensor_of_another_shape(tmp_path, capfd):
    directory = stored.base(tmp_path / "m")
    name = "model.language_model.layers.0.self_attn.k_proj.weight"

    def narrow(tensors):
        tensors[name] = tensors[name][:-1].clone()

    stored.edit_tensors(directory / "model.safetensors", narrow)
    assert "the weights of" in refusal(directory, EnvironmentFault, capfd)


def test_an_adapter_is_no_base(tmp_path, capfd):
    directory = stored.base(tmp_path / "m")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds an adapter" in refusal(directory, ConfigError, capfd)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, value, dtype):
    directory = stored.base(tmp_path / "m")
    name = "model.visual.blocks.2.mlp.linear_fc1.bias"

    def spoil(tensors):
        tensors[name][5] = value

    stored.edit_tensors(directory / "model.safetensors", spoil)
    config = schema.load(None, ["--model.path", str(directory), "--model.dtype", dtype])
    with pytest.raises(NumericFault, match=name):
        model.load(config)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_base_is_judged_before_it_is_quantised(tmp_path, quant):
    """Rounded to four bits, a NaN may look like a number."""
    pytest.importorskip("bitsandbytes")
    directory = stored.base(tmp_path / "m")
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 4] = float("nan")

    stored.edit_tensors(directory / "model.safetensors", spoil)
    config = schema.load(None, ["--model.path", str(directory), "--model.quant", quant])
    with pytest.raises(NumericFault, match=name):
        model.load(config)


def test_large_numbers_are_numbers():
    """A sum that overflows is looked at again."""
    base.check_finite({"w": torch.full((4,), 3e38)}, "it")
    base.check_finite({"w": torch.full((4096,), 60_000.0, dtype=torch.float16)}, "it")
    base.check_finite({"w": torch.zeros(0), "i": torch.ones(3, dtype=torch.int8)}, "it")
    with pytest.raises(NumericFault, match="it .* in b;"):
        base.check_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}, "it")


# ---- the commands --------------------------------------------------------------------------------


def test_a_verdict_that_is_no_number_is_no_answer(tmp_path, monkeypatch, capsys):
    """Exit 6, and no `p nan` on the screen."""
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(base, "check_finite", lambda *_: None)
    directory = stored.base(tmp_path / "m")

    def spoil(tensors):
        tensors["model.language_model.norm.weight"][0] = float("nan")

    stored.edit_tensors(directory / "model.safetensors", spoil)
    words = ["--model", str(directory), "--image", str(tmp_path / "x.png"), "--query", "red"]
    assert console.run(infer.main, words) == 6
    said = capsys.readouterr()
    assert "p nan" not in said.out and said.err.startswith("error: a verdict is not a number")


def test_memory_that_runs_out_is_not_called_damage():
    for fault in (MemoryError(), torch.OutOfMemoryError("full")):
        with pytest.raises(type(fault)), base.believed("it"):
            raise fault


def test_exit_codes(tmp_path, capsys):
    """As README lists them."""
    picture = tmp_path / "x.png"
    good = stored.base(tmp_path / "good")
    cut = stored.base(tmp_path / "cut")
    stored.cut(cut / "model.safetensors", 0.5)
    other = stored.base(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    Image.new("RGB", (64, 64)).save(picture)
    for directory, code in ((good, 0), (cut, 4), (other, 2)):
        words = ["--model", str(directory), "--image", str(picture), "--query", "x"]
        assert console.run(infer.main, words) == code, capsys.readouterr().err
