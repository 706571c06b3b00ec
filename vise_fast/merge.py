"""Fold an adapter into its base: a plain model directory that needs no PEFT.

    python -m vise_fast.merge --adapter runs/nano/adapter --out merged [--model PATH]
    [--dtype float32] [--lossy]

The same as `python -m vise_fast.export --form merged`, which knows other forms as well. Each
product B·A is formed and added in fp32 and rounded once, to the dtype the base is stored in or to
--dtype. Where rounding takes more than half of the update's size nothing is written, unless --lossy
asks for it.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("merge")  # before what takes seconds to import

import sys
from collections.abc import Sequence

from vise_fast.export import __main__ as export
from vise_fast.export.merged import Loss, merge
from vise_fast.system.console import Console, run

__all__ = ["Loss", "main", "merge"]
SYNTAX = commands.syntax("merge")


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    if given.help:
        Console().say(commands.page("merge", words))
        return 0
    given.values = dict.fromkeys(export.SYNTAX.options) | given.values | {"form": "merged"}
    return export.export(given)


if __name__ == "__main__":
    sys.exit(run(main))
