"""A parquet file with a column of pictures, as data sets on a hub are stored: bytes, or a struct of
`bytes` and `path`. Needs pyarrow.

Pictures are read by row group, the few latest kept: batches draw rows at random, so a file with
large row groups is slow. Data sets of pictures are written with 100 rows a group.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vise_fast.images.albums.album import Found, Skip
from vise_fast.system.errors import DataError, EnvironmentFault

KEPT = 4
"""Row groups in memory."""
COLUMNS = ("image", "img", "picture", "photo", "jpg", "png")
"""Tried in this order where none is named."""


class Table:
    """The pictures in one column. `column`: its name; None: the first of COLUMNS that is there;
    `file`: what is read instead of the path, where it is open already.
    """

    root = None

    def __init__(
        self, path: str | Path, column: str | None = None, file: BinaryIO | None = None
    ) -> None:
        self.path = Path(path)
        self._source = file or self.path
        self.title = f"in {path}"
        self._arrow = _arrow()
        self._file = self._opened()
        self.column = self._chosen(column)
        self._groups: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self._lock = threading.Lock()

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Named by their row."""
        start = 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            for row in range(count):
                yield Found(f"{start + row:09d}", _Cell(self, group, row), meant=True)
            start += count

    def cell(self, group: int, row: int) -> bytes:
        """A picture's bytes. Raises OSError."""
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._read(group)
                while len(self._groups) > KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            data = self._groups[group][row]
        if not data:
            raise OSError("is an empty cell")
        return data

    def _read(self, group: int) -> list[bytes | None]:
        try:
            column = self._file.read_row_group(group, columns=[self.column]).column(self.column)
            return [_bytes(value) for value in column.to_pylist()]
        except (OSError, ValueError, self._arrow.ArrowException) as fault:
            raise OSError(f"lies in a damaged row group: {fault}") from None

    def _opened(self) -> Any:
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(self._source)
        except (OSError, ValueError, self._arrow.ArrowException) as fault:
            reason = " ".join(str(fault).split())[:200]
            raise DataError(
                f"{self.path} cannot be read as parquet: {reason}; copy it again or change "
                "--data.dir"
            ) from None

    def _chosen(self, column: str | None) -> str:
        names = self._file.schema_arrow.names
        for name in COLUMNS if column is None else (column,):
            if name in names:
                self._refuse_kind(name)
                return name
        wanted = column or " or ".join(COLUMNS)
        raise DataError(
            f"{self.path} has no column {wanted} but {', '.join(names)[:200]}; name the one with "
            "the pictures by --data.column"
        )

    def _refuse_kind(self, name: str) -> None:
        types = self._arrow.types
        kind = self._file.schema_arrow.field(name).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise DataError(
                f"column {name} of {self.path} holds {kind}, not the bytes of pictures; name "
                "another by --data.column"
            )

    def is_gone(self) -> bool:
        """Whether the file is."""
        return not self.path.is_file()

    def extent(self) -> dict[str, int]:
        """The bytes of the one file."""
        return {"": self.path.stat().st_size}

    def about(self) -> dict[str, str]:
        """Names and sizes say it all."""
        return {}


@dataclass(frozen=True)
class _Cell:
    """A picture in a table."""

    table: Table
    group: int
    row: int

    def open(self) -> BinaryIO:
        """Its bytes."""
        return io.BytesIO(self.table.cell(self.group, self.row))


def _bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise EnvironmentFault(
            "parquet files need pyarrow, which is not installed; install it with: pip install "
            "'vise_fast[data]'"
        ) from None
    return pyarrow
