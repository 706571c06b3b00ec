"""docs/RELIABILITY.md says how many faults the suite holds: the numbers are pytest's own, and reach
what the project asks of itself.

    python tests/test_reliability.py --write        puts pytest's numbers into the page
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "RELIABILITY.md"
LEAST = 240
"""Cases beside images and configuration."""
LEAST_OF = {"a kill at any call": 60, "a disk that refuses": 60, "signals": 20}


class Collected:
    """A pytest plugin that counts cases by file."""

    def __init__(self):
        self.cases = Counter()

    def pytest_collection_finish(self, session):
        self.cases = Counter(str(item.path.relative_to(ROOT)) for item in session.items)


@dataclass(frozen=True)
class Row:
    """One class of faults: its name, how many cases the page says it has, the files they are in."""

    line: str
    name: str
    cases: int
    files: list[str]

    @classmethod
    def read(cls, line):
        name, cases, _, files = (cell.strip() for cell in line.strip("|").split("|"))
        return cls(line, name, int(cases), re.findall("`(tests/[^`]*)`", files))

    def counting(self, cases):
        """The line with another number."""
        return self.line.replace(f"| {self.cases} |", f"| {cases} |", 1)


def rows():
    """The page's first table."""
    table = PAGE.read_text().split("\n\n")[2].splitlines()[2:]
    return [Row.read(line) for line in table]


def collected(files):
    """Cases per file, counted by a pytest in a forked child: imports take long."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            plugin = Collected()
            words = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
            pytest.main([*words, f"--rootdir={ROOT}", *(str(ROOT / f) for f in files)], [plugin])
            os.write(writer, json.dumps(plugin.cases).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        counted = json.load(pipe)
    os.waitpid(child, 0)
    return counted


def counted():
    """[(row, how many cases pytest finds in its files)]"""
    table = rows()
    found = collected([file for row in table for file in row.files])
    return [(row, sum(found[file] for file in row.files)) for row in table]


def test_every_file_is_there_and_named_once():
    files = [file for row in rows() for file in row.files]
    assert len(files) == len(set(files)) and all((ROOT / file).is_file() for file in files)
    of_whole_runs = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/faults/test_*.py")}
    assert of_whole_runs <= set(files)


def test_the_page_counts_as_pytest_does():
    off = {row.name: f"{row.cases}, not {cases}" for row, cases in counted() if row.cases != cases}
    assert not off, f"{off}; python tests/test_reliability.py --write"


def test_there_are_as_many_as_the_project_asks_of_itself():
    table = {row.name: row.cases for row in rows()}
    beside = [n for name, n in table.items() if not name.startswith(("images", "configuration"))]
    assert sum(beside) >= LEAST
    for start, least in LEAST_OF.items():
        assert next(n for name, n in table.items() if name.startswith(start)) >= least


def write():
    """Puts pytest's numbers into the page."""
    page = PAGE.read_text()
    for row, cases in counted():
        page = page.replace(row.line, row.counting(cases))
    PAGE.write_text(page)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
