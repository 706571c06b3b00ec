"""Signals: the first is a flag, the second the end; handlers come back; real processes leave with
130 and 143.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from vise_fast.system.signals import Interrupted, Signals, heard

BOTH = pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@BOTH
def test_the_first_signal_is_a_flag(number, code):
    with Signals() as stop:
        assert not stop.asked and stop.check() is None
        os.kill(os.getpid(), number)
        assert stop.asked and stop.code == code
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.code == code
        with pytest.raises(Interrupted):
            stop.check()  # it stays


def test_somebody_elses_thread_hears_nothing():
    def listen():
        with heard() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    found = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [(False, before)]
    with heard():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(ZeroDivisionError), Signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_two_in_a_row_are_independent():
    with Signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    with Signals() as stop:
        assert not stop.asked


def test_other_threads_may_poll_but_not_install():
    seen = []
    fault = []

    def poll(stop: Signals) -> None:
        while not stop.asked:
            time.sleep(0.001)
        seen.append(stop.code)

    def install() -> None:
        try:
            Signals().__enter__()
        except ValueError as refused:
            fault.append(refused)

    with Signals() as stop:
        for target, words in ((poll, (stop,)), (install, ())):
            thread = threading.Thread(target=target, args=words)
            thread.start()
            if target is poll:
                os.kill(os.getpid(), signal.SIGINT)
            thread.join()
    assert seen == [130] and len(fault) == 1


CHILD = """
import sys, time
from vise_fast.system.signals import Signals
with Signals() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("heard", flush=True)
    while not {polite}:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(stop.code)
"""


@contextlib.contextmanager
def child(polite: bool) -> Iterator[subprocess.Popen]:
    """A process that is ready for a signal; it ends with the block, whatever happens there."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(polite=polite)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@BOTH
def test_a_polite_process_saves_and_leaves(number, code):
    with child(polite=True) as process:
        process.send_signal(number)
        assert process.communicate()[0] == "heard\nsaved\n" and process.returncode == code


@pytest.mark.parametrize("second, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_process_that_hangs(first, second, code):
    with child(polite=False) as process:
        process.send_signal(first)
        assert process.stdout.readline() == "heard\n" and process.poll() is None
        process.send_signal(second)
        assert process.communicate()[0] == "" and process.returncode == code
