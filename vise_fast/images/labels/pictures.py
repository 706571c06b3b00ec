"""Labelled pictures: what a label file says, with the pictures it speaks of.

Rules for what is odd, each counted and said: a picture that is not there, or is none, or is of
another shape than its labels say, is left out; so is a box without area, or mostly outside its
picture (of one that reaches out the part inside counts), and a name that is no phrase. A name that
stands for several things of a picture, or for a crowd, is not asked for there. A file of which more
than half cannot be used is refused, and so is one whose boxes are plainly in another form.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vise_fast.config.schema import DataConfig
from vise_fast.images.image import Image
from vise_fast.images.labels.apart import Apart
from vise_fast.images.labels.label import Label, Sheet, Sheets, Sized, in_1000, mistaken
from vise_fast.images.labels.phrase import phrase
from vise_fast.images.listing.names import SUFFIXES
from vise_fast.images.listing.through import Through, unseen
from vise_fast.images.picture_file import BadImage, decode, header, on_grid
from vise_fast.system.errors import DataError

MOST_ODD = 0.5
"""Share of the labels, or of the pictures, that may be left out."""
SHAPE = 0.02
"""How far the ratio of the sides may be off between what labels say and what a picture has."""
BESIDE = (".", "images", "../images", "../JPEGImages")
"""Where pictures usually lie, from the labels' own folder."""


@dataclass(frozen=True)
class Labelled:
    """A picture and what may be asked for on it: `objects` with boxes, and `points`. `names` also
    holds what is there and may not be asked for; `digest`: the sha256 of the file.
    """

    path: Path
    digest: str
    objects: list[Label]
    points: list[Label]
    names: list[str]

    @property
    def key(self) -> int:
        """63 bits of its content, whatever it is called."""
        return int(self.digest[:16], 16) >> 1


@dataclass
class Tally:
    """What was left out, and why; `first` names one of each."""

    odd: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """One more."""
        shown = " ".join(name.split())[:80].encode("utf-8", "backslashreplace").decode()
        self.odd[reason] += 1
        self.first.setdefault(reason, shown)

    def __str__(self) -> str:
        most = self.odd.most_common(4)
        shown = [f"{count} {' '.join(reason.split())}" for reason, count in most]
        names = list(dict.fromkeys(self.first.values()))[:1]
        return "; ".join(shown) + "".join(f" (first: {name})" for name in names if name)


class Shelf:
    """Where the pictures of labels lie."""

    def __init__(self, labels: Path, images: str | None, album: str | None) -> None:
        own = labels if labels.is_dir() else labels.parent
        usual = [own / place for place in BESIDE]
        if album is not None and Path(album).expanduser().is_dir():
            usual.append(Path(album).expanduser())
        self.places = usual if images is None else [Path(images).expanduser()]

    def find(self, name: str) -> Path | None:
        """The file that labels call so: as written, else by its last part; a name without a suffix
        may have any.
        """
        written = Path(name.replace("\\", "/"))
        for place in self.places:
            for tried in dict.fromkeys((written, Path(written.name))):
                found = _there(place / tried)
                if found is not None:
                    return found
        return _there(_among_images(written))


def _among_images(path: Path) -> Path:
    """YOLO's other habit: labels/a.txt is about images/a.jpg."""
    parts = list(path.parts)
    if "labels" in parts:
        parts[len(parts) - 1 - parts[::-1].index("labels")] = "images"
    return Path(*parts)


def _there(path: Path) -> Path | None:
    try:
        if path.is_file():
            return path
        tried = [path.with_name(path.name + suffix) for suffix in sorted(SUFFIXES)]
        return next((file for file in tried if file.is_file()), None)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _Page:
    """A sheet, its picture's file, and (height, width) in which its numbers are."""

    sheet: Sheet
    path: Path
    size: tuple[int, int]


