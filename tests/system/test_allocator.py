"""Freed memory is kept: touching a block of the same size again takes no page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vise_fast.system.machine import allocator

ROOT = Path(__file__).parents[2]
COUNT = """
import ctypes, resource, sys
from vise_fast.system.machine import allocator
if sys.argv[1] == "kept": assert allocator.keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def touch():
    blocks = [c.malloc(12_000_000) for _ in range(8)]
    for block in blocks: ctypes.memset(block, 1, 12_000_000)
    for block in blocks: c.free(block)
for _ in range(3): touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_blocks_are_not_paid_for_again():
    """Ten times eight blocks of 12 MB, after a few to settle."""
    assert faults("kept") < 0.1 * faults("given back")


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
