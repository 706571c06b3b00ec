"""A list of picture files: .txt with one path a line, .jsonl or .csv with a column of paths.

Paths are relative to the list's own folder. Nothing is fetched from the network.
"""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from vise_fast.images.albums.album import Found, Skip
from vise_fast.system.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".csv")
COLUMNS = ("image", "path", "file_name", "file", "filename")
"""Tried in this order where none is named."""
LONGEST = 4096
"""Characters of a path: the most that Linux opens."""


class Listed:
    """The files that a list names. `column`: of a .jsonl or .csv; None: the first of COLUMNS that
    is there.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path = path
        self.root = path.parent
        self.column = column
        self.title = f"in the list {path}"

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Named as they are written, each once."""
        seen = set()
        for name in self._names(skip):
            fault = _fault(name)
            if fault is None and name in seen:
                fault = "is listed twice"
            seen.add(name)
            if fault is None:
                yield Found(name, self.path.parent / name, meant=True)
            else:
                skip(_printable(name), fault)

    def _names(self, skip: Skip) -> Iterator[str]:
        kinds = {".txt": self._lines, ".jsonl": self._objects, ".csv": self._rows}
        try:
            yield from kinds[self.path.suffix.lower()](skip)
        except (OSError, UnicodeDecodeError, csv.Error) as fault:
            reason = getattr(fault, "strerror", None) or fault
            raise DataError(
                f"the list {self.path} cannot be read: {reason}; it must be UTF-8 text; write it "
                "anew or change --data.dir"
            ) from None

    def _lines(self, skip: Skip) -> Iterator[str]:
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield line.strip("\r\n")

    def _objects(self, skip: Skip) -> Iterator[str]:
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name = self._of_object(line)
                    if name is None:
                        skip(f"line {number} of {self.path.name}", "names no image")
                    else:
                        yield name

    def _of_object(self, line: str) -> str | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        name = row.get(self._column(list(row)))
        return name if isinstance(name, str) and name else None

    def _rows(self, skip: Skip) -> Iterator[str]:
        with open(self.path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            column = self._column(list(rows.fieldnames or []))
            for number, row in enumerate(rows, 2):
                if row.get(column):
                    yield row[column]
                else:
                    skip(f"row {number} of {self.path.name}", "names no image")

    def _column(self, names: list[str]) -> str:
        """Raises DataError where there is no such column."""
        wanted = COLUMNS if self.column is None else (self.column,)
        for name in wanted:
            if name in names:
                return name
        raise DataError(
            f"the list {self.path} has no column {' or '.join(wanted)} but "
            f"{', '.join(names)[:200] or 'none'}; name the one with the paths by --data.column"
        )

    def is_gone(self) -> bool:
        """Whether the list is."""
        return not self.path.is_file()

    def extent(self) -> dict[str, int]:
        """The bytes of the list, and a sum over them."""
        content = self.path.read_bytes()
        return {"": len(content), "crc32": zlib.crc32(content)}

    def about(self) -> dict[str, str]:
        """Names and sizes say it all."""
        return {}


def _fault(name: str) -> str | None:
    """Why a path cannot be opened, whatever lies there; None where it may."""
    if "://" in name:
        return "is an address, and nothing is fetched: download it and list the file"
    if len(name) > LONGEST or "\0" in name:
        return "is no path"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "is no path"
    return None


def _printable(name: str) -> str:
    return name[:200].encode("utf-8", "backslashreplace").decode()