class Pictures:
    """All labelled pictures of a file. `apart`: their contents; `odd`: what was left out.

    Raises DataError where nothing, or less than half, can be used.
    """

    def __init__(
        self,
        found: Sheets,
        title: str,
        shelf: Shelf,
        data: DataConfig,
        grid: int,
        *,
        through: Through = unseen,
    ) -> None:
        """title: the file, for messages; grid: of which every height and width is a multiple."""
        self.title = title
        self.data = data
        self.grid = grid
        self.apart = Apart()
        self.odd = Tally(Counter(found.odd))
        asked = [sheet for sheet in found.sheets.values() if sheet.marks]
        self.total = sum(len(sheet.marks) for sheet in asked) + sum(found.odd.values())
        pages = [page for sheet in asked if (page := self._page(sheet, shelf)) is not None]
        self._refuse_missing(len(pages), len(asked))
        self._refuse_mistaken(pages)
        looked_at = map(self._picture, through(pages, "labelled pictures"))
        made = [picture for picture in looked_at if picture is not None]
        self.pictures = sorted(made, key=lambda picture: picture.digest)
        self._refuse_odd()

    def _page(self, sheet: Sheet, shelf: Shelf) -> _Page | None:
        path = shelf.find(sheet.picture)
        if path is None:
            self.odd.add("pictures that are not there", sheet.picture)
            return None
        try:
            head = header(path, self.data.max_header_pixels)
        except BadImage as fault:
            self.odd.add(f"pictures that cannot be used, the first {fault}", sheet.picture)
            return None
        size = sheet.size or (head.height, head.width)
        if abs(size[1] / size[0] * head.height / head.width - 1) > SHAPE:
            self.odd.add("pictures of another shape than their labels say", sheet.picture)
            return None
        return _Page(sheet, path, size)

    def _picture(self, page: _Page) -> Labelled | None:
        digest = self._set_apart(page)
        if digest is None:
            return None
        labels = list(self._labels(page))
        names = [label.name for label, _ in labels]
        asked = [label for label, may in labels if may and names.count(label.name) == 1]
        asked.sort(key=lambda label: label.name)  # a file of another order is the same file
        objects = [label for label in asked if not label.is_point]
        points = [label for label in asked if label.is_point]
        return Labelled(page.path, digest, objects, points, names)

    def _set_apart(self, page: _Page) -> str | None:
        """The sha256 of a picture that is one and is new: from here on no batch may hold it."""
        try:
            digest = self.apart.add(page.path, self._pixels(page.path))
        except (BadImage, OSError) as fault:
            self.odd.add(f"pictures that cannot be used, the first {fault}", page.sheet.picture)
            return None
        if digest is None:
            self.odd.add("pictures that show what another shows", page.sheet.picture)
        return digest

    def _pixels(self, path: Path) -> Tensor:
        """uint8 (H, W, 3) on the model's grid. Raises BadImage."""
        data = self.data
        picture = decode(path, data.max_header_pixels)
        return torch.from_numpy(on_grid(picture, self.grid, data.min_pixels, data.max_pixels))

    def _labels(self, page: _Page) -> Iterator[tuple[Label, bool]]:
        """Each label that can be meant, and whether it may be asked for."""
        for mark in page.sheet.marks:
            name = phrase(mark.name.replace("_", " "))
            box = in_1000(mark, page.size)
            if name is None:
                self.odd.add("names that are no phrase", page.sheet.picture)
            elif isinstance(box, str):
                self.odd.add(box, page.sheet.picture)
            else:
                yield Label(name, box), mark.asked

    # -- refusals ----------------------------------------------------------------------------------

    def _refuse_missing(self, here: int, asked: int) -> None:
        if here < MOST_ODD * asked or not here:
            raise DataError(
                f"of the {asked} labelled pictures of {self.title} {here} can be used: {self.odd}; "
                "name the folder that holds them by --eval.label_images"
            )

    def _refuse_mistaken(self, pages: Sequence[_Page]) -> None:
        """Boxes that are plainly in another form than their file's."""
        by_form: dict[str, list[Sized]] = {}
        for page in pages:
            for mark in page.sheet.marks:
                by_form.setdefault(mark.form, []).append((mark, page.size))
        for boxes in by_form.values():
            found = mistaken(boxes)
            if found is not None:
                raise DataError(
                    f"the boxes of {self.title} look like {found[1]}, and a file of this kind has "
                    f"{found[0]}; every answer would be measured against a wrong box; write them "
                    "anew"
                )

    def _refuse_odd(self) -> None:
        left = sum(len(picture.names) for picture in self.pictures)
        if left < MOST_ODD * self.total:
            raise DataError(
                f"of the {self.total} labels of {self.title} {left} can be used: {self.odd}; see "
                "docs/DATA.md for what is read, and mend them"
            )

    # -- what it is --------------------------------------------------------------------------------

    def images(self, chosen: Sequence[Labelled]) -> list[Image]:
        """Decoded anew, so that thousands take no memory. Raises DataError where one is gone."""
        try:
            return [Image(self._pixels(p.path), p.path.name, p.key) for p in chosen]
        except BadImage as fault:
            raise DataError(
                f"a labelled picture of {self.title} {fault}; it could be read when the run began; "
                "bring it back"
            ) from None

    def describe(self) -> str:
        """What it is, in one line."""
        asked = sum(len(p.objects) + len(p.points) for p in self.pictures)
        unasked = sum(len(p.names) for p in self.pictures) - asked
        text = f"{len(self.pictures)} labelled pictures to check with, {asked} things to find"
        if unasked:
            text += f", {unasked} whose name others have"
        return f"{text}; left out: {self.odd}" if self.odd.odd else text

    def digest(self) -> str:
        """Equal for equal labels of equal pictures."""
        found = hashlib.sha256()
        for picture in self.pictures:
            found.update(picture.digest.encode())
            for label in picture.objects + picture.points:
                found.update(repr((label.name, label.box_1000)).encode())
        return found.hexdigest()[:32]
