"""Which files of a folder are pictures, and which of them are held out. Nothing is opened here."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vise_fast.images.albums.album import Place
from vise_fast.system.errors import DataError

_READ = "jpg jpeg jpe jfif png apng webp bmp dib gif tif tiff ppm pgm pbm pnm pfm"
_FOREIGN = "heic heif avif jxl jp2 ico tga psd eps svg raw dng cr2 nef arw exr hdr pcx icns"
SUFFIXES = frozenset(f".{name}" for name in _READ.split())
FOREIGN = frozenset(f".{name}" for name in _FOREIGN.split())
"""Pictures of formats that are not read: worth a line in the log, where a .txt beside the
photographs is not.
"""


@dataclass(frozen=True)
class Entry:
    """One usable picture: its name in the album, and (height, width) after the resize."""

    name: str
    place: Place
    key: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Split:
    """The files that are held out, and those to train on."""

    held: list[Entry]
    train: list[Entry]


def refuse_folder(root: Path) -> None:
    """Raises DataError where `root` is no folder."""
    try:
        mode = root.stat().st_mode
    except OSError as fault:
        raise DataError(
            f"no folder at {root}: {fault.strerror}; give --data.dir an existing folder of images"
        ) from None
    if not stat.S_ISDIR(mode):
        raise DataError(f"{root} is not a folder; give --data.dir the folder that holds the images")


def walk(root: Path, skip: Callable[[Path, str], None]) -> Iterator[Path]:
    """Every regular file below `root`, links followed, each folder once, hidden names left out.

    Pipes, devices, dead links and folders that cannot be listed go to `skip(path, reason)`.
    """
    folders = [root]
    seen: set[tuple[int, int]] = set()
    while folders:
        for child in _children(folders.pop(), seen, skip):
            mode = _mode(child, skip)
            if mode is None:
                continue
            if stat.S_ISDIR(mode):
                folders.append(child)
            elif stat.S_ISREG(mode):
                yield child
            else:
                skip(child, "is no regular file")


def _children(
    folder: Path, seen: set[tuple[int, int]], skip: Callable[[Path, str], None]
) -> list[Path]:
    """What lies in a folder, by name; nothing where it was seen before."""
    try:
        status = folder.stat()
        children = sorted(folder.iterdir())
    except OSError as fault:
        skip(folder, f"cannot be listed: {fault.strerror}")
        return []
    place = (status.st_dev, status.st_ino)
    if place in seen:
        return []
    seen.add(place)
    return [child for child in children if not child.name.startswith(".")]


def _mode(path: Path, skip: Callable[[Path, str], None]) -> int | None:
    try:
        return path.stat().st_mode
    except OSError as fault:
        why = "leads nowhere" if path.is_symlink() else "cannot be read"
        skip(path, f"{why}: {fault.strerror}")
        return None


def irrelevant(name: str) -> bool:
    """A file whose name says that it is no picture; names without a suffix are judged by their
    content.
    """
    suffix = PurePosixPath(name).suffix.lower()
    return bool(suffix) and suffix not in SUFFIXES | FOREIGN


def key_of(name: str) -> int:
    """63 bits of a file's relative name: the same on every machine, whatever the file holds."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def split(entries: Sequence[Entry], share: float) -> Split:
    """Holds out `share` of the files by the hash of each name: adding files moves no other. At
    least one of each where there are two files.
    """
    by_key = sorted(entries, key=lambda entry: entry.key)
    count = sum(entry.key < share * 2**63 for entry in entries)
    count = min(max(count, 1), len(entries) - 1) if share > 0 else 0
    held = {entry.name for entry in by_key[:count]}
    return Split(
        [entry for entry in by_key if entry.name in held],
        [entry for entry in entries if entry.name not in held],
    )
