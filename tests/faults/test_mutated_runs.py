"""Run files that were changed at random: whoever reads them says so in one line or takes what was
there before, never something else.

Each case changes one file of a finished run: bits, bytes, lines, or what its JSON says. Then the
run is read as one that goes on, and shown. What a line of metrics.jsonl says is hashed nowhere:
there the promise is that the line can be one.
"""

import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.forked import again, go, words
from small_runs import lines

from vise_fast.config import schema
from vise_fast.evaluate.results import Results
from vise_fast.report import diagnosis, stored_run
from vise_fast.report.page import render
from vise_fast.run import identity
from vise_fast.run.directory import Run
from vise_fast.run.resume import resolve
from vise_fast.system.console import JsonLines
from vise_fast.system.errors import DataError, UserError

CASES = 50
"""Per file."""


@dataclass
class Images:
    """A source of images as far as a run's opening asks for it."""

    known: dict

    def identity(self):
        return self.known


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert go(words(directory), directory).code == 0
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    """Everything the same files but what is changed."""
    return Path(shutil.copytree(finished, tmp_path / "run", copy_function=os.link))


# ---- changes -------------------------------------------------------------------------------------


def flipped(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def another_byte(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([b"\0", b"\xff", b'"', b"{", b"9", b"-", b"\n"]) + data[place:]


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def a_hole(data, rng):
    start = rng.randrange(len(data))
    length = rng.randrange(1, 600)
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def twice(data, rng):
    start = rng.randrange(len(data))
    end = start + rng.randrange(1, 600)
    return data[:end] + data[start:]


def without_a_piece(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 600) :]


def in_another_order(data, rng):
    pieces = data.splitlines(keepends=True)
    rng.shuffle(pieces)
    return b"".join(pieces)


def deeper(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([b"[", b'{"a":']) * 50_000 + data[place:]


ODD = (None, True, -1, 0, 1e308, 10**400, math.nan, math.inf, "1", "", [], {}, [[]], {"a": 1})


def said_otherwise(data, rng):
    """One value of the JSON becomes an odd one."""
    try:
        pieces = [json.loads(line) for line in data.splitlines()]
    except ValueError:
        pieces = None
    if pieces is None or not all(isinstance(piece, dict) for piece in pieces):
        try:
            pieces = [json.loads(data)]
        except ValueError:  # YAML
            return another_byte(data, rng)
    place = rng.choice(pieces)
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inside = place[key]
        if not isinstance(inside, dict | list) or not inside or rng.random() < 0.2:
            break
        place = inside
    place[key] = rng.choice(ODD)
    return b"\n".join(json.dumps(piece).encode() for piece in pieces) + b"\n"


CHANGES = (
    flipped,
    another_byte,
    cut,
    a_hole,
    twice,
    without_a_piece,
    in_another_order,
    deeper,
    said_otherwise,
    said_otherwise,
)


def change(path, seed):
    """One file, changed at random."""
    rng = random.Random(seed)
    data = CHANGES[seed % len(CHANGES)](path.read_bytes(), rng)
    path.unlink()  # it is the same file as in the run it was copied from
    path.write_bytes(data)


# ---- readers -------------------------------------------------------------------------------------


def opened(directory):
    """The run as it goes on, and what it finds."""
    typed = again(directory)
    start = resolve(schema.load(None, typed), schema.stated(None, typed))
    run = Run(start)
    run.resumed = start.checkpoint
    run.first = 2
    return run


def gone_on_with(copy, finished):
    """Reads all that a resumed run reads; what it takes is what was there."""
    images = Images(identity.data_of(finished, pytest.fail))
    wanted = json.loads((finished / "evaluation.json").read_text())
    own = schema.load(finished / "config.yaml")
    run = opened(copy)
    try:
        same = run.config.model_copy(deep=True)
        same.run.dir = own.run.dir
        same.train.resume = own.train.resume
        assert same == own
        run._check_data(images)
        for name, arm in run._known_evaluation().items():
            if name in wanted:
                assert Results.read(arm).json() == wanted[name]
        run.metrics = JsonLines(copy / "metrics.jsonl", run.first)
        run.samples = JsonLines(copy / "samples.jsonl", run.first)
        run.opened = True
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert all(can_be(record) for record in lines(copy / name))
        run._check_lines()
        run._check_metrics()
    finally:
        run.close()


def can_be(record):
    """Whether a line belongs to the steps that are done."""
    return isinstance(record, dict) and record.get("step", 0) <= 2


def shown(copy, finished):
    """The report, curves aside."""
    run = stored_run.read(copy)
    for name in {name for record in run.metrics for name in record}:
        steps, values = run.series(name)
        assert len(steps) == len(values)
    run.phases()
    diagnosis.diagnose(run)
    assert "</html>" in render(run, [])


READERS = {
    "evaluation.json": (gone_on_with, shown),
    "metrics.jsonl": (gone_on_with, shown),
    "samples.jsonl": (gone_on_with, shown),
    "config.yaml": (gone_on_with, shown),
    "run.json": (gone_on_with,),
    "env.json": (shown,),
}


@pytest.mark.parametrize("name", READERS)
def test_what_was_changed_is_said_or_makes_no_difference(name, copy, finished, capsys):
    refused = 0
    for seed in range(CASES):
        for reader in READERS[name]:
            (copy / name).unlink(missing_ok=True)
            shutil.copyfile(finished / name, copy / name)
            change(copy / name, seed)
            for other in ("metrics.jsonl", "samples.jsonl"):  # reading cuts them
                if other != name:
                    (copy / other).unlink()
                    shutil.copyfile(finished / other, copy / other)
            try:
                reader(copy, finished)
            except UserError as fault:
                assert "\n" not in str(fault), (name, seed)
                refused += 1
            except Exception as fault:
                raise AssertionError(f"{name}, case {seed}: {fault!r}") from fault
    said = capsys.readouterr().err.count("warning: ")
    assert refused + said >= 3


def test_other_images_are_not_gone_on_with(copy, finished):
    """A marker that tells of others, and is whole."""
    run = opened(copy)
    try:
        with pytest.raises(DataError, match="the images are not those"):
            run._check_data(Images({"kind": "others"}))
    finally:
        run.close()
