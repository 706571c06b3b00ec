"""Clocks of phases and the peak of memory."""

import mmap
import time

import pytest

from vise_fast.system.clock import Clock, peak_memory, reset_peak_memory


def test_nested_phases_count_once():
    passed = []
    clock = Clock(now=lambda: float(len(passed)))
    with clock.phase("outer"):
        passed.append("before")
        clock.wrap("inner", passed.append)("inside")
    passed.append("between")
    with clock.phase("outer"):
        passed.append("again")
    assert clock.take() == {"outer": 3.0}
    assert clock.take() == {}


def test_seconds_are_what_it_reads_by_itself():
    before = time.perf_counter()
    clock = Clock()
    with clock.phase("asleep"):
        time.sleep(0.01)
    taken = clock.take()["asleep"]
    assert 0.01 <= taken <= time.perf_counter() - before


def test_a_phase_that_fails_is_timed_and_closed():
    clock = Clock()
    with pytest.raises(ValueError), clock.phase("broken"):
        raise ValueError
    with clock.phase("next"):
        pass
    assert set(clock.take()) == {"broken", "next"}


def test_peak_memory_sees_a_large_tensor():
    if not reset_peak_memory("cpu"):
        pytest.skip("this system does not reset a process's peak")
    before = peak_memory("cpu")
    with mmap.mmap(-1, 160_000_000) as pages:  # new ones: freed memory may stay with the process
        pages.write(b"1" * len(pages))
    assert peak_memory("cpu") - before > 0.7 * 160_000_000
