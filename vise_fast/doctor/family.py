"""`doctor --model DIR`: which family a model directory belongs to, and what of it is known; of an
unknown one what it lacks, and the row to begin with.

Nothing is downloaded and no weights are read: the shapes of config.json are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vise_fast.model.base import believed, quiet, read_json, refuse_special
from vise_fast.model.families import FAMILIES, Family, draft, lacking
from vise_fast.system.errors import ConfigError


def lines(path: str) -> Iterator[str]:
    """What there is to say of a model directory. Raises ConfigError, EnvironmentFault."""
    home = Path(path)
    if not (home / "config.json").is_file():
        raise ConfigError(
            f"--model {path} has no config.json; it is no model directory; point it at one saved "
            "by transformers"
        )
    refuse_special(home, "the model")
    with believed(f"config.json of {path}"):
        content = read_json(home / "config.json")
    family = str(content.get("model_type"))
    if family in FAMILIES:
        yield from _known(FAMILIES[family])
        return
    missing = list(lacking(content))
    yield f"{path} is of family {family[:80]}, which has no row (docs/BACKBONES.md)"
    yield from (f"it lacks {what}" for what in missing)
    if not missing:
        yield from _row_to_write(path)


def _known(row: Family) -> Iterator[str]:
    engine = "fast, generic or stock" if row.fast else "generic or stock"
    yield f"family {row.model_type}: engine {engine}; boxes in {row.boxes}; style {row.style}"
    yield f"LoRA on {row.targets(True)}"
    if row.parameters:
        yield f"and on the parameters {', '.join(row.parameters)}"
    yield f"written for {', '.join(row.checkpoints) or 'no published model'}"


def _row_to_write(path: str) -> Iterator[str]:
    """A row guessed from the model's own module names."""
    with believed(f"config.json of {path}"), quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    yield "a row to begin with, for a file of yours that run.plugins names:"
    yield "from vise_fast.model.families import LANGUAGE, Family, register"
    yield "register(Family("
    for name, value in draft(model).items():
        yield f"    {name}={value},"
    yield "))"
