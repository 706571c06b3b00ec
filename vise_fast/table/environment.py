"""The environment that lmms-eval lives in: `complete` makes it, pinned by environment.txt.

It is another one than the trainer's, because torchvision needs another torch. A directory of the
user's own that has lmms-eval is taken as it is; one without it is never written to. Left out: how
lmms-eval is called (lmms_eval.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vise_fast.system.errors import EnvironmentFault

HOME = "build/consumers"
PINNED = Path(__file__).parent / "environment.txt"
MARK = "vise_fast.txt"
"""In a directory that this file began: what was asked for, so that an installation that was cut
short goes on.
"""
GIGABYTES = 7.0
ASK = "import importlib.metadata as m, sys; sys.stdout.write(m.version('lmms_eval'))"
Say = Callable[[str], object]


def python_of(place: Path) -> Path:
    """Where its interpreter is, or will be."""
    return place / "bin" / "python"


def is_ready(place: Path) -> bool:
    """Whether lmms-eval is installed there."""
    try:
        asked = subprocess.run([python_of(place), "-c", ASK], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def obstacle(place: Path) -> str | None:
    """Why it can neither be used nor made there; None where it can."""
    if is_ready(place):
        return None
    if place.exists() and any(place.iterdir()) and not (place / MARK).is_file():
        return (
            f"{place} is no environment with lmms-eval and was not begun by this command; nothing "
            "is installed into it; name an empty or new directory with --env DIR"
        )
    free = shutil.disk_usage(_existing(place)).free / 1e9
    if free < GIGABYTES:
        return (
            f"an environment with lmms-eval takes about {GIGABYTES:.0f} GB, {free:.0f} are free "
            f"at {place}; make room or name another place with --env DIR"
        )
    return None


def _existing(place: Path) -> Path:
    """The directory itself or the nearest one above it that is there."""
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.is_dir())


def complete(place: Path, say: Say) -> None:
    """Makes the environment, or goes on with one that was begun. Raises EnvironmentFault where pip
    cannot; what was installed stays for the next try.
    """
    if is_ready(place):
        return
    say(f"making   {place} for lmms-eval: about {GIGABYTES:.0f} GB, once …")
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / MARK).write_bytes(PINNED.read_bytes())
    except OSError as fault:
        raise EnvironmentFault(
            f"cannot make {place}; {fault.strerror}; name a writable place with --env DIR"
        ) from fault
    if not python_of(place).is_file():
        _venv(place)
    words = [sys.executable, "-m", "pip", "--python", str(python_of(place)), "install", "-q"]
    _install([*words, "--disable-pip-version-check", "-r", str(PINNED)], place)


def _venv(place: Path) -> None:
    """Without pip inside: ours fills it, so that systems without ensurepip can, too."""
    words = [sys.executable, "-m", "venv", "--without-pip", str(place)]
    _install(words, place)


def _install(words: list[str], place: Path) -> None:
    """What pip says goes to a log beside the environment's mark."""
    log = place / "install.log"
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise EnvironmentFault(
            f"the environment {place} could not be made: {_last_line(log)}; what was said is in "
            f"{log}; correct that and start again, it goes on where it stopped"
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:200] if said else "it said nothing"
