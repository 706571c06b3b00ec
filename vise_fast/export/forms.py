"""The forms of an exported adapter, each a directory.

portable       PEFT's files, tokenizer and processors; what from_pretrained(DIR) and PEFT load
linked         the same and the base's config and weights beside it, linked: a whole model
               directory whose adapter is not merged
merged         the update inside the weights (merged.py)
language-only  portable without the projectors' part, all of which vLLM serves
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from vise_fast.config.schema import Config
from vise_fast.export import cards, merged
from vise_fast.export.update import Update, average
from vise_fast.model import base as bases
from vise_fast.model.base import quiet
from vise_fast.model.families import FAMILIES
from vise_fast.model.load import read_config, resolve
from vise_fast.model.saved import adapter as adapters
from vise_fast.model.saved import card, side_files
from vise_fast.system import files, manifest
from vise_fast.system.console import Console
from vise_fast.system.errors import ConfigError

FORMS = ("portable", "linked", "merged", "language-only")
REMEDY = "free space or give --out a writable place"


@dataclass(frozen=True)
class Order:
    """What is asked for. `adapters`: one, or several to be averaged; `dtype` and `lossy` are for
    merged, `copy` (the weights instead of links) for linked.
    """

    form: str
    adapters: Sequence[Path]
    out: Path
    alpha: float = 1.0
    dtype: str = "auto"
    lossy: bool = False
    copy: bool = False


def make(order: Order, config: Config, console: Console) -> None:
    """Writes the directory, aside and then in place.

    Raises ConfigError, EnvironmentFault and NumericFault for adapters and bases that cannot be
    used, and EnvironmentFault where the disk refuses.
    """
    done: list[str] = []
    update = combined(order, console, done)
    for line in done:
        console.say(f"export   {line}")
    with files.folder(order.out, REMEDY) as aside:
        if order.form == "merged":
            _merged(order, config, update, done, aside, console)
        else:
            _adapter(order, config, update, done, aside)
        if order.form == "linked":
            _base_beside(config, aside, order.copy)
    for line in side_files.missing(str(order.out), card.base_name(config)):
        console.warn(line)


def combined(order: Order, console: Console, done: list[str]) -> Update:
    """The update that is exported; what was done to it is added to `done`."""
    for directory in order.adapters:
        adapters.verify(str(directory), console.warn)
    updates = [Update.read(directory) for directory in order.adapters]
    update = updates[0]
    if len(updates) > 1:
        update = average(updates)
        done.append(f"the mean of {len(updates)} adapters, of rank {update.settings.r} together")
    if order.alpha != 1.0:
        update = update.weighed(order.alpha)
        done.append(f"{order.alpha:g} of the way from the base to the adapter")
    if order.form == "language-only":
        share = update.projector_share()
        update = update.language_only()
        done.append(f"without the projectors, which were {share:.1%} of the update's squared size")
    done.append(f"form {order.form}")
    return update


def _adapter(order: Order, config: Config, update: Update, done: list[str], aside: Path) -> None:
    """An adapter directory. Raises OSError."""
    base = card.base_name(config)
    source = order.adapters[0]
    try:
        update.write(aside, base)
    except SafetensorError as fault:  # how safetensors says that the disk is full
        raise OSError(str(fault)) from fault
    _small_files(config, source, aside)
    if (source / card.SETTINGS).is_file():
        shutil.copyfile(source / card.SETTINGS, aside / card.SETTINGS)
    connector = update.projector_share() > 0
    text = cards.exported(source / "README.md", base, done, connector)
    (aside / "README.md").write_text(text, encoding="utf-8")
    manifest.write(aside)


def _small_files(config: Config, source: Path, aside: Path) -> None:
    """Of the base, and over them those that lie beside the adapter. Raises OSError."""

    def processor() -> str:
        return FAMILIES[read_config(config.model.path).model_type].processor

    side_files.copy(resolve(config.model.path), aside, processor)
    side_files.copy(str(source), aside, processor)


def _base_beside(config: Config, aside: Path, copy: bool) -> None:
    """config.json and the weights of the base, linked or copied. Raises OSError, ConfigError."""
    home = base_home(config)
    shutil.copyfile(home / side_files.CONFIG, aside / side_files.CONFIG)
    weights = bases.weight_files(home, config.model.path)
    if (home / bases.INDEX).is_file():
        weights.append(home / bases.INDEX)
    for path in weights:
        if copy:
            shutil.copyfile(path, aside / path.name)
        else:
            os.symlink(path.resolve(), aside / path.name)


def base_home(config: Config) -> Path:
    """The directory of the base's files. Raises ConfigError where they are not at hand."""
    path = config.model.path
    home = side_files.home_of(resolve(path))
    if home is None:
        raise ConfigError(
            f"model.path {path} is not on this machine; its weights are to lie beside the adapter; "
            f"fetch them with: hf download {path}"
        )
    return home


def _merged(
    order: Order,
    config: Config,
    update: Update,
    done: list[str],
    aside: Path,
    console: Console,
) -> None:
    """A model directory. Raises OSError, ConfigError, NumericFault."""
    with tempfile.TemporaryDirectory() as scratch:
        update.write(Path(scratch), card.base_name(config))
        model = merged.merged(config, scratch, console, order.dtype, order.lossy)
    with quiet():
        model.save_pretrained(str(aside), safe_serialization=True)
    _small_files(config, order.adapters[0], aside)
    (aside / "README.md").write_text(cards.merged(config, done), encoding="utf-8")
