"""A contact sheet: pictures in rows as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image as Pillow

from vise_fast.images.image import Image

TILE = 128
GAP = 4
ACROSS = 8
PAPER = (255, 255, 255)


def sheet(images: Sequence[Image]) -> bytes:
    """The PNG's bytes; each picture whole on a square of TILE pixels."""
    across = min(ACROSS, max(len(images), 1))
    down = max(-(-len(images) // across), 1)
    step = TILE + GAP
    paper = Pillow.new("RGB", (across * step + GAP, down * step + GAP), PAPER)
    for place, image in enumerate(images):
        tile = Pillow.fromarray(image.pixels.numpy())
        tile.thumbnail((TILE, TILE))
        left = GAP + place % across * step + (TILE - tile.width) // 2
        top = GAP + place // across * step + (TILE - tile.height) // 2
        paper.paste(tile, (left, top))
    held = io.BytesIO()
    paper.save(held, "PNG")
    return held.getvalue()
