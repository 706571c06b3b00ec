"""What a run asks of the other processes that train the same adapter, and the one that has none.

A rank plays its own images of every batch. What the others must know of them is exchanged in the
order of ranks, which is the order of the batch, so that every rank computes the same rewards,
advantages and figures from the same numbers. Left out: how it is sent (together.py), who is asked
for it (method/learner.py, train.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def never() -> None:
    """Interrupts nothing."""


class Ranks(Protocol):
    """A process among `count` that train one adapter; `rank` 0 writes and tells."""

    rank: int
    count: int
    cuda: int | None
    """index of the GPU that is this rank's own; None: as configured"""
    ordered: bool
    """gradients are added in the order of ranks: bitwise repeatable for the same number of them"""
    interrupted: Callable[[], None]
    """called while others are waited for; may raise"""

    def part(self, images: int) -> range:
        """The places, in a batch of so many images, of those that this rank plays."""

    def gather(self, name: str, value: T) -> list[T]:
        """One value of each rank, in their order. `name`: of the exchange, once per step."""

    def total(self, name: str, number: int) -> int:
        """The sum of everybody's."""

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become the sum of everybody's, in place."""

    def step_done(self) -> None:
        """An update is complete: the next one exchanges anew."""

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, told to all; what it raises there ends all."""

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it went well on every rank; else all end."""

    def node_by_node(self, work: Callable[[], T]) -> T:
        """`agreed`, but one process of each machine goes before its others: what it read from a
        slow disk lies in memory then.
        """

    def work(self, counts: dict[str, int], images: int, device: torch.device) -> dict[str, Any]:
        """Figures of a step's work for metrics.jsonl, from every rank's."""

    def describe(self) -> Mapping[str, Any]:
        """For env.json."""

    def missing(self) -> list[int]:
        """The ranks that are gone without a word, as far as it is known now."""

    def leave(self, code: int) -> None:
        """This rank ends the run, with this exit code: the others are told."""

    def end(self) -> None:
        """All end together: rank 0 may have work that others have not."""


class Alone:
    """The only process."""

    rank = 0
    count = 1

    def __init__(self) -> None:
        self.cuda: int | None = None
        self.ordered = True
        self.interrupted: Callable[[], None] = never

    def part(self, images: int) -> range:
        """All of them."""
        return range(images)

    def gather(self, name: str, value: T) -> list[T]:
        """Its own."""
        return [value]

    def total(self, name: str, number: int) -> int:
        """Its own."""
        return number

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """They are whole."""

    def step_done(self) -> None:
        """Nothing was exchanged."""

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns."""
        return work()

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns."""
        return work()

    def node_by_node(self, work: Callable[[], T]) -> T:
        """What `work` returns."""
        return work()

    def work(self, counts: dict[str, int], images: int, device: torch.device) -> dict[str, Any]:
        """The counts."""
        return dict(counts)

    def describe(self) -> Mapping[str, Any]:
        """Their number."""
        return {"ranks": 1}

    def missing(self) -> list[int]:
        """There is no other."""
        return []

    def leave(self, code: int) -> None:
        """Nobody is told."""

    def end(self) -> None:
        """It does."""
