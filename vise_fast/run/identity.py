"""Which folder is a run, and who may write to it.

A run carries a marker; it is never recognised by where it lies. (Runs of version 0.1 have none:
they are recognised by config.yaml and checkpoints/.) While a process works on a run it holds a lock
that the system releases when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vise_fast import __version__
from vise_fast.images.curation.verdict import LOG as LEFT_OUT
from vise_fast.images.sources import LOG
from vise_fast.system import files
from vise_fast.system.errors import ConfigError, EnvironmentFault

MARKER = "run.json"
CONFIG = "config.yaml"
LOCK = ".lock"
KIND = "vise_fast run"
FORMAT = 1
LEFT_BEHIND = frozenset({LOCK, LOG, LEFT_OUT, f".{MARKER}.partial"})
"""What a run that never began may leave in its folder: the next one begins there all the same."""
BEGINNING = (MARKER, CONFIG, "env.json", "metrics.jsonl", "samples.jsonl", LOCK)
"""What a run writes before it does anything."""
OLD_SECTIONS = frozenset({"model:", "lora:", "train:", "rollout:", "reward:", "run:"})


def is_run(directory: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    marked = files.read_json(directory / MARKER, say=lambda text: None)
    if marked is not None and marked.get("kind") == KIND:
        return True
    return (directory / "checkpoints").is_dir() and _holds_settings(directory / CONFIG)


def _holds_settings(file: Path) -> bool:
    """Whether a file is the resolved configuration that version 0.1 wrote, not somebody's own."""
    try:
        lines = files.read(file).decode().splitlines()
    except (OSError, ValueError):
        return False
    return set(lines) >= OLD_SECTIONS


def is_free(directory: Path) -> bool:
    """Whether a new run may begin there: nothing is there, or what one that never began left."""
    try:
        if not directory.exists():
            return True
        return {entry.name for entry in directory.iterdir()} <= LEFT_BEHIND
    except OSError:
        return False


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint directory lies in, None where the folders around it are none."""
    home = checkpoint.resolve().parent
    return home.parent if home.name == "checkpoints" and is_run(home.parent) else None


def fresh(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that is free: no earlier run and no folder of
    somebody else's is touched.
    """
    others = (wanted.with_name(f"{wanted.name}-{n}") for n in range(2, 10_000))
    try:
        return next(path for path in itertools.chain([wanted], others) if is_free(path))
    except (StopIteration, ValueError, OSError) as fault:
        raise ConfigError(
            f"run.dir {str(wanted)[:80]} cannot be used: {fault or 'ten thousand such runs'}; give "
            "--run.dir another place"
        ) from None


def mark(directory: Path, data: Mapping[str, Any], config: str) -> None:
    """Make a folder a run, on this data (`Source.identity`), and write its configuration down.

    Raises EnvironmentFault.
    """
    content = {"kind": KIND, "format": FORMAT, "vise_fast": __version__, "data": dict(data)}
    content["config"] = hashlib.sha256(config.encode()).hexdigest()
    files.write_json(directory / MARKER, content)
    files.write(directory / CONFIG, config)


def last_config(directory: Path) -> Path | None:
    """The configuration that a run was last started with; None where it is not there, or not as the
    marker knows it.
    """
    marked = files.read_json(directory / MARKER, say=lambda text: None)
    try:
        written = files.read(directory / CONFIG)
    except OSError:
        return None
    known = marked is not None and marked.get("config") == hashlib.sha256(written).hexdigest()
    return directory / CONFIG if known else None


def data_of(directory: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The data that a run was marked with; None where it says nothing (version 0.1), and where its
    marker is damaged, which `say` is told.
    """
    path = directory / MARKER
    marked = files.read_json(path, say)
    if marked is None:
        return None
    data = marked.get("data")
    if not isinstance(data, dict):
        say(f"{path} does not tell the images of the run")
        return None
    return data


def leave(directory: Path) -> None:
    """Of a run that could not begin in a free folder, nothing stays, nor the folder if it is empty
    then.
    """
    with contextlib.suppress(OSError):
        for name in BEGINNING:
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


class Lock:
    """The right to write to a run; held until `release` or the end of the process. `known`: whether
    the file system knows locks.

    Raises EnvironmentFault where another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        new = not directory.exists()
        with files.refused(directory):
            directory.mkdir(parents=True, exist_ok=True)
            try:
                self._file = open(directory / LOCK, "ab+", buffering=0)  # noqa: SIM115
            except OSError:
                if new:
                    directory.rmdir()
                raise
        self.known = True
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            self.known = False
        except BlockingIOError:
            holder = self._holder()
            self._file.close()
            raise EnvironmentFault(
                f"{directory} is in use by another process{holder}; two would mix their steps; "
                "wait for it, end it, or give --run.dir another place"
            ) from None
        except OSError:  # some network file systems
            self.known = False
        with contextlib.suppress(OSError):  # only for the message above
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n".encode())

    def _holder(self) -> str:
        self._file.seek(0)
        word = self._file.read(32).strip().decode("ascii", "replace")
        return f" ({word})" if word.isdecimal() else ""

    def release(self) -> None:
        """Others may write from here on."""
        self._file.close()
