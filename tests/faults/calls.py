"""Every call with which a run touches its files, one by one: where a fault can be put.

`watch(root, act)` asks `act(call)` before each of them that names something under `root`. There is
no way back (an audit hook stays for good), so it is for a process that is about to end: a forked
child (forked.py). What a library writes outside Python (safetensors) is not seen.

    make       a folder is made          remove     a file is removed
    open       a file is opened          rmdir      a folder is removed
               for writing               rename     under the name it goes to
    write      bytes go to the system    sync       fsync
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.mkdir": "make", "os.remove": "remove", "os.rmdir": "rmdir", "os.rename": "rename"}
OPEN = builtins.open


@dataclass(frozen=True)
class Call:
    """`name` relative to the root; `half` writes the first half of what a write would."""

    operation: str
    name: str
    half: Callable[[], Any] = field(default=lambda: None, compare=False)

    def __str__(self) -> str:
        return f"{self.operation} {self.name}"


def watch(root: Path, act: Callable[[Call], None]) -> None:
    """Let `act` see, fail (by an OSError) or end the process before every call under `root`."""
    watched = _Watched(root.resolve(), act)
    sys.addaudithook(watched.audit)
    builtins.open = watched.open
    io.open = watched.open
    os.fsync = watched.syncing(os.fsync)
    os.sendfile = watched.sending(os.sendfile)


class _Watched:
    def __init__(self, root: Path, act: Callable[[Call], None]) -> None:
        self.root = root
        self.act = act

    def name(self, path: Any, folder: int = -1) -> str | None:
        """The name under the root of a path, relative to an open folder; None outside."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.path.join(_opened(folder), os.fsdecode(path))
        relative = os.path.relpath(os.path.abspath(path), self.root)
        return None if relative.startswith("..") else relative

    def tell(self, operation: str, name: str | None, half: Callable[[], Any] | None = None) -> None:
        if name is not None:
            self.act(Call(operation, name, half or (lambda: None)))

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if flags & WRITING and isinstance(path, str | bytes | os.PathLike):
                self.tell("open", self.name(path))
        elif event == "os.rename":
            self.tell("rename", self.name(given[1], given[3]))
        elif event in EVENTS:
            self.tell(EVENTS[event], self.name(given[0], given[-1]))

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
        """`open`; what is written to a file under the root passes `act` on its way."""
        outside = isinstance(file, int) or self.name(file) is None
        if outside or not set(mode) & set("wax+"):
            return OPEN(file, mode, buffering, *text, **more)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *text, **more)

    def syncing(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            self.tell("sync", self.name(descriptor))
            fsync(descriptor)

        return call

    def sending(self, sendfile: Callable[..., int]) -> Callable[..., int]:
        def call(out: int, source: int, offset: int, count: int) -> int:
            size = os.fstat(source).st_size
            self.tell("write", self.name(out), lambda: sendfile(out, source, 0, size // 2))
            return sendfile(out, source, offset, count)

        return call


class _Raw(io.FileIO):
    def __init__(self, watched: _Watched, path: Any, mode: str) -> None:
        self.watched = watched
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        half = memoryview(data)[: len(data) // 2]
        write = super().write
        self.watched.tell("write", self.watched.name(self.fileno()), lambda: write(half))
        return write(data)


def _opened(folder: int) -> str:
    return os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
