"""Everything that can be told of a folder, an archive or a table of pictures without a model: every
header read, every picture decoded and measured once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vise_fast.config import schema
from vise_fast.config.schema import Config
from vise_fast.images.albums.album import Album
from vise_fast.images.curation.measures import Measures
from vise_fast.images.curation.verdict import left_out
from vise_fast.images.image import Image
from vise_fast.images.listing.entries import Entries
from vise_fast.images.listing.through import Through
from vise_fast.images.photographs import Photographs

SUGGESTED: dict[str, Any] = {
    "data.min_side": 100,
    "data.min_sharpness": 30.0,
    "data.min_contrast": 8.0,
    "data.near_duplicates": 4,
}
"""What is tried out where nothing is set."""
OFF: dict[str, Any] = dict.fromkeys(SUGGESTED, 0) | {"data.near_duplicates": None}
SHOWN = 48
"""Pictures on the page and on the sheet."""


@dataclass(frozen=True)
class Rule:
    """A setting that leaves pictures out: its value, whether it is set, and {name: why} of what it
    leaves out by itself.
    """

    key: str
    value: float
    is_set: bool
    dropped: Mapping[str, str]

    @property
    def word(self) -> str:
        """As it is typed."""
        return f"--{self.key} {self.value:g}"


@dataclass(frozen=True)
class Survey:
    """`train`, `held`: pictures to train on and held out, as the settings are; `ignored`: files
    that are none; `grids`: {(height, width) after the resize: pictures to train on}; `measures`: of
    each picture that can be used; `shown`: some to train on; `decode_s`: CPU seconds for one.
    """

    title: str
    train: int
    held: int
    ignored: int
    bad: Mapping[str, str]
    grids: Mapping[tuple[int, int], int]
    multiple: int
    measures: Mapping[str, Measures]
    rules: list[Rule]
    shown: list[Image]
    decode_s: float

    @property
    def tokens(self) -> np.ndarray:
        """int64 (N,): image tokens of each picture to train on."""
        each = [height * width // self.multiple**2 for height, width in self.grids]
        return np.repeat(np.array(each, np.int64), list(self.grids.values()))


class Surveyed:
    """An album opened for a survey: `all` its pictures, and those that the settings `keep`.

    log: takes a line per file that cannot be used. Raises what photographs raise, but for their
    share of unusable files.
    """

    def __init__(
        self, album: Album, config: Config, multiple: int, log: Path, through: Through
    ) -> None:
        self.config = schema.with_changes(config, {"data.max_bad_share": 1.0})
        whole = schema.with_changes(self.config, OFF)
        self.multiple = multiple
        self.all = Photographs(album, whole, multiple, log, through=through)
        self.keep = self.all
        if config.data.is_curated:
            self.keep = Photographs(album, self.config, multiple, log, through=through)

    def survey(self) -> Survey:
        """Measures every picture."""
        measures = self.all.measures()
        train = _usable(self.keep.train, measures)
        start = time.process_time()
        shown = self.keep.batch(0, min(SHOWN, len(train)))
        seconds = time.process_time() - start
        return Survey(
            self.all.album.title,
            len(train),
            len(_usable(self.keep.held, measures)),
            self.all.ignored,
            dict(self.all.bad),
            dict(Counter(train).most_common()),
            self.multiple,
            measures,
            [_rule(key, self.config, measures) for key in SUGGESTED],
            shown,
            seconds / len(shown),
        )

    def close(self) -> None:
        """Ends the decode threads."""
        self.all.close()
        self.keep.close()


def _usable(entries: Entries, measures: Mapping[str, Measures]) -> list[tuple[int, int]]:
    """(height, width) of those that could be decoded."""
    named = zip(map(entries.name, range(len(entries))), entries.sizes, strict=True)
    return [size for name, size in named if name in measures]


def _rule(key: str, config: Config, measures: Mapping[str, Measures]) -> Rule:
    """What one setting does by itself, as it is set or as it is suggested."""
    own = getattr(config.data, key.removeprefix("data."))
    is_set = own != OFF[key]
    value = own if is_set else SUGGESTED[key]
    alone = schema.with_changes(config, OFF | {key: value})
    return Rule(key, value, is_set, left_out(measures, alone.data))
