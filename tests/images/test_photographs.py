"""Photographs as a source: order, split, substitutes, faults of folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from PIL import Image as Pillow

from vise_fast.config.schema import Config, load
from vise_fast.images import slots as module
from vise_fast.images.albums.door import open_album
from vise_fast.images.photographs import Photographs
from vise_fast.system.errors import ConfigError, DataError


def settings(tmp_path: Path, *words: str) -> Config:
    return load(
        None,
        [
            "--run.dir",
            str(tmp_path / "run"),
            "--data.max_pixels",
            "16384",
            "--data.min_pixels",
            "256",
            *words,
        ],
    )


def fill(folder: Path, count: int, start: int = 0) -> Path:
    """`count` pictures of different sizes and colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Pillow.new("RGB", (40 + i, 90 - i % 50), (i * 7 % 256, i % 256, 255 - i % 256)).save(
            folder / f"{i:04d}.png"
        )
    return folder


def opened(tmp_path: Path, folder: Path, *words: str, multiple: int = 16) -> Photographs:
    album = open_album(str(folder))
    return Photographs(album, settings(tmp_path, *words), multiple, log_of(tmp_path))


def log_of(tmp_path: Path) -> Path:
    return tmp_path / "run" / "bad_images.jsonl"


def names(images: list) -> list[str]:
    return [image.name for image in images]


