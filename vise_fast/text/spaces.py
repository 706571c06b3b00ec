"""The numbers boxes are written in, turned into 0..1000 of the image: the one place.

    1000     relative to width and height, times 1000
    pixels   absolute pixels of the image as the model sees it (resized, on its grid)
    1024     relative, in 1024 bins

Which space an answer is in belongs to the prompt style (prompts.Style.space), but for `<loc0000>`
tokens, which are always 1024 bins. An answer with several boxes means its first.
"""

from __future__ import annotations

from vise_fast.images.geometry import Box
from vise_fast.system.errors import ConfigError
from vise_fast.text import prompts
from vise_fast.text.prompts import Space

Size = tuple[int, int]
"""(height, width) in pixels of the image as the model sees it."""


def to_1000(box: Box, space: Space, size: Size | None = None) -> Box:
    """A box in 0..1000. Raises ConfigError for pixels of an image whose size is not known."""
    x, y = _scales(space, size)
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _scales(space: Space, size: Size | None) -> tuple[float, float]:
    """What x and y are multiplied with."""
    if space == "1000":
        return 1.0, 1.0
    if space == "1024":
        return 1000 / 1024, 1000 / 1024
    if size is None:
        raise ConfigError(
            "boxes in pixels need the size of the image as the model sees it, which this engine "
            "does not tell; use --model.engine generic, or a prompt style in 0..1000"
        )
    return 1000 / size[1], 1000 / size[0]


def read_1000(text: str, space: Space, size: Size | None = None) -> Box | None:
    """The box of an answer in 0..1000, not yet clamped; None where it cannot be read."""
    loc = prompts.read_loc(text)
    if loc is not None:
        return to_1000(loc, "1024")
    box = prompts.read_box(text)
    return None if box is None else to_1000(box, space, size)
