"""Zip and tar archives, opened where they lie. A tar is read in place; of a zip, one picture at a
time is unpacked into memory.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vise_fast.images.albums.album import Found, Skip
from vise_fast.system.errors import DataError

LARGEST = 2**27
"""Bytes of one picture that are unpacked: a small archive may hold a large nothing."""
ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError)


def is_hidden(name: str) -> bool:
    """Whether a member is none that a person put there: .DS_Store, __MACOSX/…"""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class Zipped:
    """The files in a zip archive."""

    root = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = f"in {path}"
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, *ZIP_FAULTS) as fault:
            raise _unreadable(path, "zip", fault) from None

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Named as in the archive."""
        for info in self._archive.infolist():
            if info.is_dir() or is_hidden(info.filename):
                continue
            if info.flag_bits & 1:
                skip(info.filename, "is encrypted")
            elif info.file_size > LARGEST:
                skip(info.filename, f"unpacks to {info.file_size} bytes, more than {LARGEST}")
            else:
                yield Found(info.filename, _Packed(self._archive, info))

    def is_gone(self) -> bool:
        """Whether the archive is."""
        return not self.path.is_file()

    def extent(self) -> dict[str, int]:
        """The bytes of the one file."""
        return {"": self.path.stat().st_size}

    def about(self) -> dict[str, str]:
        """Names and sizes say it all."""
        return {}


@dataclass(frozen=True)
class _Packed:
    """A member of a zip archive."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def open(self) -> BinaryIO:
        """Its bytes, unpacked."""
        try:
            with self.archive.open(self.info) as member:
                data = member.read(LARGEST + 1)
        except ZIP_FAULTS as fault:
            raise OSError(f"is damaged in its archive: {fault}") from None
        if len(data) > LARGEST:
            raise OSError("unpacks to more than it says")
        return io.BytesIO(data)


class Tarred:
    """The files in a tar archive that is not compressed; a shard of WebDataset is one."""

    root = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = f"in {path}"

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Named as in the archive; of two with one name the later counts, as for tar itself."""
        try:
            with tarfile.open(self.path, "r:") as archive:
                kept: list[tarfile.TarInfo] = vars(archive)["members"]  # every one that was read
                while (member := archive.next()) is not None:
                    kept.clear()
                    if not member.isfile() or is_hidden(member.name):
                        continue
                    if member.issparse():
                        skip(member.name, "is stored with holes")
                        continue
                    yield Found(member.name, Span(self.path, member.offset_data, member.size))
        except (OSError, tarfile.TarError, ValueError, EOFError) as fault:
            raise _unreadable(self.path, "tar", fault) from None

    def is_gone(self) -> bool:
        """Whether the archive is."""
        return not self.path.is_file()

    def extent(self) -> dict[str, int]:
        """The bytes of the one file."""
        return {"": self.path.stat().st_size}

    def about(self) -> dict[str, str]:
        """Names and sizes say it all."""
        return {}


@dataclass(frozen=True)
class Span:
    """`size` bytes of a file from `start` on."""

    path: Path
    start: int
    size: int

    def open(self) -> BinaryIO:
        """They alone, as a file."""
        return io.BufferedReader(_Window(self.path, self.start, self.size))


class _Window(io.RawIOBase):
    """A file that begins and ends inside another."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._start = start
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As many bytes as there are."""
        wanted = min(len(buffer), max(self._size - self._place, 0))
        data = os.pread(self._descriptor, wanted, self._start + self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("before the first byte")
        self._place = origin + offset
        return self._place

    def close(self) -> None:
        """Once."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _unreadable(path: Path, kind: str, fault: Exception) -> DataError:
    reason = getattr(fault, "strerror", None) or " ".join(str(fault).split())[:200]
    hint = "; a compressed tar has to be unpacked first" if kind == "tar" else ""
    return DataError(
        f"{path} cannot be read as a {kind} archive: {reason}{hint}; copy it again, or give "
        "--data.dir the folder with its pictures"
    )
