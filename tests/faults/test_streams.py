"""A stream that is closed, broken or full ends no run and changes no exit code; nor does a logger
that fails.
"""

import os
import pty
import subprocess
import sys

import pytest
from faults.forked import go, words
from faults.left import left
from faults.places import refuse_at
from faults.test_signals_at_every_place import sending

from vise_fast.method import experience
from vise_fast.system.loggers import KINDS

CODE = """
import sys
from vise_fast.system.console import Console, run
from vise_fast.system.errors import DataError
def main(words):
    for _ in range(300):
        Console().say("x" * 1000)
        print("a library", file=sys.stderr)
    if "fail" in words:
        raise DataError("what; why; what to do")
    return 7 if "seven" in words else 0
if __name__ == "__main__":
    sys.exit(run(main))
"""


def closed():
    """As `>&-`: the process begins without the stream."""
    return None


def full():
    return os.open("/dev/full", os.O_WRONLY)


def left_alone():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def hung_up():
    """A terminal that was closed."""
    master, slave = pty.openpty()
    os.close(master)
    return slave


def read_only():
    return os.open("/dev/null", os.O_RDONLY)


BROKEN = (closed, full, left_alone, hung_up, read_only)
WHICH = {"out": (1,), "err": (2,), "both": (1, 2)}
STREAMS = [(kind, which) for kind in BROKEN for which in WHICH]
NAMED = pytest.mark.parametrize(
    "kind, which", STREAMS, ids=[f"{kind.__name__} {which}" for kind, which in STREAMS]
)


def put(kind, numbers):
    """Lets standard descriptors be broken ones."""
    for number in numbers:
        handle = kind()
        if handle is None:
            os.close(number)
        else:
            os.dup2(handle, number)


@NAMED
@pytest.mark.parametrize("word, code", [("", 0), ("seven", 7), ("fail", 3)])
def test_a_broken_stream_changes_no_exit_code(kind, which, word, code):
    """A process of its own: the interpreter flushes at its end, and would leave with code 120."""
    numbers = WHICH[which]
    outcome = subprocess.run(
        [sys.executable, "-c", CODE, word],
        capture_output=True,
        preexec_fn=lambda: put(kind, numbers),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    assert outcome.returncode == code, outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    if which == "err":
        assert len(outcome.stdout) > 300_000
    if which == "out" and word == "fail":
        assert outcome.stderr.endswith("error: what; why; what to do\n")


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert go(words(directory), directory).code == 0
    return directory


def breaking(kind, numbers=(1, 2)):
    """What a child does first: its own streams are broken ones."""

    def prepare():
        put(kind, numbers)
        for number, name in ((1, "stdout"), (2, "stderr")):
            if number in numbers:
                stream = None if kind is closed else os.fdopen(number, "w", closefd=False)
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)

    return prepare


@pytest.mark.parametrize("kind", BROKEN)
def test_a_run_without_streams_is_the_same_run(kind, undisturbed, tmp_path):
    directory = tmp_path / "run"
    assert go(words(directory), directory, prepare=breaking(kind)).code == 0
    assert left(directory) == left(undisturbed)


def test_streams_that_somebody_closed(undisturbed, tmp_path):
    def prepare():
        sys.stdout.close()
        sys.stderr.close()

    directory = tmp_path / "run"
    assert go(words(directory), directory, prepare=prepare).code == 0
    assert left(directory) == left(undisturbed)


def test_a_files_fault_keeps_its_code_without_streams(tmp_path):
    directory = tmp_path / "run"
    act = refuse_at("write metrics.jsonl", "ENOSPC")
    assert go(words(directory), directory, act, breaking(full)).code == 4


def test_a_signal_keeps_its_code_without_streams(tmp_path):
    directory = tmp_path / "run"
    send = sending(15, experience, "judge", 1)

    def prepare():
        breaking(left_alone)()
        send()

    assert go(words(directory), directory, prepare=prepare).code == 143


# ---- loggers -------------------------------------------------------------------------------------


class Failing:
    """A logger that fails at one of its calls."""

    def __init__(self, fails):
        self.fails = fails

    def __call__(self, run_dir, settings):
        return self.act("open") or self

    def act(self, what):
        if what == self.fails:
            raise RuntimeError("network\ndown")

    def log(self, step, figures):
        self.act("log")

    def close(self):
        self.act("close")


TELLS_SETTINGS = ("adapter/README.md", "adapter/training.yaml", "adapter/manifest.json")


@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_a_run_outlives_its_logger(fails, undisturbed, tmp_path):
    directory = tmp_path / "run"
    said = words(directory, run__loggers="[wandb]")
    outcome = go(said, directory, prepare=lambda: KINDS.update(wandb=Failing(fails)))
    assert outcome.code == 0 and len(outcome.complaints) == 1, outcome.err
    assert "logger wandb failed and is dropped" in outcome.err
    found = left(directory)
    wanted = left(undisturbed)
    for name in TELLS_SETTINGS:  # the loggers among them
        found.contents.pop(name, None)
        wanted.contents.pop(name, None)
    assert found == wanted
