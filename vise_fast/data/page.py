"""The page of a survey: tables, what each setting would leave out beside what it stays for, bad
files, and a contact sheet. It stands alone; every name is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jinja2
from PIL import Image as Pillow

from vise_fast.data import figures
from vise_fast.data.survey import Rule, Survey
from vise_fast.images.image import Image
from vise_fast.images.listing.bad_files import described

TEMPLATE = Path(__file__).with_name("page.html")
LONGEST = 160
CARDS = 24
"""Pictures of one rule on the page."""
LISTED = 200
"""Bad files on the page."""
Picture = Callable[[str], Pillow.Image | None]
"""The picture of a name; None where it cannot be had any more."""


@dataclass(frozen=True)
class Card:
    """A picture, and what is said below it. `beside`: the one that it is almost the same as."""

    src: str
    text: str
    beside: str = ""


def text(survey: Survey, lines: Iterable[str], picture: Picture) -> str:
    """The page's HTML. lines: what follows for a run."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        counts=figures.counts(survey),
        lines=list(lines),
        tables=[
            ("Of every picture", figures.SPREAD, figures.spread(survey)),
            ("After the resize", figures.GRIDS, figures.grids(survey)),
            ("What each setting leaves out", figures.RULES, figures.rules(survey)),
        ],
        bad=[described(name, reason) for name, reason in islice(survey.bad.items(), LISTED)],
        more_bad=max(0, len(survey.bad) - LISTED),
        rules=[(rule, _cards(rule, picture)) for rule in survey.rules if rule.dropped],
        shown=[Card(_uri(_of(image)), image.name) for image in survey.shown],
    )


def _cards(rule: Rule, picture: Picture) -> list[Card]:
    found = []
    for name, reason in islice(rule.dropped.items(), CARDS):
        own = picture(name)
        if own is not None:
            other = picture(reason.removeprefix("is almost ")) if "almost" in reason else None
            found.append(Card(_uri(own), described(name, reason), _uri(other) if other else ""))
    return found


def _of(image: Image) -> Pillow.Image:
    return Pillow.fromarray(image.pixels.numpy())


def _uri(picture: Pillow.Image) -> str:
    picture.thumbnail((LONGEST, LONGEST))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