def lines(tmp_path: Path) -> dict[str, str]:
    path = log_of(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({record["name"] for record in records}) == len(records), "a file has two lines"
    return {record["name"]: record["reason"] for record in records}


def refusal(tmp_path: Path, folder: Path, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        opened(tmp_path, folder, *words)
    assert caught.value.code == 3 and "\n" not in str(caught.value)
    return str(caught.value)


# -- order -----------------------------------------------------------------------------------------


def test_an_epoch_shows_every_training_image_once(tmp_path):
    source = opened(tmp_path, fill(tmp_path / "p", 30))
    train = set(names(source.batch(0, 29)))
    held = set(names(source.held_out()))
    assert len(train) == 29 and len(held) == 1 and not train & held
    assert names(source.batch(0, 29)) != names(source.batch(1, 29))
    assert set(names(source.batch(1, 29))) == train


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    folder = fill(tmp_path / "p", 23)
    first, second, other = (
        opened(tmp_path, folder, "--train.seed", seed) for seed in ("1", "1", "2")
    )
    steps = [first.batch(step, 5) for step in range(12)]
    for step in (11, 3, 7, 0, 4, 4):  # any order, as after a resume
        again = second.batch(step, 5)
        assert names(again) == names(steps[step])
        for a, b in zip(again, steps[step], strict=True):
            assert torch.equal(a.pixels, b.pixels) and a.key == b.key
    assert names(other.batch(0, 5) + other.batch(1, 5)) != names(steps[0] + steps[1])


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_threads_change_nothing(tmp_path, workers):
    folder = fill(tmp_path / "p", 17)
    plain = opened(tmp_path, folder, "--data.workers", "0")
    threaded = opened(tmp_path, folder, "--data.workers", workers)
    for step in range(6):
        for a, b in zip(plain.batch(step, 4), threaded.batch(step, 4), strict=True):
            assert a.name == b.name and torch.equal(a.pixels, b.pixels)
    threaded.close()


def test_decoding_runs_ahead(tmp_path, monkeypatch):
    source = opened(tmp_path, fill(tmp_path / "p", 40), "--data.workers", "2")
    decoded = []
    real = module.decode

    def noting(path, cap):
        decoded.append((path.name, threading.current_thread() is threading.main_thread()))
        return real(path, cap)

    monkeypatch.setattr(module, "decode", noting)
    source.batch(0, 4)
    source._pool.shutdown(wait=True)  # all that was asked for
    assert len(decoded) == 8 and not any(main for _, main in decoded)


def test_batches_larger_than_the_folder(tmp_path):
    source = opened(tmp_path, fill(tmp_path / "p", 3))
    batch = names(source.batch(0, 7))
    assert len(batch) == 7 and len(set(batch)) == 2  # one of the three is held out
    assert names(source.batch(2, 7)) == names(opened(tmp_path, tmp_path / "p").batch(2, 7))


def test_order_does_not_depend_on_how_the_disk_lists(tmp_path, monkeypatch):
    folder = fill(tmp_path / "p" / "deep", 9).parent
    fill(folder, 9, start=20)
    straight = names(opened(tmp_path, folder).batch(0, 16))
    listing = os.scandir

    @contextlib.contextmanager
    def backwards(folder):
        with listing(folder) as children:
            yield reversed(list(children))

    monkeypatch.setattr(os, "scandir", backwards)
    assert names(opened(tmp_path, folder).batch(0, 16)) == straight


# -- the held-out share ----------------------------------------------------------------------------


def test_the_split_stays_when_files_come_and_go(tmp_path):
    folder = fill(tmp_path / "p", 60)
    before = set(names(opened(tmp_path, folder, "--data.holdout", "0.3").held_out()))
    fill(folder, 60, start=60)
    after = set(
        names(opened(tmp_path, folder, "--data.holdout", "0.3", "--train.seed", "9").held_out())
    )
    assert before == {name for name in after if int(name[:4]) < 60}
    assert 20 <= len(after) <= 52  # 0.3 of 120 is 36; 99.7 % of hashes fall within


def test_the_split_ignores_content(tmp_path):
    folder = fill(tmp_path / "p", 40)
    before = names(opened(tmp_path, folder, "--data.holdout", "0.3").held_out())
    for path in folder.iterdir():
        Pillow.new("RGB", (64, 64)).save(path)
    assert names(opened(tmp_path, folder, "--data.holdout", "0.3").held_out()) == before


@pytest.mark.parametrize(
    "count, share, held",
    [(1, "0.5", 0), (2, "0.05", 1), (2, "0.99", 1), (5, "0", 0), (1, "0.05", 0), (30, "0.05", 1)],
)
def test_both_sides_have_at_least_one(tmp_path, count, share, held):
    source = opened(tmp_path, fill(tmp_path / "p", count), "--data.holdout", share)
    assert len(source.held_out()) == held and len(source.sizes()) == count - held


def test_held_out_is_limited(tmp_path):
    source = opened(tmp_path, fill(tmp_path / "p", 40), "--data.holdout", "0.5")
    every = names(source.held_out())
    assert len(every) > 5 and names(source.held_out(limit=3)) == every[:3]


# -- what an image is ------------------------------------------------------------------------------


def test_images_travel_as_uint8_on_the_grid(tmp_path):
    folder = fill(tmp_path / "p", 12)
    source = opened(tmp_path, folder, multiple=32)
    for image in source.batch(0, 11):
        assert (
            image.pixels.dtype == torch.uint8
            and image.pixels.shape[2] == 3
            and image.pixels.is_contiguous()
        )
        assert all(side % 32 == 0 for side in image.pixels.shape[:2])
        assert image.pixels.shape[0] * image.pixels.shape[1] <= 16384
        assert 0 <= image.key < 2**63
    assert sorted(source.sizes()) == sorted(
        tuple(image.pixels.shape[:2]) for image in source.batch(0, 11)
    )


def test_keys_name_files_not_places(tmp_path):
    folder = fill(tmp_path / "p", 12)
    keys = {image.name: image.key for image in opened(tmp_path, folder).batch(0, 11)}
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert {
        image.name: image.key for image in opened(tmp_path, moved, "--train.seed", "5").batch(0, 11)
    } == keys
    assert len(set(keys.values())) == len(keys)


def test_the_one_resize_is_pillows_bicubic(tmp_path):
    (tmp_path / "p").mkdir()
    Pillow.fromarray(zoo.gradient(300, 411)).save(tmp_path / "p" / "a.png")
    image = opened(tmp_path, tmp_path / "p").batch(0, 1)[0]
    height, width = image.pixels.shape[:2]
    wanted = Pillow.fromarray(zoo.gradient(300, 411)).resize(
        (width, height), Pillow.Resampling.BICUBIC
    )
    assert (height, width) != (300, 411) and np.abs(
        image.pixels.numpy().astype(int) - np.asarray(wanted).astype(int)
    ).max() <= 1


def test_an_image_on_the_grid_is_untouched(tmp_path):
    (tmp_path / "p").mkdir()
    Pillow.fromarray(zoo.gradient(96, 128)).save(tmp_path / "p" / "a.png")
    assert np.array_equal(
        opened(tmp_path, tmp_path / "p").batch(0, 1)[0].pixels.numpy(), zoo.gradient(96, 128)
    )


def test_real_photographs(tmp_path):
    """scikit-image's own: many sizes, grey and colour, PNG, JPEG, GIF and TIFF."""
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    source = Photographs(
        open_album(str(data)),
        load(None, ["--run.dir", str(tmp_path), "--data.max_pixels", "307200"]),
        32,
    )
    assert {"astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png"} <= {
        entry.name for entry in source.train + source.held
    }
    assert len({tuple(image.pixels.shape) for image in source.batch(0, 20)}) > 5
    assert "photographs" in source.describe() and "other files" in source.describe()


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_searched_deeply(tmp_path):
    folder = fill(tmp_path / "p" / "a" / "b" / "c d" / "é", 2)
    fill(tmp_path / "p" / "x.jpg", 1)  # a folder may be called like a picture
    fill(tmp_path / "p" / ".cache", 3)  # hidden: left alone
    fill(tmp_path / "p" / "__pycache__", 1)
    shutil.copy(folder / "0000.png", tmp_path / "p" / ".hidden.png")
    shutil.copy(folder / "0000.png", tmp_path / "p" / "NO_SUFFIX")
    shutil.copy(folder / "0000.png", tmp_path / "p" / "UPPER.PNG")
    shutil.copy(folder / "0000.png", tmp_path / "p" / "liar.jpg")
    (tmp_path / "p" / "README").write_text("about")
    (tmp_path / "p" / "labels.json").write_text("{}")
    (tmp_path / "p" / "Thumbs.db").write_text("")
    source = opened(tmp_path, tmp_path / "p")
    found = {entry.name for entry in source.train + source.held}
    assert found == {
        "a/b/c d/é/0000.png",
        "a/b/c d/é/0001.png",
        "x.jpg/0000.png",
        "__pycache__/0000.png",
        "NO_SUFFIX",
        "UPPER.PNG",
        "liar.jpg",
    }
    assert source.ignored == 3 and source.bad == {} and not (tmp_path / "run").exists()


def test_links_are_followed_once(tmp_path):
    folder = fill(tmp_path / "p", 2)
    elsewhere = fill(tmp_path / "q", 2, start=10)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "up").symlink_to(folder.parent)
    (folder / "self").symlink_to(folder)
    (folder / "one.png").symlink_to(elsewhere / "0010.png")
    source = opened(tmp_path, folder)
    found = sorted(os.path.realpath(folder / entry.name) for entry in source.train + source.held)
    assert (
        len(found) == 5 and len(set(found)) == 4
    )  # the file link is a name of its own; folders count once
    assert source.bad == {}


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "link").symlink_to(fill(tmp_path / "p", 3))
    assert len(opened(tmp_path, tmp_path / "link").sizes()) == 2


