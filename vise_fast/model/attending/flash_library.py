"""FlashAttention from a package of its own, for rows that lie side by side: flash-attn 4, 3 or 2,
by what the card is and what can be imported; None of them is needed, torch has FlashAttention 2.

    flash_attn.cute         flash-attn-4 (wheels), compute capability 9.0 and newer
    flash_attn_interface    FlashAttention 3, 9.0
    flash_attn              flash-attn 2 (built from source), 8.0 and newer

Imported on first use, never by importing this. What cannot be imported is passed over, with its
reason. Before a step relies on one, it is held to the written-out formula on the card (proofs.py).
Left out: shared banks of keys, whose parts need a backward pass under a given log-sum-exp, which
only torch's operators offer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

Capability = tuple[int, int]
FAULTS = (ImportError, OSError, RuntimeError, AttributeError)
"""Of an import: missing, built for another torch or CUDA, without the function."""


class Package(NamedTuple):
    """One of the three: its module, its name, the least and most compute capability."""

    module: str
    name: str
    least: Capability
    most: Capability


PACKAGES = (
    Package("flash_attn.cute", "flash-attn 4", (9, 0), (99, 0)),
    Package("flash_attn_interface", "FlashAttention 3", (9, 0), (9, 0)),
    Package("flash_attn", "flash-attn 2", (8, 0), (99, 0)),
)
"""The best first."""
DISTRIBUTIONS = ("flash-attn-4", "flash-attn-3", "flash-attn")


class Found(NamedTuple):
    """The function, or None where torch's own serves; why, in words."""

    function: Callable | None
    reason: str


def find(capability: Capability) -> Found:
    """The best package for a card."""
    passed = []
    for package in PACKAGES:
        if not package.least <= capability <= package.most:
            continue
        try:
            module = importlib.import_module(package.module)
            return Found(module.flash_attn_varlen_func, package.name)
        except ModuleNotFoundError:
            continue
        except FAULTS as fault:
            line = next(iter(str(fault).splitlines()), "")
            passed.append(f"{package.name} cannot be used ({line[:80]})")
    return Found(None, "; ".join(["torch's FlashAttention", *passed]))


_found = functools.cache(find)
_off: str | None = None


def switch_off(reason: str | None) -> None:
    """From here on torch's own serves, for this reason; None: the best package again."""
    global _off
    _off = reason


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Inside, torch's own serves."""
    before = _off
    switch_off("left out")
    try:
        yield
    finally:
        switch_off(before)


def of(device: torch.device) -> Found:
    """`find`, remembered, for this device; nothing on a CPU."""
    if device.type != "cuda" or torch.version.hip:
        return Found(None, "no package for this device")
    if _off is not None:
        return Found(None, f"torch's FlashAttention, a package is switched off: {_off}")
    return _found(torch.cuda.get_device_capability(device))


def versions() -> list[str]:
    """Of what is installed."""
    known = []
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known.append(f"{name} {metadata.version(name)}")
    return known


def attend(
    function: Callable, qkv: tuple[Tensor, Tensor, Tensor], spans: tuple[Tensor, int], scale: float
) -> Tensor:
    """Causal attention within each row by a package's function, differentiable: q (n, H, D), k and
    v (n, KV, D), spans the int32 ends (N + 1,) and the longest row; (n, H, D).
    """
    ends, longest = spans
    asked = {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    takes = _parameters(function)
    given = {name: value for name, value in asked.items() if name in takes}
    found = function(*qkv, **given)
    return found[0] if isinstance(found, tuple) else found  # 4 gives the log-sum-exp too


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    """By name: the packages differ in what they ask for."""
    return frozenset(inspect.signature(function).parameters)
