"""The base's small files that an adapter takes with it: tokenizer, chat template, processors.

A model directory holds them; of a hub id they are fetched when a run starts, or lie in the hub
cache. What is missing is said then, not when the adapter is opened on another machine. Left out:
weights and config.json (beside an adapter, transformers 5.23 takes a directory with a config.json
for a whole model).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

PROCESSOR = "processor_config.json"
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    PROCESSOR,
    "video_preprocessor_config.json",
)
CONFIG = "config.json"


@dataclass(frozen=True)
class Need:
    """One thing an adapter should hold: any of `files` will do, the first is the one to get."""

    what: str
    files: tuple[str, ...]


NEEDS = (
    Need("tokenizer", ("tokenizer.json", "vocab.json")),
    Need("tokenizer settings", ("tokenizer_config.json",)),
    Need("chat template", ("chat_template.jinja", "chat_template.json")),
    Need("image processor", ("preprocessor_config.json", PROCESSOR)),
    Need("video processor", ("video_preprocessor_config.json", PROCESSOR)),
    Need("generation settings", ("generation_config.json",)),
)
"""A processor_config.json of transformers 5 may hold both processors."""


def fetch(source: str) -> None:
    """Brings the small files of a hub id into the cache, where the hub can be reached; of a
    directory there is nothing to fetch.
    """
    if Path(source).is_dir():
        return
    with contextlib.suppress(OSError):  # what is not there is said by `missing`
        snapshot_download(source, allow_patterns=[CONFIG, *SIDE_FILES])


def home_of(source: str) -> Path | None:
    """The directory of a model, or that of a hub id in the cache; None where it is not there."""
    if Path(source).is_dir():
        return Path(source)
    cached = try_to_load_from_cache(source, CONFIG)
    return Path(cached).parent if isinstance(cached, str) else None


def found(source: str) -> list[Path]:
    """The small files that are at hand."""
    home = home_of(source)
    return [] if home is None else [p for name in SIDE_FILES if (p := home / name).is_file()]


def missing(source: str, name: str, video: bool = True) -> Iterator[str]:
    """A line for everything that an adapter of this base would lack: the file, what that means, and
    the command that gets it. `name`: what the base is called on the hub; video: its processor takes
    videos too.
    """
    have = {path.name for path in found(source)}
    place = f" --local-dir {source}" if Path(source).is_dir() else ""
    for need in NEEDS:
        if need.what == "video processor" and not video:
            continue
        if not have & set(need.files) and not _inside(source, need):
            yield (
                f"the base has no {need.files[0]}; the adapter will lack it, and its {need.what} "
                f"must come from elsewhere; get it with: hf download {name} {need.files[0]}{place}"
            )


def _inside(source: str, need: Need) -> bool:
    """Whether a chat template is written into tokenizer_config.json, as it once was."""
    home = home_of(source)
    if need.what != "chat template" or home is None:
        return False
    try:
        settings = json.loads((home / "tokenizer_config.json").read_bytes())
        return bool(settings.get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def copy(source: str, directory: Path, processor: Callable[[], str]) -> None:
    """Copies what is at hand. Where no file names the processor's class, a file that does is
    written, so that AutoProcessor needs no config.json; `processor` tells it. Raises OSError.
    """
    files = found(source)
    for path in files:
        shutil.copyfile(path, directory / path.name)
    images = [path for path in files if path.name == "preprocessor_config.json"]
    if images and not any(_names_a_processor(path) for path in files):
        content = {"processor_class": processor()}
        (directory / PROCESSOR).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _names_a_processor(path: Path) -> bool:
    return path.suffix == ".json" and b'"processor_class"' in path.read_bytes()
