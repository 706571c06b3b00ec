"""Where images come from: what every source can do, and `open_source`, the one door to them.

`source.batch(step, n)` is a function of (seed, step) and of the files alone, so a resumed run sees
what the first would have seen. A new source is a class that can what `Source` asks for, and a line
in `open_source`. Left out: the sources themselves (photographs.py, streamed.py, drawn.py,
mixed.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from vise_fast.config.schema import Config
from vise_fast.images.albums import door
from vise_fast.images.albums.door import open_album
from vise_fast.images.drawn import Scenes
from vise_fast.images.image import Image
from vise_fast.images.labels.apart import NOTHING
from vise_fast.images.labels.checked import Checked, labelled
from vise_fast.images.labels.pictures import Pictures
from vise_fast.images.listing.bad_files import LOG
from vise_fast.images.listing.through import Through, unseen
from vise_fast.images.mixed import Mixed, parts_of
from vise_fast.images.photographs import Photographs
from vise_fast.images.slots import Slots, silent
from vise_fast.images.streamed import Streamed
from vise_fast.images.words.worded import Worded
from vise_fast.images.words.words import read as read_words

UNKNOWN_SIZES = (
    "data.stream: the sizes of the images to come are not known, so memory.budget_gb is planned "
    "for images of data.max_pixels; leave data.stream out where they are smaller"
)


class Source(Protocol):
    """Images for training, others for evaluation. Every height and width is a multiple of the
    model's grid.

    A source that knows the truth also has `scene(key)`, the scenes.Scene of an image, for the
    evaluation, and `truth(image, query)`, for a reward that asks for it; one whose pictures have
    names that stay also has `names()`, those of all it trains on (None: they are not known yet).
    """

    def batch(self, step: int, n: int, part: range | None = None) -> list[Image]:
        """The `n` images of step `step`, counted from 0; of them those at the places `part`."""

    def held_out(self, limit: int = 128) -> list[Image]:
        """Images that are in no batch, at most `limit`; always the same."""

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images that batches are drawn from, without decoding any; one
        entry may stand for all.
        """

    def describe(self) -> str:
        """What it is, in one line."""

    def identity(self) -> dict[str, Any]:
        """What batches are drawn from, as JSON: equal for equal images under equal names. A resumed
        run is held to it.
        """

    def figures(self) -> dict[str, int]:
        """For metrics.jsonl: counts of what went wrong since the start."""

    def close(self) -> None:
        """Releases threads and files; no batch is asked for afterwards."""


def open_source(
    config: Config,
    multiple: int,
    directory: Path | None = None,
    say: Callable[[str], None] = silent,
    through: Through = unseen,
) -> Source:
    """The user's pictures, wherever they lie (albums/door.py), several places mixed where data.mix
    names them, or the embedded scenes where nothing is named.

    multiple: pixels per image token side (model.load.grid_multiple), which every height and width
    is a multiple of; directory: where bad_images.jsonl goes (None: nowhere); say: takes what a
    person should know of the images; through: shows how far their headers are read. Raises
    ConfigError where sizes do not fit the grid, DataError where a place, labels or words cannot be
    used.
    """
    if config.data.stream and config.memory.budget_gb is not None:
        say(UNKNOWN_SIZES)
    log = None if directory is None else directory / LOG
    labels = labelled(config, multiple, through)
    apart = NOTHING if labels is None else labels.apart

    def photographs(place: str) -> Slots:
        album = open_album(place, config.data.column, config.data.stream)
        kind = Streamed if config.data.stream else Photographs
        return kind(album, config, multiple, log, say, through=through, apart=apart)

    source: Source
    if config.data.mix:
        weights = parts_of(config.data.mix)
        source = Mixed({p: photographs(p) for p in weights}, weights, config.train.seed)
    elif config.data.dir is None:
        source = Scenes(config, multiple)
    else:
        source = photographs(config.data.dir)
    return _to_check(source, labels, config)


def _to_check(source: Source, labels: Pictures | None, config: Config) -> Source:
    """The source, with what its evaluation checks with where something is named."""
    absent = config.eval.absent
    if labels is None and absent is None:
        return source
    words = [] if absent is None else read_words(Path(absent).expanduser(), "eval.absent").anywhere
    return Checked(source, labels, list(words))


def open_training(
    config: Config,
    multiple: int,
    directory: Path | None = None,
    say: Callable[[str], None] = silent,
    through: Through = unseen,
) -> Source:
    """`open_source`, with words of the user's own (data.queries) around it: for who asks. Others
    need no file of words.
    """
    source = open_source(config, multiple, directory, say, through)
    return source if config.data.queries is None else Worded(source, config, say)


def is_here(config: Config) -> bool:
    """Whether `open_source` needs no network, as far as names say."""
    places = parts_of(config.data.mix) or ([config.data.dir] if config.data.dir else [])
    return all(map(door.is_here, places))
