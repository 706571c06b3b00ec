"""The only door to an engine: `open_engine`, used by train, dry run, evaluate and infer."""

from __future__ import annotations

from collections.abc import Callable

from vise_kernels.dispatch import Choice

from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.generic import GenericEngine
from vise_fast.engine.graphed import GraphedEngine
from vise_fast.engine.rollout import Engine
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.model.families import Family, row_of
from vise_fast.model.load import Policy, silent
from vise_fast.model.proofs import prove_here
from vise_fast.model.stock_modules import StockModules
from vise_fast.system.errors import ConfigError, EnvironmentFault


def graphs_of(config: Config, device: str) -> bool:
    """Whether tokens are decoded as graphs on this type of device; under `auto` on a GPU, where no
    product chooses its path on the host (int8 with outliers does).
    """
    if config.model.graphs != "auto":
        return config.model.graphs
    outliers = config.model.quant == "int8" and config.model.int8_threshold > 0
    return device == "cuda" and config.model.engine in ("auto", "fast") and not outliers


def engine_of(config: Config, row: Family) -> Choice:
    """The engine's name, and why. Raises ConfigError for one that the family does not have."""
    asked = config.model.engine
    if asked == "fast" and not row.fast:
        raise ConfigError(
            f"model.engine fast: family {row.model_type} has no forward pass of its own here; only "
            "some have; use --model.engine auto, which takes the generic one"
        )
    if asked != "auto":
        return Choice(asked, "asked for by model.engine")
    if row.fast:
        return Choice("fast", f"{row.model_type} has a forward pass of its own")
    return Choice("generic", f"{row.model_type} runs through transformers' forward")


def open_engine(policy: Policy, config: Config, say: Callable[[str], None] = silent) -> Engine:
    """The engine that `model.engine` and `model.graphs` ask for; say: where it tells that a fast
    path is off. Raises EnvironmentFault for graphs without a GPU.
    """
    _check_graphs(config, policy.device.type)
    if policy.device.type == "cuda" and config.model.kernels == "auto":
        prove_here(policy.device, say)
    name = engine_of(config, row_of(policy.model)).path
    if name == "stock":
        return StockEngine(StockBackbone(policy.model, policy.source), policy.tokens)
    if name == "generic":
        return GenericEngine(StockModules(policy.model, policy.source), policy.tokens)
    if graphs_of(config, policy.device.type):
        return GraphedEngine(policy.backbone, policy.tokens, say=say)
    return FastEngine(policy.backbone, policy.tokens)


def _check_graphs(config: Config, device: str) -> None:
    """Raises EnvironmentFault."""
    if config.model.graphs is True and device != "cuda":
        raise EnvironmentFault(
            f"model.graphs captures CUDA graphs and the model is on {device}; leave it false, or "
            "use a GPU"
        )
