"""The only door to an engine: `open_engine`, used by train, dry run, evaluate and infer."""

from __future__ import annotations

from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import GraphedEngine
from vise_fast.engine.rollout import Engine
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.model.load import Policy
from vise_fast.system.errors import EnvironmentFault


def open_engine(policy: Policy, config: Config) -> Engine:
    """The engine that `model.engine` and `model.graphs` ask for. Raises EnvironmentFault for graphs
    without a GPU.
    """
    if config.model.engine == "stock":
        return StockEngine(StockBackbone(policy.model), policy.tokens)
    graphs = config.model.graphs
    if graphs == "auto":
        graphs = policy.device.type == "cuda" and config.model.quant == "none"
    if not graphs:
        return FastEngine(policy.backbone, policy.tokens)
    if policy.device.type != "cuda":
        raise EnvironmentFault(
            f"model.graphs captures CUDA graphs and the model is on {policy.device.type}; leave it "
            "false, or use a GPU"
        )
    return GraphedEngine(policy.backbone, policy.tokens)
