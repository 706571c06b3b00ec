"""One page that shows a training run: `python -m vise_fast.report RUN` writes RUN/report.html and
RUN/plots/*.png; with --live it follows a run that is still going on.

The page stands alone (pictures, curves and style inside, no scripts, nothing fetched) and follows
the reader's light or dark setting. Everything a model wrote is escaped.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("report")  # before what takes seconds to import

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from vise_fast.report import live
from vise_fast.report.page import write
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, DataError

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
    if "live" in given.flags:
        return watch(Path(given.positional[0]), given.count("port") or 0, screen)
    screen.say(f"report   {write(Path(given.positional[0]), screen.warn)}")
    return 0


def watch(directory: Path, port: int, screen: console.Console) -> int:
    """Serves the page until Ctrl-C. Raises DataError for a directory that is not there."""
    if not directory.is_dir():
        raise DataError(f"{directory} is no directory; give that of a run")
    with live.server(directory, port) as server:
        screen.say(f"live     http://{live.HOST}:{server.server_port}/   (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
