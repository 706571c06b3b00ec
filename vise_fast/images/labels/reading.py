"""Files that a user wrote by hand or by a tool of his, read whole: a pipe, a file of an impossible
size, another encoding or no JSON is one line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import yaml

from vise_fast.system import files
from vise_fast.system.errors import DataError

MIB = 2**20
LARGEST = 512 * MIB
"""Bytes of a file of many pictures: twice the annotations of COCO's training share."""
LARGEST_OF_ONE = MIB
"""Bytes of a file about one picture."""
DEEPEST = 64
"""Elements within each other of an XML file."""


class Unreadable(Exception):
    """A file that is not what it should be; the text is the reason, in a few words."""


def text(path: Path, most: int = LARGEST) -> str:
    """The whole file as UTF-8, a byte order mark left out. Raises Unreadable."""
    try:
        return files.read(path, most).decode("utf-8-sig")
    except OSError as fault:
        raise Unreadable(f"cannot be read: {fault.strerror or fault}") from None
    except UnicodeDecodeError:
        raise Unreadable("is no UTF-8 text") from None
    except ValueError as fault:
        raise Unreadable(str(fault)) from None


def parsed(content: str) -> Any:
    """JSON as Python's values. Raises Unreadable."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise Unreadable(f"is no JSON: {fault}") from None


def lines(content: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line of JSON; None for one that is none."""
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield number, parsed(line)
            except Unreadable:
                yield number, None


def rows(content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a table with a line of names. Raises Unreadable."""
    table = csv.DictReader(io.StringIO(content, newline=""))
    try:
        yield from enumerate(table, 2)
    except csv.Error as fault:
        raise Unreadable(f"is no table: {fault}") from None


def settings(content: str) -> dict[str, Any]:
    """YAML that is a mapping. Raises Unreadable."""
    try:
        found = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise Unreadable(f"is no YAML: {' '.join(str(fault).split())[:120]}") from None
    if not isinstance(found, dict):
        raise Unreadable("is no mapping")
    return found


def tree(content: str) -> Element:
    """XML without a document type, so without entities that grow or name other files. Raises
    Unreadable.
    """
    builder = _Builder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.begin
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.say
    parser.StartDoctypeDeclHandler = builder.refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as fault:
        raise Unreadable(f"is no XML: {fault}") from None
    return builder.close()


class _Builder:
    """What the parser tells, as elements."""

    def __init__(self) -> None:
        self.tree = TreeBuilder()
        self.depth = 0

    def begin(self, name: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable(f"has elements more than {DEEPEST} deep")
        self.tree.start(name, attributes)

    def end(self, name: str) -> None:
        self.depth -= 1
        self.tree.end(name)

    def say(self, text: str) -> None:
        self.tree.data(text)

    def refuse(self, *declared: Any) -> None:
        raise Unreadable("declares a document type, whose entities are not taken")

    def close(self) -> Element:
        return self.tree.close()


def whole(path: Path, what: str, reason: object, remedy: str) -> DataError:
    """The one line about a file that cannot be used at all."""
    return DataError(f"{what} {path}: it {reason}; {remedy}")
