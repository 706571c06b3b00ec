"""The environment that `table` makes for lmms-eval: made, gone on with, left alone, refused."""

import zipfile

import pytest

from vise_fast.system.errors import EnvironmentFault
from vise_fast.table import environment

VERSION = "lmms_eval-0.7.3"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for lmms-eval, and the pinned list that asks for it alone."""
    path = tmp_path / f"{VERSION}-py3-none-any.whl"
    about = f"{VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("lmms_eval/__init__.py", "")
        file.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: lmms_eval\nVersion: 0.7.3\n"
        )
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    pinned = tmp_path / "environment.txt"
    pinned.write_text(f"--no-index\n{path}\n")
    monkeypatch.setattr(environment, "PINNED", pinned)
    monkeypatch.setattr(environment, "GIGABYTES", 0.001)  # it is small, and so may the disk be
    return path


def test_it_is_made_once(tmp_path, wheel):
    place = tmp_path / "env"
    said = []
    assert not environment.is_ready(place) and environment.obstacle(place) is None
    environment.complete(place, said.append)
    assert environment.is_ready(place) and len(said) == 1
    wheel.unlink()
    environment.complete(place, said.append)
    assert len(said) == 1, "what is ready is used as it is"


def test_one_that_was_cut_short_goes_on(tmp_path, wheel):
    place = tmp_path / "env"
    kept = wheel.read_bytes()
    wheel.unlink()
    with pytest.raises(EnvironmentFault, match=r"install\.log.*start again"):
        environment.complete(place, print)
    wheel.write_bytes(kept)
    assert environment.obstacle(place) is None
    environment.complete(place, print)
    assert environment.is_ready(place)


def test_a_directory_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "nothing is installed" in environment.obstacle(tmp_path)


def test_a_place_that_cannot_be_made_is_one_line(tmp_path, wheel):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="writable place"):
        environment.complete(tmp_path / "file" / "env", print)


def test_too_little_room_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "GIGABYTES", 1e9)
    assert "make room" in environment.obstacle(tmp_path / "a" / "b")
