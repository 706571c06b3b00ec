"""A source whose pictures bring the words that they are asked for.

Which picture is asked in them, and which words it is, are draws named by (seed, step, purpose,
place in the batch): neither slices nor ranks nor a resumed run change them, and the model's own
queries are drawn as they would be without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vise_fast.config.schema import Config
from vise_fast.images.around import Around
from vise_fast.images.image import Image
from vise_fast.images.words.words import read
from vise_fast.system import randomness
from vise_fast.system.errors import DataError

if TYPE_CHECKING:
    from vise_fast.images.sources import Source


class Worded(Around):
    """Raises DataError where words are those of pictures, and no picture is called so."""

    def __init__(self, source: Source, config: Config, say: Callable[[str], None]) -> None:
        super().__init__(source)
        assert config.data.queries is not None
        self.data = config.data
        self.seed = config.train.seed
        path = Path(config.data.queries).expanduser()
        self.words = read(path, "data.queries", config.data.queries_template)
        if self.words.of:
            self._check_names(say)

    def _check_names(self, say: Callable[[str], None]) -> None:
        """Every picture is called something, where its source can tell."""
        names = [] if self.data.is_drawn else getattr(self.source, "names", lambda: None)()
        if names is None:
            return
        known = sum(bool(self.words.for_picture(name)) for name in names)
        if not known:
            raise DataError(
                f"none of the {len(names)} pictures to train on is one of the {len(self.words.of)} "
                f"that {self.words.title} names; names are paths below {self.data.places}; mend "
                "them, or give --data.queries a .txt of phrases for any picture"
            )
        if known < len(names) and not self.words.anywhere:
            say(
                f"{self.words.title} has phrases for {known} of {len(names)} pictures; the others "
                "are asked for what the model names"
            )

    def batch(self, step: int, n: int, part: range | None = None) -> list[Image]:
        """The source's, with the words that are asked for."""
        images = self.source.batch(step, n, part)
        places = part or range(n)
        return [self._worded(*pair, step) for pair in zip(images, places, strict=True)]

    def _worded(self, image: Image, place: int, step: int) -> Image:
        """As it is where the model's own query is drawn."""
        draw = randomness.generator(self.seed, step, "words", place)
        if draw.random() >= self.data.queries_share:
            return image
        own = self.words.for_picture(image.name)
        if own:
            return replace(image, given=own[int(draw.integers(len(own)))])
        return self._of_the_list(image, draw)

    def _of_the_list(self, image: Image, draw: np.random.Generator) -> Image:
        words = self.words.anywhere
        if not words:
            return image
        tries = min(max(self.data.queries_tries, 1), len(words))
        drawn = tuple(words[i] for i in draw.choice(len(words), tries, replace=False).tolist())
        if self.data.queries_tries == 0:
            return replace(image, given=drawn[0])
        return replace(image, tried=drawn)

    def describe(self) -> str:
        """The source's, and the words."""
        return f"{self.source.describe()}; asked for {self.words.describe()}"

    def identity(self) -> dict[str, Any]:
        """The source's, and the words': a resumed run asks for what it would have."""
        return self.source.identity() | {"words": self.words.digest()}
