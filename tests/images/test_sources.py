"""The one door to the sources."""

from contextlib import closing
from pathlib import Path

import pytest
import zoo
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.images.drawn import Scenes
from vise_fast.images.photographs import Photographs
from vise_fast.images.sources import open_source
from vise_fast.system.errors import ConfigError, DataError


def test_without_a_folder_scenes_are_drawn():
    source = open_source(load(), 32)
    assert isinstance(source, Scenes) and source.sizes() == [(128, 128)]


def test_scenes_off_the_models_grid_are_refused():
    config = load(None, ["--scenes.size", "100"])
    assert open_source(config, 20).batch(0, 1)[0].pixels.shape == (100, 100, 3)
    with pytest.raises(ConfigError, match="a multiple of 32"):
        open_source(config, 32)


@pytest.mark.parametrize("stated", [False, True])
def test_a_folder_is_opened_on_the_grid_and_logs_where_it_is_told_to(tmp_path, stated):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Pillow.fromarray(zoo.gradient(97, 131)).save(photographs / "a.png")
    (photographs / "b.png").write_bytes(b"")
    words = [f"--data.dir={photographs}", f"--run.dir={tmp_path / 'run'}", "--data.max_bad_share=1"]
    where = tmp_path / "elsewhere" if stated else None
    with closing(open_source(load(None, words), 32, where)) as source:
        assert isinstance(source, Photographs)
        assert source.sizes() == [(96, 128)]
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")]
    assert written == [Path("elsewhere/bad_images.jsonl")] * stated


def test_a_missing_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_source(load(None, [f"--data.dir={tmp_path / 'nowhere'}"]), 32)
