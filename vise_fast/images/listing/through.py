"""How far something long has come: what hands things on may show it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Through(Protocol):
    """Hands things on one after the other, and may show how far it is."""

    def __call__(self, things: Iterable[T], label: str) -> Iterable[T]: ...


def unseen(things: Iterable[T], label: str) -> Iterable[T]:
    """Shows nothing."""
    return things
