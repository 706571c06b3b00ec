"""Where photographs may lie: each kind of album shows the same pictures in the same order, and what
is wrong with one is a line, not a crash.
"""

import io
import itertools
import json
import os
import tarfile
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.images.albums import archive, hub, table
from vise_fast.images.albums.door import is_here, open_album
from vise_fast.images.mixed import CHUNK, parts_of
from vise_fast.images.photographs import Photographs
from vise_fast.images.sources import open_source
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402  # it may be missing

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose names are those of a table's rows, so that all albums have one order."""
    folder = tmp_path_factory.mktemp("albums") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (40 + i, 64, 3), np.uint8)
        Pillow.fromarray(pixels).save(folder / f"{i:09d}", "PNG" if i % 2 else "JPEG")
    return folder


def files(folder):
    return sorted(folder.iterdir())


def as_list(folder, place, suffix):
    path = folder.parent / f"list{suffix}"
    names = [file.name for file in files(folder)]
    lines = {
        ".txt": [f"photos/{name}" for name in names],
        ".jsonl": [json.dumps({"image": f"photos/{name}", "id": 3}) for name in names],
        ".csv": ["id,path", *(f"3,photos/{name}" for name in names)],
    }
    path.write_text("\n".join([*lines[suffix], ""]))
    return path


def as_zip(folder, place, how=zipfile.ZIP_DEFLATED):
    path = place / "photos.zip"
    with zipfile.ZipFile(path, "w", how) as made:
        for file in files(folder):
            made.write(file, file.name)
    return path


def as_tar(folder, place, name="photos.tar", chosen=slice(None), mode="w"):
    path = place / name
    with tarfile.open(path, mode) as made:
        for file in files(folder)[chosen]:
            made.add(file, file.name)
    return path


def as_table(folder, place, struct=True, rows=5):
    path = place / "photos.parquet"
    data = [file.read_bytes() for file in files(folder)]
    column = [{"bytes": b, "path": None} for b in data] if struct else data
    parquet.write_table(pyarrow.table({"id": range(COUNT), "image": column}), path, rows)
    return path


KINDS = {
    "txt": lambda folder, place: as_list(folder, place, ".txt"),
    "jsonl": lambda folder, place: as_list(folder, place, ".jsonl"),
    "csv": lambda folder, place: as_list(folder, place, ".csv"),
    "zip": as_zip,
    "stored zip": lambda folder, place: as_zip(folder, place, zipfile.ZIP_STORED),
    "tar": as_tar,
    "table": as_table,
    "table of bytes": lambda folder, place: as_table(folder, place, struct=False),
}


def settings(place, *words):
    common = ["--run.dir", str(place / "run"), "--data.max_pixels", "16384"]
    return load(None, [*common, "--data.min_pixels", "256", *words])


def opened(place, where, *words):
    return Photographs(open_album(str(where)), settings(place, *words), 16)


def last(name):
    return name.rpartition("/")[2]


