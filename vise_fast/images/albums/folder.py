"""A folder and what lies below it, links followed; hidden names are left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vise_fast.images.albums.album import Found, Skip
from vise_fast.images.listing.walk import refuse_folder, walk


class Folder:
    """Every regular file under a directory. Raises DataError where there is none."""

    def __init__(self, root: Path) -> None:
        refuse_folder(root)
        self.root = root
        self.title = f"under {root}"

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Named by their path relative to the folder."""
        for name in walk(self.root, skip):
            yield Found(name, self.root / name)

    def is_gone(self) -> bool:
        """Empty or not there."""
        try:
            return not any(self.root.iterdir())
        except OSError:
            return True

    def extent(self) -> dict[str, int]:
        """None: the order of a folder is what is listed of it."""
        return {}

    def about(self) -> dict[str, str]:
        """Names and sizes say it all; the folder may be another."""
        return {}