def test_names_that_are_no_text(tmp_path):
    folder = fill(tmp_path / "p", 1)
    os.rename(os.fsencode(folder / "0000.png"), os.fsencode(folder) + b"/\xff\xfe.png")
    (folder / "a\nb.jpg").write_bytes(b"")
    source = opened(tmp_path, folder, "--data.max_bad_share", "1")
    assert source.batch(0, 1)[0].name == os.fsdecode(b"\xff\xfe.png")
    assert lines(tmp_path) == {"a\nb.jpg": "is empty"}
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "name, part",
    [
        ("absent", "No such file"),
        ("file.jpg", "is not a folder"),
        ("dangling", "No such file"),
        ("file.jpg/x", "Not a directory"),
        ("a" * 300, "too long"),
    ],
)
def test_no_folder(tmp_path, name, part):
    (tmp_path / "file.jpg").write_bytes(zoo.rgb())
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    said = refusal(tmp_path, tmp_path / name)
    assert part in said and "--data.dir" in said and not (tmp_path / "run").exists()


def test_an_empty_folder(tmp_path):
    (tmp_path / "p" / "deeper").mkdir(parents=True)
    assert "no images under" in refusal(tmp_path, tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("x")
    (tmp_path / "p" / "README").write_text("x")
    assert "2 other files" in refusal(tmp_path, tmp_path / "p")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", ["0.05", "1"])
def test_all_bad_by_header(tmp_path, share):
    (tmp_path / "p").mkdir()
    for name in ("a.jpg", "b.png", "c.gif"):
        (tmp_path / "p" / name).write_bytes(b"broken")
    said = refusal(tmp_path, tmp_path / "p", "--data.max_bad_share", share)
    assert (
        "none of the 3 images" in said
        and "a.jpg is none of JPEG" in said
        and "bad_images.jsonl" in said
    )
    assert set(lines(tmp_path)) == {"a.jpg", "b.png", "c.gif"}


def test_all_bad_by_pixels_only(tmp_path):
    """Sound headers over truncated pixels: found out before a model would be loaded."""
    (tmp_path / "p").mkdir()
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / "p" / name).write_bytes(zoo.rgb()[:-60])
    said = refusal(tmp_path, tmp_path / "p", "--data.max_bad_share", "1", "--data.holdout", "0")
    assert "none of the 4 images" in said and len(lines(tmp_path)) == 4


