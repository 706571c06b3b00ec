"""The words of small commands: own options, settings, and where the configuration comes from."""

import json

import pytest

from vise_fast.config import schema as config
from vise_fast.config.words import parse
from vise_fast.system.errors import ConfigError


def test_options_settings_and_places_are_told_apart():
    found = parse(
        ["RUN", "--json=a b", "--train.lr", "1e-3", "--adapter", "x", "--run.report", "--debug"],
        ("json", "adapter", "scenes"),
        places=1,
    )
    assert (found["json"], found["adapter"], found["scenes"]) == ("a b", "x", None)
    assert found.places == ["RUN"] and found.settings == ["--train.lr", "1e-3", "--run.report"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scens", "3"], "did you mean --scenes"),
        (["--zzz"], "known: --scenes"),
        (["--scenes"], "no value"),
        (["--scenes", "--x"], "no value"),
        (["stray"], "unexpected word"),
    ],
)
def test_faults_say_what_to_write(words, said):
    with pytest.raises(ConfigError, match=said):
        parse(words, ("scenes",))


@pytest.mark.parametrize("text", ["x", "-3", "1.5", ""])
def test_counts_are_whole_numbers(text):
    with pytest.raises(ConfigError, match="whole number"):
        parse([f"--scenes={text}"], ("scenes",)).whole("scenes")


def adapter(directory, base):
    (directory / "adapter").mkdir(parents=True)
    (directory / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base})
    )
    return str(directory / "adapter")


def configuration(*words):
    return parse(words, ("adapter", "model", "config")).configuration()


def test_an_adapter_in_a_run_brings_the_runs_settings_and_the_command_line_wins(tmp_path):
    where = adapter(tmp_path, "org/other")
    (tmp_path / "config.yaml").write_text(
        config.to_yaml(
            config.load(None, ["--model.path=org/base", "--eval.scenes=7", "--scenes.size=64"])
        )
    )
    found = configuration("--adapter", where, "--scenes.size", "96")
    assert (found.model.path, found.eval.scenes, found.scenes.size) == ("org/base", 7, 96)
    assert configuration("--adapter", where, "--model", "org/third").model.path == "org/third"


def test_a_lone_adapter_brings_the_base_it_names(tmp_path):
    assert configuration("--adapter", adapter(tmp_path, "org/base")).model.path == "org/base"


def test_the_embedded_base_is_found_wherever_it_was_installed(tmp_path):
    found = configuration("--adapter", adapter(tmp_path, "/somewhere/site-packages/vise_fast/nano"))
    assert (
        found.model.path == "nano"
        and found.data.max_pixels == config.load(None, []).data.max_pixels
    )


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_adapter_is_a_config_error(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match="no JSON"):
        configuration("--adapter", str(tmp_path))
