"""Where images come from: a folder of photographs or the embedded scenes, both as uint8 (H, W, 3) on the model's grid.

`source.batch(step, n)` is a function of (seed, step) and of the files alone, so a resumed run sees what the first would have seen.
A file that cannot be used is skipped with one line in bad_images.jsonl and a drawn substitute. Left out: decoding (decode.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image as Pillow

from vise_fast.config.schema import Config
from vise_fast.images import scenes
from vise_fast.images.picture_file import BadImage, decode, grid_size, header
from vise_fast.system import randomness
from vise_fast.system.errors import ConfigError, DataError

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
    ]
)
# pictures of formats that are not read: worth a line, where a .txt beside the photographs is not
FOREIGN = frozenset(
    [
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jp2",
        ".ico",
        ".tga",
        ".psd",
        ".eps",
        ".svg",
        ".raw",
        ".dng",
        ".cr2",
        ".nef",
        ".arw",
        ".exr",
        ".hdr",
        ".pcx",
        ".icns",
    ]
)


@dataclass(frozen=True)
class Image:
    """`pixels` uint8 (H, W, 3) on the CPU, H and W on the model's grid; `key` names the image in 63 bits, the same in every run."""

    pixels: torch.Tensor
    name: str
    key: int


class Source(Protocol):
    """What the loop needs from either source."""

    def batch(self, step: int, n: int) -> list[Image]: ...

    def held_out(self, limit: int = 128) -> list[Image]: ...

    def sizes(self) -> list[tuple[int, int]]: ...

    def describe(self) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Entry:
    """One usable file: name relative to the folder, and (height, width) after the resize."""

    name: str
    path: Path
    key: int
    size: tuple[int, int]


