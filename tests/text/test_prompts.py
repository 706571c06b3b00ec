"""Prompts and parsers: every spelling of a box, a query and a verdict that a model may come up
with.
"""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vise_fast.system.errors import ConfigError
from vise_fast.text import prompts
from vise_fast.text.prompts import (
    NATURAL,
    SHORT,
    read_box,
    read_query,
    read_verdict,
    style_for,
)

READABLE = [
    ("<box>12,34,56,78</box>", (12, 34, 56, 78)),
    ("<box>012,345,678,999</box>", (12, 345, 678, 999)),
    ("<box> 12 , 34 , 56 , 78 </box>", (12, 34, 56, 78)),
    ("<box>12 34 56 78</box>", (12, 34, 56, 78)),
    ("<box> 0 1 2 , 3 4 5 , 6 7 8 , 9 9 9 </box>", (12, 345, 678, 999)),
    ("<box>012 , 3 4 5,678,9 9 9</box>", (12, 345, 678, 999)),
    ("<box>[12, 34, 56, 78]</box>", (12, 34, 56, 78)),
    ("<box>(12,34),(56,78)</box>", (12, 34, 56, 78)),
    ("<box>(12, 34) (56, 78)</box>", (12, 34, 56, 78)),
    ("<box>12;34;56;78</box>", (12, 34, 56, 78)),
    ("<box>12，34，56，78</box>", (12, 34, 56, 78)),
    ("<box>12.5,34.25,56.0,78.</box>", (12.5, 34.25, 56, 78)),
    ("<box>1e2,2e2,3e2,4e2</box>", (100, 200, 300, 400)),
    ("<box>+12,-34,56,1078</box>", (12, -34, 56, 1078)),
    ("<box>78,56,34,12</box>", (78, 56, 34, 12)),
    ("<box>0,0,0,0</box>", (0, 0, 0, 0)),
    ("<box>0,0,1000,1000</box>", (0, 0, 1000, 1000)),
    ("<box>\n12,\n34,\n56,\n78\n</box>\n", (12, 34, 56, 78)),
    ("<BOX>12,34,56,78</BOX>", (12, 34, 56, 78)),
    ("< box >12,34,56,78< / box >", (12, 34, 56, 78)),
    ("<box>12,34,56,78", (12, 34, 56, 78)),
    ("12,34,56,78</box>", (12, 34, 56, 78)),
    ("<box>12,34,56,78<|im_end|>", (12, 34, 56, 78)),
    ("<box>12,34,56,78</box><box>1,2,3,4</box>", (12, 34, 56, 78)),
    ("<box></box><box>1,2,3,4</box>", (1, 2, 3, 4)),
    ("<box>[[12,34,56,78],[1,2,3,4]]</box>", (12, 34, 56, 78)),
    ("<|box_start|>(12,34),(56,78)<|box_end|>", (12, 34, 56, 78)),
    ("The object is here: <box>12,34,56,78</box>.", (12, 34, 56, 78)),
    ("The 2 dogs: <box>12,34,56,78</box>", (12, 34, 56, 78)),
    ('{"bbox_2d": [12, 34, 56, 78]}', (12, 34, 56, 78)),
    ('{"label": "12 dogs", "bbox_2d": [12, 34, 56, 78]}', (12, 34, 56, 78)),
    (
        '```json\n[\n\t{"bbox_2d": [12, 34, 56, 78], "label": "red circle"}\n]\n```',
        (12, 34, 56, 78),
    ),
    ('```json\n[{"bbox_2d": [12, 34, 56, 78]}, {"bbox_2d": [1, 2, 3, 4]}]\n```', (12, 34, 56, 78)),
    ('```json\n{"bbox_2d": [12, 34, 56, 78', (12, 34, 56, 78)),
    ("{'bbox_2d': [12.0, 34.0, 56.0, 78.0]}", (12, 34, 56, 78)),
    ('{"bbox": [12, 34, 56, 78]}', (12, 34, 56, 78)),
    ("box: 12, 34, 56, 78", (12, 34, 56, 78)),
    ("```json\n[12, 34, 56, 78]\n```", (12, 34, 56, 78)),
    ("[12, 34, 56, 78]", (12, 34, 56, 78)),
    ("[[12, 34, 56, 78]]", (12, 34, 56, 78)),
    ("(12, 34), (56, 78)", (12, 34, 56, 78)),
    ("12, 34, 56, 78", (12, 34, 56, 78)),
    ("12 34 56 78.", (12, 34, 56, 78)),
    ("It is at [12, 34, 56, 78] in picture 3", (12, 34, 56, 78)),
]

UNREADABLE = [
    "",
    " ",
    "<box></box>",
    "<box>",
    "<box>12,34,56</box>",
    "<box>12,34,56,78,90</box>",
    "<box>1,2,3,4,5px</box>",
    "<box>a,b,c,d</box>",
    "<box>12,34,56</box> 1,2,3,4",
    "<box>nan,34,56,78</box>",
    "<box>inf,34,56,78</box>",
    "<box>1e999,34,56,78</box>",
    "<box>1000001,34,56,78</box>",
    "<box>" + "9" * 400 + ",1,2,3</box>",
    "<box>10%,20%,30%,40%</box>",
    "12px, 34px, 56px, 78px",
    "12,34,56",
    "1.2.3.4",
    "1,2,3,4.5.6",
    "the red circle",
    "there are 3 dogs, 2 cats, 1 bird and 4 fish",
    '{"bbox_2d": []}',
    '{"bbox_2d": null}',
    '{"bbox_2d": [1, 2, 3]}',
    "<visible>yes</visible>",
    "<|im_end|>",
    "\x00\x01",
]


