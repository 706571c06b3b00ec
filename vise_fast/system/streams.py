"""Standard output and standard error as a run sees them: what cannot be written is dropped, and the
run goes on with the exit code it would have had.

A reader that went away, a full disk behind `> log`, a terminal that was closed, a stream that was
closed before the process began. Left out: what is said (console.py).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

STANDARD = (0, 1, 2)
"""Descriptors of standard input, output and error."""


def guard() -> None:
    """From now on nothing that prints in this process can fail at it: neither we, nor a library,
    nor the interpreter, which flushes at its end and would leave with code 120.

    Streams that were put in place of the process's own (by tests, by a notebook) are left alone.
    """
    _occupy(STANDARD)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _forgiving(sys.stdout, 1)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _forgiving(sys.stderr, 2)


def _occupy(descriptors: Iterable[int]) -> None:
    """A standard descriptor that is closed goes to the next file that is opened, which would then
    hold what C libraries print: the null device takes its place.
    """
    for descriptor in descriptors:
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    """The same stream over writes that do not fail; where there was none, one that says nothing."""
    if stream is None or stream.closed:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", True),
    )


class _Descriptor(io.FileIO):
    """Takes what it is given, and drops what the system refuses."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class Forgiving:
    """A text stream whose writes do not fail, around one of somebody else's; None says nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = io.StringIO() if stream is None else stream
        self._silent = stream is None

    def write(self, text: str) -> int:
        """Writes, or drops what the stream refuses."""
        if not self._silent:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes as far as the stream lets."""
        if not self._silent:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person sees it at once; a closed stream shows nothing."""
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
