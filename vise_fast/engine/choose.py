"""The only door to an engine: `open_engine`, used by train, dry run, evaluate and infer."""

from __future__ import annotations

from collections.abc import Callable

from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import GraphedEngine
from vise_fast.engine.rollout import Engine
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.model.load import Policy, silent
from vise_fast.model.proofs import prove_here
from vise_fast.system.errors import EnvironmentFault


def graphs_of(config: Config, device: str) -> bool:
    """Whether tokens are decoded as graphs on this type of device; under `auto` on a GPU, where no
    product chooses its path on the host (int8 with outliers does).
    """
    if config.model.graphs != "auto":
        return config.model.graphs
    outliers = config.model.quant == "int8" and config.model.int8_threshold > 0
    return device == "cuda" and config.model.engine == "fast" and not outliers


def open_engine(policy: Policy, config: Config, say: Callable[[str], None] = silent) -> Engine:
    """The engine that `model.engine` and `model.graphs` ask for; say: where it tells that a fast
    path is off. Raises EnvironmentFault for graphs without a GPU.
    """
    if policy.device.type == "cuda" and config.model.kernels == "auto":
        prove_here(policy.device, say)
    if config.model.engine == "stock":
        return StockEngine(StockBackbone(policy.model), policy.tokens)
    if not graphs_of(config, policy.device.type):
        return FastEngine(policy.backbone, policy.tokens)
    if policy.device.type != "cuda":
        raise EnvironmentFault(
            f"model.graphs captures CUDA graphs and the model is on {policy.device.type}; leave it "
            "false, or use a GPU"
        )
    return GraphedEngine(policy.backbone, policy.tokens, say=say)
