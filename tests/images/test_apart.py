"""Labelled pictures leave every batch, by content: the bytes of a file (sha256), whatever it is
called and wherever it lies, and the pixels of one that was stored anew.
"""

import json
import tarfile
import zipfile
from contextlib import closing

import labelled
import pytest
import torch
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.images.sources import open_source
from vise_fast.system.errors import DataError

PLENTY = 20
CHECKED = 4


@pytest.fixture
def place(tmp_path):
    """A folder of pictures to train on, and one of labelled others."""
    drawn = labelled.drawn(PLENTY + CHECKED)
    labelled.save(tmp_path / "photos", drawn[:PLENTY])
    paths = labelled.save(tmp_path / "checked", drawn[PLENTY:], first=PLENTY)
    labelled.as_lines(tmp_path / "checked", paths, drawn[PLENTY:])
    return tmp_path


def opened(place, *words, labels=True):
    common = ["--data.max_pixels=16384", "--data.min_pixels=256", f"--run.dir={place / 'run'}"]
    if "--data.mix" not in " ".join(words):
        common.append(f"--data.dir={place / 'photos'}")
    if labels:
        common.append(f"--eval.labels={place / 'checked' / 'labels.jsonl'}")
    return closing(open_source(load(None, [*common, *words]), 16, place))


def checked(place):
    return sorted((place / "checked").glob("*.png"))


def every_picture(source):
    """Names and pixels of two epochs, and of what is held out."""
    found = source.held_out(1000)
    for step in range(2 * PLENTY):
        found += source.batch(step, 2)
    return found


def labelled_pixels(place):
    with opened(place) as source:
        return [image.pixels for image in source.labels.images(source.labels.pictures)]


def shown(images, pixels):
    return [i.name for i in images if any(torch.equal(i.pixels, other) for other in pixels)]


def leaks(place, *words):
    """(with the labels named, without): the labelled pictures among all that are drawn."""
    wanted = labelled_pixels(place)
    with opened(place, *words) as source:
        inside = shown(every_picture(source), wanted)
        text = source.describe()
    with opened(place, *words, labels=False) as source:
        planted = shown(every_picture(source), wanted)
    assert planted, "nothing was planted"
    assert f"{CHECKED} labelled pictures to check with" in text
    return inside


def copied(place):
    for number, path in enumerate(checked(place)):
        (place / "photos" / f"holiday {number}.png").write_bytes(path.read_bytes())


def linked(place):
    for path in checked(place):
        (place / "photos" / f"link-{path.name}").symlink_to(path)


def linked_folder(place):
    (place / "photos" / "all").symlink_to(place / "checked")


def hard_linked(place):
    for path in checked(place):
        (place / "photos" / f"hard-{path.name}").hardlink_to(path)


def without_suffix(place):
    (place / "photos" / "picture").write_bytes(checked(place)[0].read_bytes())


def stored_anew(place):
    """Other bytes, the same pixels."""
    for number, path in enumerate(checked(place)):
        Pillow.open(path).save(place / "photos" / f"{number}.bmp")
        Pillow.open(path).save(place / "photos" / f"{number}-b.png", compress_level=1)


@pytest.mark.parametrize(
    "plant", [copied, linked, linked_folder, hard_linked, without_suffix, stored_anew]
)
def test_a_planted_picture_is_in_no_batch(place, plant):
    plant(place)
    assert leaks(place) == []


def as_zip(place):
    path = place / "more.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for number, file in enumerate(checked(place)):
            made.write(file, f"renamed/{number}.png")
        made.write(place / "photos" / "003.png", "renamed/other.png")
    return path


@pytest.mark.parametrize("how", ["zip", "folder"])
def test_nor_does_a_mixture_bring_it(place, how):
    other = as_zip(place) if how == "zip" else place / "more"
    if how == "folder":
        labelled.save(other, labelled.drawn(3, seed=5))
        for number, path in enumerate(checked(place)):
            (other / f"renamed {number}.png").write_bytes(path.read_bytes())
    assert leaks(place, f"--data.mix=[{place / 'photos'}=1, {other}=1]") == []


@pytest.mark.parametrize("mixed", [False, True])
def test_nor_does_a_stream(place, mixed):
    path = place / "shard.tar"
    with tarfile.open(path, "w") as made:
        for number, file in enumerate(sorted((place / "photos").glob("*.png"))):
            made.add(file, f"{2 * number:03d}.png")
        for number, file in enumerate(checked(place)):
            made.add(file, f"{2 * number + 1:03d}.png")
    where = f"--data.mix=[{path}=1]" if mixed else f"--data.dir={path}"
    assert leaks(place, where, "--data.stream=true", "--data.buffer=8") == []


def test_the_split_of_the_others_is_what_it_was(place):
    """Labelled pictures that lie elsewhere change nothing but what a resumed run is held to."""
    with opened(place) as source, opened(place, labels=False) as plain:
        known = source.identity()
        assert known.pop("labels") and known == plain.identity()
        pairs = zip(every_picture(source), every_picture(plain), strict=True)
        assert all(a.name == b.name and torch.equal(a.pixels, b.pixels) for a, b in pairs)


def test_other_labels_are_another_identity(place):
    with opened(place) as source:
        before = source.identity()["labels"]
    path = place / "checked" / "labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    with opened(place) as source:
        assert source.identity()["labels"] == before, "their order says nothing"
    rows[0]["box"][0] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with opened(place) as source:
        assert source.identity()["labels"] != before


def test_what_is_left_out_is_said_and_is_no_fault_of_the_files(place):
    copied(place)
    stored_anew(place)
    with opened(place, "--data.max_bad_share=0", "--data.holdout=0") as source:
        assert f"{CHECKED} labelled and left out" in source.describe()
        every_picture(source)
    log = (place / "bad_images.jsonl").read_text()
    assert log.count("for checking only") == 2 * CHECKED


def test_nothing_left_to_train_on(place):
    with pytest.raises(DataError, match="nothing is left to train on"):
        opened(place, f"--data.dir={place / 'checked'}")
