"""An adapter in the form that its next reader takes.

    python -m vise_fast.export --form portable --adapter runs/nano/adapter --out DIR
    python -m vise_fast.export --form merged --average A/adapter B/adapter --alpha 0.5 --out DIR

Forms: portable (from_pretrained and PEFT load it), linked (base weights linked beside it: a whole
model directory, not merged; --copy copies them), merged (the update inside the weights; --dtype
float32 rounds nothing away, --lossy accepts what rounding takes), language-only (without the
projectors' part, which vLLM leaves out by default). --alpha X goes X of the way from the base to
the adapter; --average A B is the mean of several adapters, whose ranks add up. --model says which
base, where the adapter does not. --push OWNER/NAME says what would be sent to the hub, --yes sends
it.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("export")  # before what takes seconds to import

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from vise_fast.config import origin
from vise_fast.config.command_line import CommandLine
from vise_fast.export import push
from vise_fast.export.forms import FORMS, Order, make
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
SYNTAX = commands.syntax("export")


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    if given.help:
        Console().say(commands.page("export", words))
        return 0
    return export(given)


def export(given: CommandLine) -> int:
    """The command, parsed; merge.py comes here too."""
    console = Console()
    order = _order(given)
    if given["push"] is not None:
        _check_push(given["push"], order)
    given.values["adapter"] = str(order.adapters[0])
    make(order, origin.configuration(given), console)
    console.say(f"{'merged' if order.form == 'merged' else 'export':8} {order.out}")
    if given["push"] is not None:
        push.push(order.out, given["push"], send="yes" in given.flags, console=console)
    return 0


def _check_push(repository: str, order: Order) -> None:
    push.check_name(repository)
    if order.form == "linked":
        raise ConfigError(
            "--form linked is for this machine: its weights are links, and the base is on the hub "
            "already; push --form portable"
        )


def _order(given: CommandLine) -> Order:
    """What the words ask for. Raises ConfigError."""
    adapters = _adapters(given)
    form = given["form"] or "portable"
    if form not in FORMS:
        raise ConfigError(f"--form {form} is none of the forms; known: {', '.join(FORMS)}")
    if given["out"] is None:
        raise ConfigError(
            "where to? the result is a directory of its own; write "
            f"{commands.spoken('export')} --form {form} --adapter RUN/adapter --out DIR"
        )
    out = Path(given["out"])
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"--out {out} exists already; nothing is overwritten; name a new directory"
        )
    dtype = given["dtype"] or "auto"
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not understood; known: {', '.join(DTYPES)}")
    copy = "copy" in given.flags
    lossy = "lossy" in given.flags
    return Order(form, adapters, out, _alpha(given["alpha"]), dtype, lossy=lossy, copy=copy)


def _adapters(given: CommandLine) -> list[Path]:
    """The adapter, or those to be averaged. Raises ConfigError."""
    average = given["average"]
    if average is None and given.positional:
        raise ConfigError(
            f"unexpected word '{given.positional[0]}'; several adapters follow --average A B"
        )
    if average is not None and given["adapter"] is None and given.positional:
        return [Path(place) for place in (average, *given.positional)]
    if average is None and given["adapter"] is not None:
        return [Path(given["adapter"])]
    raise ConfigError(
        "which adapter? either one or several are exported; write --adapter RUN/adapter, or "
        "--average A/adapter B/adapter"
    )


def _alpha(text: str | None) -> float:
    try:
        alpha = 1.0 if text is None else float(text)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise ConfigError(
            f"--alpha {text} is no number; 0 is the base, 1 the adapter; write --alpha 0.5"
        )
    return alpha


if __name__ == "__main__":
    sys.exit(run(main))
