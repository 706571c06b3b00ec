"""Fold an adapter into its base: a plain model directory that needs no PEFT.

    python -m vise_fast.merge --adapter runs/nano/adapter --out merged [--model PATH]

Each product B·A is formed and added in fp32 and rounded once, to the dtype the base is stored in.
What that rounding takes away is said on screen: after a gentle run a bf16 base can swallow most of
the update, and the adapter itself is then the better export. Left out: quantised bases (the merge
goes into the unquantised weights).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from vise_fast.config import origin
from vise_fast.config.command_line import Syntax
from vise_fast.config.schema import Config
from vise_fast.model import adapter as adapters
from vise_fast.model import base as bases
from vise_fast.model.export import side_files
from vise_fast.model.load import attach, check_targets, read_config, resolve
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError, EnvironmentFault

KEPT_WARNING = 0.9
SYNTAX = Syntax(options=origin.OPTIONS | {"out": "DIR"}, settings=origin.SETTINGS)


@dataclass
class Loss:
    """What rounding did to the update, summed over all merged matrices (float64 sums of fp32
    numbers).
    """

    matrices: int = 0
    wanted: float = 0.0
    """sum of wanted², the squared size of the update"""
    along: float = 0.0
    """sum of wanted · arrived"""
    error: float = 0.0
    """sum of (arrived - wanted)²"""
    touched: int = 0
    """weights that the update wants to change"""
    unmoved: int = 0
    """of those, weights whose stored number did not change"""

    def add(self, wanted: Tensor, arrived: Tensor) -> None:
        """One matrix: the update it should have had, and the one it had; fp32."""
        self.matrices += 1
        self.wanted += float(wanted.double().square().sum())
        self.along += float((wanted.double() * arrived.double()).sum())
        self.error += float((arrived - wanted).double().square().sum())
        self.touched += int((wanted != 0).sum())
        self.unmoved += int(((wanted != 0) & (arrived == 0)).sum())

    @property
    def relative(self) -> float:
        """Size of the rounding error over size of the update; 0 for an empty update."""
        return (self.error / self.wanted) ** 0.5 if self.wanted else 0.0

    @property
    def kept(self) -> float:
        """The share of the update, along its own direction, that arrived; 1 for an empty update."""
        return self.along / self.wanted if self.wanted else 1.0


@torch.no_grad()
def merge(model: PeftModel, adapter: str = "default") -> Loss:
    """Adds every LoRA product to its base weight, in place; the LoRA layers stay and must not be
    used again.
    """
    loss = Loss()
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            base: Any = module.get_base_layer()
            weight: Tensor = base.weight
            wanted = _update(module, adapter)
            merged = (weight.float() + wanted).to(weight.dtype)
            loss.add(wanted, merged.float() - weight.float())
            weight.copy_(merged)
    return loss


def _update(layer: Any, adapter: str) -> Tensor:
    """What a LoRA layer adds to its base weight: scaling · B·A, fp32 (out, in)."""
    down = layer.lora_A[adapter].weight.float()
    up = layer.lora_B[adapter].weight.float()
    return (up @ down) * layer.scaling[adapter]


def load_for_merge(config: Config, adapter: str, say: Callable[[str], None]) -> PeftModel:
    """The unquantised base in its stored dtype, on the CPU, with the adapter attached; `say` takes
    what a person should know of the files.

    Raises ConfigError, EnvironmentFault, NumericFault: see model.load.load.
    """
    adapters.verify(adapter, say)
    path = config.model.path
    base = bases.read_weights(resolve(path), path, read_config(path), dtype="auto")
    model = attach(base.requires_grad_(False), config, adapter)
    check_targets(model)
    return model


def save(model: PeftModel, source: str, out: Path) -> None:
    """The merged base with its tokenizer and processor files, written aside and renamed.

    Raises EnvironmentFault.
    """
    aside = out.with_name(out.name + ".partial")
    lora: Any = model.base_model
    try:
        shutil.rmtree(aside, ignore_errors=True)
        lora.unload().save_pretrained(str(aside), safe_serialization=True)
        for path in side_files(source):
            if not (aside / path.name).exists():
                shutil.copyfile(path, aside / path.name)
        os.replace(aside, out)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {out}; {error.strerror or error}; free space or give --out a writable "
            "place"
        ) from error


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    console = Console()
    if given.help:
        console.say(__doc__)
        return 0
    adapter = given["adapter"]
    if adapter is None or given["out"] is None:
        raise ConfigError(
            "merge needs an adapter and a place for the result; write python -m vise_fast.merge "
            "--adapter RUN/adapter --out DIR"
        )
    out = Path(given["out"])
    if out.exists():
        raise ConfigError(
            f"--out {out} exists already; nothing is overwritten; name a new directory"
        )
    merge_into(out, origin.configuration(given), adapter, console)
    return 0


def merge_into(out: Path, config: Config, adapter: str, console: Console) -> None:
    """Loads, merges, says what was lost, saves."""
    model = load_for_merge(config, adapter, console.warn)
    if config.model.quant != "none":
        console.warn(
            f"the adapter was trained on a base held in {config.model.quant}; it is merged into "
            "the unquantised weights, which it has not seen"
        )
    loss = merge(model)
    bases.check_finite(model.state_dict(), "the merged model")  # a narrow dtype may overflow
    base: Any = model.get_base_model()
    _say(console, loss, base.lm_head.weight.dtype)
    save(model, resolve(config.model.path), out)
    console.say(f"merged   {out}")


def _say(console: Console, loss: Loss, dtype: torch.dtype) -> None:
    """How much of the update arrived in weights of this dtype."""
    name = str(dtype).removeprefix("torch.")
    console.say(f"merged   {loss.matrices} matrices in fp32, stored as {name}")
    console.say(
        f"rounding {loss.relative:.2%} of the update's size is lost, {loss.kept:.2%} of it "
        f"arrived, {loss.unmoved} of {loss.touched} weights did not move"
    )
    if loss.kept < KEPT_WARNING or loss.relative > 1 - KEPT_WARNING:
        console.warn(
            f"{name} is too coarse for this update: the merged model is not the model that was "
            "trained; use the adapter itself where you can"
        )


if __name__ == "__main__":
    sys.exit(run(main))
