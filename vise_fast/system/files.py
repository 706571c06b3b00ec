"""How a file or a folder of a run is written, and how a file is read back.

Written aside, synced, renamed into place: after a kill or a full disk the old one or the new one is
there, whole. Read back: a broken file counts as absent, and the caller is told, to say so. Left
out: what is appended to (console.JsonLines), what is hashed (checkpoint.py, manifest.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vise_fast.system.errors import EnvironmentFault

LARGEST_JSON = 256 * 2**20
"""Bytes of the largest JSON file that is read: an evaluation of 100,000 scenes is a tenth of it."""


@contextlib.contextmanager
def refused(what: str | Path) -> Iterator[None]:
    """An OSError inside becomes the one line about a disk that refuses."""
    try:
        yield
    except OSError as fault:
        raise EnvironmentFault(
            f"cannot write {what}: {fault.strerror or fault}; free space or give --run.dir a "
            "writable place"
        ) from fault


def write(path: Path, data: str | bytes) -> None:
    """Puts a file in place, durably. Raises EnvironmentFault; the old one then stays as it was."""
    aside = path.with_name(f".{path.name}.partial")
    with refused(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(aside, data if isinstance(data, bytes) else data.encode())
            os.replace(aside, path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """`write` of anything JSON holds; NaN and infinity are refused with ValueError."""
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or (said) where it is broken."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("larger than any file a run writes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as fault:
        reason = " ".join(str(fault).split())
        say(f"{path} cannot be read ({reason}); the run goes on as if it were not there")
        return None
    return content


@contextlib.contextmanager
def folder(final: Path) -> Iterator[Path]:
    """Yields a folder to fill, which then takes the place of `final`.

    There is no moment without a whole one on disk: the old one steps aside until the new one is in
    place, and `settle` finishes what a kill interrupted. Raises EnvironmentFault.
    """
    with refused(final):
        settle(final)
        aside = _aside(final)
        try:
            aside.mkdir(parents=True)
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            sync(aside)
            put_in_place(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def settle(final: Path) -> None:
    """Finish a replacement that was cut short: the old folder comes back where the new one is not
    in place, and what is left over goes. Raises OSError.
    """
    replaced = _replaced(final)
    if replaced.exists() and not final.exists():
        os.rename(replaced, final)
    for rest in (replaced, _aside(final)):
        if rest.exists():
            shutil.rmtree(rest)


def put_in_place(aside: Path, final: Path) -> None:
    """Renames a finished folder into place, durably; an old one steps aside first and is removed
    last. Raises OSError.
    """
    replaced = _replaced(final)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(aside, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def sync(directory: Path) -> None:
    """Makes the entries of a directory durable. Raises OSError."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
