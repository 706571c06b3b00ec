"""A run at a terminal: Ctrl-C once and twice, and the terminal that is closed."""

import fcntl
import os
import pty
import signal
import sys
import termios
import threading
import time

import pytest
from faults.forked import again, go, words
from faults.left import left, sound, steps_saved
from faults.test_signals_at_every_place import sending

from vise_fast.method import experience
from vise_fast.run import directory as run_directory

HIDDEN = "\x1b[?25l"
SHOWN = "\x1b[?25h"


class Terminal:
    """A terminal with somebody who reads it; `text`: what was shown. It is closed as soon as
    `until` was shown.
    """

    def __init__(self, until=None):
        self.master, self.slave = pty.openpty()
        self.until = until
        self.text = ""
        self._reader = threading.Thread(target=self._read)

    def _read(self):
        try:
            while data := os.read(self.master, 65536):
                self.text += data.decode("utf-8", "replace")
                if self.until is not None and self.until in self.text:
                    break
        except OSError:  # how a terminal says that nobody writes to it any more
            pass
        os.close(self.master)

    def go(self, directory, place):
        """A run at this terminal, with something that happens in it."""

        def prepare():
            self.take()
            place()

        self._reader.start()
        outcome = go(words(directory), directory, prepare=prepare)
        os.close(self.slave)
        self._reader.join(30)
        return outcome

    def take(self):
        """The process that calls this (a child) lives at the terminal from now on."""
        os.setsid()
        os.close(self.master)
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(self.slave, number)
            stream = os.fdopen(number, "w", 1, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@pytest.fixture(autouse=True)
def a_terminal_that_can(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def test_ctrl_c_once(tmp_path):
    directory = tmp_path / "run"
    terminal = Terminal()
    place = sending(signal.SIGINT, experience, "judge", 2)
    assert terminal.go(directory, place).code == 130
    assert terminal.text.rindex(SHOWN) > terminal.text.rindex(HIDDEN)
    assert "go on with --train.resume auto" in terminal.text
    assert steps_saved(directory) == 1


def twice(number):
    """The signal comes two times at once: the second ends a run that hangs."""

    def prepare():
        sending(number, experience, "judge", 2)()
        sending(number, experience, "judge", 2)()

    return prepare


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_twice_leaves_the_cursor_visible_and_the_run_whole(number, code, tmp_path):
    directory = tmp_path / "run"
    terminal = Terminal()
    assert terminal.go(directory, twice(number)).code == code
    assert terminal.text.rindex(SHOWN) > terminal.text.rindex(HIDDEN)
    sound(directory)
    assert steps_saved(directory) == 1
    assert go(again(directory), directory).code == 0


def until_hung_up():
    """The first update takes until the terminal is gone."""
    plain = run_directory.Steps.advance

    def advance(self, *given):
        os.write(1, b"one update is done")
        deadline = time.monotonic() + 60
        while os.isatty(1) and time.monotonic() < deadline:
            time.sleep(0.01)
        return plain(self, *given)

    run_directory.Steps.advance = advance


def test_a_terminal_that_is_closed(tmp_path):
    """The system sends SIGHUP, and refuses all that is said from then on."""
    directory = tmp_path / "run"
    assert Terminal(until="one update is done").go(directory, until_hung_up).code == 129
    assert steps_saved(directory) == 1
    undisturbed = tmp_path / "undisturbed"
    assert go(words(undisturbed), undisturbed).code == 0
    assert go(again(directory), directory).code == 0
    assert left(directory) == left(undisturbed)
