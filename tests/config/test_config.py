"""Configuration: layers, presets, faults of one line, help, the shipped files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from vise_fast.config import schema as config
from vise_fast.config import settings
from vise_fast.config.schema import Config, load, to_yaml
from vise_fast.system.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NO_NANO = ["--model.path", "some/base"]  # leaves the schema's own defaults


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def complaint(path: Path | None = None, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, words)
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def get(conf: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(conf, section), name)


# -- overrides -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--train.steps", "50"], "train.steps", 50),
        (["--train.steps=50"], "train.steps", 50),
        (["--train.steps", "5", "--train.steps", "6"], "train.steps", 6),
        (["--train.steps", "5.0"], "train.steps", 5),
        (["--train.lr", "1e-6"], "train.lr", 1e-6),  # YAML 1.1 reads this as text
        (["--train.lr=7.0e-4"], "train.lr", 7e-4),
        (["--train.checkpointing"], "train.checkpointing", True),
        (["--train.checkpointing", "--train.steps", "5"], "train.checkpointing", True),
        (["--train.checkpointing", "no"], "train.checkpointing", False),
        (["--train.checkpointing=false"], "train.checkpointing", False),
        (["--view.kinds", "flip"], "view.kinds", ("flip",)),
        (["--view.kinds", "flip,crop"], "view.kinds", ("flip", "crop")),
        (["--view.kinds", "[flip, crop]"], "view.kinds", ("flip", "crop")),
        (["--view.scale", "0.5,2"], "view.scale", (0.5, 2.0)),
        (["--view.scale=[0.5, 2]"], "view.scale", (0.5, 2.0)),
        (["--run.loggers", "[]"], "run.loggers", ()),
        (["--run.loggers", "tensorboard, wandb"], "run.loggers", ("tensorboard", "wandb")),
        (["--data.dir", "photos"], "data.dir", "photos"),
        (["--data.dir", "2024"], "data.dir", "2024"),
        (["--data.dir", "no"], "data.dir", "no"),
        (["--data.dir", "1e3"], "data.dir", "1e3"),
        (["--data.dir", "my: photos"], "data.dir", "my: photos"),
        (["--data.dir=a=b"], "data.dir", "a=b"),
        (["--data.dir", "-x"], "data.dir", "-x"),
        (["--data.dir", "null"], "data.dir", None),
        (["--data.dir="], "data.dir", None),
        (["--memory.budget_gb", "auto"], "memory.budget_gb", "auto"),
        (["--memory.budget_gb", "7.5"], "memory.budget_gb", 7.5),
        (["--memory.budget_gb", "null"], "memory.budget_gb", None),
        (["--memory.budget_gb", "none"], "memory.budget_gb", None),
        (["--model.quant", "none"], "model.quant", "none"),
        (["--model.device", "cuda:3"], "model.device", "cuda:3"),
    ],
)
def test_an_override_is_taken(words, key, value):
    taken = get(load(None, words), key)
    assert taken == value and type(taken) is type(value)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--train.steps", "abc"], ["train.steps", "'abc'", "an integer >= 1"]),
        (["--train.steps", "0"], ["train.steps", "'0'", ">= 1"]),
        (["--train.steps", "1.5"], ["train.steps", "'1.5'", "an integer"]),
        (["--train.steps", "5e1"], ["train.steps", "'5e1'", "an integer"]),
        (["--train.steps", "true"], ["train.steps", "true", "an integer"]),
        (["--train.steps", "null"], ["train.steps", "null", "an integer"]),
        (["--train.steps", "[1]"], ["train.steps", "an integer"]),
        (["--train.steps", "{a: 1}"], ["train.steps", "an integer"]),
        (["--train.steps", ""], ["train.steps", "an integer"]),
        (["--train.steps"], ["train.steps", "no value", "an integer"]),
        (["--train.steps", "--train.lr", "1"], ["train.steps", "no value"]),
        (["--train.lr", ".nan"], ["train.lr", "a number > 0"]),
        (["--train.lr", ".inf"], ["train.lr", "a number > 0"]),
        (["--train.lr", "-1"], ["train.lr", "a number > 0"]),
        (["--train.lr", "[", "--x.y"], ["x.y"]),
        (["--train.lr", "["], ["train.lr", "'['", "a number > 0"]),
        (["--train.checkpointing", "maybe"], ["train.checkpointing", "true or false"]),
        (["--view.scale", "0.9"], ["view.scale", "2 numbers"]),
        (["--view.scale", "1,2,3"], ["view.scale", "2 numbers"]),
        (["--view.scale", "[a, b]"], ["view.scale", "2 numbers"]),
        (["--view.kinds", "flop"], ["view.kinds", "flop", "affine, crop, flip"]),
        (["--view.kinds", "[]"], ["view.kinds", "affine, crop, flip"]),
        (["--model.quant", "int4"], ["model.quant", "'int4'", "none, int8, nf4"]),
        (["--model.device", "gpu"], ["model.device", "'gpu'", "cuda:N"]),
        (["--model.path", ""], ["model.path", "text"]),
        (["--memory.budget_gb", "much"], ["memory.budget_gb", "a number or 'auto' or null"]),
        (["--memory.budget_gb", "-3"], ["memory.budget_gb", "positive"]),
        (["--lora.dropout", "1"], ["lora.dropout", "< 1"]),
        (["--train.seed", "-1"], ["train.seed", ">= 0"]),
        (["--train.seed", str(2**64)], ["train.seed", "too large"]),
        (["--train.lr", "1e300"], ["train.lr", "too large"]),
        (["--ghost.sigma_px", "1e-320"], ["ghost.sigma_px", "a number >= 0.001 and <= 500"]),
        (["--ghost.sigma_px", "1e4"], ["ghost.sigma_px", "a number >= 0.001 and <= 500"]),
        (["--ghost.radius_sigmas", "1e10"], ["ghost.radius_sigmas", "<= 10"]),
        (["--data.max_header_pixels", "1e9"], ["data.max_header_pixels", "<= 89000000"]),
        (["--steps", "5"], ["'steps'", "did you mean train.steps?"]),
        (["--lr=1"], ["'lr'", "did you mean train.lr?"]),
        (["--trian.steps", "5"], ["'trian.steps'", "did you mean train.steps?"]),
        (["--train.step", "5"], ["did you mean train.steps?"]),
        (["--rollout.sample", "5"], ["did you mean rollout.samples?"]),
        (["--data.max_pixel", "5"], ["did you mean data.max_pixels?"]),
        (["--zzz.qqq", "5"], ["'zzz.qqq'", "--help"]),
        (["--train", "5"], ["'train'", "section", "train.steps"]),
        (["--train.steps.more", "5"], ["'train.steps.more'", "did you mean"]),
        (["steps"], ["'steps'", "--section.key value"]),
        (["-x"], ["'-x'"]),
        (["--"], ["unknown key"]),
    ],
)
def test_a_wrong_override_is_one_line(words, parts):
    said = complaint(None, *words)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    "words, part",
    [
        (["--rollout.samples", "1"], "rollout.samples to 2 or more"),
        (["--rollout.samples", "1", "--update.advantage", "grpo"], "rollout.samples to 2 or more"),
        (
            ["--rollout.samples", "1", "--update.advantage", "dr_grpo"],
            "rollout.samples to 2 or more",
        ),
        (["--update.advantage=ema", "--rollout.temperature=0.9"], "update.tempered"),
        (["--reward.preset=as_released", "--update.consensus=0.5"], "update.consensus"),
        (["--update.beta_min", "1", "--update.beta_max", "0.5"], "beta_min"),
        (["--update.beta", "1000"], "beta_max"),
        (["--data.min_pixels", "400000"], "min_pixels"),
        (["--train.micro_batch", "9", "--train.batch", "8"], "micro_batch"),
        (["--train.warmup", "9", "--train.steps", "8"], "warmup"),
        (["--view.scale", "1.1,0.9"], "view.scale"),
        (["--view.scale", "0,1"], "view.scale"),
        (["--view.crop", "0.9,1.1"], "view.crop"),
        (["--view.crop", "0,1"], "view.crop"),
        (["--optim.betas", "0.9,1"], "optim.betas"),
        (["--model.graphs=true", "--model.quant=int8", "--model.int8_threshold=6"], "model.graphs"),
        (["--model.graphs", "true", "--model.engine", "stock"], "model.graphs"),
        (
            ["--reward.w_geo", "0", "--reward.w_sem", "0", "--reward.w_area", "0"],
            "nothing is rewarded",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words, part):
    assert part in complaint(None, *words)


@pytest.mark.parametrize("right", ["--update.tempered=true", "--rollout.temperature=1"])
def test_one_sample_is_fine_with_a_running_baseline(right):
    words = ["--rollout.samples", "1", "--update.advantage", "ema", right]
    assert load(None, words).rollout.samples == 1


def test_several_wrong_values_are_counted():
    assert "(1 more like this)" in complaint(None, "--train.steps", "x", "--train.lr", "y")


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, parts",
    [
        ("train:\n  stepz: 5\n", ["train.stepz", "run.yaml", "did you mean train.steps?"]),
        ("steps: 5\n", ["'steps'", "did you mean train.steps?"]),
        ("train: 5\n", ["'train'", "section"]),
        ("training:\n  steps: 5\n", ["'training'"]),
        ("train:\n  steps: five\n", ["train.steps", "'five'", "an integer"]),
        ("train:\n  steps: yes\n", ["train.steps", "true", "an integer"]),
        ("train:\n  steps: 5\n  steps: 6\n", ["line 3", "'steps'", "twice"]),
        ("train:\n  steps: 5\ntrain:\n  lr: 1\n", ["line 3", "'train'", "twice"]),
        ("train:\n  steps: [1\n", ["line", "YAML"]),
        ("\tx: 1\n", ["line 1", "YAML"]),
        ("- 1\n- 2\n", ["no settings"]),
        ("just text\n", ["no settings", "just text"]),
        ("x: !!python/object/apply:os.system [ls]\n", ["YAML"]),
        ("a: 1\n---\nb: 2\n", ["YAML"]),
        ("data:\n  dir: 2024\n", ["data.dir", "'2024'", "text"]),
        ("data:\n  dir: [a, b]\n", ["data.dir", "text"]),
        ("view:\n  scale: 1\n", ["view.scale", "2 numbers"]),
        (
            "reward:\n  preset: best\n",
            ["reward.preset", "'best'", "robust, paper, as_released, consensus"],
        ),
        ("1: 2\n", ["unknown key '1'"]),
        ("? [a, b]\n: 1\n", ["YAML"]),
        ("train:\n  ? {a: b}\n  : 1\n", ["YAML"]),
        (b"\xff\xfe\x00train", ["UTF-8"]),
        (b"train:\n  steps: \x00\n", ["YAML"]),
        ("&a [*a]\n", ["line 1", "YAML", "alias *a"]),
        ("train: &a\n  x: *a\n", ["line 2", "YAML", "alias *a"]),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, parts):
    said = complaint(written(tmp_path, text))
    assert all(part in said for part in parts), said


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in complaint(tmp_path / "absent.yaml")
    assert "directory" in complaint(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "{}\n"])
def test_an_empty_file_changes_nothing(tmp_path, text):
    assert load(written(tmp_path, text)) == load()


def test_dotted_keys_work_in_a_file(tmp_path):
    assert load(written(tmp_path, "train.steps: 7\n")).train.steps == 7


def test_command_line_beats_file_beats_preset_beats_nano(tmp_path):
    path = written(tmp_path, "reward:\n  preset: paper\n  gate: 0.25\nrollout:\n  samples: 3\n")
    conf = load(path, ["--rollout.samples", "5"])
    assert (conf.rollout.samples, conf.reward.gate, conf.rollout.views) == (5, 0.25, 1)
    assert (
        conf.train.batch == 1
        and load(written(tmp_path, "")).train.batch
        == yaml.safe_load(config.NANO.read_text())["train"]["batch"]
    )
    assert conf.train.lr == load().train.lr  # nano's; presets leave the learning rate to the model


# -- presets ---------------------------------------------------------------------------------------

PAPER = {
    "rollout.samples": 1,
    "rollout.views": 1,
    "train.batch": 1,
    "reward.sem": "paper",
    "reward.soft": False,
    "reward.sufficiency": False,
    "reward.judge": "policy",
    "reward.gate": 0.0,
    "reward.projection": "corners",
    "reward.w_geo": 0.5,
    "reward.w_sem": 0.5,
    "reward.w_area": 0.0,
    "reward.unreadable": "floor",
    "reward.shared_controls": False,
    "reward.settled": 0.0,
    "update.advantage": "ema",
    "update.ema_momentum": 0.9,
    "update.kl": "exact",
    "update.beta": 1e-3,
    "update.beta_min": 1e-6,
    "update.tau": 0.02,
    "update.eta": 0.1,
    "ghost.radius_sigmas": 3.0,
    "view.literal_pixels": False,
    "rollout.temperature": 1.0,
    "rollout.asker": "policy",
    "rollout.regrounder": "policy",
    "rollout.view_temperature": 1.0,
}
RELEASED = PAPER | {"update.kl": "k1_loss", "ghost.radius_sigmas": 1.0, "view.literal_pixels": True}
ROBUST = {
    "rollout.samples": 8,
    "rollout.asker": "reference",
    "rollout.regrounder": "reference",
    "rollout.view_temperature": 0.0,
    "reward.sem": "contrast",
    "reward.soft": True,
    "reward.sufficiency": True,
    "reward.gate": 0.5,
    "reward.judge": "reference",
    "reward.projection": "ellipse",
    "update.advantage": "rloo",
    "update.kl": "exact",
    "update.beta_min": 1e-3,
}


NANO_ROBUST = ROBUST | {  # what was chosen on the embedded model is its own
    "update.beta_min": 0.02,
    "rollout.view_temperature": 0.6,
    "reward.unreadable": "group",
    "reward.shared_controls": True,
    "reward.settled": 0.1,
}


@pytest.mark.parametrize(
    "preset, values, words",
    [
        ("paper", PAPER, []),
        ("paper", PAPER, NO_NANO),
        ("as_released", RELEASED, []),
        ("as_released", RELEASED, NO_NANO),
        ("robust", NANO_ROBUST, []),
        ("robust", ROBUST, NO_NANO),
    ],
)
def test_preset_values(preset, values, words):
    conf = load(None, [*words, "--reward.preset", preset])
    assert {key: get(conf, key) for key in values} == values


def test_robust_is_the_default():
    assert load(None, NO_NANO) == load(None, [*NO_NANO, "--reward.preset", "robust"])


def test_every_preset_names_real_keys():
    known = {key for key, _ in settings.fields(Config)}
    assert all(set(values) <= known for values in config.PRESETS.values())


# -- the whole -------------------------------------------------------------------------------------


def test_nano_is_what_runs_when_nothing_is_said():
    stated = settings.read(config.NANO, Config)
    conf = load()
    assert stated and all(get(conf, key) == value for key, value in stated.items())
    assert load(ROOT / "configs" / "nano.yaml") == conf
    assert (ROOT / "configs" / "nano.yaml").read_bytes() == config.NANO.read_bytes()
    assert load(None, NO_NANO).train.lr == 1e-6  # nano's numbers are for nano only


def test_loading_shares_nothing():
    first = load()
    second = load()
    first.train.steps = 999
    assert second.train.steps != 999 and load().train.steps != 999


def test_assignment_is_checked():
    with pytest.raises(ValueError, match="steps"):
        load().train.steps = 0


def test_environment_variables_are_no_settings(monkeypatch):
    before = load()
    for name in ("TRAIN_STEPS", "train.steps", "TRAIN__STEPS", "VISE_FAST_TRAIN_STEPS", "STEPS"):
        monkeypatch.setenv(name, "3")
    assert load() == before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_load_and_survive_yaml(path, tmp_path):
    conf = load(path)
    again = written(tmp_path, to_yaml(conf))
    assert load(again) == conf
    assert path.read_text().startswith("# ")  # opens with what the run is and needs


def test_resolved_yaml_states_everything():
    content = yaml.safe_load(to_yaml(load(None, ["--view.scale", "0.5,2"])))
    stated = set()
    for section, inside in content.items():
        stated |= {f"{section}.{key}" for key in inside}
    assert stated == {key for key, _ in settings.fields(Config)}
    assert content["view"]["scale"] == [0.5, 2.0]


@pytest.mark.parametrize("width", [60, 100])
def test_help_names_every_key_with_its_default(width):
    text = settings.help_text(Config, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(
        width, max(len(line) for line in lines if line.startswith("  --")), 90
    )
    for key, field in settings.fields(Config):
        assert f"  --{key} " in text
        assert field.description, f"{key} has no help"
    assert "--train.lr 1e-06" in lines[lines.index("  --train.lr 1e-06")]
    assert "none, int8, nf4" in " ".join(text.split())


def test_every_section_has_its_line_of_help():
    assert all(field.annotation.__doc__ for field in Config.model_fields.values())


# -- shapes of the real models ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, total, vision",
    [
        ("2b", 2_127_532_032, 406_957_056),
        ("4b", 4_437_815_808, 415_347_712),
        ("8b", 8_767_123_696, 576_388_336),
        ("32b", 33_357_390_064, 595_266_800),
    ],
)
def test_model_shapes(size, total, vision, tmp_path):
    """bf16 bytes of the published sizes: 4.3, 8.9, 17.5 and 66.7 GB."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    content = (ROOT / "configs" / "models" / f"qwen3-vl-{size}.json").read_text()
    (tmp_path / "config.json").write_text(content)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert sum(parameter.numel() for parameter in model.model.visual.parameters()) == vision
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (size in ("2b", "4b")) == json.loads(content)["tie_word_embeddings"]
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"], rope["mrope_interleaved"]) == (
        5_000_000,
        [24, 20, 20],
        True,
    )


def test_a_run_shorter_than_the_embedded_warm_up_is_no_mistake():
    usual = yaml.safe_load(config.NANO.read_text())["train"]["warmup"]
    assert load().train.warmup == usual > 2 == load(None, ["--train.steps", "2"]).train.warmup
    assert load(config.NANO, ["--train.steps", "3"]).train.warmup == 3
    with pytest.raises(ConfigError, match="train.warmup"):
        load(None, ["--train.steps", "2", "--train.warmup", "3"])
