"""A finished adapter as a directory: what travels with it, what it says of its base, and that
nothing in it leads back to the machine that trained it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stored
import yaml
from PIL import Image
from safetensors import safe_open

from vise_fast import infer, merge
from vise_fast import train as trainer
from vise_fast.config import schema, settings
from vise_fast.evaluate import __main__ as evaluate
from vise_fast.model.saved import card
from vise_fast.model.saved.card import Made
from vise_fast.system import console
from vise_fast.system.errors import ConfigError
from vise_fast.text.prompts import NATURAL

ROOT = Path(__file__).parents[2]
TRAVELS = set(stored.FILES) - {"config.json", "model.safetensors"}
SHORT_RUN = ["--train.steps=1", "--train.batch=1", "--rollout.samples=2", "--rollout.views=1"]
SHORT_RUN += ["--eval.scenes=2", "--eval.attention=false", "--run.report=false"]
OPEN_ALONE = """
import sys
from transformers import AutoModelForImageTextToText, AutoTokenizer
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
names = [name for name, _ in model.named_parameters() if "lora_" in name]
print(len(names), len(tokenizer), bool(tokenizer.chat_template))
"""


def offline(home, *words):
    """A Python process that sees this hub cache and no network: what it says, in order."""
    known = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **known, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=env,
        cwd=home,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(home, *words):
    return offline(home, "-m", "vise_fast.train", f"--model.path={stored.HUB_ID}", *words)


# ---- from a hub id -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """The home of a cache with all files, and the adapter that a run from it left."""
    home = tmp_path_factory.mktemp("whole")
    stored.hub_cache(home)
    said = train(home, "--run.dir=run", *SHORT_RUN)
    assert "the base has no" not in said
    return home, home / "run" / "adapter"


def test_all_small_files_of_a_hub_base_travel(from_hub):
    _, adapter = from_hub
    for name in TRAVELS:
        assert (adapter / name).read_bytes() == (stored.nano.DIRECTORY / name).read_bytes(), name
    assert json.loads((adapter / "processor_config.json").read_text()) == {
        "processor_class": "Qwen3VLProcessor"
    }
    assert not (adapter / "config.json").exists()


def test_who_may_read_one_of_its_files_may_read_all(from_hub):
    modes = {path.name: path.stat().st_mode for path in from_hub[1].iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_the_base_is_its_hub_id(from_hub):
    _, adapter = from_hub
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        stored.HUB_ID
    )


def test_transformers_opens_base_and_adapter_from_the_directory_alone(from_hub):
    home, adapter = from_hub
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        tensors = len(file.keys())
    said = offline(home, "-c", OPEN_ALONE, adapter).splitlines()[-1]
    assert said == f"{tensors} 49 True"


def test_nothing_leads_back_to_the_machine(from_hub):
    home, adapter = from_hub
    for path in adapter.iterdir():
        data = path.read_bytes()
        for place in (home, ROOT, Path.home()):
            assert str(place).encode() not in data, (path.name, place)


def test_what_the_cache_lacks_is_said_before_anything_is_trained(tmp_path):
    left_out = ["preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"]
    stored.hub_cache(tmp_path, left_out)
    said = train(tmp_path, "--run.dir=run", *SHORT_RUN)
    for name in left_out:
        command = f"hf download {stored.HUB_ID} {name}"
        assert 0 < said.index(command) < said.index("evaluating the base"), said
    assert not {*left_out, "processor_config.json"} & {p.name for p in (tmp_path / "run").iterdir()}


# ---- from a directory ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stored.base(tmp_path_factory.mktemp("bases") / "my-model")


@pytest.fixture(scope="module")
def from_directory(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("directory") / "adapter"
    return stored.adapter(place, f"--model.path={base}", "--data.dir=/data/holiday pictures")


def test_a_local_base_goes_by_its_bare_name(base, from_directory):
    content = json.loads((from_directory / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "my-model"
    assert {path.name for path in from_directory.iterdir()} > TRAVELS
    for path in from_directory.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name
        assert b"/data/" not in path.read_bytes(), path.name


def test_a_local_base_goes_by_what_the_user_says(base, tmp_path):
    words = (f"--model.path={base}", f"--adapter.base={stored.HUB_ID}")
    adapter = stored.adapter(tmp_path / "adapter", *words)
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == stored.HUB_ID


@pytest.mark.parametrize("name", ["/data/model", "../model", "a/b/c", "~/model"])
def test_a_path_is_no_name(name):
    with pytest.raises(ConfigError, match="adapter.base"):
        configuration(f"--adapter.base={name}")


def test_who_has_only_a_bare_name_is_asked_for_the_model(base, from_directory, tmp_path, capsys):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "x.png")
    adapter = ["--adapter", str(from_directory)]
    commands = {
        infer.main: ["--image", str(tmp_path / "x.png"), "--query", "red"],
        evaluate.main: ["--eval.attention", "false", "--scenes", "2"],
        merge.main: ["--out", str(tmp_path / "out")],
    }
    for main, words in commands.items():
        assert console.run(main, [*adapter, *words]) == 2
        assert "my-model" in (said := capsys.readouterr().err) and "--model DIRECTORY" in said
        assert console.run(main, [*adapter, *words, "--model", str(base)]) == 0


def test_a_directory_that_lacks_a_file_names_the_command(tmp_path, capsys):
    base = stored.base(tmp_path / "lean")
    (base / "preprocessor_config.json").unlink()
    words = [f"--model.path={base}", f"--run.dir={tmp_path / 'run'}", "--adapter.base=org/lean"]
    assert console.run(trainer.main, [*words, *SHORT_RUN]) == 0
    line = f"hf download org/lean preprocessor_config.json --local-dir {base}"
    assert line in " ".join(capsys.readouterr().err.split())


def test_a_template_inside_the_tokenizers_settings_is_none_that_is_missing(tmp_path):
    base = stored.base(tmp_path / "old")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    assert len(list(card.side_files.missing(str(base), "x"))) == 1
    stored.edit(base / "tokenizer_config.json", chat_template=template)
    assert list(card.side_files.missing(str(base), "x")) == []


# ---- without projectors --------------------------------------------------------------------------


def test_without_projectors_the_language_model_alone_is_trained(tmp_path, capsys):
    run = ["--run.dir", str(tmp_path / "run"), "--lora.projector=false", *SHORT_RUN]
    assert console.run(trainer.main, run) == 0
    adapter = tmp_path / "run" / "adapter"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = file.keys()
        moved = [name for name in names if ".lora_B." in name and file.get_tensor(name).any()]
    assert names and not [name for name in names if ".visual." in name] and moved
    again = ["--run.dir", str(tmp_path / "again"), "--lora.init_from", str(adapter), *SHORT_RUN]
    assert console.run(trainer.main, again) == 0
    assert schema.load(tmp_path / "again" / "config.yaml").lora.projector is False
    capsys.readouterr()
    assert console.run(trainer.main, [*again, "--lora.projector=true"]) == 2
    assert "lora.projector true is not that of the adapter" in capsys.readouterr().err


# ---- the card ------------------------------------------------------------------------------------


def configuration(*words):
    return schema.load(None, words)


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_the_hub_can_read_what_it_is():
    config = configuration("--model.path=Qwen/Qwen3-VL-2B-Instruct")
    assert front(card.model_card(config, NATURAL, Made())) == {
        "library_name": "peft",
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3-VL-2B-Instruct",
        "base_model_relation": "adapter",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "transformers", "vise", "self-evolution", "visual-grounding"],
    }


def test_the_licence_is_the_bases_or_what_the_user_says(base):
    assert card.licence(configuration("--model.path=org/unknown")) == "other"
    assert card.licence(configuration("--adapter.licence=mit")) == "mit"
    (base / "README.md").write_text("---\ntags: [a]\nlicense: cc-by-4.0\n---\n# It\nlicense: no\n")
    assert card.licence(configuration(f"--model.path={base}")) == "cc-by-4.0"
    (base / "README.md").unlink()


def test_it_tells_how_it_was_made_and_what_was_measured():
    made = Made({"mean IoU": ("0.300", "0.350 (+0.050)")}, {"images": 7, "names": "c0ffee"})
    text = card.model_card(configuration("--data.dir=photos", "--lora.r=24"), NATURAL, made)
    for part in ("7 images", "c0ffee", "| mean IoU | 0.300 | 0.350 (+0.050) |", "rank 24"):
        assert part in text
    assert "python -m vise_fast.train --config training.yaml --data.dir YOUR_IMAGES" in text
    assert "2606.27373" in text and "@inproceedings" in text


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (16, 16), (24, 32), (64, 64)])
def test_the_vllm_line(rank, served):
    words = ["--model.path=org/base", f"--lora.r={rank}"]
    line = (
        "vllm serve org/base --enable-lora --enable-tower-connector-lora "
        f"--max-lora-rank {served} --lora-modules vise=PATH_OF_THIS_ADAPTER"
    )
    assert line in card.model_card(configuration(*words), NATURAL, Made())
    without = card.model_card(configuration(*words, "--lora.projector=false"), NATURAL, Made())
    assert line.replace(" --enable-tower-connector-lora", "") in without


def test_the_snippet_is_python_with_two_questions(from_directory):
    text = (from_directory / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(code, "snippet", "exec")
    assert 'BASE = "my-model"' in code and "'find red circle'" in code


def test_the_settings_beside_it_make_the_same_run(from_directory, base):
    made = schema.load(from_directory / card.SETTINGS)
    trained = configuration("--lora.r=4", "--lora.alpha=8", f"--model.path={base}")
    ours, theirs = (settings.changed(c) for c in (trained, made))
    moved = {"model.path": "my-model", "run.dir": "runs/again", "data.dir": "holiday pictures"}
    assert theirs == ours | moved


def test_settings_and_card_name_no_place_on_this_machine(tmp_path):
    """Whatever kind of path it is: of pictures, prompts or plugins."""
    (tmp_path / "mine.py").write_text("")
    secret = str(tmp_path)
    words = ["--data.mix", f"[{secret}/a=3, hf:owner/photos=1]", "--run.dir", f"{secret}/run"]
    words += ["--run.plugins", f"[{secret}/mine.py]", "--prompts.file", f"{secret}/prompts.yaml"]
    config = schema.load(None, words)
    made = card.Made({}, {"images": 3, "mix": [{"names": "abc"}, {"names": "def"}]})
    text = card.training_settings(config) + card.model_card(config, NATURAL, made)
    assert secret not in text
    assert "a=3" in text and "hf:owner/photos=1" in text and "`abc, def`" in text
    assert "--data.mix '[YOUR_IMAGES=1]'" in text
