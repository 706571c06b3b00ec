"""What running code takes: seconds per phase, and the peak of its memory.

Nothing here changes what it watches. Left out: FLOPs and host syncs (profile/).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def fence(device: torch.device | str) -> None:
    """Wait for the device; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds per phase, added up until `take`. A phase inside another counts for the outer one
    only.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        fenced: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """fenced: wait for the GPU at both ends of a phase, so that it is charged with its own work
        (two host syncs each).

        now: anything that only grows; a counter of FLOPs or launches in place of seconds splits
        those by phase.
        """
        self.device = device
        self.fenced = fenced
        self.now = now
        self.seconds: dict[str, float] = {}
        self._inside = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges what runs inside to `name`."""
        if self._inside:
            yield
            return
        self._inside = True
        start = self._now()
        try:
            yield
        finally:
            self._inside = False
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def wrap(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function` as a phase."""

        def timed(*args: Any, **kwargs: Any) -> T:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """{phase: seconds} since the last call, which starts anew."""
        taken = self.seconds
        self.seconds = {}
        return taken

    def _now(self) -> float:
        if self.fenced:
            fence(self.device)
        return self.now()


def reset_peak_memory(device: torch.device | str) -> bool:
    """Start a new peak; False where the system cannot (then the peak is the process's own since its
    start).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device | str) -> int:
    """Bytes: the allocator's peak reservation on a GPU; on a CPU the process's peak resident
    size, 0 where the system does not tell it (Windows).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(
            (text for text in status.read_text().splitlines() if text.startswith("VmHWM")), None
        )
        if line is not None:
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
