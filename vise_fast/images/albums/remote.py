"""The shards of a data set on the hub, read as they come: nothing is downloaded first and nothing
is kept. Tars are read once from end to end, of tables a group of rows at a time.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vise_fast.images.albums import hub
from vise_fast.images.albums.album import Bytes, Found, Skip
from vise_fast.images.albums.archive import LARGEST, is_hidden
from vise_fast.images.albums.several import Several
from vise_fast.images.albums.table import Table
from vise_fast.images.listing.names import irrelevant
from vise_fast.system.errors import ConfigError, EnvironmentFault

FAULTS = (OSError, HfHubHTTPError)


@dataclass(frozen=True)
class Shard:
    """A file of a data set at a commit. `size`: its bytes."""

    name: str
    commit: str
    path: str
    size: int

    def open(self) -> BinaryIO:
        """It, over the network; can seek."""
        address = f"datasets/{self.name}@{self.commit}/{self.path}"
        return cast(BinaryIO, HfFileSystem().open(address, "rb"))


class Remote:
    """One shard as an album."""

    root = None

    def __init__(self, shard: Shard, column: str | None) -> None:
        self.shard = shard
        self.column = column
        self.title = f"in {shard.path} of hf:{shard.name}"

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """In the order of the shard. Raises EnvironmentFault where the network fails, DataError
        where the shard is damaged.
        """
        try:
            with self.shard.open() as file:
                if self.shard.path.endswith(".tar"):
                    yield from _members(file, skip)
                else:
                    yield from Table(self.shard.path, self.column, file).pictures(skip)
        except (*FAULTS, tarfile.TarError, EOFError) as fault:
            raise EnvironmentFault(
                f"{self.shard.path} of hf:{self.shard.name} cannot be read on: "
                f"{' '.join(str(fault).split())[:200]}; go online, and go on with --train.resume "
                "auto"
            ) from None

    def is_gone(self) -> bool:
        """Never known."""
        return False

    def extent(self) -> dict[str, int]:
        """Its bytes."""
        return {"": self.shard.size}

    def about(self) -> dict[str, str]:
        """The commit."""
        return {"commit": self.shard.commit}


def _members(file: BinaryIO, skip: Skip) -> Iterator[Found]:
    """Of a tar that is read from end to end, the pictures with their bytes."""
    with tarfile.open(fileobj=file, mode="r|") as archive:
        kept: list[tarfile.TarInfo] = vars(archive)["members"]
        while (member := archive.next()) is not None:
            kept.clear()
            if not member.isfile() or is_hidden(member.name) or irrelevant(member.name):
                continue
            if member.issparse() or member.size > LARGEST:
                skip(member.name, f"is stored with holes or in more than {LARGEST} bytes")
                continue
            content: Any = archive.extractfile(member)
            yield Found(member.name, Bytes(content.read()))


def streamed(address: str, column: str | None) -> Several:
    """The tars or tables of `hf:OWNER/NAME[@COMMIT]`, in the order of their names. Raises
    ConfigError where there are none, EnvironmentFault where the hub cannot be asked.
    """
    shards = shards_of(address)
    for suffix in (".parquet", ".tar"):
        chosen = {shard.path: shard for shard in shards if shard.path.endswith(suffix)}
        if chosen:
            albums = {path: Remote(chosen[path], column) for path in sorted(chosen)}
            return Several(f"in {address}", albums)
    raise ConfigError(
        f"{address} has neither tables nor tars, which are what can be streamed; leave data.stream "
        "out, and it is downloaded once"
    )


def shards_of(address: str) -> list[Shard]:
    """Its files, from the hub."""
    name, _, revision = address.removeprefix(hub.PREFIX).partition("@")
    try:
        told = HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
    except HFValidationError:
        raise hub.no_data_set(address) from None
    except FAULTS as fault:
        raise hub.not_to_be_had(address, fault) from None
    commit = told.sha or ""
    files = told.siblings or []
    return [Shard(name, commit, file.rfilename, file.size or 0) for file in files]
