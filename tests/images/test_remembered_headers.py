"""A listing that is remembered: two starts find the same, and whatever changed in between is seen.

The tests set FRESH below zero, so that files may be remembered that were only just written.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.images.albums.door import open_album
from vise_fast.images.listing import remembered, scan
from vise_fast.images.listing.names import Names
from vise_fast.images.photographs import Photographs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "FEW", 0)
    monkeypatch.setattr(remembered, "FRESH", -(10**18))
    return tmp_path / "cache" / "vise_fast" / "listings"


@pytest.fixture
def read(monkeypatch):
    """Names of the files whose headers are read."""
    names: list[str] = []
    real = scan.header

    def noting(place, cap):
        names.append(place.name)
        return real(place, cap)

    monkeypatch.setattr(scan, "header", noting)
    return names


def picture(path: Path, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", (width, height), "red").save(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        picture(tmp_path / "photos" / f"{i % 3}" / f"{i:02d}.png", 64 + 16 * i)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "README").write_text("about")
    return tmp_path / "photos"


def start(tmp_path, place, *words):
    """What a start finds: identity, sizes, reasons, counts."""
    words = ["--run.dir", str(tmp_path / "run"), "--data.max_bad_share", "1", *words]
    with closing(Photographs(open_album(str(place)), load(None, words), 16)) as source:
        held = [image.name for image in source.held_out()]
        return source.identity(), source.sizes(), source.bad, source.ignored, held


def test_a_second_start_reads_only_what_cannot_be_used(tmp_path, folder, read):
    first = start(tmp_path, folder)
    assert len(read) == 14
    read.clear()
    assert start(tmp_path, folder) == first
    assert sorted(read) == ["README", "broken.png"]


def test_a_list_is_remembered_too(tmp_path, folder, read):
    names = [f"{path.relative_to(tmp_path)}" for path in folder.rglob("*.png")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    first = start(tmp_path, tmp_path / "list.txt")
    read.clear()
    assert start(tmp_path, tmp_path / "list.txt") == first and read == ["broken.png"]


def replaced(path):
    picture(path.with_name("new.png"), 200)
    os.replace(path.with_name("new.png"), path)


def replaced_with_old_times(path):
    """Another file of the same bytes, size and time of writing."""
    shutil.copy2(path, path.with_name("copy.png"))
    os.replace(path.with_name("copy.png"), path)


def written_with_old_times(path):
    old = path.stat()
    data = bytearray(path.read_bytes())
    data[19] = 80  # the width in its header
    path.write_bytes(data)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


CHANGES = {
    "written": lambda path: picture(path, 500, 90),
    "replaced": replaced,
    "replaced, with old times": replaced_with_old_times,
    "written, with old times": written_with_old_times,
    "touched": lambda path: os.utime(path, (1, 1)),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_name("moved.png")),
    "added": lambda path: picture(path.with_name("added.png")),
    "its folder replaced": lambda path: (
        shutil.copytree(path.parent, path.parents[2] / "c", dirs_exist_ok=True),
        shutil.rmtree(path.parent),
        os.rename(path.parents[2] / "c", path.parent),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["0/00.png", "1/07.png", "2/11.png"])
def test_whatever_changes_is_seen(tmp_path, folder, read, monkeypatch, change, name):
    start(tmp_path, folder)
    CHANGES[change](folder / name)
    read.clear()
    found = start(tmp_path, folder)
    again = [name for name in read if name not in ("README", "broken.png")]
    assert len(again) == {"removed": 0, "its folder replaced": 4}.get(change, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert found == start(tmp_path, folder)


def test_what_was_written_just_now_is_read_again(tmp_path, folder, read, monkeypatch):
    monkeypatch.setattr(remembered, "FRESH", 10**18)
    first = start(tmp_path, folder)
    read.clear()
    assert start(tmp_path, folder) == first and len(read) == 14


def test_few_files_are_not_worth_a_cache(tmp_path, folder, cache, monkeypatch):
    monkeypatch.setattr(remembered, "FEW", 14)
    start(tmp_path, folder)
    assert not cache.exists()


def test_other_limits_read_again(tmp_path, folder, read):
    start(tmp_path, folder)
    read.clear()
    found = start(tmp_path, folder, "--data.max_header_pixels", "5000")
    assert len(read) == 14 and sum("promises" in reason for reason in found[2].values()) == 9


def test_another_grid_does_not(tmp_path, folder, read):
    start(tmp_path, folder)
    read.clear()
    small = start(tmp_path, folder, "--data.max_pixels", "2048")
    assert sorted(read) == ["README", "broken.png"]
    assert all(height * width <= 2048 for height, width in small[1])


def changed(path, data, name, how):
    """Writes it again, whole in itself, with one array that is not as it was."""
    stored = dict(np.load(io.BytesIO(data)))
    np.savez(path.open("wb"), **stored | {name: how(stored[name])})


SPOILT = {
    "empty": lambda path, data: path.write_bytes(b""),
    "cut": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "flipped": lambda path, data: path.write_bytes(data[:200] + b"\xff" * 8 + data[208:]),
    "an array": lambda path, data: np.save(path.open("wb"), np.zeros(3)),
    "others": lambda path, data: np.savez(path.open("wb"), names=np.zeros(3, np.uint8)),
    "short": lambda path, data: changed(path, data, "stamps", lambda stored: stored[:4]),
    "crossed": lambda path, data: changed(path, data, "ends", lambda stored: stored[::-1]),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_cache_is_thrown_away(tmp_path, folder, cache, read, how):
    first = start(tmp_path, folder)
    (path,) = cache.iterdir()
    SPOILT[how](path, path.read_bytes())
    read.clear()
    assert start(tmp_path, folder) == first and len(read) == 14
    read.clear()
    assert start(tmp_path, folder) == first and len(read) == 2  # it was written anew


def test_a_disk_that_refuses_costs_only_time(tmp_path, folder, cache, read):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    first = start(tmp_path, folder)
    read.clear()
    assert start(tmp_path, folder) == first and len(read) == 14


def test_names_of_any_bytes_come_back(tmp_path, folder, read):
    for name in (b"a\nb.png", b"\xff\xfe.png", b"\xc3\xa9.png", b"z z.png"):
        shutil.copy(folder / "0/00.png", os.fsencode(folder) + b"/" + name)
    first = start(tmp_path, folder)
    read.clear()
    assert start(tmp_path, folder) == first and len(read) == 2


def test_many_names_in_one_block():
    raw = [b"", b"a", b"", "é".encode(), b"\xff"]
    names = Names.of(raw)
    assert len(names) == 5 and [names.raw(i) for i in range(5)] == raw
    assert names[4] == os.fsdecode(b"\xff") and len(Names.of([])) == 0


def test_identity_is_the_one_that_runs_were_marked_with(tmp_path):
    """The digest of an earlier version over the same names and sizes."""
    folder = tmp_path / "three"
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png", 64, 48)
    found = start(tmp_path, folder, "--data.holdout", "0")[0]
    digest = hashlib.blake2b(digest_size=16)
    for name in ("a", "b", "c"):
        digest.update(f"{name}.png".encode() + b"\0%dx%d\n" % (48, 64))
    assert found == {"images": 3, "names": digest.hexdigest()}
    assert json.dumps(found)
