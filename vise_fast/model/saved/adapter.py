"""An adapter as files: what PEFT saved, taken for damaged or hostile, and put onto its base.

One that vise_fast wrote is held to its manifest. Any other is taken if it is a plain LoRA whose
tensors all have a place here, leave none empty and are finite. Left out: writing one (export.py), a
fresh one (load.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import nn

from vise_fast.model.base import believed, check_finite, quiet, read_json, refuse_special
from vise_fast.system import manifest
from vise_fast.system.errors import ConfigError, EnvironmentFault

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WIDTHS = frozenset({"F64", "F32", "F16", "BF16"})
AGAIN = "copy the adapter again"
UNDERSTOOD = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_alpha",
        "lora_dropout",
        "alpha_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "init_lora_weights",
        "megatron_core",
    }
)
"""PEFT's settings that change nothing here but where LoRA lies and how it is scaled; of all others
the default is the only value that the fast forward computes.
"""


class Place(NamedTuple):
    """Where a tensor belongs: module name in the base, factor A or B."""

    module: str
    factor: str


def verify(adapter: str, say: Callable[[str], None]) -> None:
    """Holds a directory to its manifest; one without is somebody else's, which is said.

    Raises ConfigError where there is no adapter, EnvironmentFault where a file is damaged.
    """
    directory = Path(adapter)
    needed = (SETTINGS, WEIGHTS)
    written = directory.is_dir() and manifest.verify(directory, "the adapter", needed)
    for name in needed:
        if not (directory / name).is_file():
            raise ConfigError(
                f"adapter {adapter} has no {name}; it is not an adapter directory; point at a "
                "finished RUN/adapter"
            )
    refuse_special(directory, "the adapter", AGAIN)
    if not written:
        say(
            f"the adapter {adapter} has no {manifest.NAME}: vise_fast 0.2 did not write it; it is "
            "taken as it is"
        )


def load(base: nn.Module, adapter: str) -> PeftModel:
    """The base with this adapter on it, trainable. `verify` comes first.

    Raises ConfigError for an adapter of another kind or another base, EnvironmentFault for damaged
    files, NumericFault for numbers that are not finite.
    """
    directory = Path(adapter)
    settings = read_settings(directory)
    check_fits(directory, settings, base)
    with believed(f"the adapter {adapter}", AGAIN), quiet():
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True, config=settings)
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    _check_whole(directory, factors)
    check_finite(factors, f"the adapter {adapter}")
    return model


def read_settings(directory: Path) -> LoraConfig:
    """adapter_config.json as PEFT's own. Raises ConfigError, EnvironmentFault."""
    with believed(f"the adapter {directory}", AGAIN):
        content = read_json(directory / SETTINGS)
        _refuse_other_kinds(directory, content)
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        chosen = {name: value for name, value in content.items() if name in known & UNDERSTOOD}
        # else PEFT would draw the factors anew by some method that changes the base as well
        settings = LoraConfig(**chosen | {"init_lora_weights": True})
        if not (isinstance(settings.r, int) and settings.r > 0):
            raise ValueError(f"its rank is {settings.r!r}")
        if not math.isfinite(settings.lora_alpha):
            raise ValueError(f"its alpha is {settings.lora_alpha!r}")
    return settings


def _refuse_other_kinds(directory: Path, content: dict[str, Any]) -> None:
    """Raises ConfigError for what is no plain LoRA: the fast forward would compute something else
    than PEFT.
    """
    if content.get("peft_type") != "LORA":
        raise ConfigError(
            f"adapter {directory} is of kind {content.get('peft_type')}; this trainer knows LORA; "
            "use one of that kind"
        )
    plain = vars(LoraConfig())
    for name, value in content.items():
        if name in plain and name not in UNDERSTOOD and value and value != plain[name]:
            raise ConfigError(
                f"adapter {directory} sets {name}, which this trainer does not compute; use a "
                "plain LoRA adapter, or merge it into its base with PEFT"
            )


def check_fits(directory: Path, settings: LoraConfig, base: nn.Module) -> None:
    """Every tensor of the adapter has a place of the right shape in the base.

    Raises ConfigError, EnvironmentFault.
    """
    shapes = _shapes(base, settings.target_parameters or [])
    rank = settings.r
    with (
        believed(f"the adapter {directory}", AGAIN),
        safe_open(directory / WEIGHTS, "pt") as file,
    ):
        keys = file.keys()
        for key in keys:
            place = _place(key)
            out = shapes.get(place.module)
            stored = file.get_slice(key)
            wide = out and ((rank, out[1]) if place.factor == "A" else (out[0], rank))
            if tuple(stored.get_shape()) != wide or stored.get_dtype() not in WIDTHS:
                raise ConfigError(
                    f"adapter {directory} was made for another base; {place.module} is {out} "
                    "here; use the base it was trained on"
                )


def _shapes(base: nn.Module, parameters: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every product of the base, and of the modules that own these bare parameters."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in base.named_modules():
        if hasattr(module, "in_features"):
            any_module: Any = module
            shapes[name] = any_module.out_features, any_module.in_features
    for name, parameter in base.named_parameters():
        if parameter.dim() == 2 and any(name.endswith(f".{p}") for p in parameters):
            shapes[name.rpartition(".")[0]] = parameter.shape[0], parameter.shape[1]
    return shapes


def _place(key: str) -> Place:
    """The place that a tensor's name tells."""
    module, found, factor = key.removeprefix(PREFIX).partition(".lora_")
    letter = factor.removesuffix(".weight")
    return Place(module, letter if found and letter in ("A", "B") else "")


def _check_whole(directory: Path, factors: dict[str, nn.Parameter]) -> None:
    """PEFT leaves what the file lacks at random. Raises EnvironmentFault."""
    with safe_open(directory / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    missing = sorted({name.replace(".default.", ".") for name in factors} - stored)
    if missing:
        raise EnvironmentFault(
            f"the adapter {directory} is incomplete: {missing[0]} is missing; {AGAIN}"
        )
