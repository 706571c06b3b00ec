"""The page that shows what every style was answered with: a table, and a card per picture with its
boxes and verdicts. It stands alone; everything a model wrote is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image as Pillow

from vise_fast.images.image import Image
from vise_fast.probe.measure import Asked, Measured
from vise_fast.probe.verdict import best, few, warnings, yaml_line
from vise_fast.system import files

TEMPLATE = Path(__file__).with_name("page.html")
REMEDY = "give --html a writable place"
LONGEST = 320
CARDS = 8
ROWS = (
    ("readable queries", "readable_queries"),
    ("readable boxes", "readable_boxes"),
    ("agreement across a view", "agreement"),
    ("... with another picture's", "chance"),
    ("p(visible)", "seen"),
    ("p, its box hidden", "hidden"),
    ("p, another box hidden", "elsewhere"),
    ("p of another picture's word", "absent"),
    ("different queries", "distinct"),
    ("box area, share of the picture", "area"),
    ("queries naming a side", "side_words"),
    ("tokens of a query", "query_tokens"),
    ("tokens of a box", "box_tokens"),
    ("seconds per picture", "seconds"),
)
"""Title and figure, in the order of the table."""


@dataclass(frozen=True)
class Card:
    """One picture in one style; the box in percent of it, or None."""

    asked: Asked
    src: str
    box: tuple[float, float, float, float] | None


def table(measured: Sequence[Measured]) -> list[list[str]]:
    """A row per figure: its title, then each style's value."""
    return [[title, *(f"{getattr(m, name):.3g}" for m in measured)] for title, name in ROWS]


def write(path: Path, measured: Sequence[Measured], images: Sequence[Image], model: str) -> None:
    """Raises EnvironmentFault where the disk refuses."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    chosen = best(measured)
    shown = {m.style: _cards(m, images) for m in measured}
    text = template.render(
        model=model,
        measured=measured,
        rows=table(measured),
        cards=shown,
        chosen=chosen,
        handful=few(measured) is not None,
        line=None if chosen is None else yaml_line(chosen),
        warnings=list(warnings(chosen or measured[0])),
    )
    with files.refused(path, REMEDY):
        path.write_text(text, encoding="utf-8")


def _cards(measured: Measured, images: Sequence[Image]) -> list[Card]:
    pairs = list(zip(measured.samples, images, strict=True))[:CARDS]
    return [Card(asked, _uri(image), _percent(asked)) for asked, image in pairs]


def _percent(asked: Asked) -> tuple[float, float, float, float] | None:
    """left, top, width, height."""
    if asked.box_1000 is None:
        return None
    x1, y1, x2, y2 = asked.box_1000
    return x1 / 10, y1 / 10, (x2 - x1) / 10, (y2 - y1) / 10


def _uri(image: Image) -> str:
    picture = Pillow.fromarray(image.pixels.numpy())
    picture.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