def refusal(place, where, *words):
    with pytest.raises(DataError) as caught:
        opened(place, where, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the same pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_album_has_the_folders_pictures_in_the_folders_order(folder, tmp_path, kind):
    words = ["--data.holdout", "0"]
    place = KINDS[kind](folder, tmp_path)
    with (
        closing(opened(tmp_path, folder, *words)) as plain,
        closing(opened(tmp_path, place, *words)) as source,
    ):
        for step in range(2):
            pairs = zip(plain.batch(step, 12), source.batch(step, 12), strict=True)
            for a, b in pairs:
                assert last(b.name) == a.name and torch.equal(a.pixels, b.pixels)
        assert source.sizes() == plain.sizes() and not source.bad
        assert source.identity()["images"] == COUNT


def test_where_names_agree_all_else_does(folder, tmp_path):
    with (
        closing(opened(tmp_path, folder)) as plain,
        closing(opened(tmp_path, as_zip(folder, tmp_path))) as source,
    ):
        assert source.identity() == plain.identity()
        assert [i.key for i in source.held_out()] == [i.key for i in plain.held_out()]


def test_shards_are_one_album(folder, tmp_path):
    half = COUNT // 2
    as_tar(folder, tmp_path, "shard-0.tar", slice(0, half))
    as_tar(folder, tmp_path, "shard-1.tar", slice(half, None))
    pattern = tmp_path / "shard-*.tar"
    assert is_here(str(pattern))
    with closing(opened(tmp_path, pattern, "--data.holdout", "0")) as source:
        found = [image.name for image in source.batch(0, COUNT)]
    assert len(set(found)) == COUNT and {name[:11] for name in found} == {
        "shard-0.tar",
        "shard-1.tar",
    }


def test_shards_of_one_name_in_two_folders(folder, tmp_path):
    for name, chosen in (("a", slice(0, 4)), ("b", slice(4, 9))):
        (tmp_path / name).mkdir()
        as_tar(folder, tmp_path / name, "0.tar", chosen)
    with closing(opened(tmp_path, tmp_path / "*" / "0.tar", "--data.holdout", "0")) as source:
        assert source.identity()["images"] == 9


def test_a_batch_is_drawn_again_from_the_middle(folder, tmp_path):
    place = as_table(folder, tmp_path, rows=2)
    with closing(opened(tmp_path, place)) as one, closing(opened(tmp_path, place)) as other:
        wanted = [one.batch(step, 4) for step in range(9)]
        for step in (8, 2, 5):
            for a, b in zip(wanted[step], other.batch(step, 4), strict=True):
                assert a.name == b.name and torch.equal(a.pixels, b.pixels)
        assert len(other.album._groups) <= table.KEPT


# -- what is wrong with them -----------------------------------------------------------------------


def test_lists_say_what_cannot_be_used(folder, tmp_path):
    good = [f"{folder}/{file.name}" for file in files(folder)]
    rows = [*good, good[0], "https://example.org/a.jpg", "missing.png", "a\0b", "\ud800"]
    path = tmp_path / "list.jsonl"
    lines = [json.dumps({"file_name": row}) for row in rows]
    path.write_text("\n".join([*lines, "{", "[1]", '{"file_name": 3}']))
    with closing(opened(tmp_path, path, "--data.max_bad_share", "1")) as source:
        assert source.identity()["images"] == COUNT
        reasons = set(source.bad.values())
    for part in ("listed twice", "nothing is fetched", "no path", "names no image", "No such file"):
        assert any(part in reason for reason in reasons), (part, reasons)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"x,y\n1,2\n", "no column image or path"),
        ("a.csv", b"", "no column"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b"\n\n", "no images"),
        ("a.zip", b"PK\x03\x04 and then nothing", "zip archive"),
        ("a.zip", b"", "zip archive"),
        ("a.tar", b"not a tar at all" * 64, "tar archive"),
        ("a.tar", b"", "tar archive"),
        ("a.parquet", b"PAR1", "parquet"),
        ("a.docx", b"text", "is not a folder"),
    ],
)
def test_what_is_no_album_is_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path, tmp_path / name)


def test_nothing_under_a_pattern(tmp_path):
    assert "stands for" in refusal(tmp_path, tmp_path / "*.tar")
    assert not is_here(str(tmp_path / "*.tar"))


def test_a_column_that_is_not_there_or_holds_no_pictures(folder, tmp_path):
    path = as_table(folder, tmp_path)
    for column, said in (("photo", "no column photo"), ("id", "holds int64")):
        with pytest.raises(DataError, match=said):
            open_album(str(path), column)
    with pytest.raises(DataError, match="data.column"):
        opened(tmp_path, as_list(folder, tmp_path, ".csv")).album.__class__(
            as_list(folder, tmp_path, ".csv"), "title"
        ).pictures(print).__next__()


def test_without_pyarrow_the_remedy_is_said(folder, tmp_path, monkeypatch):
    path = as_table(folder, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match=r"vise_fast\[data\]"):
        open_album(str(path))


