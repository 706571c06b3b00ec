"""Many albums as one: the shards of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from vise_fast.images.albums.album import Album, Found, Skip


class Several:
    """Albums by the name that goes before those of their pictures."""

    root = None

    def __init__(self, title: str, albums: Mapping[str, Album]) -> None:
        self.title = title
        self.albums = albums

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Those of each, named album/picture."""
        for prefix, album in self.albums.items():
            for found in album.pictures(_Prefixed(prefix, skip)):
                yield replace(found, name=f"{prefix}/{found.name}")

    def is_gone(self) -> bool:
        """Whether any is."""
        return any(album.is_gone() for album in self.albums.values())

    def extent(self) -> dict[str, int]:
        """That of each, under its name."""
        found: dict[str, int] = {}
        for prefix, album in self.albums.items():
            found |= {f"{prefix}/{name}": size for name, size in album.extent().items()}
        return found

    def about(self) -> dict[str, str]:
        """What any of them says."""
        told: dict[str, str] = {}
        for album in self.albums.values():
            told |= album.about()
        return told


class _Prefixed:
    """Takes what an album skips, under its name here."""

    def __init__(self, prefix: str, skip: Skip) -> None:
        self.prefix = prefix
        self.skip = skip

    def __call__(self, name: str, reason: str) -> None:
        self.skip(f"{self.prefix}/{name}", reason)