@pytest.mark.parametrize("text, box", READABLE)
def test_readable_box(text, box):
    assert read_box(text) == pytest.approx(box)


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_box(text):
    assert read_box(text) is None


@given(st.text(alphabet="<>/box(),.[]{}\"': 0123456789eE+-nanifvisqury|_%\n", max_size=80))
def test_parsers_never_raise_and_boxes_are_sane(text):
    box = read_box(text)
    query = read_query(text)
    verdict = read_verdict(text)
    assert box is None or (len(box) == 4 and all(abs(v) <= 1e6 for v in box))
    assert query is None or (query == query.strip() and 0 < len(query) <= prompts.QUERY_CHARS)
    assert verdict in (None, True, False)


@pytest.mark.parametrize("style", [NATURAL, SHORT])
@given(box=st.tuples(*[st.integers(0, 999)] * 4))
def test_written_boxes_are_read_back(style, box):
    assert read_box(style.write_box(box)) == box


def test_short_texts_are_the_embedded_models_language():
    assert SHORT.ask() == "name an object"
    assert SHORT.ground("red circle") == "find red circle"
    assert SHORT.verify("red circle") == "see red circle ?"
    assert SHORT.write_query("red circle") == "<query> red circle </query>"
    assert SHORT.write_box((12, 345, 678.4, 1000)) == "<box>012,345,678,999</box>"
    assert (SHORT.write_verdict(True), SHORT.write_verdict(False)) == (
        "<visible>yes</visible>",
        "<visible>no</visible>",
    )


def test_natural_answers_follow_their_own_instructions():
    assert NATURAL.write_box((12, 345, 678.4, 1200)) == "<box>12,345,678,1000</box>"
    for text in (NATURAL.ask(), NATURAL.ground("a red {0} cup"), NATURAL.verify("a red {0} cup")):
        assert "{query}" not in text and len(text) < 400
    assert "a red {0} cup" in NATURAL.ground("a red {0} cup") and "a red {0} cup" in NATURAL.verify(
        "a red {0} cup"
    )
    assert NATURAL.write_verdict(True).startswith(NATURAL.verdict_opening)


def test_style_comes_from_the_models_config():
    assert style_for(SimpleNamespace()) is NATURAL
    assert style_for(SimpleNamespace(vise_prompts="short")) is SHORT
    with pytest.raises(ConfigError, match="loud"):
        style_for(SimpleNamespace(vise_prompts="loud"))


QUERIES = [
    ("<query>red circle</query>", "red circle"),
    ("<query> red circle </query>", "red circle"),
    ("<query>\n red \t circle\n</query>", "red circle"),
    ("Sure! <query>the cup</query> is my pick", "the cup"),
    ("<QUERY>the cup</QUERY>", "the cup"),
    ("<query>the cup", "the cup"),
    ("<query>the cup<|im_end|>", "the cup"),
    ("<query>the cup<box>1,2,3,4</box>", "the cup"),
    ("<query>a</query><query>b</query>", "a"),
    ("<query> </query><query>b</query>", "b"),
    ("<query>the<|im_end|> cup</query>", "the cup"),
    ("<query>the <|im_<|x|>end|> cup</query>", "the cup"),
    ("<query>the <|vision_start|><|image_pad|>cup</query>", "the cup"),
    ("<query>the <tool_call>cup</query>", "the cup"),
    ("<query>the\x00 c\u200bup</query>", "the c up"),
    ("<query>\x07</query>", None),
    ("<query><|im_end|></query>", None),
    ("<query></query>", None),
    ("<query>", None),
    ("red circle", None),
    ("red circle</query>", None),
    ("", None),
]


@pytest.mark.parametrize("text, query", QUERIES)
def test_read_query(text, query):
    assert read_query(text) == query


@given(st.text(alphabet="<|im_end>/query \x00ab", max_size=60))
def test_a_query_never_carries_a_special_token(text):
    query = read_query(f"<query>{text}</query>")
    assert query is None or not ("<" in query and ">" in query[query.index("<") :])


def test_long_queries_are_cut():
    assert len(read_query("<query>" + "word " * 100 + "</query>")) <= 200


VERDICTS = [
    ("<visible>yes</visible>", True),
    ("<visible>no</visible>", False),
    ("<visible> Yes", True),
    ("<visible>NO</visible>", False),
    ("yes", True),
    ("No.", False),
    ("no</visible>", False),
    ("Yes, it is clearly visible.", True),
    ("<visible>yes</visible> no doubt", True),
    ("<visible></visible>", None),
    ("yes or no", None),
    ("nothing", None),
    ("maybe", None),
    ("", None),
]


@pytest.mark.parametrize("text, verdict", VERDICTS)
def test_read_verdict(text, verdict):
    assert read_verdict(text) is verdict
