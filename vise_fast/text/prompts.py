"""What we ask and how we read the answer: prompt styles and parsers, text in, values out.

Two styles: "natural" for pretrained Qwen3-VL, "short" for the embedded model (its whole vocabulary
is a few hundred words). A model's config names its style in the field `vise_prompts`; without it,
"natural". Parsers are shared by both styles and never raise: an answer that cannot be read is None,
which the rewards treat as data. Left out: tokens and chat template (tokens.py).

Run: `pytest tests/text/test_prompts.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from vise_fast.images.geometry import Box
from vise_fast.system.errors import ConfigError

Space = Literal["1000", "pixels", "1024"]
QUERY_CHARS = 200
LARGEST_NUMBER = 1e6


@dataclass(frozen=True)
class Style:
    """The texts of one prompt style; `{query}` is filled in literally."""

    name: str
    ask_text: str
    ground_text: str
    verify_text: str
    digits: int = 1
    """A written coordinate has at least this many digits."""
    largest: int = 1000
    """The largest coordinate that is ever written."""
    gap: str = ""
    """Stands between a tag and the words of a query."""
    verdict_opening: str = "<visible>"
    """The assistant's turn is opened with this before the next-token verdict."""
    yes: tuple[str, ...] = ("yes", "Yes", "YES")
    no: tuple[str, ...] = ("no", "No", "NO")
    query_form: str = "<query>{query}</query>"
    box_form: str = "<box>{box}</box>"
    """{box}: four numbers with commas; {x1} to {y2}: each of them."""
    verdict_closing: str = "</visible>"
    space: Space = "1000"
    """The numbers in which boxes are asked for and written (spaces.py)."""
    system: str = ""
    """A turn of its own before the question; empty: what the chat template says."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings of `verify_text`, for verdicts that are averaged."""

    def ask(self) -> str:
        """The question for an object's name."""
        return self.ask_text

    def ground(self, query: str) -> str:
        """The question for an object's box."""
        return self.ground_text.replace("{query}", query)

    def verify(self, query: str) -> str:
        """The question whether an object is visible."""
        return self.verify_text.replace("{query}", query)

    def verify_again(self, query: str) -> list[str]:
        """The same question in other words."""
        return [text.replace("{query}", query) for text in self.paraphrases]

    def write_query(self, query: str) -> str:
        """The answer to `ask` that names this object."""
        return self.query_form.replace("{query}", f"{self.gap}{query}{self.gap}")

    def write_box(self, box: Box) -> str:
        """The answer to `ground` for this box in the style's own numbers, rounded and clamped to
        what it can write.
        """
        values = [min(max(round(float(v)), 0), self.largest) for v in box]
        numbers = [f"{n:0{self.digits}d}" for n in values]
        text = self.box_form.replace("{box}", ",".join(numbers))
        for name, number in zip(("{x1}", "{y1}", "{x2}", "{y2}"), numbers, strict=True):
            text = text.replace(name, number)
        return text

    def write_verdict(self, visible: bool) -> str:
        """The answer to `verify`."""
        word = (self.yes if visible else self.no)[0]
        return f"{self.verdict_opening}{word}{self.verdict_closing}"


NATURAL = Style(
    name="natural",
    ask_text=(
        "Pick one object in this image that is clearly visible and easy to tell apart from "
        "everything else. "
        "Describe it with a short noun phrase that fits this object only, without the words left "
        "or right. "
        "Answer with exactly one line: <query>your phrase</query>"
    ),
    ground_text=(
        "Locate this in the image: {query}\n"
        "Give the tightest box around it as x1,y1,x2,y2: whole numbers from 0 to 1000, relative to "
        "the width and height of the image. "
        "Answer with exactly one line: <box>x1,y1,x2,y2</box>. If it is not in the image, answer "
        "<box>0,0,0,0</box>"
    ),
    verify_text=(
        "Is this clearly visible in the image: {query}\n"
        "If it is missing, hidden or blurred beyond recognition, the answer is no. "
        "Answer with exactly one line: <visible>yes</visible> or <visible>no</visible>"
    ),
    paraphrases=(
        "Can this be seen clearly in the image: {query}\n"
        "If it is missing, hidden or blurred beyond recognition, the answer is no. "
        "Answer with exactly one line: <visible>yes</visible> or <visible>no</visible>",
        "Does the image clearly show this: {query}\n"
        "If it is missing, hidden or blurred beyond recognition, the answer is no. "
        "Answer with exactly one line: <visible>yes</visible> or <visible>no</visible>",
    ),
)

SHORT = Style(
    name="short",
    ask_text="name an object",
    ground_text="find {query}",
    verify_text="see {query} ?",
    digits=3,
    largest=999,
    gap=" ",
)

STYLES = {style.name: style for style in (NATURAL, SHORT)}


def style_for(model_config) -> Style:
    """The style that a model's config asks for in `vise_prompts` (absent: natural).

    Raises ConfigError for an unknown name.
    """
    name = getattr(model_config, "vise_prompts", "natural")
    if name not in STYLES:
        raise ConfigError(
            f"unknown prompt style {name!r}; the model's config.json says vise_prompts; use one of "
            f"{', '.join(STYLES)}"
        )
    return STYLES[name]


