"""The probe: the embedded model plays on its own scenes and is warned of on photographs; the style
it chooses, the page it writes.
"""

import math
from dataclasses import replace

import PIL.Image
import pytest
import skimage.data

from vise_fast.config.schema import load
from vise_fast.engine.choose import open_engine
from vise_fast.images.sources import open_source
from vise_fast.model import load as model
from vise_fast.probe import __main__ as probe
from vise_fast.probe.measure import measure
from vise_fast.probe.verdict import best, score, separation, warnings, yaml_line
from vise_fast.system import console
from vise_fast.text.styles import STYLES

PICTURES = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    home = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        whole = PIL.Image.fromarray(getattr(skimage.data, name)())
        width, height = whole.size
        for i, left in enumerate((0.0, 0.08, 0.16, 0.24, 0.32, 0.4)):
            box = (int(left * width), 0, int((left + 0.6) * width), height)
            whole.crop(box).save(home / f"{name}{i}.png")
    return home


def measured(*words, style="short"):
    config = load(None, [str(word) for word in words])
    source = open_source(config, model.grid_multiple("nano"))
    engine = open_engine(model.load(config), config)
    before = engine.tokens
    found = measure(engine, source.batch(0, PICTURES), config, STYLES[style])
    assert engine.tokens is before
    return found


@pytest.fixture(scope="module")
def on_scenes():
    return measured()


@pytest.fixture(scope="module")
def on_photographs(photos):
    return measured("--data.dir", photos)


def test_on_its_own_scenes_the_embedded_model_can_play(on_scenes):
    m = on_scenes
    assert m.readable_queries == m.readable_boxes == 1.0
    assert m.agreement > 0.6 > m.chance and separation(m) > 0.4 and m.absent < m.seen
    assert list(warnings(m)) == [] and len(m.samples) == PICTURES
    assert all(set(one.verdicts) >= {"seen", "hidden", "elsewhere"} for one in m.samples)


def test_on_photographs_it_is_warned_of(on_photographs, on_scenes):
    said = list(warnings(on_photographs))
    assert any("judge" in line for line in said) and any("learning rate" in line for line in said)
    assert score(on_photographs) < 0.5 * score(on_scenes)


def test_a_style_that_cannot_be_read_is_not_chosen(on_scenes):
    unread = measured(style="json")
    assert unread.readable_queries == 0 and math.isnan(unread.agreement) and score(unread) == 0
    assert best([unread, on_scenes]) is on_scenes and best([unread]) is None
    assert len(list(warnings(unread))) == 3
    assert yaml_line(on_scenes) == "prompts: {ask: short, ground: short, verify: short}"


def test_the_same_pictures_are_answered_the_same(on_scenes):
    again = measured()
    assert replace(again, seconds=0.0) == replace(on_scenes, seconds=0.0)


def test_the_command_writes_a_page(photos, tmp_path, capsys):
    page = tmp_path / "probe.html"
    words = ["--data.dir", str(photos), "--pictures", "20", "--html", str(page)]
    assert console.run(probe.main, [*words, "--styles", "short,json"]) == 0
    told = capsys.readouterr()
    assert "in a configuration: prompts: {ask: short" in told.out
    text = page.read_text()
    assert text.count('class="card"') == 16 and text.count('class="box"') >= 1
    assert "<query>" not in text and "&lt;query&gt;" in text, "what a model wrote is escaped"


def test_from_a_handful_nothing_is_concluded(on_scenes):
    few = replace(on_scenes, samples=on_scenes.samples[:19])
    assert best([few]) is None and best([on_scenes]) is on_scenes
    (said,) = warnings(replace(few, readable_boxes=0.0))
    again = replace(few, samples=few.samples * 2)
    assert best([again]) is None, "a picture that is shown twice is one"
    assert "19 pictures are too few to tell" in said and "give 20" in said


def test_a_page_that_cannot_be_written_is_one_line_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(probe, "load", None)
    words = ["--pictures", "2", "--styles", "short", "--html", str(tmp_path / "no" / "page.html")]
    assert console.run(probe.main, words) == 4
    assert "cannot write" in capsys.readouterr().err
