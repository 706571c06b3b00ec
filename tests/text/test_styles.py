"""Prompt styles as settings, and the numbers boxes are written in."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vise_fast.config.schema import PromptConfig
from vise_fast.system.errors import ConfigError
from vise_fast.text import spaces, styles
from vise_fast.text.prompts import NATURAL, SHORT, read_loc, read_query, read_verdict
from vise_fast.text.styles import Manner, chosen

SIZE = (480, 640)
EXAMPLE = Path(__file__).parents[2] / "examples" / "prompts.yaml"
BOX = st.tuples(*[st.floats(0, 1000)] * 4)


def written_in(box_1000, space, size):
    """The numbers that a box is written in."""
    height, width = {"1000": (1000, 1000), "1024": (1024, 1024), "pixels": size}[space]
    return tuple(side * (width, height)[n % 2] / 1000 for n, side in enumerate(box_1000))


def style(manner=None, **settings):
    return chosen(PromptConfig(**settings), manner or Manner("natural"))


def test_what_is_asked_by_default_is_what_always_was():
    for known in (NATURAL, SHORT):
        found = style(Manner(known.name))
        assert found.ask() == known.ask() and found.ground("x") == known.ground("x")
        assert found.verify("x") == known.verify("x") and found.verify_again("x") == []
        assert found.space == "1000" and found.system == ""


@pytest.mark.parametrize("shipped", styles.SHIPPED, ids=lambda shipped: shipped.name)
def test_what_a_style_asks_for_is_read_back(shipped):
    box = (120.0, 250.0, 500.0, 875.0)
    own = tuple(round(v) for v in written_in(box, shipped.space, SIZE))
    found = spaces.read_1000(shipped.write_box(own), shipped.space, SIZE)
    assert found == pytest.approx(box, abs=1.0)
    assert read_query(shipped.write_query("red car")) == "red car"
    for visible in (True, False):
        assert read_verdict(shipped.write_verdict(visible)) is visible
    assert "{query}" not in shipped.ground("red car") + shipped.verify("red car")


@given(BOX, st.sampled_from(["1000", "pixels", "1024"]))
def test_spaces_go_there_and_back(box, space):
    there = written_in(box, space, SIZE)
    assert spaces.to_1000(there, space, SIZE) == pytest.approx(box, abs=1e-6)


def test_pixels_are_those_of_the_image_the_model_sees():
    text = '```json\n[{"bbox_2d": [64, 48, 320, 240], "label": "cat"}]\n```'
    assert spaces.read_1000(text, "pixels", SIZE) == pytest.approx((100, 100, 500, 500))
    with pytest.raises(ConfigError, match="size of the image"):
        spaces.read_1000(text, "pixels", None)


ANSWERS = [
    ("<ref>a cat</ref><box>[[10, 20, 30, 40]]</box>", (10, 20, 30, 40)),
    ("<ref>cats</ref><box>[[10,20,30,40],[50,60,70,80]]</box>", (10, 20, 30, 40)),
    ("[10, 20, 30, 40]", (10, 20, 30, 40)),
    ("[[10, 20, 30, 40], [50, 60, 70, 80]]", (10, 20, 30, 40)),
    ('[{"bbox_2d": [10,20,30,40]}, {"bbox_2d": [1,2,3,4]}]', (10, 20, 30, 40)),
]


@pytest.mark.parametrize("text, box", ANSWERS)
def test_of_several_boxes_the_first_counts(text, box):
    assert spaces.read_1000(text, "1000") == box


def test_loc_tokens_are_1024_bins_in_any_style():
    text = "<loc0512><loc0256><loc1023><loc0768> cat"
    assert read_loc(text) == (256, 512, 768, 1023)
    for space in ("1000", "pixels"):
        found = spaces.read_1000(text, space, SIZE)
        assert found == pytest.approx((250, 500, 750, 999.02), abs=0.01)
    assert read_loc("<loc0512><loc0256>") is None


@pytest.mark.parametrize(
    "text, query",
    [
        ('{"object": "red car"}', "red car"),
        ('```json\n{"object": "a \\"red\\" car"}', 'a \\"red\\" car'),
        ("<ref>red car</ref><box>[[1,2,3,4]]</box>", "red car"),
        ("<|object_ref_start|>red car<|object_ref_end|>", "red car"),
        ('<query></query>{"object": "red car"}', None),
        ('{"object": ""}', None),
    ],
)
def test_queries_of_other_formats(text, query):
    assert read_query(text) == query


def test_native_is_the_family_s_format_in_its_own_numbers():
    asked = style(Manner("native", "json", "pixels")).ground("cat")
    assert "pixels of the image" in asked and "1000" not in asked and "bbox_2d" in asked
    assert style(Manner("native", "ref")).ground("cat").endswith("<ref>cat</ref>")


def test_each_question_has_its_own_style():
    mixed = style(ask="short", ground="json", verify="ref")
    assert mixed.ask() == SHORT.ask() and "bbox_2d" in mixed.ground("cat")
    assert mixed.verify("cat") == styles.REF.verify("cat") and mixed.verdict_opening == "<visible>"
    assert mixed.name == "short+json+ref"


def test_styles_of_a_file():
    own = style(file=str(EXAMPLE))
    assert own.name == "pointed" and own.ground("a cat").startswith("Where is a cat?")
    assert style(file=str(EXAMPLE), ground="json").ask() == NATURAL.ask()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no styles"),
        ("mine: {ask_text: a}", "lacks ground_text"),
        ("mine: {ask_text: a, ground_text: b, verify_text: c}", "no {query}"),
        ("mine: {ask_text: a, loud: 1}", "does not know loud"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        style(file=str(path))


def test_unknown_styles_and_too_many_wordings_are_refused():
    with pytest.raises(ConfigError, match="unknown prompt style 'loud'"):
        style(ask="loud")
    assert len(style(paraphrases=3).verify_again("cat")) == 2
    with pytest.raises(ConfigError, match="style short has 1 wordings"):
        style(Manner("short"), paraphrases=2)
