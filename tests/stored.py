"""The embedded model and an adapter of it as directories of their own, to be damaged by tests."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vise_fast import nano
from vise_fast.config import schema
from vise_fast.model import load as model
from vise_fast.model.saved import export

HUB_ID = "somebody/small-vl"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def base(directory: Path) -> Path:
    """A copy of the embedded model."""
    directory.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(nano.DIRECTORY / name, directory / name)
    return directory


def hub_cache(home: Path, left_out: Collection[str] = ()) -> Path:
    """The embedded model as the hub id HUB_ID in a cache, HF_HOME being `home`; its snapshot."""
    cached = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cached / "snapshots" / commit
    base(snapshot)
    for name in left_out:
        (snapshot / name).unlink()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    return snapshot


def adapter(directory: Path, *words: str) -> Path:
    """An adapter that says something, as a run with these settings exports it."""
    config = schema.load(None, ["--lora.r", "4", "--lora.alpha", "8", *words])
    policy = model.load(config)
    torch.manual_seed(0)
    for name, factor in policy.parameters().items():
        if "lora_B" in name:
            factor.data.normal_(0, 0.02)
    return export.export(policy, config, directory)


def edit(file: Path, **changes) -> None:
    """Changes entries of a JSON file; `a__b` is entry b of a."""
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = content
        for name in parents:
            place = place[name]
        place[last] = value
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change) -> None:
    """Rewrites a safetensors file after `change(tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def cut(file: Path, kept: float) -> None:
    """Keeps the first share of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
