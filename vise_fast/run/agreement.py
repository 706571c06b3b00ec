"""Before the first step: every rank has the same settings, code, images and weights as rank 0, or
none begins.

Two ranks that differ would train on, each another model, and nothing would look wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import vise_kernels
from torch import Tensor

from vise_fast import __version__
from vise_fast.config import settings
from vise_fast.config.places import PACKAGE
from vise_fast.config.schema import Config
from vise_fast.images.sources import Source
from vise_fast.model.load import Policy
from vise_fast.ranks.ranks import Ranks
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault

ROW = 1024
"""Words that are added up before their sums are weighted by their place."""


def same_settings(ranks: Ranks, config: Config) -> None:
    """As they were asked for. Raises ConfigError, EnvironmentFault for other code."""
    if ranks.count == 1:
        return
    keys = [key for key, _ in settings.fields(Config)]
    values = {key: settings.get(config, key) for key in keys}
    first, *others = ranks.gather("settings", values)
    for rank, theirs in enumerate(others, 1):
        for key in keys:
            if theirs[key] != first[key]:
                raise ConfigError(
                    f"{key} is {settings.show(first[key])} on rank 0 and "
                    f"{settings.show(theirs[key])} on rank {rank}; all ranks train one adapter; "
                    "start them with the same words and files"
                )
    _refuse_other(ranks, "code", _code(config))
    ranks.step_done()


def same_inputs(ranks: Ranks, policy: Policy, source: Source) -> None:
    """Images and weights, as they were found. Raises DataError, EnvironmentFault."""
    if ranks.count == 1:
        return
    _refuse_other(ranks, "weights", weights(policy))
    told = ranks.gather("images", source.identity())
    other = _other(told)
    if other is not None:
        raise DataError(
            f"the images of rank {other} are not those of rank 0 ({told[other].get('images')} "
            f"there, {told[0].get('images')} on rank 0); each would draw its own batch; give "
            "--data.dir the same files on every machine"
        )
    ranks.step_done()


def _refuse_other(ranks: Ranks, what: str, own: str) -> None:
    told = ranks.gather(what, own)
    other = _other(told)
    if other is not None:
        raise EnvironmentFault(
            f"the {what} of rank {other} ({told[other]}) is not that of rank 0 ({told[0]}); they "
            "would train two models as one; install and copy the same everywhere"
        )


def _other(told: list[Any]) -> int | None:
    """The first rank that differs from rank 0."""
    return next((rank for rank, value in enumerate(told) if value != told[0]), None)


def _code(config: Config) -> str:
    """Versions, and a hash of every Python file that computes, a reward of the user's as well."""
    digest = hashlib.sha256()
    for home in (PACKAGE, Path(vise_kernels.__file__).parent):
        for file in sorted(home.rglob("*.py")):
            digest.update(str(file.relative_to(home)).encode() + b"\0" + file.read_bytes())
    for name in (config.reward.plugin, config.prompts.file, *config.run.plugins):
        if name is not None:
            digest.update(Path(name).expanduser().read_bytes())
    return (
        f"vise_fast {__version__} {digest.hexdigest()[:12]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}"
    )


def weights(policy: Policy) -> str:
    """A hash over every tensor as it lies in memory, adapter included: one pass, one host sync."""
    digest = hashlib.sha256()
    sums = []
    for name, tensor in policy.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sums += list(_sums(tensor.detach()))
    digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Two sums of a tensor's 32-bit words, int64, wrapping: of all, and of rows by their place."""
    bytes_ = tensor.contiguous().flatten().view(torch.uint8)
    odd = len(bytes_) % 4
    words = bytes_[: len(bytes_) - odd].view(torch.int32)
    yield words.sum(dtype=torch.int64) + bytes_[len(bytes_) - odd :].sum(dtype=torch.int64)
    rows = words[: len(words) - len(words) % ROW].view(-1, ROW).sum(1, dtype=torch.int64)
    yield (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()