_TAG = re.compile(r"<[^<>]*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_QUERY = re.compile(r"<\s*query\s*>", re.IGNORECASE)
_QUERY_END = re.compile(r"<\s*/\s*query\s*>", re.IGNORECASE)

_OTHER_QUERY = re.compile(
    r"<\s*(?:ref|\|object_ref_start\|)\s*>(?P<ref>[^<]*)"
    r"|\"object\"\s*:\s*\"(?P<json>(?:[^\"\\]|\\.)*)",
    re.IGNORECASE,
)


def _without_tags(text: str) -> str:
    """Drop `<...>` until none is left, so that removing one cannot assemble another."""
    while _TAG.search(text):
        text = _TAG.sub(" ", text)
    return text


def _plain(text: str) -> str:
    text = _without_tags(_CONTROL.sub(" ", text))
    return " ".join(text.split())[:QUERY_CHARS].strip()


def read_query(text: str) -> str | None:
    """The first non-empty `<query>…</query>`: one line of at most 200 characters without control
    characters, tags or special tokens; where there is none, the first `<ref>…</ref>` or
    `"object": "…"`.

    An unclosed tag (the answer ran out of tokens) is read up to the next tag or the end. None when
    there is nothing to read.
    """
    for part in _QUERY.split(text)[1:]:
        closed = _QUERY_END.search(part)
        query = _plain(part[: closed.start()] if closed else part.split("<")[0])
        if query:
            return query
    for found in () if _QUERY.search(text) else _OTHER_QUERY.finditer(text):
        query = _plain(found["ref"] or found["json"] or "")
        if query:
            return query
    return None


_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_COMMA = r"(?:\s*[,;，、]\s*|\s+)"
_RUN = re.compile(rf"(?<![\w.%+-]){_NUMBER}(?:{_COMMA}{_NUMBER})*+(?![\w]|\.[0-9]|\s*%)")
_CORNER = rf"[(\[]\s*({_NUMBER})\s*[,;，、]\s*({_NUMBER})\s*[)\]]"
_CORNERS = re.compile(rf"{_CORNER}\s*[,;，、]?\s*{_CORNER}")
_SPACED_DIGITS = re.compile(r"(?<![0-9.])[0-9](?: [0-9])+(?![0-9.])")
_BOX_TAG = re.compile(r"<\s*\|?\s*box(?:_start)?\s*\|?\s*>", re.IGNORECASE)
_BOX_KEY = re.compile(r"[\"']?\b(?:bbox(?:_2d)?|box)\b[\"']?\s*[:=]\s*", re.IGNORECASE)


def _numbers(run: str) -> Box | None:
    """Exactly four sane numbers, or None."""
    values = [float(number) for number in re.findall(_NUMBER, run)]
    sane = all(math.isfinite(value) and abs(value) <= LARGEST_NUMBER for value in values)
    if len(values) != 4 or not sane:
        return None
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2


def _first_four(text: str) -> Box | None:
    """The first run of exactly four numbers; `(a, b), (c, d)` counts as one run."""
    text = _CORNERS.sub(r"\1,\2,\3,\4", text)
    for run in _RUN.finditer(text):
        if len(re.findall(_NUMBER, run.group())) == 4:
            return _numbers(run.group())
    return None


def _tagged(content: str) -> Box | None:
    """Inside a tag: up to the next tag; a tokenizer may have put blanks between the digits of a
    number.
    """
    content = content.split("<")[0]
    if len(re.findall(r"[,;，、]", content)) == 3:
        content = _SPACED_DIGITS.sub(lambda digits: digits.group().replace(" ", ""), content)
    return _first_four(content)


def read_box(text: str) -> Box | None:
    """The first readable box of an answer as four floats (nominally 0..1000, cleaned later by
    geometry), or None.

    Read in this order: `<box>…</box>` (also unclosed), a `"bbox_2d": […]` or `"box": …` key, a bare
    list of exactly four numbers. A tag or key without four numbers is not replaced by numbers found
    elsewhere. Non-finite numbers and magnitudes above 1e6 are unreadable.
    """
    for mark, read in ((_BOX_TAG, _tagged), (_BOX_KEY, _first_four)):
        parts = mark.split(text)[1:]
        if parts:
            return next((box for box in map(read, parts) if box is not None), None)
    return _first_four(text)


_LOC = re.compile(r"<\s*loc\s*([0-9]{1,4})\s*>" * 4, re.IGNORECASE)


def read_loc(text: str) -> Box | None:
    """The first four `<loc0000>` tokens in a row, PaliGemma's y1 x1 y2 x2 in 1024 bins, as x1, y1,
    x2, y2 in those bins; None where there are none.
    """
    found = _LOC.search(text)
    if found is None:
        return None
    y1, x1, y2, x2 = map(float, found.groups())
    return x1, y1, x2, y2


_VISIBLE = re.compile(r"<\s*visible\s*>", re.IGNORECASE)
_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def read_verdict(text: str) -> bool | None:
    """True for yes, False for no, None when neither is said or both are.

    Looks behind `<visible>` when there is one.
    """
    tagged = _VISIBLE.split(text, maxsplit=1)
    content = tagged[1].split("<")[0] if len(tagged) == 2 else text
    words = {word.lower() for word in _VERDICT.findall(content)}
    return None if len(words) != 1 else words == {"yes"}
