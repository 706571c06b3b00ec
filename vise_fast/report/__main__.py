"""One page that shows a training run: `python -m vise_fast.report RUN` writes RUN/report.html and
RUN/plots/*.png.

The page stands alone (pictures, curves and style inside, no scripts, nothing fetched) and follows
the reader's light or dark setting. Everything a model wrote is escaped.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("report")  # before what takes seconds to import

import sys
from collections.abc import Sequence
from pathlib import Path

from vise_fast.report.page import write
from vise_fast.system import console
from vise_fast.system.errors import ConfigError

SYNTAX = commands.syntax("report")


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(commands.page("report", words))
        return 0
    if not given.positional:
        raise ConfigError(
            "which run? report reads a run directory and takes no settings; write python -m "
            "vise_fast.report runs/nano"
        )
    screen.say(f"report   {write(Path(given.positional[0]), screen.warn)}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
