"""Runs beside each other: a table with paired intervals on screen, and one page with it, the curves
on top of each other and the settings in which they differ.

    python -m vise_fast.compare runs/a runs/b [--out compare.html]

The first run is what the others are compared with. Figures are paired where runs were measured on
the same held-out images.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("compare")  # before what takes seconds to import

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vise_fast.report import comparison
from vise_fast.report.comparison import Comparison
from vise_fast.report.stored_run import read
from vise_fast.system import files
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError

if TYPE_CHECKING:
    from vise_fast.report.plots import Plot

SYNTAX = commands.syntax("compare")
REMEDY = "give --out a writable file"


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    console = Console()
    if given.help:
        console.say(commands.page("compare", words))
        return 0
    if len(given.positional) < 2:
        raise ConfigError(
            "which runs? compare puts two or more beside each other; write vise-fast compare "
            "runs/a runs/b"
        )
    _refuse_twice(given.positional)
    shown = comparison.compare([read(Path(place)) for place in given.positional])
    tell(shown, console)
    out = comparison.destination(given["out"])
    files.write(out, comparison.render(shown, _curves(shown, console.warn)), REMEDY)
    console.say(f"page     {out}")
    return 0


def _refuse_twice(places: Sequence[str]) -> None:
    """Raises ConfigError where two names mean one run."""
    seen: set[Path] = set()
    for place in places:
        found = Path(place).resolve()
        if found in seen:
            raise ConfigError(
                f"{place} is named twice; a run has no difference to itself; name each run once"
            )
        seen.add(found)


def tell(shown: Comparison, console: Console) -> None:
    """The table and the differences, on screen."""
    title = f"adapters on held-out images (difference to {shown.names[0]}, 95 % interval)"
    console.table(title, ["", *shown.names], [comparison.row(line) for line in shown.lines])
    for key, values in shown.differences.items():
        console.say(f"differs  {key}: {' · '.join(values)}")
    for name, stored in zip(shown.names, shown.runs, strict=True):
        if stored.after is None:
            why = "no evaluation was made" if stored.finished else "it is not finished"
            console.warn(f"{name} has no figures of its adapter: {why}")
    measured = sum(stored.after is not None for stored in shown.runs)
    if shown.lines and measured > 1 and not shown.paired:
        console.warn("the runs were not measured on the same images; no difference can be told")


def _curves(shown: Comparison, say: Callable[[str], None]) -> list[Plot]:
    """None where matplotlib is missing."""
    try:
        from vise_fast.report.plots import overlay
    except ImportError as fault:
        say(f"the page has no curves: matplotlib cannot be imported ({fault})")
        return []
    return overlay(dict(zip(shown.names, shown.runs, strict=True)))


if __name__ == "__main__":
    sys.exit(run(main))
