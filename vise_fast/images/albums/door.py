"""The one door to the albums: what `data.dir` names, by its form.

photos                    a folder, searched recursively
list.txt, .jsonl, .csv    a list of files
photos.zip, photos.tar    an archive; shards-*.tar or any other pattern: many
photos.parquet            a table with a column of pictures
hf:OWNER/NAME[@COMMIT]    a data set on the hub
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path

from vise_fast.images.albums import hub, listed, remote
from vise_fast.images.albums.album import Album
from vise_fast.images.albums.archive import Tarred, Zipped
from vise_fast.images.albums.folder import Folder
from vise_fast.images.albums.several import Several
from vise_fast.images.albums.table import Table
from vise_fast.system.errors import DataError

SHARDS = (".parquet", ".tar", ".zip")
PATTERN = frozenset("*?[")


def open_album(place: str, column: str | None = None, stream: bool = False) -> Album:
    """column: of a list or table; stream: a data set on the hub is not downloaded first. Raises
    DataError where nothing is there, ConfigError and EnvironmentFault for a data set on the hub.
    """
    if place.startswith(hub.PREFIX):
        if stream:
            return remote.streamed(place, column)
        files = hub.fetched(place)
        return hub.OnHub(place, files, _whatever(files, column))
    path = Path(place).expanduser()
    if PATTERN & set(place) and not os.path.exists(path):
        return _shards(place, sorted(map(Path, glob.glob(str(path)))), column)
    if os.path.isfile(path):
        return _of_file(path, column)
    return Folder(path)


def is_here(place: str) -> bool:
    """Whether it can be opened without the network, as far as its name says."""
    path = Path(place).expanduser()
    return os.path.exists(path) or (bool(PATTERN & set(place)) and bool(glob.glob(str(path))))


def _of_file(path: Path, column: str | None) -> Album:
    suffix = path.suffix.lower()
    if suffix in listed.SUFFIXES:
        return listed.Listed(path, column)
    makers: dict[str, Callable[[], Album]] = {
        ".zip": lambda: Zipped(path),
        ".tar": lambda: Tarred(path),
        ".parquet": lambda: Table(path, column),
    }
    if suffix not in makers:
        raise DataError(
            f"{path} is not a folder, and no {', '.join((*listed.SUFFIXES, *SHARDS))} file; give "
            "--data.dir the folder that holds the images, or one of these"
        )
    return makers[suffix]()


def _shards(title: str, paths: list[Path], column: str | None) -> Album:
    if not paths:
        raise DataError(f"nothing is there that {title} stands for; look at --data.dir")
    names = {path.name for path in paths}
    whole = len(names) < len(paths)
    albums = {str(path) if whole else path.name: _of_file(path, column) for path in paths}
    return Several(f"in {title}", albums)


def _whatever(files: Path, column: str | None) -> Album:
    """A downloaded data set: its tables or archives where it has some, else its pictures."""
    for suffix in SHARDS:
        found = sorted(files.rglob(f"*{suffix}"))
        if found:
            inside = {path.relative_to(files).as_posix(): path for path in found}
            return Several("", {name: _of_file(path, column) for name, path in inside.items()})
    return Folder(files)
