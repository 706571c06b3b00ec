"""Base and adapter as model directories that lmms-eval opens, and the run of every task on both.

The adapter is evaluated unmerged: its arm is a linked directory (export/forms.py). Task by task and
arm by arm; what is finished is not run again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vise_fast.config.schema import Config
from vise_fast.export.forms import Order, base_home, make
from vise_fast.model.load import read_config, resolve, style_of
from vise_fast.model.saved import side_files
from vise_fast.system.console import Console
from vise_fast.table import drawn, lmms_eval
from vise_fast.table.lmms_eval import Setting

ARMS = ("base", "adapter")
SCENES = 64


@dataclass(frozen=True)
class Job:
    """One task on one arm; `words`: the command, `out`: where its samples go."""

    arm: str
    task: str
    words: list[str]
    out: Path

    @property
    def finished(self) -> bool:
        """Whether its samples are there."""
        return self.out.is_dir() and any(self.out.rglob(f"*_samples_{self.task}.jsonl"))

    @property
    def local(self) -> bool:
        """Whether it needs no download."""
        return self.task.startswith("drawn_")


def jobs(python: str, out: Path, tasks: list[str], config: Config, setting: Setting) -> list[Job]:
    """Everything there is to run, both arms of a task one after the other."""
    homes = {"base": base_path(config), "adapter": out / "adapter"}
    found = []
    for task in tasks:
        for arm in ARMS:
            limit = "" if setting.limit is None else f"_first_{setting.limit}"
            place = out / "samples" / arm / f"{task}{limit}"
            include = out / "tasks" if task.startswith("drawn_") else None
            words = lmms_eval.command(python, homes[arm], task, place, setting, include)
            found.append(Job(arm, task, words, place))
    return found


def base_path(config: Config) -> Path:
    """The base as lmms-eval is told: its directory, or its hub id while it is not here."""
    source = resolve(config.model.path)
    return side_files.home_of(source) or Path(source)


def prepare(config: Config, adapter: Path, out: Path, console: Console) -> None:
    """The adapter's directory and the drawn tasks, where they are not there yet. Raises as
    `export` does.
    """
    base_home(config)
    if not (out / "adapter").exists():
        make(Order("linked", [adapter], out / "adapter"), config, console)
    last = f"{drawn.TASKS[-1].name}{drawn.BLIND}.yaml"
    if not (out / "tasks" / last).exists():  # its pictures are named by where they lie
        shutil.rmtree(out / "tasks", ignore_errors=True)
        drawn.write(out / "tasks", style_of(config, read_config(config.model.path)), SCENES)


def run(todo: list[Job], out: Path, console: Console) -> Iterator[Job]:
    """Runs what is not finished; yields each job when it is."""
    for job in todo:
        if not job.finished:
            console.say(f"running  {job.task} on the {job.arm} …")
            shutil.rmtree(job.out, ignore_errors=True)
            log = out / "logs" / f"{job.task}_{job.arm}.log"
            lmms_eval.run(job.words, log, offline=job.local)
        yield job
