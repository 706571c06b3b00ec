"""The update of an adapter as factors, and what can be done to it without its base: weighed,
averaged with others, cut down to the language model.

Every LoRA layer adds scaling · B · A to a weight. Nothing of size (out, in) is formed here: sizes
come from products of (r, r). Left out: adding it to a base (merged.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from vise_fast.model.base import believed, check_finite
from vise_fast.model.qwen3_vl import LANGUAGE_TARGETS
from vise_fast.model.saved import adapter as adapters
from vise_fast.model.saved.adapter import PREFIX, WEIGHTS
from vise_fast.system.errors import ConfigError

DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
PROJECTOR = re.compile(r"\.(visual|multi_modal_projector|connector)(\.|$)")


@dataclass
class Update:
    """What PEFT stores: `settings`, and `tensors` by name, A (r, in) and B (out, r)."""

    settings: LoraConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Update:
        """Of an adapter that `adapters.verify` has seen.

        Raises ConfigError for an adapter of another kind, EnvironmentFault for a damaged one,
        NumericFault for numbers that are not finite.
        """
        settings = adapters.read_settings(directory)
        with believed(f"the adapter {directory}", adapters.AGAIN):
            tensors = load_file(directory / WEIGHTS)
        found = cls(settings, tensors)
        found._check(directory)
        check_finite(tensors, f"the adapter {directory}")
        return found

    def _check(self, directory: Path) -> None:
        names = {name + end for name in self.modules() for end in (DOWN, UP)}
        rank = self.settings.r
        fits = all(
            len(self.tensors[n + DOWN]) == rank for n in self.modules() if names <= self.keys
        )
        if names != self.keys or not names or not fits:
            raise ConfigError(
                f"adapter {directory} is no plain LoRA of rank {rank}; its tensors are other than "
                "A and B of each layer; export one that PEFT or vise_fast wrote"
            )

    @property
    def keys(self) -> set[str]:
        """The names of all tensors."""
        return set(self.tensors)

    def modules(self) -> list[str]:
        """The layers that are changed, by the beginning of their tensors' names."""
        return sorted(key.removesuffix(DOWN) for key in self.tensors if key.endswith(DOWN))

    def scaling(self, module: str) -> float:
        """What PEFT multiplies B · A of a layer with."""
        s = self.settings
        name = module.removeprefix(PREFIX)
        patterns = s.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), name), s.lora_alpha)
        return alpha / (s.r**0.5 if s.use_rslora else s.r)

    def squared_size(self, module: str) -> float:
        """Sum of squares of what is added to a layer's weight: tr(Bᵀ B · A Aᵀ) · scaling²."""
        down = self.tensors[module + DOWN].double()
        up = self.tensors[module + UP].double()
        return float(((up.T @ up) * (down @ down.T)).sum()) * self.scaling(module) ** 2

    def projector_share(self) -> float:
        """The projectors' share of the update's squared size; 0 of an empty update."""
        sizes = {module: self.squared_size(module) for module in self.modules()}
        total = sum(sizes.values())
        outside = sum(size for module, size in sizes.items() if PROJECTOR.search(module))
        return outside / total if total else 0.0

    def weighed(self, alpha: float) -> Update:
        """The update times alpha: 0 is the base, 1 the adapter. B carries the factor."""
        tensors = {n: t * alpha if n.endswith(UP) else t for n, t in self.tensors.items()}
        return Update(self.settings, tensors)

    def language_only(self) -> Update:
        """Without the projectors' layers."""
        tensors = {n: t for n, t in self.tensors.items() if not PROJECTOR.search(n)}
        kept = Update(self.settings, tensors)
        targets = kept._targets()
        settings = _copy(self.settings, target_modules=targets, target_parameters=None)
        return Update(settings, tensors)

    def _targets(self) -> str | list[str]:
        """PEFT's target_modules of exactly these layers: the pattern where it says the same."""
        names = [module.removeprefix(PREFIX) for module in self.modules()]
        if all(re.fullmatch(LANGUAGE_TARGETS, name) for name in names):
            kinds = {name.rpartition(".")[2] for name in names}
            if len(kinds) == 7:
                return LANGUAGE_TARGETS
        return names

    def write(self, directory: Path, base: str) -> None:
        """PEFT's two files; the base by its name. Raises OSError, SafetensorError."""
        _copy(self.settings, base_model_name_or_path=base).save_pretrained(str(directory))
        content = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(content, directory / WEIGHTS, {"format": "pt"})


def average(updates: Sequence[Update]) -> Update:
    """The mean of several updates of one base, exactly: the factors side by side, so that the rank
    is the sum of all ranks; scaling 1.

    Raises ConfigError where they change different layers.
    """
    first = updates[0]
    if any(_shapes(update) != _shapes(first) for update in updates):
        raise ConfigError(
            "the adapters change different layers, so that there is no average of them; average "
            "adapters of one base with the same targets"
        )
    tensors: dict[str, Tensor] = {}
    for module in first.modules():
        ups = [u.tensors[module + UP] * (u.scaling(module) / len(updates)) for u in updates]
        tensors[module + DOWN] = torch.cat([u.tensors[module + DOWN] for u in updates])
        tensors[module + UP] = torch.cat(ups, 1)
    rank = sum(update.settings.r for update in updates)
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "alpha_pattern": {}}
    return Update(_copy(first.settings, **plain), tensors)


def _shapes(update: Update) -> Mapping[str, tuple[int, int]]:
    """(out, in) of every layer that is changed."""
    t = update.tensors
    return {m: (t[m + UP].shape[0], t[m + DOWN].shape[1]) for m in update.modules()}


def _copy(settings: LoraConfig, **changes: object) -> LoraConfig:
    stored = vars(settings)
    known = {field: stored[field] for field in adapters.UNDERSTOOD if field in stored}
    return LoraConfig(**known | {"inference_mode": True} | changes)