class Scenes:
    """The embedded source. The truth of an image is `scene(image.key)`; training never asks for it.

    Raises ConfigError where scenes.size does not fit a model grid of `multiple` pixels.
    """

    def __init__(self, config: Config, seed: int | None = None, multiple: int = 1):
        if config.scenes.size % multiple:
            raise ConfigError(
                f"scenes.size {config.scenes.size} does not fit the model's grid; give a multiple "
                f"of {multiple}"
            )
        self.settings = config.scenes
        self.seed = config.train.seed if seed is None else seed
        self.eval = config.eval

    def batch(self, step: int, n: int) -> list[Image]:
        """`n` fresh scenes of step `step`."""
        return [
            self._image(randomness.key(self.seed, step, "scene", i), f"scene {step}.{i}")
            for i in range(n)
        ]

    def held_out(self, limit: int = 128) -> list[Image]:
        """The scenes of the evaluation (eval.scenes of eval.seed), at most `limit`."""
        keys = [
            randomness.key(self.eval.seed, 0, "held-out scene", i)
            for i in range(min(limit, self.eval.scenes))
        ]
        return [self._image(key, f"held-out scene {i}") for i, key in enumerate(keys)]

    def scene(self, key: int) -> scenes.Scene:
        """The scene of an image, with its objects."""
        rng = np.random.Generator(np.random.Philox(key))
        return scenes.draw(rng, size=self.settings.size, max_objects=self.settings.max_objects)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image to come: one entry stands for all."""
        return [(self.settings.size, self.settings.size)]

    def describe(self) -> str:
        return f"embedded scenes, {self.settings.size} x {self.settings.size} px, up to {self.settings.max_objects} objects"

    def close(self) -> None:
        """Nothing to release."""

    def _image(self, key: int, name: str) -> Image:
        return Image(torch.from_numpy(self.scene(key).pixels), name, key)


class Folder:
    """Every picture under a directory, in a seeded order per epoch, decoded `data.workers` threads ahead.

    Raises DataError when there is nothing to train on, or when more than `data.max_bad_share` of the files cannot be used.
    """

    def __init__(self, dir: str | Path, config: Config, multiple: int, log: Path | None = None):
        self.root = Path(dir).expanduser()
        self.data = config.data
        self.seed = config.train.seed
        self.multiple = multiple
        self.bad: dict[str, str] = {}
        self.log = Path(config.run.dir) / "bad_images.jsonl" if log is None else log
        self._logged = (
            set(self.log.read_text(encoding="utf-8", errors="replace").splitlines())
            if self.log.exists()
            else set()
        )
        self._ahead: dict[int, Future[torch.Tensor]] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(self.data.workers, "decode") if self.data.workers else None
        warnings.filterwarnings(
            "ignore", module=r"PIL\."
        )  # oddities of single files; the unusable ones are logged by name
        self._scan()
        self._prove_one_decodes()

    def batch(self, step: int, n: int) -> list[Image]:
        """The `n` images of step `step`, counted from 0. Raises DataError when too many files turn out unusable."""
        first = step * n
        self._want(range(first, first + n))
        images = [self._image(slot) for slot in range(first, first + n)]
        self._want(range(first + n, first + 2 * n))
        return images

    def held_out(self, limit: int = 128) -> list[Image]:
        """The held-out photographs, at most `limit`; never part of a batch."""
        images = []
        for entry in self.held:
            pixels = (
                self._pixels(entry, partial(self._decode, entry)) if len(images) < limit else None
            )
            if pixels is not None:
                images.append(Image(pixels, entry.name, entry.key))
        return images

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) after the resize of every training image, from the headers alone."""
        return [entry.size for entry in self.train]

    def describe(self) -> str:
        extra = (
            [f"{len(self.held)} held out"]
            + [f"{len(self.bad)} unusable"] * bool(self.bad)
            + [f"{self.ignored} other files"] * bool(self.ignored)
        )
        return f"{len(self.train)} photographs under {self.root} ({', '.join(extra)})"

    def close(self) -> None:
        """Ends the decode threads; what they hold is dropped."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # -- listing -----------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Lists the folder and reads every header; splits what is usable into `train` and `held`."""
        _refuse_folder(self.root)
        names = []
        self.ignored = 0
        for path in _walk(self.root, self._skip):
            name = path.relative_to(self.root).as_posix()
            self.ignored += _irrelevant(path)
            names += [] if _irrelevant(path) else [(name, path)]
        entries = [
            entry
            for name, path in sorted(names, key=lambda pair: os.fsencode(pair[0]))
            if (entry := self._entry(name, path))
        ]
        if not entries:
            self._refuse_all()
        self.total = len(entries) + len(self.bad)
        self.held, self.train = _split(entries, self.data.holdout)
        self._refuse_share()

    def _entry(self, name: str, path: Path) -> Entry | None:
        try:
            head = header(path, self.data.max_header_pixels)
        except BadImage as fault:
            if path.suffix:
                self._skip(name, str(fault))
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
        return Entry(name, path, _hash(name), size)

    def _prove_one_decodes(self) -> None:
        """A header says little: decodes in the order of the first epoch until one picture comes out whole."""
        for slot in range(len(self.train)):
            entry = self._at(slot)
            if self._pixels(entry, partial(self._decode, entry)) is not None:
                return
        self._refuse_all()

    # -- drawing -----------------------------------------------------------------------------------

    def _at(self, slot: int) -> Entry:
        """The file at place `slot` of the endless sequence: one seeded permutation per epoch."""
        epoch, place = divmod(slot, len(self.train))
        if epoch not in self._orders:
            self._orders = {
                kept: order for kept, order in self._orders.items() if kept >= epoch - 1
            }
            self._orders[epoch] = randomness.generator(self.seed, epoch, "order").permutation(
                len(self.train)
            )
        return self.train[self._orders[epoch][place]]

    def _image(self, slot: int) -> Image:
        entry = self._at(slot)
        future = self._ahead.pop(slot, None)
        pixels = self._pixels(entry, future.result if future else partial(self._decode, entry))
        if pixels is None:
            return self._substitute(slot)
        return Image(pixels, entry.name, entry.key)

    def _substitute(self, slot: int) -> Image:
        """Another file for an unusable one, drawn by its place, so that history does not matter."""
        for index in randomness.generator(self.seed, slot, "substitute").permutation(
            len(self.train)
        ):
            entry = self.train[index]
            pixels = self._pixels(entry, partial(self._decode, entry))
            if pixels is not None:
                return Image(pixels, entry.name, entry.key)
        self._refuse_all()

    def _want(self, slots: range) -> None:
        """Starts decoding what is not under way yet, and forgets what lies outside `slots`."""
        if self._pool is None:
            return
        for stale in [slot for slot in self._ahead if slot not in slots]:
            self._ahead.pop(stale).cancel()
        for slot in slots:
            entry = self._at(slot)
            if slot not in self._ahead and entry.name not in self.bad:
                self._ahead[slot] = self._pool.submit(self._decode, entry)

    def _decode(self, entry: Entry) -> torch.Tensor:
        """uint8 (H, W, 3). Runs in a decode thread: changes nothing. Raises BadImage."""
        picture = decode(entry.path, self.data.max_header_pixels)
        height, width = grid_size(
            picture.height, picture.width, self.multiple, self.data.min_pixels, self.data.max_pixels
        )
        if (picture.height, picture.width) != (height, width):
            picture = picture.resize((width, height), Pillow.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture, np.uint8))

    # -- faults ------------------------------------------------------------------------------------

    def _pixels(self, entry: Entry, work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The result of `work`, or None with a line in the log when the file turns out unusable."""
        if entry.name in self.bad:
            return None
        try:
            return work()
        except BadImage as fault:
            self._skip(entry.name, str(fault))
            self._refuse_share()
            return None

    def _skip(self, name: str, reason: str) -> None:
        self.bad[name] = reason
        line = json.dumps({"name": name, "reason": reason})
        if line in self._logged:
            return
        self._logged.add(line)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _refuse_all(self) -> NoReturn:
        if not self.bad:
            others = f" ({self.ignored} other files there)" if self.ignored else ""
            raise DataError(
                f"no images under {self.root}{others}; put JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM "
                "files there or change --data.dir"
            )
        name, reason = next(iter(self.bad.items()))
        raise DataError(
            f"none of the {len(self.bad)} images under {self.root} can be used: {_shown(name)} "
            f"{reason}; all reasons are in {self.log}"
        )

    def _refuse_share(self) -> None:
        if len(self.bad) > self.data.max_bad_share * self.total:
            name, reason = next(iter(self.bad.items()))
            raise DataError(
                f"{len(self.bad)} of {self.total} images under {self.root} cannot be used, more "
                f"than data.max_bad_share {self.data.max_bad_share:g}: "
                f"{_shown(name)} {reason}; remove those listed in {self.log} or raise "
                "--data.max_bad_share"
            )


def _refuse_folder(root: Path) -> None:
    try:
        kind = root.stat().st_mode
    except OSError as fault:
        raise DataError(
            f"no folder at {root}: {fault.strerror}; give --data.dir an existing folder of images"
        ) from None
    if not stat.S_ISDIR(kind):
        raise DataError(f"{root} is not a folder; give --data.dir the folder that holds the images")


def _walk(root: Path, skip: Callable[[str, str], None]) -> Iterator[Path]:
    """Every regular file below `root`, links followed, each folder once; pipes, devices and dead links go to `skip(name, reason)`."""
    todo = [root]
    seen = set()
    while todo:
        folder = todo.pop()
        try:
            status = folder.stat()
            children = sorted(folder.iterdir())
        except OSError as fault:
            skip(folder.relative_to(root).as_posix(), f"cannot be listed: {fault.strerror}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for child in children:
            if child.name.startswith("."):
                continue
            try:
                mode = child.stat().st_mode
            except OSError as fault:
                skip(
                    child.relative_to(root).as_posix(),
                    f"leads nowhere: {fault.strerror}"
                    if child.is_symlink()
                    else f"cannot be read: {fault.strerror}",
                )
                continue
            if stat.S_ISDIR(mode):
                todo.append(child)
            elif stat.S_ISREG(mode):
                yield child
            else:
                skip(child.relative_to(root).as_posix(), "is no regular file")


def _irrelevant(path: Path) -> bool:
    """A file whose name says that it is no picture; names without a suffix are judged by their content."""
    return bool(path.suffix) and path.suffix.lower() not in SUFFIXES | FOREIGN


def _hash(name: str) -> int:
    """63 bits of a file's relative name: the same on every machine, whatever the file holds."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little") >> 1


def _split(entries: list[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """(held out, training) by the hash of each name: adding files moves no other. At least one of each where there are two files."""
    by_hash = sorted(entries, key=lambda entry: entry.key)
    count = sum(entry.key < share * 2**63 for entry in entries)
    count = min(max(count, 1), len(entries) - 1) if share > 0 else 0
    held = {entry.name for entry in by_hash[:count]}
    return [entry for entry in by_hash if entry.name in held], [
        entry for entry in entries if entry.name not in held
    ]


def _shown(name: str) -> str:
    """A file name as printable text (names are bytes; some are no text)."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