def test_a_compressed_tar_says_what_to_do(folder, tmp_path):
    path = as_tar(folder, tmp_path, "photos.tar", mode="w:gz")
    assert "unpacked first" in refusal(tmp_path, path)


def spoiled(path, share):
    """A copy cut off after a share of it."""
    data = path.read_bytes()
    cut = path.with_name(f"cut{path.suffix}")
    cut.write_bytes(data[: int(len(data) * share)])
    return cut


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "tar", "table"])
def test_an_archive_cut_off_is_refused_or_its_pictures_are_listed(folder, tmp_path, kind, share):
    cut = spoiled(KINDS[kind](folder, tmp_path), share)
    try:
        with closing(opened(tmp_path, cut, "--data.max_bad_share", "1")) as source:
            for image in source.batch(0, 8):
                assert image.pixels.shape[2] == 3
            assert source.bad or share > 0.9
    except DataError as fault:
        assert "\n" not in str(fault)


@pytest.mark.parametrize("kind", ["zip", "stored zip", "tar", "table"])
def test_flipped_bytes_crash_nothing(folder, tmp_path, kind):
    path = KINDS[kind](folder, tmp_path)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for _ in range(12):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 60):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            with closing(opened(tmp_path, path, "--data.max_bad_share", "1")) as source:
                source.batch(0, 8)
        except DataError as fault:
            assert "\n" not in str(fault)


def test_members_that_are_none(folder, tmp_path):
    path = as_zip(folder, tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as made:
        made.writestr("__MACOSX/._a.png", b"x")
        made.writestr(".DS_Store", b"x")
        made.writestr("notes.txt", b"x")
        made.writestr("bomb.png", b"\0" * (archive.LARGEST + 1))
        made.writestr("empty.png", b"")
    with closing(opened(tmp_path, path, "--data.max_bad_share", "1")) as source:
        assert source.ignored == 1 and set(source.bad) == {"bomb.png", "empty.png"}


def test_a_zip_that_lies_about_a_size_is_not_unpacked_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST", 1000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.png", b"\0" * 5000)
    album = open_album(str(path))
    (info,) = album._archive.infolist()
    info.file_size = 10
    (found,) = album.pictures(print)
    with pytest.raises(OSError, match=r"."):
        found.place.open()


def test_a_tar_with_links_and_holes_reads_no_other_file(tmp_path):
    secret = tmp_path / "secret.png"
    Pillow.new("RGB", (50, 50), "red").save(secret)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as made:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type = kind
            info.linkname = str(secret)
            made.addfile(info)
    assert "no images" in refusal(tmp_path, path)


def test_an_archive_that_goes_away_is_one_fault(folder, tmp_path):
    path = as_tar(folder, tmp_path)
    source = opened(tmp_path, path, "--data.workers", "0")
    path.unlink()
    with pytest.raises(DataError, match="images are gone"):
        source.batch(0, 4)


# -- a window into a file --------------------------------------------------------------------------


