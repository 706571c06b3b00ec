"""Which style to train in, and whether the base can play at all: plain rules over measured figures.

    score = readable queries · readable boxes · agreement · (1 + separation) / 2

separation is p(visible) with another box hidden minus p with the box itself hidden, at least 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from vise_fast.evaluate.results import FEW, TOO_FEW
from vise_fast.probe.measure import Measured

READABLE = 0.5
AGREEMENT = 0.65
SEPARATION = 0.3
"""Below each of them a run has little to learn from. The embedded model: agreement 0.80 and
separation 0.70 on its own scenes; 0.38 and 0.03, 0.59 and 0.15 on two sets of photographs.
"""


def separation(measured: Measured) -> float:
    """How much more the judge misses the box than another of its size; nan where nothing was
    judged.
    """
    return measured.elsewhere - measured.hidden


def score(measured: Measured) -> float:
    """0..1; 0 where nothing can be read."""
    parts = measured.agreement, separation(measured)
    agreement, apart = (0.0 if math.isnan(part) else part for part in parts)
    readable = measured.readable_queries * measured.readable_boxes
    return readable * agreement * (1 + max(apart, 0.0)) / 2


def few(table: Sequence[Measured]) -> str | None:
    """Why nothing is concluded; None where there are pictures enough."""
    pictures = len({one.name for one in table[0].samples})  # shown twice, it is one
    if pictures >= FEW:
        return None
    return (
        f"{pictures} pictures are {TOO_FEW}: no style is chosen and none is warned of; give {FEW} "
        "different ones or more (--pictures, data.dir)"
    )


def best(table: Sequence[Measured]) -> Measured | None:
    """The style with the highest score, the first among equals; None where none has any, or there
    are too few pictures to tell.
    """
    if few(table) is not None:
        return None
    found = max(table, key=score)
    return found if score(found) > 0 else None


def warnings(measured: Measured) -> Iterator[str]:
    """Why a run in this style would learn little, one line each: what; why; what to do. Of too few
    pictures only that.
    """
    handful = few([measured])
    if handful is not None:
        yield handful
        return
    readable = measured.readable_queries * measured.readable_boxes
    if readable < READABLE:
        yield (
            f"{readable:.0%} of the pictures end in a readable box in style {measured.style}; the "
            "others teach nothing; try another prompt style or a larger model"
        )
    apart = separation(measured)
    if not apart >= SEPARATION:
        yield (
            f"the judge sees the object nearly as well with its box hidden "
            f"(p {measured.hidden:.2f}) as with another hidden (p {measured.elsewhere:.2f}); its "
            "verdicts carry no signal here; take a base that knows such pictures"
        )
    if not measured.agreement >= AGREEMENT:
        yield (
            f"boxes do not follow the picture into a view (agreement {measured.agreement:.2f}, "
            f"{measured.chance:.2f} with another picture's); this base cannot ground on these "
            "pictures, and no learning rate changes that; take another base"
        )


def yaml_line(measured: Measured) -> str:
    """What to write into a configuration."""
    name = measured.style
    return f"prompts: {{ask: {name}, ground: {name}, verify: {name}}}"
