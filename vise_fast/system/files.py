"""How a file or a folder of a run is written, and how a file is read back.

Written aside, synced, renamed into place: after a kill or a full disk the old one or the new one is
there, whole. What grows line by line is appended to: each piece is there whole or not at all. Read
back: only a regular file of a size that can be, never a pipe or a device; a broken one counts as
absent, and the caller is told, to say so. Left out: what is hashed (checkpoint.py, manifest.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vise_fast.system.errors import EnvironmentFault

WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)
"""Where the system has it: Windows has neither the word nor such pipes."""
LARGEST_JSON = 256 * 2**20
"""Bytes of the largest JSON file that is read: an evaluation of 100,000 scenes is a tenth of it."""
LARGEST_LINES = 4 * 2**30
"""Bytes of the largest file of JSON lines that is read: a million steps are a third of it."""

REMEDY = "free space or give --run.dir a writable place"


@contextlib.contextmanager
def refused(what: str | Path, remedy: str = REMEDY) -> Iterator[None]:
    """An OSError inside becomes the one line about a disk that refuses."""
    try:
        yield
    except OSError as fault:
        raise EnvironmentFault(
            f"cannot write {what}: {fault.strerror or fault}; {remedy}"
        ) from fault


def write(path: Path, data: str | bytes, remedy: str = REMEDY) -> None:
    """Puts a file in place, durably. Raises EnvironmentFault; the old one then stays as it was."""
    aside = path.with_name(f".{path.name}.partial")
    with refused(path, remedy):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(aside, data if isinstance(data, bytes) else data.encode())
            os.replace(aside, path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


def writable(path: Path, remedy: str = REMEDY) -> None:
    """Before hours of work whose result goes there: raises EnvironmentFault for a folder that is
    not there or takes no file, and for a file that takes nothing. Nothing stays behind.
    """
    with refused(path, remedy):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        new = not path.exists()
        if new or path.is_file():
            path.open("ab").close()
        if new:
            path.unlink()


def write_json(path: Path, content: Any) -> None:
    """`write` of anything JSON holds; NaN and infinity are refused with ValueError."""
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


class Appended:
    """A file that only grows, made where there is none. Raises OSError, as `write` and `sync`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _refuse_special(path.stat())
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Appends a piece; of one that does not fit nothing stays."""
        before = os.fstat(self._file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise

    def sync(self) -> None:
        """Makes durable what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is held back: it is all written."""
        self._file.close()


def user_cache() -> Path:
    """This package's folder of what can be found out again: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vise_fast"


def append(path: Path, data: bytes) -> None:
    """One more piece at the end of a file. Raises EnvironmentFault."""
    with refused(path), contextlib.closing(Appended(path)) as file:
        file.write(data)


def read(path: Path, most: int = LARGEST_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes; nothing else is read from, or waited
    for. Raises OSError.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        _refuse_special(found)
        if found.st_size > most:
            raise OSError(errno.EFBIG, "it is larger than any such file")
        return file.read(found.st_size)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to, too."""
    return os.open(path, flags | WITHOUT_WAITING)


def _refuse_special(found: os.stat_result) -> None:
    """Raises OSError for what is no regular file."""
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def read_json(path: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or where it is broken, which `say` is
    told in words.
    """
    try:
        if not path.exists():
            return None
        content = json.loads(read(path))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as fault:
        reason = getattr(fault, "strerror", None) or " ".join(str(fault).split())
        say(f"{path} cannot be read: {reason}")
        return None
    return content


@contextlib.contextmanager
def folder(final: Path, remedy: str = REMEDY) -> Iterator[Path]:
    """Yields a folder to fill, which then takes the place of `final`.

    There is no moment without a whole one on disk: the old one steps aside until the new one is in
    place, and `settle` finishes what a kill interrupted. Raises EnvironmentFault.
    """
    with refused(final, remedy):
        settle(final)
        aside = _aside(final)
        try:
            aside.mkdir(parents=True)
            yield aside
            for path in [*aside.rglob("*"), aside]:
                sync(path)
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


def sync(path: Path) -> None:
    """Makes the content of a file, or the entries of a folder, durable; where the system opens no
    folders (Windows), those of a folder are its own business. Raises OSError.
    """
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def write_synced(path: Path, data: bytes) -> None:
    """A file with its content on the disk, not in place durably yet. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
