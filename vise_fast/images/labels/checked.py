"""A source that brings what its evaluation checks with: labelled pictures, and words for what is in
none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vise_fast.config.schema import Config
from vise_fast.images.around import Around
from vise_fast.images.labels.door import open_labels
from vise_fast.images.labels.pictures import Pictures, Shelf
from vise_fast.images.listing.through import Through, unseen

if TYPE_CHECKING:
    from vise_fast.images.sources import Source


class Checked(Around):
    """`labels`: None where there are none; `absent`: phrases. The source itself leaves labelled
    pictures out of every batch (apart.py).
    """

    def __init__(self, source: Source, labels: Pictures | None, absent: list[str]) -> None:
        super().__init__(source)
        self.labels = labels
        self.absent = absent

    def describe(self) -> str:
        """The source's, and what there is to check with."""
        text = self.source.describe()
        return text if self.labels is None else f"{text}; {self.labels.describe()}"

    def identity(self) -> dict[str, Any]:
        """The source's, and the labels: a run is before and after about the same ones."""
        found = self.source.identity()
        return found if self.labels is None else found | {"labels": self.labels.digest()}


def labelled(config: Config, grid: int, through: Through = unseen) -> Pictures | None:
    """The pictures of `eval.labels`. Raises DataError."""
    if config.eval.labels is None:
        return None
    path = Path(config.eval.labels).expanduser()
    shelf = Shelf(path, config.eval.label_images, config.data.dir)
    return Pictures(
        open_labels(path), config.eval.labels, shelf, config.data, grid, through=through
    )
