"""What is left out by its looks: each rule alone, the same again from what was remembered, and
nothing unless it is asked for.
"""

from __future__ import annotations

import io
import json
from contextlib import closing

import numpy as np
import pytest
import skimage.data
from PIL import Image as Pillow
from PIL import ImageFilter

from vise_fast.config.schema import load
from vise_fast.images.albums.door import open_album
from vise_fast.images.curation import measured as module
from vise_fast.images.curation.measures import Measures, measure
from vise_fast.images.curation.near import originals
from vise_fast.images.listing import remembered
from vise_fast.images.photographs import Photographs
from vise_fast.system.errors import ConfigError, DataError

ALMOST = ("cat_0", "cat_again", "cat_saved", "cat_shrunk")


def saved(picture, quality):
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=quality)
    return Pillow.open(held).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs, one of them four times over, one blurred, one flat, one small."""
    home = tmp_path_factory.mktemp("curation") / "photos"
    home.mkdir()
    cat = Pillow.fromarray(skimage.data.chelsea())
    pictures = {
        "cat_0": cat,
        "cat_again": cat,
        "cat_saved": saved(cat, 40),
        "cat_shrunk": cat.resize((225, 150)),
        "astronaut": Pillow.fromarray(skimage.data.astronaut()),
        "coffee": Pillow.fromarray(skimage.data.coffee()),
        "rocket": Pillow.fromarray(skimage.data.rocket()),
        "blurred": Pillow.fromarray(skimage.data.coffee()[:, 100:]).filter(
            ImageFilter.GaussianBlur(12)
        ),
        "flat": Pillow.new("RGB", (300, 200), (120, 130, 140)),
        "small": Pillow.fromarray(skimage.data.astronaut()).crop((200, 0, 290, 90)),
    }
    for name, picture in pictures.items():
        picture.save(home / f"{name}.png")
    return home


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "FRESH", -(10**18))


def opened(tmp_path, folder, *words):
    words = ["--run.dir", str(tmp_path / "run"), "--data.dir", str(folder), *words]
    log = tmp_path / "run" / "bad_images.jsonl"
    return Photographs(open_album(str(folder)), load(None, words), 32, log)


def gone(tmp_path, folder, *words):
    """{name without its suffix: reason}"""
    with closing(opened(tmp_path, folder, *words)) as source:
        kept = {entry.name for entry in source.train + source.held}
        assert not kept & set(source.left_out) and len(kept) + len(source.left_out) == 10
        assert source.identity()["images"] == len(kept)
        return {name.removesuffix(".png"): reason for name, reason in source.left_out.items()}


def test_nothing_is_left_out_unless_it_is_asked_for(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(module, "measure", None)
    assert gone(tmp_path, folder) == {} and not (tmp_path / "run").exists()


RULES = {
    "data.min_side": (100, {"small": "is small: 90 px"}),
    "data.min_sharpness": (20, {"blurred": "is blurred", "flat": "is blurred"}),
    "data.min_contrast": (5, {"flat": "is flat: contrast 0"}),
    "data.near_duplicates": (4, dict.fromkeys(ALMOST[1:], "is almost cat_0.png")),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_by_itself(tmp_path, folder, rule):
    limit, wanted = RULES[rule]
    found = gone(tmp_path, folder, f"--{rule}", str(limit))
    assert set(found) == set(wanted)
    assert all(found[name].startswith(reason) for name, reason in wanted.items())
    lines = (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == {f"{name}.png" for name in wanted}


def test_of_pictures_that_are_almost_the_same_the_largest_stays(tmp_path, folder):
    place = tmp_path / "some"
    place.mkdir()
    for new, name in {"a": "cat_shrunk", "b": "cat_saved", "c": "cat_0", "d": "rocket"}.items():
        (place / f"{new}.png").write_bytes((folder / f"{name}.png").read_bytes())
    with closing(opened(tmp_path, place, "--data.near_duplicates", "4")) as source:
        assert source.left_out == dict.fromkeys(("a.png", "c.png"), "is almost b.png")


def test_all_rules_together_say_one_reason_each(tmp_path, folder):
    words = [word for rule, (limit, _) in RULES.items() for word in (f"--{rule}", str(limit))]
    assert set(gone(tmp_path, folder, *words)) == {"small", "blurred", "flat", *ALMOST[1:]}


@pytest.mark.parametrize("workers", ["0", "3"])
def test_a_second_start_measures_nothing_and_says_the_same(tmp_path, folder, workers, monkeypatch):
    words = ["--data.workers", workers, "--data.near_duplicates", "4"]
    monkeypatch.setattr(remembered, "FEW", 0)
    first = gone(tmp_path, folder, *words)
    count = 0

    def counting(picture):
        nonlocal count
        count += 1
        return measure(picture)

    monkeypatch.setattr(module, "measure", counting)
    assert gone(tmp_path, folder, *words) == first and count == 0
    (folder / "flat.png").touch()
    assert gone(tmp_path, folder, *words) == first and count == 1


def test_a_broken_picture_is_bad_not_left_out(tmp_path, folder):
    place = tmp_path / "some"
    place.mkdir()
    for name in ("astronaut.png", "coffee.png", "rocket.png"):
        (place / name).write_bytes((folder / name).read_bytes())
    (place / "cut.png").write_bytes((folder / "cat_0.png").read_bytes()[:20000])
    words = ["--data.min_side", "10", "--data.max_bad_share", "1"]
    with closing(opened(tmp_path, place, *words)) as source:
        assert set(source.bad) == {"cut.png"} and not source.left_out
        assert source.identity()["images"] == 3


def test_too_strict_a_limit_is_told(tmp_path, folder):
    with pytest.raises(DataError, match="all 10 usable images .* are left out: .*is small"):
        opened(tmp_path, folder, "--data.min_side", "100000")


def test_a_stream_cannot_leave_out():
    for word in ("min_side=3", "min_sharpness=1", "min_contrast=1", "near_duplicates=0"):
        with pytest.raises(ConfigError, match="leave either out"):
            load(None, ["--data.stream=true", "--data.dir=a.tar", f"--data.{word}"])


# -- measures --------------------------------------------------------------------------------------


def test_the_bits_are_those_of_imagehash():
    """Computed once by imagehash 4.3.2: str(imagehash.dhash(picture))."""
    wanted = {
        "chelsea": "5414589aab6fa785",
        "astronaut": "cd8dd91d897293a7",
        "coffee": "f3e96933160b1b36",
        "rocket": "e0c0c090909090d1",
    }
    for name, bits in wanted.items():
        found = measure(Pillow.fromarray(getattr(skimage.data, name)())).bits
        assert f"{found & (2**64 - 1):016x}" == bits, name


def test_sharpness_falls_as_a_picture_is_blurred_and_does_not_depend_on_its_size():
    cat = Pillow.fromarray(skimage.data.chelsea())
    blurred = [measure(cat.filter(ImageFilter.GaussianBlur(s))) for s in (0, 1, 2, 4, 8)]
    values = [one.sharpness for one in blurred]
    assert values == sorted(values, reverse=True) and values[0] > 20 * values[-1]
    twice = measure(cat.resize((cat.width * 2, cat.height * 2), Pillow.Resampling.BICUBIC))
    assert 0.8 < twice.sharpness / values[0] < 1.25


def test_measures_by_hand():
    board = np.indices((8, 8)).sum(0) % 2 * 255
    found = measure(Pillow.fromarray(board.astype(np.uint8)).convert("RGB"))
    assert found.side == 8 and found.contrast == 127500
    assert found.sharpness == 1000 * (4 * 255) ** 2  # +-1020 in equal numbers
    assert measure(Pillow.new("RGB", (1, 7))) == Measures(1, 0, 0, 0)


# -- almost the same -------------------------------------------------------------------------------


def plainly(bits, distance):
    kept, found = [], []
    for place, own in enumerate(bits):
        close = [k for k in kept if ((own ^ bits[k]) & (2**64 - 1)).bit_count() <= distance]
        found.append(min(close, default=place))
        if not close:
            kept.append(place)
    return found


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 16])
def test_parts_find_what_comparing_all_finds(distance):
    rng = np.random.default_rng(distance)
    bits = rng.integers(-(2**63), 2**63 - 1, 150).tolist()
    for place in rng.integers(0, 150, 250).tolist():
        flips = rng.choice(64, rng.integers(0, distance + 3), replace=False).tolist()
        changed = bits[place] & (2**64 - 1)
        for flip in flips:
            changed ^= 1 << flip
        bits.append(changed - 2**64 if changed >= 2**63 else changed)
    found = originals(bits, distance)
    assert found == plainly(bits, distance)
    assert len(set(found)) < len(bits)
