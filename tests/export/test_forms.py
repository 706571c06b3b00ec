"""The forms of an export, by the command: each loads as it promises and computes what the adapter
computes.
"""

import json
import shlex

import pytest
import stored
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vise_fast import merge, nano
from vise_fast.config import schema
from vise_fast.export import __main__ as export
from vise_fast.export import cards, push
from vise_fast.model import load as model
from vise_fast.system import console

ROWS = torch.tensor([[1, 9, 12, 20, 31, 2], [3, 4, 7, 44, 40, 1]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return stored.adapter(tmp_path_factory.mktemp("forms") / "adapter")


def run(*words):
    return console.run(export.main, [str(word) for word in words])


@pytest.fixture
def made(adapter, tmp_path):
    """Exports the adapter with these words; the directory."""

    def make(*words):
        assert run("--adapter", adapter, "--out", tmp_path / "out", *words) == 0
        return tmp_path / "out"

    return make


@torch.no_grad()
def logits(loaded):
    return loaded.eval()(input_ids=ROWS).logits


def base(path=nano.DIRECTORY, **settings):
    return AutoModelForImageTextToText.from_pretrained(path, **settings)


def tuned(directory):
    return PeftModel.from_pretrained(base(), str(directory))


def test_portable_is_what_the_run_left_and_whole(adapter, made):
    out = made("--form", "portable")
    assert {p.name for p in out.iterdir()} == {p.name for p in adapter.iterdir()}
    assert torch.equal(logits(tuned(out)), logits(tuned(adapter)))
    assert "form portable" in (out / "README.md").read_text()


def test_portable_completes_an_adapter_that_lacks_files(adapter, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((adapter / name).read_bytes())
    assert run("--adapter", bare, "--out", tmp_path / "out") == 0
    missing = {path.name for path in adapter.iterdir()} - {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert missing == {"training.yaml"}


def test_the_base_can_be_named_anew(made):
    out = made("--model", "org/base")
    settings = json.loads((out / "adapter_config.json").read_text())
    text = (out / "README.md").read_text()
    assert settings["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in text and 'BASE = "org/base"' in text
    assert "vllm serve org/base --enable-lora" in text


def test_a_name_with_marks_in_it_stays_a_name(adapter, tmp_path):
    """A directory may be called anything; the card stays Python, shell and YAML."""
    where = stored.base(tmp_path / "my \\1 'model'")
    text = cards.exported(adapter / "README.md", where.name, [], connector=True)
    assert f"BASE = {json.dumps(where.name)}" in text
    assert f"vllm serve {shlex.quote(where.name)} --enable-lora" in text
    assert f"base_model: {where.name}" in text


@pytest.mark.parametrize("copy", [[], ["--copy"]])
def test_linked_is_a_whole_model_directory_that_computes_the_same(adapter, made, copy):
    out = made("--form", "linked", *copy)
    assert (out / "model.safetensors").is_symlink() != bool(copy)
    whole = base(out)
    assert [name for name, _ in whole.named_parameters() if "lora_" in name]
    assert (logits(whole) - logits(tuned(adapter))).abs().max() == 0


def test_merged_computes_the_same_and_needs_no_peft(adapter, made, capsys):
    out = made("--form", "merged")
    said = capsys.readouterr().out
    assert "stored as float32" in said and "rounding" in said
    plain = base(out)
    assert not [name for name, _ in plain.named_parameters() if "lora_" in name]
    torch.testing.assert_close(logits(plain), logits(tuned(adapter)), rtol=1e-4, atol=1e-4)
    assert (out / "preprocessor_config.json").is_file()
    assert "base_model_relation: finetune" in (out / "README.md").read_text()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_merged_part_of_the_way(adapter, made, alpha):
    weights = load_file(made("--form", "merged", "--alpha", alpha) / "model.safetensors")
    whole = tuned(adapter).merge_and_unload().state_dict()
    for name, before in base().state_dict().items():
        if name in weights:
            wanted = before + alpha * (whole[name] - before)
            torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_language_only_leaves_the_projectors_alone_and_says_how_much_goes(adapter, made, capsys):
    out = made("--form", "language-only")
    assert "of the update's squared size" in capsys.readouterr().out
    stripped = tuned(adapter)
    for name, factor in stripped.named_parameters():
        if "lora_B" in name and ".visual." in name:
            factor.data.zero_()
    assert not [n for n, _ in tuned(out).named_parameters() if "lora_" in n and ".visual." in n]
    assert torch.equal(logits(tuned(out)), logits(stripped))
    assert "--enable-tower-connector-lora --max" not in (out / "README.md").read_text()


def test_the_average_of_an_adapter_with_itself_is_the_adapter(adapter, tmp_path):
    out = tmp_path / "mean"
    assert run("--average", adapter, adapter, "--out", out) == 0
    torch.testing.assert_close(logits(tuned(out)), logits(tuned(adapter)), rtol=1e-4, atol=1e-4)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert model.load(schema.load(None, []), str(out)).parameters()


# ---- what rounding takes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coarse(adapter, tmp_path_factory):
    """A bf16 base, and an adapter that changes less than it can tell."""
    home = tmp_path_factory.mktemp("coarse")
    half = stored.base(home / "half")
    stored.edit(half / "config.json", dtype="bfloat16")
    stored.edit_tensors(
        half / "model.safetensors",
        lambda found: found.update({n: t.bfloat16() for n, t in found.items()}),
    )
    assert run("--adapter", adapter, "--out", home / "shy", "--alpha", "1e-5") == 0
    return ["--adapter", home / "shy", "--model", half, "--form", "merged"]


def test_a_merge_that_throws_most_away_is_refused_and_leaves_nothing(coarse, tmp_path, capsys):
    assert run(*coarse, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "too coarse" in said and "--dtype float32" in said and "--lossy" in said
    assert not list(tmp_path.iterdir())


def test_it_is_made_where_it_is_asked_for_all_the_same(coarse, tmp_path, capsys):
    assert run(*coarse, "--out", tmp_path / "out", "--lossy") == 0
    assert "too coarse" in capsys.readouterr().err
    assert base(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_stored_in_float32_nothing_is_lost(coarse, tmp_path, capsys):
    assert run(*coarse, "--out", tmp_path / "out", "--dtype", "float32") == 0
    shown = capsys.readouterr()
    assert "too coarse" not in shown.err and "stored as float32" in shown.out
    assert base(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_merge_is_the_same_command(adapter, tmp_path):
    words = ["--adapter", str(adapter), "--out"]
    assert console.run(merge.main, [*words, str(tmp_path / "one")]) == 0
    assert run(*words, tmp_path / "two", "--form", "merged") == 0
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- the hub -------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub's client; remembers what it was asked for."""

    def __init__(self, fault=None):
        self.calls = []
        self.fault = fault

    def create_repo(self, name, **options):
        if self.fault:
            raise self.fault
        self.calls.append((name, options))

    def upload_folder(self, **options):
        self.calls.append(options)
        return "the place"


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: found)
    return found


def test_a_push_is_dry_until_it_is_asked_for(hub, made, capsys):
    made("--push", "me/mine")
    said = capsys.readouterr().out
    assert not hub.calls and "nothing was sent" in said and "adapter_model.safetensors" in said


def test_a_push_sends_the_directory_to_a_private_repository(hub, made, capsys):
    out = made("--push", "me/mine", "--yes")
    assert hub.calls == [
        ("me/mine", {"private": True, "exist_ok": True}),
        {"repo_id": "me/mine", "folder_path": out},
    ]
    assert "the place" in capsys.readouterr().out


def test_a_hub_that_refuses_is_one_line_and_the_directory_stays(hub, adapter, tmp_path, capsys):
    hub.fault = OSError("no token\nmore")
    words = ["--adapter", adapter, "--out", tmp_path / "out", "--push", "me/mine", "--yes"]
    assert run(*words) == 4
    assert "no token" in capsys.readouterr().err and (tmp_path / "out" / "README.md").is_file()


# ---- wrong words ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--out", "{out}"],
        ["--adapter", "{a}"],
        ["--adapter", "{a}", "--out", "{a}"],
        ["--adapter", "{a}", "--out", "{out}", "--form", "zip"],
        ["--adapter", "{a}", "--out", "{out}", "--alpha", "much"],
        ["--adapter", "{a}", "--out", "{out}", "--alpha", "nan"],
        ["--adapter", "{a}", "--out", "{out}", "--dtype", "int8"],
        ["--adapter", "{a}", "--out", "{out}", "{a}"],
        ["--average", "{a}", "--out", "{out}"],
        ["--average", "{a}", "{a}", "--adapter", "{a}", "--out", "{out}"],
        ["--adapter", "{a}", "--out", "{out}", "--push", "nobody"],
        ["--adapter", "{a}", "--out", "{out}", "--push", "a/b/c"],
        ["--adapter", "{a}", "--out", "{out}", "--push", "me/mine", "--form", "linked"],
        ["--adapter", "{a}", "--out", "{out}", "--model", "org/not-here", "--form", "linked"],
    ],
)
def test_words_that_cannot_be_meant_are_refused(words, adapter, tmp_path, hub):
    out = tmp_path / "out"
    assert run(*(word.format(a=adapter, out=out) for word in words)) == 2
    assert not out.exists() and not hub.calls
