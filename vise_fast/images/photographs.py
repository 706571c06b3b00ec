"""An album of photographs as a source: a seeded order per epoch, decoded some threads ahead.

Whether the album is good enough is decided once, at the start: every header is read, and TRIED
pictures are decoded. One that turns out unusable later is skipped, with one line in
bad_images.jsonl and a drawn substitute. Left out: where pictures lie (albums/), which are held out
(listing.py), decoding one (picture_file.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.images import listing
from vise_fast.images.albums.album import Album, Found
from vise_fast.images.image import Image
from vise_fast.images.listing import Entry
from vise_fast.images.picture_file import BadImage, decode, grid_size, header, on_grid
from vise_fast.system import files, randomness
from vise_fast.system.errors import ConfigError, DataError

T = TypeVar("T")
LOG = "bad_images.jsonl"
TRIED = 256
"""Files that are decoded at the start, chosen by their names: always the same."""


class BadFiles:
    """The files that cannot be used: {name: reason}, and one line each in a JSON-lines file.

    A line that an earlier run wrote there is not repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: dict[str, str] = {}
        text = ""
        with contextlib.suppress(OSError):  # none yet, or not to be read: a line may come twice
            text = path.read_text(encoding="utf-8", errors="replace")
        self._written = set(text.splitlines())

    def add(self, name: str, reason: str) -> None:
        """Notes one file. Raises EnvironmentFault where the disk refuses."""
        self.reasons[name] = reason
        line = json.dumps({"name": name, "reason": reason})
        if line in self._written:
            return
        self._written.add(line)
        files.append(self.path, line.encode() + b"\n")

    def first(self) -> str:
        """The first file and its reason."""
        return described(*next(iter(self.reasons.items())))


def described(name: str, reason: str) -> str:
    """A file and its reason as printable text (names are bytes; some are no text)."""
    return f"{name.encode('utf-8', 'backslashreplace').decode('utf-8')} {reason}"


def silent(text: str) -> None:
    """Says nothing."""


class Through(Protocol):
    """Hands things on one after the other, and may show how far it is."""

    def __call__(self, things: Collection[T], label: str) -> Iterable[T]: ...


def unseen(things: Collection[T], label: str) -> Iterable[T]:
    """Shows nothing."""
    return things


