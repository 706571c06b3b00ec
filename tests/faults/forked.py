"""Whole runs in forked children: a fault in one ends nothing but itself, and costs no start of
Python.

A child runs `vise_fast.train` with its words, on one thread, with its own standard output and
error; what it left behind is what the tests look at. Left out, for they take longer than the rest:
the curves of the report are not drawn (but written), the evaluation's rescale of boxes is not
looked for, and the model is the parent's, which a child has as its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from faults.calls import Call, watch

from vise_fast import train
from vise_fast.config import schema
from vise_fast.evaluate import grounding
from vise_fast.model import load
from vise_fast.model.load import Policy
from vise_fast.report import page
from vise_fast.report.plots import Plot
from vise_fast.system import console

KILLED = 137
"""What a shell reports of a process that SIGKILL ended."""
TINY = {
    "model.device": "cpu",
    "train.batch": 1,
    "train.seed": 2,
    "train.steps": 2,
    "train.schedule": "constant",
    "train.warmup": 0,
    "rollout.samples": 3,
    "rollout.views": 1,
    "rollout.box_tokens": 24,
    "scenes.size": 96,
    "eval.scenes": 1,
    "eval.attention": "false",
    "run.checkpoint_every": 1,
    "run.keep": 1,
    "run.samples_every": 1,
}
CURVES = [Plot(name, name, "", "<svg></svg>", name.encode() * 2000) for name in ("reward", "kl")]
SECONDS = 300
"""A child that takes longer hangs, on whatever machine."""
LOGS = ("out", "err", "calls")
LOAD = load.load
Act = Callable[[Call], None]


@dataclass
class Outcome:
    """How a child ended, what it said, and the calls it made."""

    code: int
    out: str
    err: str
    calls: list[str]

    @property
    def complaints(self) -> list[str]:
        """Lines on standard error, without the bars of libraries."""
        return [line for line in self.err.splitlines() if line.strip() and "%|" not in line]

    @property
    def errors(self) -> list[str]:
        """The lines that say why it ended."""
        return [line for line in self.complaints if line.startswith("error: ")]


def words(directory: Path, **settings: Any) -> list[str]:
    """A tiny run into `directory`; settings with __ for the dot."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    said = TINY | {"run.dir": directory} | changed
    return [f"--{key}={value}" for key, value in said.items()]


def again(directory: Path, **settings: Any) -> list[str]:
    """The words that a run prints when it was stopped."""
    changed = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return ["--train.resume", "auto", "--run.dir", str(directory), *changed]


def restart(directory: Path, **settings: Any) -> list[str]:
    """What to say after a kill, which prints nothing: the words that a run prints, or the first
    ones where there is no run yet.
    """
    begun = all((directory / name).exists() for name in ("run.json", "config.yaml"))
    return again(directory) if begun else [*words(directory, **settings), "--train.resume", "auto"]


def go(
    said: Sequence[str],
    root: Path,
    act: Act | None = None,
    prepare: Callable[[], None] | None = None,
    *,
    kill_after_s: float | None = None,
) -> Outcome:
    """One run in a child. `act` sees every call on a file under `root`; `prepare` runs first.

    kill_after_s: SIGKILL after so many seconds, if it is not over by then; the code is -9 then.
    """
    child = begin(said, root, root.parent / f"{root.name}.logs", act, prepare)
    return child.ended(kill_after_s)


@dataclass(frozen=True)
class Child:
    """A run in a process of its own, and where it writes what it says."""

    pid: int
    logs: Path

    def ended(self, kill_after_s: float | None = None) -> Outcome:
        """Wait for it."""
        code = _wait(self.pid, kill_after_s)
        texts = [(self.logs / name).read_text(errors="replace") for name in LOGS]
        return Outcome(code, texts[0], texts[1], texts[2].splitlines())


def begin(
    said: Sequence[str],
    root: Path,
    logs: Path,
    act: Act | None = None,
    prepare: Callable[[], None] | None = None,
) -> Child:
    """One run in a child, which goes on by itself."""
    _warm()
    logs.mkdir(parents=True, exist_ok=True)
    for name in LOGS:  # a child may be killed before it makes them
        (logs / name).write_bytes(b"")
    child = os.fork()
    if child == 0:
        _live(said, root, logs, act, prepare)
    return Child(child, logs)


@functools.cache
def _warm() -> Policy:
    """What every child would do again: libraries import half of themselves at their first use, and
    the base is the same each time. Nobody trains this one but children, who have it to themselves.
    """
    page.environment().get_template("report.html")
    return load.load(_config())


def _config() -> schema.Config:
    return schema.load(None, [f"--{key}={value}" for key, value in TINY.items()])


def _loaded(config: schema.Config, **more: Any) -> Policy:
    """`load`, which reads nothing of a run: from this process's memory where it is the same."""
    tiny = _config()
    same = (config.model, config.lora, config.train.seed) == (
        tiny.model,
        tiny.lora,
        tiny.train.seed,
    )
    return _warm() if same else LOAD(config, **more)


def _live(
    said: Sequence[str],
    root: Path,
    logs: Path,
    act: Act | None,
    prepare: Callable[[], None] | None,
) -> NoReturn:
    """The child's whole life."""
    code = 1
    try:
        gc.freeze()  # what the parent knows is not looked through again
        _speak_into(logs / "out", logs / "err")
        torch.set_num_threads(1)  # threads do not live on in a forked child
        page.curves = lambda run, say: CURVES
        grounding.best_scales = _no_scales
        load.load = _loaded
        watch(root, _written_down(logs / "calls", act))
        if prepare is not None:
            prepare()
        code = console.run(train.main, list(said))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _no_scales(*given: Any) -> list[dict[str, float]]:
    """What `best_scales` gives where boxes fit as they are."""
    return [dict.fromkeys(grounding.KINDS, 1.0) for _ in given[-1]]


def _speak_into(out: Path, err: Path) -> None:
    """Standard output and error of this process, from now on."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, closefd=False)


def _written_down(log: Path, act: Act | None) -> Act:
    """`act`, with every call noted."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def noted(call: Call) -> None:
        os.write(handle, f"{call}\n".encode())
        if act is not None:
            act(call)

    return noted


def _wait(child: int, kill_after_s: float | None) -> int:
    seconds = SECONDS if kill_after_s is None else kill_after_s
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if kill_after_s is None:
        raise TimeoutError(f"the run was not over after {SECONDS} seconds")
    return os.waitstatus_to_exitcode(status)
