"""The survey of a folder: what it counts, what it says would be left out, its page and sheet."""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
from contextlib import closing

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.data import __main__ as command
from vise_fast.data import figures
from vise_fast.data.sheet import ACROSS, GAP, TILE, sheet
from vise_fast.data.survey import Surveyed
from vise_fast.images.albums.door import open_album
from vise_fast.images.image import Image
from vise_fast.images.listing.through import unseen
from vise_fast.system import console

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve crops of photographs, one twice, a flat one, a small one, broken ones, a text."""
    home = tmp_path_factory.mktemp("survey") / "photos"
    home.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        whole = Pillow.fromarray(getattr(skimage.data, name)())
        for i in range(4):
            left = i * whole.width // 8
            part = whole.crop((left, 0, left + whole.width // 2, whole.height))
            part.save(home / f"{name}{i}.jpg", quality=90)
    shutil.copy(home / "coffee1.jpg", home / "coffee1_again.jpg")
    Pillow.new("RGB", (400, 300), "grey").save(home / "flat.png")
    Pillow.fromarray(skimage.data.astronaut()).crop((190, 20, 260, 100)).save(home / "small.png")
    (home / "<b>.jpg").write_bytes(b"no picture")
    (home / "cut.jpg").write_bytes((home / "coffee0.jpg").read_bytes()[:9000])
    (home / "notes.txt").write_text("about")
    return home


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def surveyed(tmp_path, folder, *words):
    config = load(None, ["--data.dir", str(folder), *words])
    log = tmp_path / "bad.jsonl"
    with closing(Surveyed(open_album(str(folder)), config, 32, log, unseen)) as opened:
        return opened.survey()


def test_it_counts_what_is_there(tmp_path, folder):
    found = surveyed(tmp_path, folder)
    assert (found.train + found.held, found.ignored) == (15, 1)
    assert set(found.bad) == {"<b>.jpg", "cut.jpg"} and len(found.measures) == 15
    assert sum(found.grids.values()) == found.train == len(found.tokens) == len(found.shown)
    assert {rule.key: set(rule.dropped) for rule in found.rules} == {
        "data.min_side": {"small.png"},
        "data.min_sharpness": {"flat.png"},
        "data.min_contrast": {"flat.png"},
        "data.near_duplicates": {"coffee1_again.jpg"},
    }
    assert not any(rule.is_set for rule in found.rules)


def test_settings_that_are_set_count(tmp_path, folder):
    found = surveyed(tmp_path, folder, "--data.near_duplicates", "4", "--data.min_side", "90")
    assert found.train + found.held == 13 and len(found.measures) == 15
    assert {rule.word for rule in found.rules if rule.is_set} == {
        "--data.near_duplicates 4",
        "--data.min_side 90",
    }


def test_figures_by_hand(tmp_path, folder):
    found = surveyed(tmp_path, folder)
    first = figures.spread(found)[0]
    sides = sorted(one.side for one in found.measures.values())
    assert first == ["shorter side, px", *(str(sides[i]) for i in (0, 1, 7, 13, 14))]
    assert found.tokens.tolist() == [
        h * w // 32**2 for (h, w), count in found.grids.items() for _ in range(count)
    ]
    rows = figures.grids(found)
    assert sum(int(row[1]) for row in rows) == found.train
    assert figures.time_lines(found, 4)[0].startswith(f"an epoch is {-(-found.train // 4)} steps")


@pytest.fixture
def written(tmp_path, folder, monkeypatch, capsys):
    """The command's page, sheet and words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert console.run(command.main, [str(folder)]) == 0
    return tmp_path / "data.html", tmp_path / "data.png", capsys.readouterr()


def test_the_command_says_and_writes_it_all(written, folder):
    page, png, said = written
    for part in ("to train on", "2 cannot be used", "--data.near_duplicates 4", "memory   peak"):
        assert part in said.out, part
    assert "<b>.jpg is none of JPEG" in said.err and "cut.jpg cannot be decoded" in said.err
    text = page.read_text()
    assert "&lt;b&gt;.jpg" in text and "<b>.jpg" not in text
    assert "is almost coffee1.jpg" in html.unescape(text)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert Pillow.open(png).size[0] == ACROSS * (TILE + GAP) + GAP
    assert not list(folder.parent.glob("*.jsonl"))  # nothing is written beside the pictures


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_shows_every_picture(written, tmp_path):
    """Loaded, and as wide as they are: the browser's own word."""
    page, _, _ = written
    script = (
        "<script>document.title = [...document.images].filter("
        "i => i.complete && i.naturalWidth > 0).length + ' of ' + document.images.length"
        " + ' wide ' + (document.documentElement.scrollWidth <= innerWidth)</script></html>"
    )
    shown = tmp_path / "shown.html"
    shown.write_text(page.read_text().replace("</html>", f"<body>{script}"))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    words += ["--virtual-time-budget=3000", "--window-size=800,900", f"file://{shown}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    told = re.search(r"<title>(\d+) of (\d+) wide (\w+)</title>", done.stdout)
    assert told and told[1] == told[2] and int(told[1]) > 15 and told[3] == "true"


def test_no_place_is_a_config_error(capsys):
    assert console.run(command.main, []) == 2
    assert "say vise-fast data photos" in capsys.readouterr().err


def test_a_sheet_holds_each_picture_whole():
    images = [
        Image(torch.full((h, w, 3), 10 * i, dtype=torch.uint8), f"{i}", i)
        for i, (h, w) in enumerate([(64, 64), (300, 100), (100, 300)] * 4)
    ]
    paper = np.asarray(Pillow.open(io.BytesIO(sheet(images))))
    assert paper.shape == (2 * (TILE + GAP) + GAP, 8 * (TILE + GAP) + GAP, 3)
    assert set(np.unique(paper)) <= {*range(0, 120, 10), 255} and len(np.unique(paper)) == 13
