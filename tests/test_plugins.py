"""What an outside file can add without a change here: a view, a prompt style, a reward, a model
family. The files are those of examples/.
"""

import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from small_engines import ROWS, SIZES, relative
from small_runs import SMALL, go, lines
from tiny import IMAGE, TinyTokens, images
from tiny_families import SQUARE, bare_of, text

from vise_fast.config import schema
from vise_fast.config.schema import load
from vise_fast.engine.generic import GenericEngine
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.images import views
from vise_fast.model import families
from vise_fast.model.families import FAMILIES
from vise_fast.model.stock_modules import StockModules
from vise_fast.system import plugin
from vise_fast.system.errors import ConfigError
from vise_fast.text import prompts, styles

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def registries(monkeypatch):
    """Everything a plugin adds is forgotten afterwards."""
    monkeypatch.setattr(views, "DRAWN", dict(views.DRAWN))
    monkeypatch.setattr(prompts, "STYLES", dict(prompts.STYLES))
    monkeypatch.setattr(styles, "STYLES", prompts.STYLES)
    monkeypatch.setattr(schema, "VIEW_KINDS", list(schema.VIEW_KINDS))
    monkeypatch.setattr(views, "VIEW_KINDS", schema.VIEW_KINDS)
    known = set(FAMILIES)
    yield
    for name in set(FAMILIES) - known:
        del FAMILIES[name]
    for name in [name for name in sys.modules if name.startswith("vise_fast_plugin_")]:
        del sys.modules[name]


def test_a_plugin_brings_a_view_a_style_and_a_reward(registries, tmp_path):
    words = [
        f"--run.plugins={EXAMPLES / 'view_plugin.py'},{EXAMPLES / 'reward_plugin.py'}",
        "--view.kinds=upside_down",
        "--prompts.ground=whereabouts",
        "--reward.name=product",
        f"--run.dir={tmp_path / 'run'}",
        "--train.steps=1",
    ]
    assert go(*SMALL, *words) == 0
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    stored = load(tmp_path / "run" / "config.yaml")
    assert stored.view.kinds == ("upside_down",) and len(stored.run.plugins) == 2


def test_an_upside_down_view_turns_rows_around(registries):
    plugin.load(str(EXAMPLES / "view_plugin.py"), "run.plugins")
    matrix = views.DRAWN["upside_down"](None, 8, 6, None)
    picture = torch.randint(0, 256, (8, 6, 3), dtype=torch.uint8)
    (moved,) = views.apply([picture], [views.View("upside_down", matrix)])
    assert torch.equal(moved, picture.flip(0))


def test_names_are_not_taken_twice(registries):
    with pytest.raises(ConfigError, match="view crop is known"):
        views.register("crop", None)
    with pytest.raises(ConfigError, match="style json is known"):
        styles.register(styles.JSON)
    with pytest.raises(ConfigError, match="family gemma3 is known"):
        families.register(FAMILIES["gemma3"])


def test_an_unknown_view_is_refused():
    with pytest.raises(ConfigError, match="view.kinds"):
        load(None, ["--view.kinds=sideways"])


def test_a_missing_plugin_is_one_line(registries):
    with pytest.raises(ConfigError, match="run.plugins nowhere.py: no such file"):
        load(None, ["--run.plugins=nowhere.py"])


def llava():
    vision = SQUARE | {"model_type": "clip_vision_model", "hidden_size": 24}
    return hf.LlavaConfig(
        text_config=text(model_type="llama"), vision_config=vision, image_token_index=IMAGE
    )


def test_a_family_is_one_row_of_an_outside_file(registries):
    plugin.load(str(EXAMPLES / "family_plugin.py"), "run.plugins")
    model = bare_of(llava())
    engine = GenericEngine(StockModules(model), TinyTokens())
    stock = StockEngine(StockBackbone(model), TinyTokens())
    features = engine.encode(images(SIZES))
    prefixes = engine.prefill(features, True)
    found = engine.forked_verdict_logits(prefixes, [0, 1, 2, 3], ROWS)
    truth = stock.verdict_logits(stock.encode(images(SIZES)), ROWS, True)
    assert relative(found, truth) < 2e-6
