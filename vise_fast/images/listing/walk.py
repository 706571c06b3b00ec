"""The files below a folder, by name. Nothing is opened here, and only links are looked at closer
than the folder itself tells.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vise_fast.images.albums.album import Skip
from vise_fast.system.errors import DataError


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


def walk(root: Path, skip: Skip) -> Iterator[str]:
    """Every regular file below `root`, named by its path from there with slashes: links followed,
    each folder once, hidden names left out; folder by folder, in each by name.

    Pipes, devices, dead links and folders that cannot be listed go to `skip(name, reason)`.
    """
    folders = [""]
    seen: set[tuple[int, int]] = set()
    while folders:
        inside = folders.pop()
        files: list[str] = []
        below: list[str] = []
        for child in _children(root, inside, seen, skip):
            _sort_in(child, f"{inside}{child.name}", files, below, skip)
        folders += sorted(below)
        yield from sorted(files)


def _children(
    root: Path, inside: str, seen: set[tuple[int, int]], skip: Skip
) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder; nothing where it was seen before."""
    folder = os.path.join(root, inside)
    try:
        status = os.stat(folder)
        place = (status.st_dev, status.st_ino)
        if place in seen:
            return
        seen.add(place)
        with os.scandir(folder) as children:
            for child in children:
                if not child.name.startswith("."):
                    yield child
    except OSError as fault:
        skip(inside.removesuffix("/") or ".", f"cannot be listed: {fault.strerror}")


def _sort_in(
    child: os.DirEntry[str], name: str, files: list[str], below: list[str], skip: Skip
) -> None:
    """Puts one name where it belongs; a folder's ends with a slash."""
    try:
        if child.is_dir():
            below.append(f"{name}/")
        elif child.is_file():
            files.append(name)
        else:
            child.stat()  # says why a link leads nowhere
            skip(name, "is no regular file")
    except OSError as fault:
        why = "leads nowhere" if child.is_symlink() else "cannot be read"
        skip(name, f"{why}: {fault.strerror}")
