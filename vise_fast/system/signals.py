"""Ctrl-C, SIGTERM and a closed terminal end a run in good order: a flag that loop, generation and
update poll; the second signal ends it at once.

Left out: what good order is (run/directory.py saves a checkpoint). Exit codes: 129 for SIGHUP, 130
for SIGINT, 143 for SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""A closed terminal; Windows has no such signal."""
CAUGHT = tuple(n for n in (HANGUP, signal.SIGINT, signal.SIGTERM) if n is not None)
SHOW_CURSOR = b"\x1b[?25h"  # a live bar hides it


class Interrupted(Exception):
    """Raised by `check`; `code` is the exit status to leave with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


@contextlib.contextmanager
def heard() -> Iterator[Signals]:
    """`Signals()`; in a thread of somebody else, who ends it (Ray Train does), one that hears
    nothing.
    """
    stop = Signals()
    main = threading.current_thread() is threading.main_thread()
    with stop if main else contextlib.nullcontext():
        yield stop


class Signals:
    """`with Signals() as stop:` polls `stop.asked`, or lets `stop.check()` raise Interrupted; the
    old handlers come back at the end.

    Main thread only (Python installs handlers nowhere else): ValueError in another.
    """

    def __init__(self) -> None:
        self.code = 0

    @property
    def asked(self) -> bool:
        """A signal has arrived."""
        return self.code != 0

    def check(self) -> None:
        """Raises Interrupted where a signal has arrived."""
        if self.code:
            raise Interrupted(self.code)

    def __enter__(self) -> Signals:
        # nohup: a closed terminal is to be ignored
        deaf = HANGUP is not None and signal.getsignal(HANGUP) is signal.SIG_IGN
        heard = [n for n in CAUGHT if not (deaf and n == HANGUP)]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            # no clean-up: whatever hangs would hang it too, and checkpoints stand a kill
            for stream in (1, 2):
                if os.isatty(stream):
                    os.write(stream, SHOW_CURSOR)
            os._exit(128 + number)
        self.code = 128 + number
