"""Form `merged`: the update added to its base, a plain model directory that needs no PEFT.

Each product B·A is formed and added in fp32 and rounded once, to the dtype the result is stored in.
What that rounding takes away is said on screen; where it is more than half of the update's size the
result is refused, unless it is asked for all the same. Left out: quantised bases (the merge goes
into the unquantised weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.model import base as bases
from vise_fast.model.load import attach, check_targets, read_config, resolve
from vise_fast.system.console import Console
from vise_fast.system.errors import ConfigError

KEPT_WARNING = 0.9
REFUSED_ABOVE = 0.5
"""Rounding error over size of the update: above it most of what arrives is not what was trained."""


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
            weight = _weight(module)
            wanted = _update(module, adapter)
            merged = (weight.float() + wanted).to(weight.dtype)
            loss.add(wanted, merged.float() - weight.float())
            weight.copy_(merged)
    return loss


def _weight(layer: Any) -> Tensor:
    """What the product is added to: a linear's weight, or a bare parameter."""
    if hasattr(layer, "get_param"):
        return layer.get_param()
    return layer.get_base_layer().weight


def _update(layer: Any, adapter: str) -> Tensor:
    """What a LoRA layer adds to its base weight: scaling · B·A, fp32 (out, in)."""
    down = layer.lora_A[adapter].weight.float()
    up = layer.lora_B[adapter].weight.float()
    return (up @ down) * layer.scaling[adapter]


def load(config: Config, adapter: str, dtype: str = "auto") -> PeftModel:
    """The unquantised base on the CPU with the adapter attached; dtype auto: as it is stored.

    Raises ConfigError, EnvironmentFault, NumericFault: see model.load.load.
    """
    path = config.model.path
    base = bases.read_weights(resolve(path), path, read_config(path), dtype=dtype)
    model = attach(base.requires_grad_(False), config, adapter)
    check_targets(model)
    return model


def merged(config: Config, adapter: str, console: Console, dtype: str, lossy: bool) -> Any:
    """The transformers model with the update in its weights; says what rounding took.

    Raises ConfigError where that is most of it, unless `lossy`; NumericFault where a narrow dtype
    overflows.
    """
    model = load(config, adapter, dtype)
    if config.model.quant != "none":
        console.warn(
            f"the adapter was trained on a base held in {config.model.quant}; it is merged into "
            "the unquantised weights, which it has not seen"
        )
    loss = merge(model)
    bases.check_finite(model.state_dict(), "the merged model")
    base: Any = model.get_base_model()
    _say(console, loss, base.lm_head.weight.dtype, lossy)
    lora: Any = model.base_model
    return lora.unload()


def _say(console: Console, loss: Loss, dtype: torch.dtype, lossy: bool) -> None:
    """How much of the update arrived in weights of this dtype. Raises ConfigError."""
    name = str(dtype).removeprefix("torch.")
    console.say(f"merged   {loss.matrices} matrices in fp32, stored as {name}")
    console.say(
        f"rounding {loss.relative:.2%} of the update's size is lost, {loss.kept:.2%} of it "
        f"arrived, {loss.unmoved} of {loss.touched} weights did not move"
    )
    if loss.relative > REFUSED_ABOVE and not lossy:
        raise ConfigError(
            f"{name} is too coarse for this update: an error of {loss.relative:.0%} of its size "
            "would be merged with it; use --form linked or portable, store it as --dtype float32, "
            "or say --lossy"
        )
    if loss.kept < KEPT_WARNING or loss.relative > 1 - KEPT_WARNING:
        console.warn(
            f"{name} is too coarse for this update: the merged model is not the model that was "
            "trained; use the adapter itself where you can"
        )
