"""Runs of the trainer one after the other, over a grid or a list of settings, and a table of them
at the end.

    python -m vise_fast.sweep FILE.yaml [--dry-run]

    dir: sweeps/lr                  # where the runs go
    config: nano                    # what they share: a file or a preset, and
    set: {train.steps: 50}          # settings
    grid: {train.lr: [3.0e-4, 7.0e-4], train.seed: [0, 1]}    # every combination; or
    runs: [{train.lr: 3.0e-4}, {train.lr: 7.0e-4, lora.r: 8}] # those alone

Each is a process of its own. Said again, a sweep goes on where it was: what is finished is not run
again, what was stopped resumes. Left out: searching (every run is written down beforehand), and
several runs at a time: there is one GPU.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("sweep")  # before what takes seconds to import

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vise_fast.config import schema, settings
from vise_fast.evaluate.titles import ENTRIES
from vise_fast.report import comparison
from vise_fast.report.stored_run import StoredRun, read
from vise_fast.system import files
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError, DataError

SYNTAX = commands.syntax("sweep")
KEYS = ("dir", "config", "set", "grid", "runs")
OWN = ("run.dir", "train.resume")
"""Settings that the sweep gives itself."""
INTERRUPTED = (129, 130, 143)
SHOWN = ("sampled_iou", "greedy_iou", "sampled_area_ratio", "own_TU")
"""The figures of the table."""


@dataclass(frozen=True)
class Job:
    """One run: where it goes, and the words that follow `train`."""

    directory: Path
    words: list[str]

    @property
    def stored(self) -> StoredRun | None:
        """What it left behind; None where it has no step yet."""
        try:
            return read(self.directory)
        except DataError:
            return None

    @property
    def finished(self) -> bool:
        """Whether its adapter lies there and every step is done."""
        stored = self.stored
        return stored is not None and stored.finished and stored.adapter is not None


def jobs(path: Path) -> list[Job]:
    """The runs of a sweep, in their order. Raises ConfigError, also where one of them could not be
    trained.
    """
    content = _content(path)
    home = Path(str(content.get("dir") or f"sweeps/{path.stem}"))
    shared = _settings(content.get("set") or {}, "set", path)
    config = content.get("config")
    if config is not None and not isinstance(config, str):
        raise ConfigError(f"config in {path} is no name; write config: nano, or leave it out")
    found = [_job(home, config, shared, own, path) for own in _varied(content, path)]
    places = [job.directory for job in found]
    if len(set(places)) < len(places):
        raise ConfigError(f"two runs of {path} are the same; every run needs a setting of its own")
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(files.read(path, settings.LARGEST_FILE))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise ConfigError(f"{path} is no sweep: {reason}; see vise-fast sweep --help") from None
    if not isinstance(content, dict) or not content.keys() <= set(KEYS):
        raise ConfigError(f"{path} is no sweep; it may say {', '.join(KEYS)}; see sweep --help")
    return content


def _varied(content: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """{setting: value} of each run."""
    if ("grid" in content) == ("runs" in content):
        raise ConfigError(f"{path} needs either grid or runs; see vise-fast sweep --help")
    if "runs" in content:
        listed = content["runs"]
        if not isinstance(listed, list) or not listed:
            raise ConfigError(f"runs in {path} is no list; write runs: [{{train.lr: 1.0e-4}}]")
        yield from (_settings(entry, "runs", path) for entry in listed)
        return
    grid = _settings(content["grid"], "grid", path)
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(f"grid in {path} has no lists; write grid: {{train.seed: [0, 1]}}")
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _settings(entry: Any, where: str, path: Path) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} in {path} is no mapping of settings; write train.lr: 1.0e-4")
    taken = [key for key in OWN if key in entry]
    if taken:
        raise ConfigError(f"{where} in {path} says {taken[0]}, which a sweep gives itself")
    return {str(key): value for key, value in entry.items()}


def _job(
    home: Path, config: str | None, shared: dict[str, Any], own: dict[str, Any], path: Path
) -> Job:
    """Raises ConfigError for a run that the trainer would refuse."""
    said = [f"--{key}={_word(value)}" for key, value in (shared | own).items()]
    try:
        schema.load(config, said)
    except ConfigError as fault:
        raise ConfigError(f"{path}: {fault}") from None
    name = "_".join(f"{key}={_word(value)}" for key, value in own.items()) or "run"
    directory = home / re.sub(r"[^\w.=,+-]", "-", name)[:120]
    first = [] if config is None else ["--config", config]
    return Job(directory, [*first, *said, f"--run.dir={directory}", "--resume=auto"])


def _word(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return settings.bare(value) if value is None or isinstance(value, bool) else str(value)


def main(words: Sequence[str]) -> int:
    """The command: 0, or the exit code of the first run that failed."""
    given = SYNTAX.parse(words)
    console = Console()
    if given.help:
        console.say(commands.page("sweep", words))
        return 0
    if not given.positional:
        raise ConfigError("which sweep? it is a file of settings; see vise-fast sweep --help")
    todo = jobs(Path(given.positional[0]))
    if "dry-run" in given.flags:
        for job in todo:
            state = "finished" if job.finished else "to run"
            console.say(f"{state:8} vise-fast train {shlex.join(job.words)}")
        return 0
    code = sweep(todo, console)
    tell(todo, console)
    return code


def sweep(todo: Sequence[Job], console: Console) -> int:
    """Runs what is left; a run that fails does not keep the others, a stopped one does."""
    worst = 0
    for number, job in enumerate(todo, 1):
        console.say(f"sweep    {number} of {len(todo)}: {job.directory}")
        if job.finished:
            console.say("finished already")
            continue
        done = subprocess.run([sys.executable, "-m", "vise_fast.train", *job.words], check=False)
        if done.returncode:
            console.warn(f"{job.directory} ended with exit code {done.returncode}")
        if done.returncode in INTERRUPTED or done.returncode < 0:
            return done.returncode if done.returncode > 0 else 128 - done.returncode
        worst = worst or done.returncode
    return worst


def tell(todo: Sequence[Job], console: Console) -> None:
    """The table of the runs that were measured, the first of them being what the others are
    compared with.
    """
    stored = [found for job in todo if (found := job.stored) is not None]
    if not stored:
        return
    shown = comparison.compare(stored)
    titles = [ENTRIES[name].title for name in SHOWN]
    lines = [line for line in shown.lines if line.entry.title in titles]
    columns = ["run", *(line.entry.title for line in lines)]
    rows = list(zip(shown.names, *(comparison.row(line)[1:] for line in lines), strict=True))
    console.table("adapters; the first is what the others are compared with", columns, rows)
    console.say(f"page     vise-fast compare {shlex.join(str(run.directory) for run in stored)}")


if __name__ == "__main__":
    sys.exit(run(main))