class Photographs:
    """The pictures of an album. `train` and `held`: the usable ones; `ignored`: how many files are
    no pictures by their name.

    Raises DataError when there is nothing to train on, or when more than `data.max_bad_share` of
    the files seem unusable; ConfigError when `data.max_pixels` holds no cell of the grid.
    """

    def __init__(
        self,
        album: Album,
        config: Config,
        multiple: int,
        log: Path | None = None,
        say: Callable[[str], None] = silent,
        *,
        through: Through = unseen,
    ) -> None:
        """multiple: of which every height and width is one; log: the file that gets a line per
        unusable file (None: bad_images.jsonl in run.dir); say: takes what a person should know;
        through: shows how far the files are read.
        """
        self.album = album
        self.data = config.data
        self.seed = config.train.seed
        self.multiple = multiple
        self._bad = BadFiles(Path(config.run.dir) / LOG if log is None else log)
        self._ahead: dict[int, Future[Tensor]] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(self.data.workers, "decode") if self.data.workers else None
        # oddities of single files; the unusable ones are logged by name
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._say: Callable[[str], None] = silent  # what is found at the start is in `describe`
        self._through = through
        self._scan()
        self._try_some()
        self._prove_one_decodes()
        self._say = say

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

    def held_out(self, limit: int = 128) -> list[Image]:
        """The held-out photographs, at most `limit`; never part of a batch."""
        images: list[Image] = []
        for entry in self.held:
            if len(images) == limit:
                break
            pixels = self._pixels(entry)
            if pixels is not None:
                images.append(Image(pixels, entry.name, entry.key))
        return images

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) after the resize of every training image, from the headers alone."""
        return [entry.size for entry in self.train]

    def describe(self) -> str:
        """What it is, in one line."""
        counts = [f"{len(self.held)} held out"]
        if self.bad:
            counts.append(f"{len(self.bad)} unusable")
        if self.ignored:
            counts.append(f"{self.ignored} other files")
        return f"{len(self.train)} photographs {self.album.title} ({', '.join(counts)})"

    def identity(self) -> dict[str, Any]:
        """How many images, and a hash over their names and sizes; the place may be another."""
        digest = hashlib.blake2b(digest_size=16)
        for entry in self.held + self.train:
            digest.update(os.fsencode(entry.name) + b"\0%dx%d\n" % entry.size)
        count = len(self.held) + len(self.train)
        return {"images": count, "names": digest.hexdigest()} | self.album.about()

    def figures(self) -> dict[str, int]:
        """Files that turned out unusable so far."""
        return {"bad_images": len(self.bad)}

    def close(self) -> None:
        """Ends the decode threads; what they hold is dropped."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # -- listing -----------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Lists the album, reads every header, splits what is usable into `train` and `held`."""
        self.ignored = 0
        known: dict[str, Found] = {}
        for found in self.album.pictures(self._bad.add):
            if not found.meant and listing.irrelevant(found.name):
                self.ignored += 1
            else:
                known[found.name] = found
        listed = self._through(sorted(known, key=os.fsencode), "reading headers")
        seen = [self._entry(known[name]) for name in listed]
        entries = [entry for entry in seen if entry is not None]
        if not entries:
            self._refuse_all()
        self.total = len(entries) + len(self.bad)
        parts = listing.split(entries, self.data.holdout)
        self.held = parts.held
        self.train = parts.train
        self._refuse_share(len(self.bad) / self.total, f"{len(self.bad)} of {self.total} images")

    def _entry(self, found: Found) -> Entry | None:
        try:
            head = header(found.place, self.data.max_header_pixels)
        except BadImage as fault:
            if found.meant or PurePosixPath(found.name).suffix:
                self._bad.add(found.name, str(fault))
            else:
                self.ignored += 1  # README, LICENSE, Makefile
            return None
        try:
            size = grid_size(
                head.height, head.width, self.multiple, self.data.min_pixels, self.data.max_pixels
            )
        except ValueError as fault:
            raise ConfigError(
                f"data.max_pixels is too small: {fault}; raise it to {self.multiple**2} or more"
            ) from None
        return Entry(found.name, found.place, listing.key_of(found.name), size)

    def _try_some(self) -> None:
        """A header says little: decodes TRIED files whose names decide, all where there are fewer,
        and judges the others by them.
        """
        entries = self.held + self.train
        headless = len(self.bad)
        tried = sorted(entries, key=lambda entry: listing.key_of(f"tried {entry.name}"))[:TRIED]
        run = map if self._pool is None else self._pool.map
        reasons = run(self._fault_of, tried)
        for entry, reason in zip(self._through(tried, "trying some"), reasons, strict=True):
            if reason is not None:
                self._bad.add(entry.name, reason)
        broken = len(self.bad) - headless
        share = (headless + broken * len(entries) / len(tried)) / self.total
        counted = f"{len(self.bad)} of {self.total} images"
        if len(tried) < len(entries):
            counted = f"{broken} of {len(tried)} images that were tried, and {headless} headers,"
        self._refuse_share(share, counted)

    def _fault_of(self, entry: Entry) -> str | None:
        """Why a file cannot be decoded; None where it can. Runs in a decode thread."""
        try:
            self._decode(entry)
        except BadImage as fault:
            return str(fault)
        return None

    def _prove_one_decodes(self) -> None:
        """Decodes in the order of the first epoch until one picture comes out whole."""
        for slot in range(len(self.train)):
            if self._pixels(self._at(slot)) is not None:
                return
        self._refuse_all()

    # -- drawing -----------------------------------------------------------------------------------

    def _at(self, slot: int) -> Entry:
        """The file at place `slot` of the endless sequence: one seeded permutation per epoch."""
        epoch, place = divmod(slot, len(self.train))
        if epoch not in self._orders:
            for stale in [kept for kept in self._orders if kept < epoch - 1]:
                del self._orders[stale]
            rng = randomness.generator(self.seed, epoch, "order")
            self._orders[epoch] = rng.permutation(len(self.train))
        return self.train[self._orders[epoch][place]]

    def _image(self, slot: int) -> Image:
        entry = self._at(slot)
        pixels = self._pixels(entry, self._ahead.pop(slot, None))
        return self._substitute(slot) if pixels is None else Image(pixels, entry.name, entry.key)

    def _substitute(self, slot: int) -> Image:
        """Another file for an unusable one, drawn by its place, so that history does not matter."""
        rng = randomness.generator(self.seed, slot, "substitute")
        for index in rng.permutation(len(self.train)):
            entry = self.train[index]
            pixels = self._pixels(entry)
            if pixels is not None:
                return Image(pixels, entry.name, entry.key)
        self._refuse_all()

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
            f"turns out unusable from here on; they are listed in {self._bad.path}"
        )
        self._say = silent

    def _decode(self, entry: Entry) -> Tensor:
        """uint8 (H, W, 3). Runs in a decode thread: changes nothing. Raises BadImage."""
        picture = decode(entry.place, self.data.max_header_pixels)
        return torch.from_numpy(
            on_grid(picture, self.multiple, self.data.min_pixels, self.data.max_pixels)
        )

    # -- refusals ----------------------------------------------------------------------------------

    def _refuse_gone(self) -> None:
        """A folder that was moved away or unmounted is one fault, not one of each of its files."""
        if self.album.is_gone():
            raise DataError(
                f"the images are gone: there is nothing {self.album.title} any more; it was there "
                "when the run began; bring it back, and go on with --train.resume auto"
            )

    def _refuse_all(self) -> NoReturn:
        if not self.bad:
            others = f" ({self.ignored} other files there)" if self.ignored else ""
            raise DataError(
                f"no images {self.album.title}{others}; put JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM "
                "files there or change --data.dir"
            )
        raise DataError(
            f"none of the {len(self.bad)} images {self.album.title} can be used: "
            f"{self._bad.first()}; all reasons are in {self._bad.path}"
        )

    def _refuse_share(self, share: float, counted: str) -> None:
        if share > self.data.max_bad_share:
            raise DataError(
                f"{counted} {self.album.title} cannot be used, more than data.max_bad_share "
                f"{self.data.max_bad_share:g}: {self._bad.first()}; remove those listed in "
                f"{self._bad.path} or raise --data.max_bad_share"
            )