def test_too_many_bad(tmp_path):
    folder = fill(tmp_path / "p", 18)
    (folder / "a.jpg").write_bytes(b"")
    (folder / "b.jpg").write_bytes(b"x")
    said = refusal(tmp_path, folder)
    assert (
        "2 of 20" in said
        and "0.05" in said
        and "--data.max_bad_share" in said
        and "a.jpg is empty" in said
    )
    assert len(opened(tmp_path, folder, "--data.max_bad_share", "0.1").batch(0, 4)) == 4


def test_exactly_the_allowed_share_is_allowed(tmp_path):
    folder = fill(tmp_path / "p", 19)
    (folder / "a.jpg").write_bytes(b"")
    source = opened(tmp_path, folder)
    assert source.bad == {"a.jpg": "is empty"} and "1 unusable" in source.describe()


FAULTS = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "is empty"),
    "text.jpg": (lambda path: path.write_text("hello"), "is none of"),
    "page.png": (lambda path: path.write_text("<html>404"), "is none of"),
    "photo.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "is none of"),
    "photo.avif": (lambda path: path.write_bytes(zoo.rgb("AVIF")), "is none of"),
    "drawing.svg": (lambda path: path.write_text("<svg/>"), "is none of"),
    "icon.ico": (lambda path: path.write_bytes(zoo.rgb("ICO")), "is none of"),
    "bomb.png": (lambda path: path.write_bytes(zoo.png_bomb()), "promises"),
    "long.png": (lambda path: path.write_bytes(zoo.rgb(size=(2, 900))), "over 200 times"),
    "pipe.jpg": (os.mkfifo, "is no regular file"),
    "pipe": (os.mkfifo, "is no regular file"),
    "null.jpg": (lambda path: path.symlink_to("/dev/null"), "is no regular file"),
    "zero.jpg": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "dangling.jpg": (lambda path: path.symlink_to("absent.jpg"), "leads nowhere"),
    "loop.jpg": (lambda path: path.symlink_to("loop.jpg"), "leads nowhere"),
    "cut.jpg": (lambda path: path.write_bytes(zoo.rgb("JPEG")[:100]), "cannot be decoded"),
    "cut.webp": (lambda path: path.write_bytes(zoo.rgb("WEBP")[:-9]), "cannot be decoded"),
    "nan.pfm": (
        lambda path: path.write_bytes(b"Pf\n8 8\n-1.0\n" + np.full(64, np.nan, "<f4").tobytes()),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_bad_file_costs_one_line(tmp_path, name):
    folder = fill(tmp_path / "p", 3)
    make, part = FAULTS[name]
    make(folder / name)
    source = opened(tmp_path, folder, "--data.max_bad_share", "1", "--data.holdout", "0")
    seen = names(source.batch(0, 4)) + names(source.batch(1, 4))
    assert name not in seen and {"0000.png", "0001.png", "0002.png"} <= set(seen)
    assert set(lines(tmp_path)) == {name} and part in lines(tmp_path)[name]


def spoil(folder: Path, *names: str) -> None:
    """Cuts the pixels of files whose headers stay good."""
    for name in names:
        (folder / name).write_bytes(zoo.rgb()[:-60])


@pytest.mark.parametrize("when", ["before", "after"])
def test_faults_get_a_drawn_substitute(tmp_path, when):
    """Files whose pixels turn out broken, at the start or later: the same substitute in any
    history, with and without threads.
    """
    folder = fill(tmp_path / "p", 12)
    broken = ("x1.png", "x2.png", "x3.png")
    for name in broken:
        (folder / name).write_bytes(zoo.rgb())
    if when == "before":
        spoil(folder, *broken)
    words = ["--data.max_bad_share", "1", "--data.holdout", "0"]
    first = opened(tmp_path, folder, *words)
    second = Photographs(
        open_album(str(folder)),
        settings(tmp_path, *words, "--data.workers", "0"),
        16,
        log=tmp_path / "second.jsonl",
    )
    spoil(folder, *broken)
    steps = [names(first.batch(step, 5)) for step in range(9)]
    assert not any(name.startswith("x") for name in chain.from_iterable(steps))
    assert [names(second.batch(step, 5)) for step in reversed(range(9))] == steps[::-1]
    assert set(lines(tmp_path)) == {"x1.png", "x2.png", "x3.png"} == set(first.bad)


def test_broken_pixels_are_known_before_a_model_is_loaded(tmp_path):
    folder = fill(tmp_path / "p", 12)
    spoil(folder, "x1.png", "x2.png", "x3.png")
    said = refusal(tmp_path, folder, "--data.max_bad_share", "0.15", "--data.holdout", "0")
    assert "3 of 15 images" in said and re.search(r"x[123]\.png cannot be decoded", said)
    assert set(lines(tmp_path)) == {"x1.png", "x2.png", "x3.png"}
    opened(tmp_path, folder, "--data.max_bad_share", "0.2")  # exactly as many as are allowed


def test_a_late_fault_never_ends_a_run(tmp_path):
    """Each is skipped, listed and counted; one line is said."""
    folder = fill(tmp_path / "p", 12)
    said: list[str] = []
    config = settings(tmp_path, "--data.max_bad_share", "0", "--data.holdout", "0")
    source = Photographs(open_album(str(folder)), config, 16, log_of(tmp_path), said.append)
    late = ("0003.png", "0004.png", "0007.png")
    spoil(folder, *late)
    assert source.figures() == {"bad_images": 0} and said == []
    seen = [name for step in range(4) for name in names(source.batch(step, 5))]
    assert len(seen) == 20 and source.figures() == {"bad_images": 3} == {"bad_images": len(late)}
    assert set(lines(tmp_path)) == set(late)
    assert len(said) == 1 and "\n" not in said[0] and said[0].split()[0] in late
    assert "bad_images.jsonl" in said[0]


def test_what_is_tried_is_chosen_by_names(tmp_path, monkeypatch):
    """A folder of more files than are tried: the same ones every time, wherever the folder lies,
    and the share among them stands for all.
    """
    monkeypatch.setattr(module, "TRIED", 8)
    folder = fill(tmp_path / "p", 40)
    tried: list[str] = []
    real = Photographs._fault_of

    def noting(self, entry):
        tried.append(entry.name)
        return real(self, entry)

    monkeypatch.setattr(Photographs, "_fault_of", noting)
    opened(tmp_path, folder, "--data.workers", "0")
    first = list(tried)
    tried.clear()
    shutil.copytree(folder, tmp_path / "q")
    opened(tmp_path, tmp_path / "q", "--data.workers", "3", "--train.seed", "5")
    assert len(first) == 8 and sorted(tried) == sorted(first)
    untried = sorted(set(os.listdir(folder)) - set(first))
    spoil(folder, *untried[:9])
    opened(tmp_path, folder)  # 9 of 40, but none of the tried ones
    spoil(folder, first[0])
    (folder / "more.png").write_bytes(b"")
    words = ["--data.max_bad_share", "0.14"]  # (1 + 40 / 8) / 41 is 0.146
    said = refusal(tmp_path, folder, *words)
    assert "1 of 8 images that were tried, and 1 headers" in said
    opened(tmp_path, folder, "--data.max_bad_share", "0.15")


def test_a_file_that_vanishes_is_a_late_fault(tmp_path):
    folder = fill(tmp_path / "p", 10)
    source = opened(
        tmp_path, folder, "--data.max_bad_share", "1", "--data.workers", "0", "--data.holdout", "0"
    )
    gone = source._at(3).name
    (folder / gone).unlink()
    assert gone not in names(source.batch(0, 10)) and "No such file" in lines(tmp_path)[gone]


def test_a_folder_that_vanishes_ends_the_run(tmp_path):
    folder = fill(tmp_path / "p", 4)
    source = opened(tmp_path, folder, "--data.max_bad_share", "1", "--data.workers", "0")
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="the images are gone"):
        source.batch(1, 4)


