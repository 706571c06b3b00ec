"""One page that shows a training run: `python -m vise_fast.report RUN` writes RUN/report.html and
RUN/plots/*.png.

The page stands alone (pictures, curves and style inside, no scripts, nothing fetched) and follows
the reader's light or dark setting. Everything a model wrote is escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vise_fast.config.command_line import Syntax
from vise_fast.report.page import write
from vise_fast.system import console
from vise_fast.system.errors import ConfigError

SYNTAX = Syntax(positional=1)


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(__doc__)
        return 0
    if not given.positional:
        raise ConfigError(
            "which run? report reads a run directory and takes no settings; write python -m "
            "vise_fast.report runs/nano"
        )
    screen.say(f"report   {write(Path(given.positional[0]))}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
