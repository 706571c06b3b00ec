"""Streams: a batch is a function of seed and step, whoever asks and from where on; nothing is held
that is not needed; the same guards.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from images.test_albums import COUNT, as_list, as_table, as_tar, as_zip, files, folder, settings
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.images import slots, streamed
from vise_fast.images.albums.album import Found
from vise_fast.images.albums.door import open_album
from vise_fast.images.listing.names import key_of
from vise_fast.images.listing.shuffle import Shuffle
from vise_fast.images.sources import open_source
from vise_fast.images.streamed import Streamed, held
from vise_fast.system.errors import ConfigError, DataError

__all__ = ["folder"]
KINDS = {
    "txt": lambda folder, place: as_list(folder, place, ".txt"),
    "jsonl": lambda folder, place: as_list(folder, place, ".jsonl"),
    "zip": as_zip,
    "tar": as_tar,
    "table": lambda folder, place: as_table(folder, place, rows=3),
}


def opened(place, where, *words):
    log = place / "run" / "bad_images.jsonl"
    return Streamed(open_album(str(where)), streaming(place, where, *words), 16, log)


def streaming(place, where, *words):
    return settings(place, "--data.stream", "true", "--data.dir", str(where), *words)


def drawn(source, steps, n=5):
    return [source.batch(step, n) for step in steps]


def same(one, other):
    for a, b in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        assert a.name == b.name and a.key == b.key and torch.equal(a.pixels, b.pixels)


# -- the order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", ["1", "4", "1000"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_seed_and_step(folder, tmp_path, kind, buffer):
    """Also where another process begins in the middle, in a later pass, or goes back."""
    place = KINDS[kind](folder, tmp_path)
    words = ["--data.buffer", buffer]
    with closing(opened(tmp_path, place, *words)) as source:
        wanted = drawn(source, range(14))
    for first in (0, 1, 5, 9, 13):
        with closing(opened(tmp_path, place, *words, "--data.workers", "0")) as source:
            same(drawn(source, range(first, 14)), wanted[first:])
            same(drawn(source, (13, 2, 8)), [wanted[13], wanted[2], wanted[8]])


def test_every_pass_shows_every_picture_once(folder, tmp_path):
    place = as_tar(folder, tmp_path)
    with closing(opened(tmp_path, place, "--data.buffer", "7", "--data.holdout", "0.2")) as source:
        held_out = [image.name for image in source.held_out()]
        count = COUNT - len(held_out)
        seen = [source.batch(step, 1)[0].name for step in range(3 * count)]
    passes = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert held_out and all(len({*part, *held_out}) == COUNT for part in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])


def test_another_seed_is_another_order(folder, tmp_path):
    place = as_tar(folder, tmp_path)
    orders = []
    for seed in ("0", "1"):
        with closing(opened(tmp_path, place, "--train.seed", seed)) as source:
            orders.append([image.name for image in source.batch(0, 12)])
    assert orders[0] != orders[1]


def test_the_held_out_share_is_that_of_a_listing(folder, tmp_path):
    place = as_tar(folder, tmp_path)
    words = ["--data.holdout", "0.3"]
    with (
        closing(open_source(settings(tmp_path, "--data.dir", str(place), *words), 16)) as listed,
        closing(opened(tmp_path, place, *words)) as source,
    ):
        names = {image.name for image in source.held_out()}
        assert names == {image.name for image in listed.held_out()} and names
        assert [image.name for image in source.held_out(2)] == sorted(names)[:2]


def test_held_out_pictures_are_looked_for_once(folder, tmp_path, monkeypatch):
    """Later calls read no names again; too few of them are told."""
    monkeypatch.setattr(streamed, "LOOKED", 12)
    said = []
    place = as_table(folder, tmp_path, rows=4)
    config = streaming(tmp_path, place, "--data.holdout", "0.4")
    with closing(Streamed(open_album(str(place)), config, 16, say=said.append)) as source:
        first = source.held_out(2)
        assert source._looked < 12 and not said
        every = source.held_out(100)
        monkeypatch.setattr(type(source.album), "pictures", None)
        assert [image.name for image in source.held_out(100)] == [image.name for image in every]
    same([first], [every[:2]])
    assert (
        2 < len(every) < 12
        and len(said) == 1
        and "held-out images, not 100, are among the first 12" in said[0]
    )


def test_ranks_draw_their_parts_of_one_batch(folder, tmp_path):
    place = as_table(folder, tmp_path)
    with closing(opened(tmp_path, place)) as source:
        whole = drawn(source, range(9), 6)
    parts = []
    for part in (range(0, 2), range(2, 6)):
        with closing(opened(tmp_path, place)) as source:
            parts.append([source.batch(step, 6, part) for step in range(9)])
    same([a + b for a, b in zip(*parts, strict=True)], whole)


def test_a_mixture_of_streams_goes_on_anywhere(folder, tmp_path):
    half = COUNT // 2
    as_tar(folder, tmp_path, "shard-0.tar", slice(0, half))
    as_tar(folder, tmp_path, "shard-1.tar", slice(half, None))
    mix = f"[{tmp_path}/shard-*.tar=2, {as_table(folder, tmp_path)}=1]"
    config = settings(tmp_path, "--data.mix", mix, "--data.stream", "true", "--data.buffer", "6")
    with closing(open_source(config, 16)) as source:
        wanted = drawn(source, range(12))
        marked = source.identity()
    for first in (3, 11):
        with closing(open_source(config, 16)) as source:
            assert source.identity() == marked and marked["images"] == "streamed"
            same(drawn(source, range(first, 12)), wanted[first:])


# -- the buffer ------------------------------------------------------------------------------------


def passed(count, size, skipped=0, number=0):
    shuffle = Shuffle(iter(range(count)), size, 3, number, lambda record: record)
    assert shuffle.skip(skipped) == min(skipped, count)
    return list(iter(shuffle.give, None))


@pytest.mark.parametrize(
    "count, size", [(0, 5), (1, 1), (7, 1), (7, 3), (7, 7), (7, 20), (400, 32)]
)
def test_a_pass_gives_each_record_once_wherever_it_begins(count, size):
    whole = passed(count, size)
    assert sorted(whole) == list(range(count))
    for skipped in {0, 1, count // 2, count, count + 3}:
        assert passed(count, size, skipped) == whole[skipped:]
    if size == 1:
        assert whole == list(range(count))


def test_a_record_comes_no_earlier_than_the_buffer_allows():
    whole = passed(2000, 50)
    assert all(record < place + 50 for place, record in enumerate(whole))
    late = np.array([place - record for place, record in enumerate(whole)])
    assert late.max() > 100 and abs(late.mean()) < 1e-9
    assert whole != passed(2000, 50, number=1)


def test_the_next_record_is_drawn_evenly():
    """Of a full buffer: the chi-square of 40 cells stays below its 99.99 % point, 84.6."""
    firsts = Counter(passed(40, 40, number=number)[0] for number in range(2000))
    assert sum((firsts[i] - 50) ** 2 / 50 for i in range(40)) < 84.6


def test_only_what_is_given_is_held():
    """What is passed over is never read; what stays in the buffer is."""
    read = []

    def hold(record):
        read.append(record)
        return record

    shuffle = Shuffle(iter(range(1000)), 10, 0, 0, hold)
    shuffle.skip(900)
    assert len(read) == 10


def test_the_buffer_is_as_large_as_it_says(folder, tmp_path, monkeypatch):
    most = 0
    real = Shuffle._next

    def counting(self, hold):
        nonlocal most
        found = real(self, hold)
        most = max(most, len(self._buffer))
        return found

    monkeypatch.setattr(Shuffle, "_next", counting)
    with closing(opened(tmp_path, as_tar(folder, tmp_path), "--data.buffer", "9")) as source:
        drawn(source, range(6))
    assert most == 9


def test_rows_of_a_table_are_read_once(folder, tmp_path, monkeypatch):
    place = as_table(folder, tmp_path, rows=2)
    album = open_album(str(place))
    groups = []
    real = type(album)._read
    monkeypatch.setattr(
        type(album), "_read", lambda self, group: groups.append(group) or real(self, group)
    )
    config = streaming(tmp_path, place, "--data.buffer", "16")
    with closing(Streamed(album, config, 16)) as source:
        groups.clear()
        drawn(source, range(8), 2)
    assert len(groups) == len(set(groups))


# -- what is kept ----------------------------------------------------------------------------------


def test_what_is_passed_is_forgotten(folder, tmp_path):
    with closing(opened(tmp_path, as_tar(folder, tmp_path))) as source:
        for step in range(60):
            source.batch(step, 3)
            assert len(source._given) <= 6 and len(source._ahead) <= 3


def test_a_tar_keeps_no_members(tmp_path, folder):
    album = open_album(str(as_tar(folder, tmp_path)))
    seen = []
    real = tarfile.TarFile.next

    def noting(self):
        seen.append(len(self.members))
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile.TarFile, "next", noting)
        assert len(list(album.pictures(print))) == COUNT
    assert max(seen) <= 1


def test_a_file_is_not_held_in_memory(folder):
    found = Found("a", files(folder)[0])
    assert held(found) == found


# -- faults ----------------------------------------------------------------------------------------


def spoilt(folder, tmp_path, chosen):
    """A tar with members whose pixels are cut off."""
    path = tmp_path / "spoilt.tar"
    whole = tmp_path / "whole"
    whole.mkdir()
    for i, file in enumerate(files(folder)):
        data = file.read_bytes()
        (whole / f"{file.name}.png").write_bytes(data[:-60] if i in chosen else data)
    with tarfile.open(path, "w") as made:
        for file in sorted(whole.iterdir()):
            made.add(file, file.name)
    return path


@pytest.mark.parametrize("chosen", [{4}, {3, 4, 5, 11}, set(range(0, COUNT, 2))])
def test_another_takes_the_place_in_any_history(folder, tmp_path, chosen):
    place = spoilt(folder, tmp_path, chosen)
    words = ["--data.max_bad_share", "1", "--data.buffer", "5", "--data.holdout", "0"]
    with closing(opened(tmp_path, place, *words)) as source:
        wanted = drawn(source, range(10))
        assert source.figures() == {"bad_images": len(chosen)}
    with closing(opened(tmp_path, place, *words, "--data.workers", "0")) as source:
        for step in (9, 4, 5, 0):
            same([source.batch(step, 5)], [wanted[step]])
    log = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert len(log) == len(chosen) and all("cannot be decoded" in line for line in log)


def test_too_many_bad_at_the_start(folder, tmp_path):
    place = spoilt(folder, tmp_path, {1, 2})
    with pytest.raises(DataError, match="2 of the first 23 images"):
        opened(tmp_path, place)


def test_a_late_fault_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "TRIED", 8)
    said = []
    place = spoilt(folder, tmp_path, {12, 17})
    config = streaming(tmp_path, place, "--data.buffer", "4")
    with closing(Streamed(open_album(str(place)), config, 16, say=said.append)) as source:
        drawn(source, range(8))
    assert len(said) == 1 and source.figures() == {"bad_images": 2}


def test_nothing_usable_ends_it(folder, tmp_path):
    place = spoilt(folder, tmp_path, set(range(COUNT)))
    with pytest.raises(DataError, match="none of the 23 images"):
        opened(tmp_path, place, "--data.max_bad_share", "1")


def test_an_empty_stream(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n")
    with pytest.raises(DataError, match="no images"):
        opened(tmp_path, path)


def test_all_held_out(folder, tmp_path):
    one = files(folder)[0].name
    path = tmp_path / "one.txt"
    path.write_text(str(folder / one))
    share = key_of(str(folder / one)) / 2**63
    if share < 0.99:
        with pytest.raises(DataError, match="no images"):
            opened(tmp_path, path, "--data.holdout", str(min(share + 0.005, 0.999)))


def test_a_folder_has_no_order(folder, tmp_path):
    with pytest.raises(DataError, match="leave data.stream out"):
        opened(tmp_path, folder)


def test_drawn_scenes_are_no_stream():
    with pytest.raises(ConfigError, match="nothing to read"):
        load(None, ["--data.stream", "true"])


def test_a_shard_that_goes_away_is_one_fault(folder, tmp_path):
    path = as_tar(folder, tmp_path)
    source = opened(tmp_path, path, "--data.workers", "0")
    path.unlink()
    with pytest.raises(DataError, match="images are gone"):
        drawn(source, range(9))


# -- what is known of it ---------------------------------------------------------------------------


def test_identity_is_the_shards_and_the_first_names(folder, tmp_path):
    place = as_tar(folder, tmp_path)
    with closing(opened(tmp_path, place)) as source:
        before = source.identity()
        assert json.dumps(before) and "a stream" in source.describe()
    moved = place.rename(tmp_path / "moved.tar")
    with closing(opened(tmp_path, moved)) as source:
        assert source.identity() == before
    with tarfile.open(moved, "a") as made:
        made.add(files(folder)[0], "one_more")
    with closing(opened(tmp_path, moved)) as source:
        assert source.identity() != before


def test_the_plan_is_for_the_largest_that_may_come(folder, tmp_path):
    said = []
    place = as_tar(folder, tmp_path)
    config = streaming(tmp_path, place, "--memory.budget_gb", "4")
    with closing(open_source(config, 16, say=said.append)) as source:
        assert source.sizes() == [(96, 144)] and streamed.LARGE[0] * 4 == streamed.LARGE[1] * 3
        assert max(p.shape[0] * p.shape[1] for (p,) in shapes(source)) <= 16384
    assert len(said) == 1 and "memory.budget_gb is planned for images of" in said[0]


def shapes(source):
    return [(image.pixels,) for image in source.batch(0, 12)]


def test_members_beside_the_pictures_are_passed_over(folder, tmp_path):
    path = tmp_path / "shard.tar"
    (tmp_path / "a.json").write_text("{}")
    Pillow.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with tarfile.open(path, "w") as made:
        for i in range(6):
            made.add(tmp_path / "a.json", f"{i}.json")
            made.add(tmp_path / "a.png", f"{i}.png")
    with closing(opened(tmp_path, path, "--data.holdout", "0")) as source:
        assert {image.name for image in source.batch(0, 6)} == {f"{i}.png" for i in range(6)}
        assert not source.bad
