"""A data set on the hub, `hf:OWNER/NAME` or `hf:OWNER/NAME@COMMIT`: its files in the hub's cache,
then whatever they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vise_fast.images.albums.album import Album, Found, Skip
from vise_fast.images.listing.names import SUFFIXES
from vise_fast.system.errors import ConfigError, EnvironmentFault

PREFIX = "hf:"
PATTERNS = ["*.parquet", "*.tar", "*.zip", *(f"*{suffix}" for suffix in sorted(SUFFIXES))]
COMMIT = re.compile(r"[0-9a-f]{40}")


def fetched(address: str) -> Path:
    """The directory of its files; from the network only where the cache lacks them. Raises
    ConfigError, EnvironmentFault.
    """
    name, _, revision = address.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            snapshot_download(
                name, repo_type="dataset", revision=revision or None, allow_patterns=PATTERNS
            )
        )
    except HFValidationError:
        raise no_data_set(address) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as fault:
        raise not_to_be_had(address, fault) from None


def no_data_set(address: str) -> ConfigError:
    """What is said of an address that is none."""
    return ConfigError(
        f"data.dir {address} names no data set; it is hf:OWNER/NAME or hf:OWNER/NAME@COMMIT"
    )


def not_to_be_had(address: str, fault: Exception) -> EnvironmentFault:
    """What is said where the hub refuses or cannot be reached."""
    reason = " ".join(str(fault).split())[:200]
    return EnvironmentFault(
        f"the data set {address} is neither here nor to be had: {reason}; go online, log in "
        "with hf auth login, or give --data.dir a folder"
    )


class OnHub:
    """A data set's files as an album, and which version they are."""

    def __init__(self, address: str, files: Path, album: Album) -> None:
        self.title = f"in {address}"
        self.files = files
        self.album = album
        self.root = album.root

    def pictures(self, skip: Skip) -> Iterator[Found]:
        """Those of its files."""
        return self.album.pictures(skip)

    def is_gone(self) -> bool:
        """Whether the cache is."""
        return self.album.is_gone()

    def extent(self) -> dict[str, int]:
        """That of its files."""
        return self.album.extent()

    def about(self) -> dict[str, str]:
        """The commit, so that a resumed run sees the same version or says so."""
        commit = self.files.name
        return {"commit": commit} if COMMIT.fullmatch(commit) else {}
