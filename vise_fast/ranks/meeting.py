"""Who is here now: a name for this start of the ranks that no other start has.

A launcher that starts the processes of a run again may hand them the store of those before, with
everything that the dead left in it: addresses that nobody listens at, a word that the run is over.
So the living agree on a fresh name first, and put all they say under it. Numbers of restarts would
not do: after a failure on one machine the agents of the others count differently.

    every rank    hello/r = a name of its own
    rank 0        roll    = the hellos of all ranks, written again whenever one changes
    the others    seen/r  = the roll with their own name in it
    rank 0        go/name, once everybody has seen the roll as it is

A roll that holds a rank's own name was written after that rank came, so by a rank 0 that lives.
Left out: what is said under the name (joined.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from torch.distributed import Store

T = TypeVar("T")
LOOK_S = 0.02


def fresh_name(store: Store, rank: int, count: int, patience_s: float) -> str:
    """The same on all `count` ranks of this start, never used before. TimeoutError where the others
    do not come within `patience_s` seconds.
    """
    own = uuid.uuid4().hex
    store.set(f"hello/{rank}", own)
    if rank == 0:
        _until(lambda: _all_have_seen(store, count), patience_s)
        store.set(f"go/{own}", "")
        return own
    roll = _until(lambda: _roll_with(store, rank, own), patience_s)
    name = roll.split()[0]
    _until(lambda: _may_go(store, rank, own, name), patience_s)
    return name


def _until(look: Callable[[], T], patience_s: float) -> T:
    """What `look` returns, as soon as it is true."""
    end = time.monotonic() + patience_s
    while not (found := look()):
        if time.monotonic() > end:
            raise TimeoutError(f"not all ranks came within {patience_s:g} seconds")
        time.sleep(LOOK_S)
    return found


def _read(store: Store, key: str) -> str:
    """\"\" where nothing was said."""
    return store.get(key).decode() if store.check([key]) else ""


def _all_have_seen(store: Store, count: int) -> bool:
    """Rank 0: calls the roll again, and looks whether everybody has seen this one."""
    hellos = [_read(store, f"hello/{rank}") for rank in range(count)]
    if not all(hellos):
        return False
    roll = " ".join(hellos)
    if _read(store, "roll") != roll:
        store.set("roll", roll)
    return all(_read(store, f"seen/{rank}") == roll for rank in range(1, count))


def _roll_with(store: Store, rank: int, own: str) -> str:
    """The roll, where it names this process; else \"\"."""
    roll = _read(store, "roll")
    return roll if own in roll.split()[rank : rank + 1] else ""


def _may_go(store: Store, rank: int, own: str, name: str) -> bool:
    """Says that the roll as it is now was seen."""
    roll = _roll_with(store, rank, own)
    if roll and _read(store, f"seen/{rank}") != roll:
        store.set(f"seen/{rank}", roll)
    return bool(store.check([f"go/{name}"]))