def test_a_window_is_a_file_of_its_own(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    span = archive.Span(path, 10, 30)
    with span.open() as window:
        assert window.read() == bytes(range(10, 40)) and window.read() == b""
        assert window.seek(-5, io.SEEK_END) == 25 and window.read(3) == bytes([35, 36, 37])
        assert (
            window.seek(2) == 2 and window.seek(3, io.SEEK_CUR) == 5 and window.read(1) == b"\x0f"
        )
        window.seek(90)
        assert window.read() == b""
        with pytest.raises(OSError, match=r"."):
            window.seek(-1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        span.open().close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- several places --------------------------------------------------------------------------------


def mixture(folder, place, *words):
    other = as_zip(folder, place)
    return open_source(settings(place, "--data.mix", f"[{folder}=3, {other}=1]", *words), 16)


def test_a_mixture_draws_by_weight_and_repeats(folder, tmp_path):
    with closing(mixture(folder, tmp_path)) as one, closing(mixture(folder, tmp_path)) as other:
        wanted = [one.batch(step, 7) for step in range(40)]
        names = [image.name for image in itertools.chain.from_iterable(wanted)]
        share = sum(name.startswith(f"{folder}: ") for name in names) / len(names)
        assert 0.67 < share < 0.83
        for step in (39, 0, 17):
            for a, b in zip(wanted[step], other.batch(step, 7), strict=True):
                assert a.name == b.name and a.key == b.key and torch.equal(a.pixels, b.pixels)


def test_each_place_of_a_mixture_shows_every_picture_once_an_epoch(folder, tmp_path):
    with closing(mixture(folder, tmp_path, "--data.holdout", "0")) as source:
        seen = [image.name for step in range(9) for image in source.batch(step, 10)]
    ours = [name for name in seen if name.startswith(f"{folder}: ")]
    assert len(ours) > COUNT and len(set(ours[:COUNT])) == COUNT


def test_slots_of_a_mixture_count_on_across_chunks(folder, tmp_path):
    with closing(mixture(folder, tmp_path)) as source:
        slots = range(CHUNK - 50, CHUNK + 50)
        found = [source._slot(slot) for slot in slots]
        for place in (0, 1):
            own = [slot for which, slot in found if which == place]
            assert own == list(range(own[0], own[0] + len(own)))


def test_a_mixture_holds_out_from_each(folder, tmp_path):
    with closing(mixture(folder, tmp_path, "--data.holdout", "0.2")) as source:
        held = [image.name for image in source.held_out(6)]
        trained = {image.name for step in range(30) for image in source.batch(step, 5)}
    assert len(held) == 6 and not trained & set(held)
    assert {name.partition(": ")[0] for name in held} == set(source.places)


def test_a_mixture_is_held_to_its_weights(folder, tmp_path):
    with closing(mixture(folder, tmp_path)) as one:
        before = one.identity()
    other = as_zip(folder, tmp_path)
    config = settings(tmp_path, "--data.mix", f"[{folder}=2, {other}=1]")
    with closing(open_source(config, 16)) as source:
        assert source.identity() != before and source.identity()["mix"] == before["mix"]


@pytest.mark.parametrize("words", [["a"], ["=1"], ["a=0"], ["a=-1"], ["a=x"], ["a=1", "a=2"]])
def test_words_that_are_no_mixture(words):
    with pytest.raises(ConfigError, match="photos=3"):
        parts_of(words)


def test_a_folder_and_a_mixture_contradict_each_other():
    with pytest.raises(ConfigError, match="both say where images are"):
        load(None, ["--data.dir", "a", "--data.mix", "[b=1]"])


# -- the hub ---------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home, folder, make):
    """A data set as the hub's cache holds it."""
    root = home / "hub" / "datasets--somebody--photos"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    make(folder, snapshot)


@pytest.mark.parametrize("make", [as_table, as_tar, as_zip])
def test_a_data_set_in_the_hubs_cache_needs_no_network(folder, tmp_path, monkeypatch, make):
    cached(tmp_path, folder, make)
    monkeypatch.setattr(hub, "snapshot_download", offline(tmp_path / "hub"))
    for address in ("hf:somebody/photos", f"hf:somebody/photos@{COMMIT}"):
        with closing(opened(tmp_path, address)) as source:
            assert source.identity()["images"] == COUNT and source.identity()["commit"] == COMMIT
            assert source.batch(0, 4)
    with pytest.raises(EnvironmentFault, match="neither here nor to be had"):
        open_album("hf:somebody/else")


def offline(cache):
    real = hub.snapshot_download
    return lambda name, **more: real(name, cache_dir=cache, local_files_only=True, **more)


@pytest.mark.parametrize("address", ["hf:", "hf:a/b/c", "hf:a b"])
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        open_album(address)


def test_a_missing_place_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_album(str(tmp_path / "nowhere"))
    assert not is_here(str(tmp_path / "nowhere")) and is_here(str(tmp_path))
    assert not is_here("hf:a/b") and Path("hf:a").suffix == ""
