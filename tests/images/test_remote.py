"""A data set on the hub that is read as it comes, with local files in the place of the hub."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from images.test_albums import COMMIT, COUNT, as_table, as_tar, folder, settings
from images.test_streamed import drawn, opened, same

from vise_fast.images.albums import remote
from vise_fast.images.albums.album import Bytes
from vise_fast.images.albums.door import open_album
from vise_fast.images.sources import open_source
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault

__all__ = ["folder"]
ADDRESS = "hf:somebody/photos"


@pytest.fixture
def on_hub(monkeypatch):
    """Puts files there."""

    def put(*paths):
        there = {f"data/{path.name}": path for path in paths}
        files = [
            SimpleNamespace(rfilename=name, size=path.stat().st_size)
            for name, path in there.items()
        ]
        files.append(SimpleNamespace(rfilename="README.md", size=3))
        told = SimpleNamespace(sha=COMMIT, siblings=files)
        monkeypatch.setattr(remote.HfApi, "dataset_info", lambda self, name, **more: told)
        monkeypatch.setattr(remote.Shard, "open", lambda self: there[self.path].open("rb"))

    return put


def shards(folder, place):
    half = COUNT // 2
    first = as_tar(folder, place, "shard-0.tar", slice(0, half))
    return first, as_tar(folder, place, "shard-1.tar", slice(half, None))


def streaming(tmp_path, *words):
    words = ["--data.dir", ADDRESS, "--data.stream", "true", "--data.buffer", "5", *words]
    return open_source(settings(tmp_path, *words), 16)


def test_tars_show_what_local_ones_show(folder, tmp_path, on_hub):
    on_hub(*reversed(shards(folder, tmp_path)))
    local = opened(tmp_path, tmp_path / "shard-*.tar", "--data.buffer", "5", "--data.holdout", "0")
    with closing(local) as plain, closing(streaming(tmp_path, "--data.holdout", "0")) as source:
        for step in range(9):
            for one, other in zip(plain.batch(step, 5), source.batch(step, 5), strict=True):
                assert f"data/{one.name}" == other.name and torch.equal(one.pixels, other.pixels)
        assert source.identity()["commit"] == COMMIT


@pytest.mark.parametrize("make", [shards, lambda *given: (as_table(*given, rows=4),)])
def test_a_resumed_stream_goes_on(folder, tmp_path, on_hub, make):
    on_hub(*make(folder, tmp_path))
    with closing(streaming(tmp_path)) as source:
        wanted = drawn(source, range(11))
        marked = source.identity()
    for first in (4, 10):
        with closing(streaming(tmp_path)) as source:
            assert source.identity() == marked
            same(drawn(source, range(first, 11)), wanted[first:])


def test_rows_and_members_lie_in_memory(folder, tmp_path, on_hub):
    on_hub(*shards(folder, tmp_path))
    found = list(open_album(ADDRESS, stream=True).pictures(print))
    assert len(found) == COUNT and all(isinstance(one.place, Bytes) for one in found)
    assert found[0].name.startswith("data/shard-0.tar/")


def test_a_network_that_fails_is_one_line(folder, tmp_path, on_hub, monkeypatch):
    on_hub(*shards(folder, tmp_path))

    def fail(self):
        raise OSError("connection reset")

    monkeypatch.setattr(remote.Shard, "open", fail)
    with pytest.raises(EnvironmentFault, match=r"cannot be read on: connection reset; go online"):
        streaming(tmp_path)


def test_a_shard_cut_off(folder, tmp_path, on_hub):
    path = as_tar(folder, tmp_path, "shard-0.tar")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    on_hub(path)
    with pytest.raises((EnvironmentFault, DataError)) as caught:
        drawn(streaming(tmp_path, "--data.max_bad_share", "1"), range(9))
    assert "\n" not in str(caught.value)


def test_a_data_set_without_shards(on_hub):
    on_hub()
    with pytest.raises(ConfigError, match="neither tables nor tars"):
        open_album(ADDRESS, stream=True)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (HFValidationError("no"), ConfigError),
        (OSError("no route to host"), EnvironmentFault),
        (
            HfHubHTTPError("401", response=SimpleNamespace(headers={}, request=None)),
            EnvironmentFault,
        ),
    ],
)
def test_a_hub_that_refuses(monkeypatch, fault, said):
    def refuse(self, name, **more):
        raise fault

    monkeypatch.setattr(remote.HfApi, "dataset_info", refuse)
    with pytest.raises(said, match="OWNER/NAME|to be had"):
        open_album(ADDRESS, stream=True)
