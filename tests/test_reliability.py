"""docs/RELIABILITY.md says how many faults the suite holds: the numbers are pytest's own, and reach
what the project asks of itself.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "RELIABILITY.md").read_text()
LEAST = 240
"""Cases beside images and configuration."""
LEAST_OF = {"a kill at any call": 60, "a disk that refuses": 60, "signals": 20}


class Collected:
    """A pytest plugin that counts cases by file."""

    def __init__(self):
        self.cases = Counter()

    def pytest_collection_finish(self, session):
        self.cases = Counter(str(item.path.relative_to(ROOT)) for item in session.items)


def rows():
    """{class: (cases, files)} of the page's first table."""
    table = PAGE.split("\n\n")[2].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {cell[0]: (int(cell[1]), re.findall("`(tests/[^`]*)`", cell[3])) for cell in cells}


def collected(files):
    """Cases per file, counted by a pytest in a forked child: an import of everything takes long."""
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


def test_the_page_counts_as_pytest_does():
    table = rows()
    files = [file for _, named in table.values() for file in named]
    assert len(files) == len(set(files)) and all((ROOT / file).is_file() for file in files)
    found = collected(files)
    counted = {name: sum(found[file] for file in named) for name, (_, named) in table.items()}
    assert counted == {name: cases for name, (cases, _) in table.items()}


def test_there_are_as_many_as_the_project_asks_of_itself():
    table = {name: cases for name, (cases, _) in rows().items()}
    beside = [n for name, n in table.items() if not name.startswith(("images", "configuration"))]
    assert sum(beside) >= LEAST
    for start, least in LEAST_OF.items():
        assert next(n for name, n in table.items() if name.startswith(start)) >= least
