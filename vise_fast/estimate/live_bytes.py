"""Counts the bytes of all tensor storages alive, activations saved for the backward pass included,
on any device.

Around a real step on a CPU it measures; on the meta device it predicts (rehearsal.py). Left out:
scratch inside operators.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class _Storage:
    label: str
    size: int
    alive: weakref.ref


class Live(TorchDispatchMode):
    """Bytes of tensor storages alive: `now`, their `peak`, and `at_peak` by the label under which
    each was made.

    Counts what is made while it is entered, plus what `adopt` is told of; on one device type.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.label = "other"
        self.now = 0
        self.peak = 0
        self.by: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._known: dict[int, _Storage] = {}
        self._held: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = self.compute(function, args, kwargs or {})
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def compute(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The op itself; a place for subclasses."""
        return function(*args, **kwargs)

    def adopt(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors made earlier."""
        with self.labelled(label):
            for tensor in tensors:
                self._count(tensor)

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made inside bears this label."""
        before = self.label
        self.label = label
        try:
            yield
        finally:
            self.label = before

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._known or size == 0:
            return
        alive = weakref.ref(storage, lambda _: self._forget(key))
        self._known[key] = _Storage(self.label, size, alive)
        self.by[self.label] += size
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = self.by.copy()

    def _forget(self, key: int) -> None:
        gone = self._known.pop(key)
        self.by[gone.label] -= gone.size
        self.now -= gone.size

    def hold(self, tensors: list[Tensor], label: str) -> None:
        """Keep tensors alive, and counted, as long as this is."""
        self._held += tensors
        self.relabel(tensors, label)

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """What these tensors hold is counted under another label from now on."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None:
                self.by[known.label] -= known.size
                self.by[label] += known.size
                known.label = label

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.now
        self.at_peak = self.by.copy()