def test_a_resumed_run_repeats_no_line(tmp_path):
    folder = fill(tmp_path / "p", 10)
    (folder / "bad.jpg").write_bytes(b"")
    for _ in range(3):
        opened(tmp_path, folder, "--data.max_bad_share", "1")
    assert lines(tmp_path) == {"bad.jpg": "is empty"}


def test_a_folder_that_cannot_be_listed_is_a_line(tmp_path, monkeypatch):
    fill(tmp_path / "p", 4)
    fill(tmp_path / "p" / "secret", 4)
    listing = os.scandir

    def refuse(folder):
        if os.path.basename(folder.rstrip("/")) == "secret":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = opened(tmp_path, tmp_path / "p", "--data.max_bad_share", "1")
    assert source.bad == {"secret": "cannot be listed: Permission denied"}


def test_a_budget_smaller_than_a_cell_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="data.max_pixels is too small"):
        Photographs(
            open_album(str(fill(tmp_path / "p", 2))),
            load(None, ["--data.max_pixels", "1024", "--data.min_pixels", "1"]),
            64,
        )


def test_close_ends_the_threads(tmp_path):
    source = opened(tmp_path, fill(tmp_path / "p", 30), "--data.workers", "2")
    source.batch(0, 8)
    source.close()
    assert not any(
        thread.name.startswith("decode") and thread in source._pool._threads
        for thread in threading.enumerate()
    )
