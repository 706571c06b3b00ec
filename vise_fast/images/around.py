"""A source with something added: what is not overridden is the inner one's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vise_fast.images.image import Image

if TYPE_CHECKING:
    from vise_fast.images.sources import Source


class Around:
    """Hands everything on to `source`, also what only some sources have (scene, truth)."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        """What this class does not have. Raises AttributeError where the source has not either."""
        return getattr(self.source, name)

    def batch(self, step: int, n: int, part: range | None = None) -> list[Image]:
        """The source's."""
        return self.source.batch(step, n, part)

    def held_out(self, limit: int = 128) -> list[Image]:
        """The source's."""
        return self.source.held_out(limit)

    def sizes(self) -> list[tuple[int, int]]:
        """The source's."""
        return self.source.sizes()

    def describe(self) -> str:
        """The source's."""
        return self.source.describe()

    def identity(self) -> dict[str, Any]:
        """The source's."""
        return self.source.identity()

    def figures(self) -> dict[str, int]:
        """The source's."""
        return self.source.figures()

    def close(self) -> None:
        """The source's."""
        self.source.close()
