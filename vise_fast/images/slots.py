"""The endless sequence of an album's pictures, decoded some threads ahead: what photographs drawn
by their names (photographs.py) and streamed ones (streamed.py) have in common.

A picture that turns out unusable is skipped, with one line in a run's bad_images.jsonl, and another
takes its place, the same in every history. Left out: which picture a slot shows.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.images.albums.album import Album
from vise_fast.images.image import Image
from vise_fast.images.labels.apart import NOTHING, Apart
from vise_fast.images.listing.bad_files import BadFiles, described
from vise_fast.images.listing.entries import Entry
from vise_fast.images.listing.through import Through, unseen
from vise_fast.images.picture_file import BadImage, decode, on_grid
from vise_fast.system.console import counted
from vise_fast.system.errors import DataError

TRIED = 256
"""Files that are decoded at the start, chosen by their names or their places: always the same."""


def silent(text: str) -> None:
    """Says nothing."""


class ForChecking(BadImage):
    """A picture that somebody labelled to check with."""


class Slots(ABC):
    """Pictures by their place in a sequence without an end."""

    def __init__(
        self,
        album: Album,
        config: Config,
        multiple: int,
        log: Path | None = None,
        say: Callable[[str], None] = silent,
        *,
        through: Through = unseen,
        apart: Apart = NOTHING,
    ) -> None:
        """multiple: of which every height and width is one; log: the file that gets a line per
        unusable file (None: they are not written down); say: takes what a person should know;
        through: shows how far the files are read; apart: what is for checking only, and leaves.
        """
        self.album = album
        self.data = config.data
        self.seed = config.train.seed
        self.multiple = multiple
        self.ignored = 0
        self._bad = BadFiles(log)
        self._ahead: dict[int, Future[Tensor]] = {}
        self._pool = ThreadPoolExecutor(self.data.workers, "decode") if self.data.workers else None
        # oddities of single files; the unusable ones are logged by name
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._say: Callable[[str], None] = silent  # what is found at the start is in `describe`
        self._through = through
        self._apart = apart
        self.labelled = 0
        self._begin()
        self._say = say

    @abstractmethod
    def _begin(self) -> None:
        """Looks at the album and refuses it where it is not good enough."""

    @abstractmethod
    def _at(self, slot: int) -> Entry:
        """The file at place `slot` of the endless sequence."""

    @abstractmethod
    def _others(self, slot: int) -> Iterable[Entry]:
        """What may take its place where it cannot be used: the same in any history."""

    @property
    def bad(self) -> dict[str, str]:
        """{name: reason} of the files that cannot be used, as far as is known yet."""
        return self._bad.reasons

    def batch(self, step: int, n: int, part: range | None = None) -> list[Image]:
        """The `n` images of step `step`, counted from 0; of them those at the places `part`.

        Raises DataError when no file can be used any more.
        """
        part = part or range(n)
        now = range(step * n + part.start, step * n + part.stop)
        return self.slots(now, range(now.start + n, now.stop + n))

    def slots(self, now: range, then: range | None = None) -> list[Image]:
        """The images at places `now` of the endless sequence; those at `then` (None: as many
        further ones) are decoded ahead. Raises as `batch` does.
        """
        self._decode_ahead(now)
        images = [self._image(slot) for slot in now]
        self._decode_ahead(range(now.stop, now.stop + len(now)) if then is None else then)
        return images

    @abstractmethod
    def held_out(self, limit: int = 128) -> list[Image]:
        """Images that are in no batch, at most `limit`; always the same."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) after the resize, of the training images or of what stands for all."""

    def names(self) -> list[str] | None:
        """Of every training image; None where they are not known before they come."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """What it is, in one line."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What batches are drawn from."""

    def figures(self) -> dict[str, int]:
        """Files that turned out unusable so far."""
        return {"bad_images": len(self.bad)}

    def close(self) -> None:
        """Ends the decode threads; what they hold is dropped."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # -- decoding ----------------------------------------------------------------------------------

    def _image(self, slot: int) -> Image:
        entry = self._at(slot)
        pixels = self._pixels(entry, self._ahead.pop(slot, None))
        return self._substitute(slot) if pixels is None else Image(pixels, entry.name, entry.key)

    def _substitute(self, slot: int) -> Image:
        for entry in self._others(slot):
            pixels = self._pixels(entry)
            if pixels is not None:
                return Image(pixels, entry.name, entry.key)
        self._refuse_all()

    def _images(self, entries: Iterable[Entry], limit: int) -> list[Image]:
        """The first `limit` of them that can be used."""
        images: list[Image] = []
        for entry in entries:
            if len(images) == limit:
                break
            pixels = self._pixels(entry)
            if pixels is not None:
                images.append(Image(pixels, entry.name, entry.key))
        return images

    def _decode_ahead(self, slots: range) -> None:
        """Starts decoding what is not under way yet, and forgets what lies outside `slots`."""
        if self._pool is None:
            return
        for stale in [slot for slot in self._ahead if slot not in slots]:
            self._ahead.pop(stale).cancel()
        for slot in slots:
            entry = self._at(slot)
            if slot not in self._ahead and entry.name not in self.bad:
                self._ahead[slot] = self._pool.submit(self._decode, entry)

    def _pixels(self, entry: Entry, ahead: Future[Tensor] | None = None) -> Tensor | None:
        """uint8 (H, W, 3), from the thread that decodes it already or decoded here. None, with a
        line in the log, when the file turns out unusable.
        """
        if entry.name in self.bad:
            return None
        try:
            return self._decode(entry) if ahead is None else ahead.result()
        except BadImage as fault:
            self._refuse_gone()
            self._note(entry.name, str(fault))
            return None

    def _note(self, name: str, reason: str) -> None:
        """A file that turned out unusable; the first one after the start is said."""
        self._bad.add(name, reason)
        self._say(
            f"{described(name, reason)}: another image takes its place, as for every one that "
            f"turns out unusable from here on; {self._bad.listed}"
        )
        self._say = silent

    def _decode(self, entry: Entry) -> Tensor:
        """uint8 (H, W, 3). Runs in a decode thread: changes nothing. Raises BadImage."""
        if self._apart.holds(entry.place):
            raise ForChecking("is a labelled picture, which is for checking only")
        picture = decode(entry.place, self.data.max_header_pixels)
        pixels = torch.from_numpy(
            on_grid(picture, self.multiple, self.data.min_pixels, self.data.max_pixels)
        )
        if self._apart.shows(pixels):
            raise ForChecking("shows a labelled picture, which is for checking only")
        return pixels

    def _fault_of(self, entry: Entry) -> str | None:
        """Why a file cannot be decoded; None where it can. Runs in a decode thread."""
        try:
            self._decode(entry)
        except ForChecking:  # left out when it is drawn, and no fault of the file
            return None
        except BadImage as fault:
            return str(fault)
        return None

    def _try(self, tried: Sequence[Entry]) -> int:
        """Decodes them and lists those that cannot be; how many."""
        before = len(self.bad)
        run = map if self._pool is None else self._pool.map
        reasons = run(self._fault_of, tried)
        for entry, reason in zip(self._through(tried, "trying some"), reasons, strict=True):
            if reason is not None:
                self._bad.add(entry.name, reason)
        return len(self.bad) - before

    # -- refusals ----------------------------------------------------------------------------------

    def _refuse_gone(self) -> None:
        """A folder that was moved away or unmounted is one fault, not one of each of its files."""
        if self.album.is_gone():
            raise DataError(
                f"the images are gone: there is nothing {self.album.title} any more; it was there "
                "when the run began; bring it back, and go on with --train.resume auto"
            )

    def _refuse_all(self) -> NoReturn:
        if self.labelled and not self.bad:
            raise DataError(
                f"all {self.labelled} images {self.album.title} are labelled pictures, which are "
                "for checking only; nothing is left to train on; add others, or leave out "
                "--eval.labels"
            )
        if not self.bad:
            others = f" ({counted(self.ignored, 'other file')} there)" if self.ignored else ""
            raise DataError(
                f"no images {self.album.title}{others}; put JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM "
                "files there or change --data.dir"
            )
        raise DataError(
            f"none of the {len(self.bad)} images {self.album.title} can be used: "
            f"{self._bad.first()}; {self._bad.listed}"
        )

    def _refuse_share(self, share: float, counted: str) -> None:
        if share > self.data.max_bad_share:
            raise DataError(
                f"{counted} {self.album.title} cannot be used, more than data.max_bad_share "
                f"{self.data.max_bad_share:g}: {self._bad.first()}; {self._bad.listed}; remove "
                "them or raise --data.max_bad_share"
            )
