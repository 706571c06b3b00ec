"""Files of words, by their form.

words.txt, .names     a phrase a line, for any picture
words.jsonl           {"image": "a.jpg", "query": "the red cup"} a line; also a list of phrases
words.csv             columns image and query

A line without an image is for any picture. A line of a .txt that begins with # is a comment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vise_fast.images.albums.listed import COLUMNS
from vise_fast.images.labels import reading
from vise_fast.images.labels.phrase import phrase
from vise_fast.images.labels.reading import Unreadable
from vise_fast.system.errors import DataError

LARGEST = 64 * reading.MIB
QUERIES = ("query", "phrase", "text", "caption", "name", "label")
NAME = "{name}"
"""Where a template takes a phrase."""


@dataclass(frozen=True)
class Words:
    """`anywhere`: phrases for any picture; `of`: those of a picture, by its name; `odd`: how many
    lines are none.
    """

    title: str
    anywhere: tuple[str, ...]
    of: dict[str, tuple[str, ...]]
    odd: int

    def for_picture(self, name: str) -> tuple[str, ...]:
        """Its own phrases: by its name, by its name in its place of a mixture, or by the last part
        of its path.
        """
        inner = name.partition(": ")[2] or name
        for key in (name, inner, inner.rpartition("/")[2]):
            if key in self.of:
                return self.of[key]
        return ()

    def digest(self) -> str:
        """Equal for equal phrases of equal pictures."""
        content = json.dumps([self.anywhere, sorted(self.of.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def describe(self) -> str:
        """What they are, in a few words."""
        parts = [f"{len(self.anywhere)} phrases"] if self.anywhere else []
        parts += [f"phrases of {len(self.of)} pictures"] if self.of else []
        odd = f", {self.odd} lines left out" if self.odd else ""
        return f"{' and '.join(parts)} in {self.title}{odd}"


def read(path: Path, setting: str, template: str = NAME) -> Words:
    """setting: which one names the file, for the message. Raises DataError, one line."""
    found = _Found(template)
    try:
        for name, text in _lines(path):
            found.add(name, text)
        if not found.anywhere and not found.of:
            raise Unreadable("holds no phrase")
    except Unreadable as fault:
        raise DataError(
            f"the words {path} cannot be used: it {fault}; give --{setting} a .txt with a phrase a "
            "line, or a .jsonl or .csv with image and query"
        ) from None
    of = {name: tuple(phrases) for name, phrases in found.of.items()}
    return Words(str(path), tuple(found.anywhere), of, found.odd)


class _Found:
    """Phrases so far, each once."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.anywhere: dict[str, None] = {}
        self.of: dict[str, dict[str, None]] = {}
        self.odd = 0

    def add(self, name: str | None, text: object) -> None:
        """A phrase for a picture, None: for any."""
        said = phrase(text)
        filled = None if said is None else phrase(self.template.replace(NAME, said))
        if filled is None:
            self.odd += 1
        elif name is None:
            self.anywhere[filled] = None
        else:
            self.of.setdefault(name, {})[filled] = None


def _lines(path: Path) -> Iterator[tuple[str | None, object]]:
    """(picture or None, phrase) as they are written. Raises Unreadable."""
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".names", ".jsonl", ".csv"):
        raise Unreadable("is of no form that is known")
    content = reading.text(path, LARGEST)
    if suffix == ".jsonl":
        for _, row in reading.lines(content):
            yield from _of_row(row)
    elif suffix == ".csv":
        for _, row in reading.rows(content):
            yield from _of_row(row)
    else:
        for line in content.splitlines():
            if line.strip() and not line.startswith("#"):
                yield None, line


def _of_row(row: Any) -> Iterable[tuple[str | None, object]]:
    """Those of an object, or of a line of a table."""
    if not isinstance(row, dict):
        return [(None, row)]
    named = [row[key] for key in COLUMNS if isinstance(row.get(key), str) and row[key]]
    said = next((row[key] for key in QUERIES if key in row), None)
    name = named[0] if named else None
    return [(name, text) for text in (said if isinstance(said, list) else [said])]
