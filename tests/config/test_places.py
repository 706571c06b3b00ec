"""The file behind `--config`: what is there comes first, a shipped preset needs no path."""

from pathlib import Path

import pytest

from vise_fast.config import places
from vise_fast.config.schema import load
from vise_fast.system.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SPELLINGS = ("{}", "{}.yaml", "configs/{}.yaml", "./configs/{}")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_found_from_any_directory(name):
    file = ROOT / "configs" / f"{name}.yaml"
    for spelling in SPELLINGS:
        assert places.config_file(spelling.format(name)) == file
    assert load(name) == load(file)


def test_a_file_that_is_there_comes_before_the_preset(elsewhere):
    (elsewhere / "configs").mkdir()
    for own in (Path("paper.yaml"), Path("configs", "paper.yaml")):
        assert load(own).train.steps == 4000
        own.write_text("train: {steps: 3}")
        assert load(own).train.steps == 3


def test_a_directory_of_that_name_does_not_hide_a_preset(elsewhere):
    (elsewhere / "nano").mkdir()
    assert load("nano").model.path == "nano"


@pytest.mark.parametrize(
    "typed", ["mine.yaml", "other/nano.yaml", "/configs/nano.yaml", "configs/models/nano", "..", ""]
)
def test_what_is_no_preset_comes_back_as_typed(typed):
    assert places.config_file(typed) == Path(typed)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(typed)


@pytest.mark.parametrize(
    "typed, meant",
    [("qwen3vl-2b", "qwen3-vl-2b"), ("Paper.yaml", "paper"), ("configs/nanno", "nano")],
)
def test_a_preset_spelt_otherwise_is_named(typed, meant):
    with pytest.raises(ConfigError, match=f"did you mean --config {meant}\\?"):
        load(typed)


def test_where_no_preset_is_close_the_list_is_named():
    with pytest.raises(ConfigError, match="existing YAML file or a shipped preset"):
        load("my own settings.yaml")


def test_every_shape_is_there():
    assert {path.stem for path in places.SHAPES.glob("qwen3-vl-*.json")} == {
        f"qwen3-vl-{size}" for size in ("2b", "4b", "8b", "32b")
    }
