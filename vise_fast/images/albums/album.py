"""What every album can do, and what it says of a picture. Left out: the albums themselves."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

Skip = Callable[[str, str], None]
"""Takes the name of what cannot be used, and the reason in a few words."""


class Blob(Protocol):
    """The bytes of a picture that is no file of its own."""

    def open(self) -> BinaryIO:
        """They as a file that can seek, for any thread; the caller closes it. Raises OSError."""


@dataclass(frozen=True)
class Bytes:
    """A picture's bytes in memory."""

    data: bytes

    def open(self) -> BinaryIO:
        """They as a file."""
        return io.BytesIO(self.data)


Place = Path | Blob


@dataclass(frozen=True)
class Found:
    """Something that may be a picture. `name`: unlike any other's in the album, the same on every
    machine; `meant`: it is listed as one, whatever its name ends with.
    """

    name: str
    place: Place
    meant: bool = False


class Album(Protocol):
    """Many pictures in one place."""

    title: str
    """how messages name the place: "under photos", "in photos.zip" """

    @property
    def root(self) -> Path | None:
        """The folder that its pictures lie in, each at its name; None where they are no files."""

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Everything that may be one, in any order. Raises DataError where the album is none."""

    def is_gone(self) -> bool:
        """Whether it was there and is not any more: unmounted, moved away."""

    def extent(self) -> dict[str, int]:
        """The files that it is made of and their bytes: what a stream is held to, whose pictures
        nobody has counted. {} where its pictures have no order of their own. Raises OSError.
        """

    def about(self) -> dict[str, str]:
        """What else a resumed run is held to; {} where names and sizes say it all."""
