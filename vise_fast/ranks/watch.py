"""Who of the others is still there: known at once on this machine, and elsewhere by a beat.

A process that is killed says nothing. On the same machine the system knows; from another one every
rank sets a counter in the launcher's store, and one that stands still for SILENCE_S is gone. A
process that ends by itself leaves a word there first.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed import DistError

BEAT_S = 2.0
SILENCE_S = 20.0
"""Longer than any pause in which a process is well: Python threads take turns every 5 ms."""
FAREWELL_S = 5.0
LEFT = "left"


@dataclass(frozen=True)
class Process:
    """Where a rank runs. `machine`: equal for processes that see each other's numbers."""

    rank: int
    machine: str
    pid: int
    host: str

    @classmethod
    def here(cls, rank: int) -> Process:
        """This one."""
        return cls(rank, _machine(), os.getpid(), socket.gethostname())


def _machine() -> str:
    """The boot and the process namespace; the host's name where the system tells neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"host {socket.gethostname()}"


def runs(pid: int) -> bool:
    """Whether a process of this machine is alive; one that waits to be buried is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@dataclass
class _Heard:
    """The last beat of a rank elsewhere, and when it was seen to change."""

    beat: bytes = b""
    at: float = field(default_factory=time.monotonic)


class Watch:
    """Beats for this rank, and looks after the others. `store`: the launcher's.

    The store may go away with the machine it is on; then everything that was there is gone.
    """

    def __init__(self, store: Any, own: Process, everybody: list[Process]) -> None:
        self.store = store
        self.own = own
        near = Path("/proc/self/stat").exists()
        others = [process for process in everybody if process.rank != own.rank]
        self._here = [p for p in others if near and p.machine == own.machine]
        self._elsewhere = [p for p in others if p not in self._here]
        self._heard = {process.rank: _Heard() for process in self._elsewhere}
        self._over = threading.Event()
        store.set(f"beat/{own.rank}", "0")
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()

    def gone(self) -> list[Process]:
        """Those that ended without a word, as far as it is known now."""
        found = [process for process in self._here if not runs(process.pid)]
        return found + self._silent()

    def _silent(self) -> list[Process]:
        """Those of other machines whose beat stands still."""
        now = time.monotonic()
        silent = []
        for process in self._elsewhere:
            heard = self._heard[process.rank]
            beat = self._read(f"beat/{process.rank}")
            if beat != heard.beat:
                self._heard[process.rank] = _Heard(beat, now)
            elif now - heard.at > SILENCE_S:
                silent.append(process)
        return silent

    def _read(self, key: str) -> bytes:
        """b"" where the store does not have it, or is gone."""
        with contextlib.suppress(DistError, RuntimeError):
            if self.store.check([key]):
                return self.store.get(key)
        return b""

    def leave(self, code: int) -> None:
        """A word for the others: this rank ends by itself, with this code."""
        with contextlib.suppress(DistError, RuntimeError):
            self.store.set(f"{LEFT}/{self.own.rank}", str(code))
            if not self.store.check([LEFT]):
                self.store.set(LEFT, str(code))

    def speaks(self) -> bool:
        """Whether this rank is the first to say why the run ends; asked once."""
        try:
            return self.store.add("speakers", 1) == 1
        except (DistError, RuntimeError):  # it went with a rank that spoke
            return self.own.rank == 0

    def see_off(self, everybody: list[Process]) -> None:
        """Wait, not for long, until the others have left or are gone: the store may be this
        process's.
        """
        end = time.monotonic() + FAREWELL_S
        while time.monotonic() < end:
            gone = {process.rank for process in self.gone()}
            here = [p.rank for p in everybody if p.rank not in gone | {self.own.rank}]
            if all(self.has_left(rank) for rank in here):
                return
            time.sleep(0.05)

    def left(self) -> int | None:
        """The exit code of the first one that ended by itself, None while nobody did."""
        said = self._read(LEFT)
        return int(said) if said else None

    def has_left(self, rank: int) -> bool:
        """Whether a rank ended by itself."""
        return self._read(f"{LEFT}/{rank}") != b""

    def close(self) -> None:
        """No more beats."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(BEAT_S):
            beats += 1
            try:
                self.store.set(f"beat/{self.own.rank}", str(beats))
            except (DistError, RuntimeError):
                return  # the store is gone, and with it whoever would read
