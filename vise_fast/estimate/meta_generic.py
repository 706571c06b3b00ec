"""The generic engine on shapes: the stock decoder on the meta device, every call a stage.

What the tower says is held as it would be; its pass is counted as one block's widest moment over
all images, and images enter the decoder as if they were text of the same length, for placeholders
are found by numbers that are not there. Left out: what the projector keeps for its gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vise_fast.engine.fast import Sheet
from vise_fast.engine.generic import GenericEngine, GenericPrefixes, GenericPrompts, Rows
from vise_fast.engine.rollout import Answered, Rollout, owners
from vise_fast.estimate.stages import Stages
from vise_fast.model.families import square_tokens
from vise_fast.model.stock_modules import Encoded, StockModules
from vise_fast.text.tokens import Tokens

META = torch.device("meta")
ATTENTION = "vise_fast_meta"
WIDTHS_AT_ONCE = 4
"""Activations of a tower's block beside its MLP: queries, keys, values and their sum."""


def _not_packed(position_ids: Tensor) -> None:
    """There are none."""


def tower_width(config: Any) -> int:
    """Numbers per patch between the tower's blocks."""
    vision = config.vision_config
    return getattr(vision, "embed_dim", None) or vision.hidden_size


def said_width(config: Any) -> int:
    """Numbers per patch that the tower hands on, all recorded outputs together."""
    vision = config.vision_config
    taps = getattr(vision, "deepstack_visual_indexes", None) or []
    wide = getattr(vision, "vision_output_dim", None)
    return wide or tower_width(config) * (1 + len(taps))


def kept_by_tower(modules: MetaModules, sizes: list[tuple[int, int]]) -> int:
    """Bytes of what the tower said of images of these (height, width)."""
    pictures = [torch.empty(*size, 3, dtype=torch.uint8, device=META) for size in sizes]
    kept = modules.encode(pictures)
    return sum(tree.numel() * tree.dtype.itemsize for tree in kept.said.values())


class _Attention(torch.autograd.Function):
    """Fused attention as it is held: queries, keys and values until the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """(N, H, T, D) to (N, T, H, D), as transformers asks of an attention function."""
    return _Attention.apply(query, key, value).transpose(1, 2), None


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """A mixture's MLP (n, E) as large as it is: every chosen pair of token and expert, through the
    first expert's shapes.
    """
    chosen = index.shape[-1]
    pairs = hidden.repeat_interleave(chosen, 0)
    gate, up = _product(pairs, module.gate_up_proj[0]).chunk(2, -1)
    out = _product(F.silu(gate) * up, module.down_proj[0])
    return (out * weights.reshape(-1, 1)).view(len(hidden), chosen, -1).sum(1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x times a weight that lies (in, out) or (out, in)."""
    return x @ weight if weight.shape[0] == x.shape[-1] else x @ weight.T


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
ALL_EXPERTS_FUNCTIONS.register(ATTENTION, _experts)


class MetaModules(StockModules):
    """The stock modules, whose images nobody computes."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        text = self.core.model.get_submodule(self._text()).config
        text._attn_implementation = ATTENTION
        text._experts_implementation = ATTENTION

    def encode(self, images: list[Tensor]) -> Encoded:
        """What the tower would say, after the widest moment of its pass."""
        grids = [self._grid(image) for image in images]
        sizes = [rows * columns or 1 for rows, columns in grids]
        patches = sum(self._patches(grid) for grid in grids)
        vision = self.config.vision_config
        middle = getattr(vision, "intermediate_size", 0) or 4 * tower_width(self.config)
        width = middle + WIDTHS_AT_ONCE * tower_width(self.config)
        passing = torch.empty(patches, width, dtype=self.dtype, device=META)
        del passing
        each = patches * said_width(self.config) // sum(sizes)
        said = torch.empty(sum(sizes), each, dtype=self.dtype, device=META)
        return Encoded({self._kept.outputs[0]: said}, sizes, grids)

    def _grid(self, image: Tensor) -> tuple[int, int]:
        if self.row.pixels != "patches":
            return 0, 0
        patch = self.config.vision_config.patch_size
        return image.shape[0] // patch, image.shape[1] // patch

    def _patches(self, grid: tuple[int, int]) -> int:
        tiles = getattr(self.config.vision_config, "max_num_tiles", 1)
        return grid[0] * grid[1] or square_tokens(self.config) * tiles

    @contextlib.contextmanager
    def recorded(self, features: Encoded) -> Iterator[None]:
        """No tower is run in any case."""
        yield

    def blank(self, features: Encoded) -> dict[str, Tensor]:
        """Nothing, or the keys of cross-attention to come."""
        if not self.row.crosses:
            return {}
        tokens = self._patches((0, 0)) + self.config.vision_config.max_num_tiles
        width = self.config.text_config.hidden_size
        shape = len(features), tokens, width
        return {"cross_attention_states": torch.empty(shape, dtype=self.dtype, device=META)}

    def forward(self, **inputs: Any) -> Any:
        """Without positions, whose numbers would be looked at for packed sequences."""
        look = masking_utils.find_packed_sequence_indices
        masking_utils.find_packed_sequence_indices = _not_packed
        try:
            return super().forward(**inputs | {"position_ids": None})
        finally:
            masking_utils.find_packed_sequence_indices = look

    def marks(self, ids: Tensor) -> dict[str, Tensor]:
        """None: there are no numbers to tell image tokens by."""
        return {}


class MetaGenericEngine(GenericEngine):
    """The generic engine, every call a stage of its own."""

    backbone: MetaModules

    def __init__(self, backbone: MetaModules, tokens: Tokens, stages: Stages) -> None:
        super().__init__(backbone, tokens)
        self.clock = stages

    def home(self, values: Tensor) -> Tensor:
        """Numbers that can be probabilities, no two alike."""
        return torch.linspace(1, 0.9, values.numel(), dtype=values.dtype).view(values.shape)

    def encode(self, images: list[Tensor]) -> Encoded:
        """As a stage."""
        with self.clock.phase("encode"):
            return super().encode(images)

    def prefill(self, features: Encoded, adapters: bool, *, graph: bool = False) -> GenericPrefixes:
        """As a stage."""
        with self.clock.phase("prefix" if adapters else "reference prefix"):
            return super().prefill(features, adapters, graph=graph)

    def prompt(
        self, prefixes: GenericPrefixes, owner: list[int], rows: list[list[int]]
    ) -> GenericPrompts:
        """As a stage."""
        with self.clock.phase("question"):
            return super().prompt(prefixes, owner, rows)

    @torch.no_grad()
    def generate(
        self,
        prompts: GenericPrompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """The last token, when the keys and values of all are there."""
        with self.clock.phase("answers"), self.backbone.adapters(prompts.adapters):
            sheet = Sheet.blank(len(seeds), limit, self.tokens, self.device)
            going = self._start(prompts, owners(fan), seeds)
            written = torch.zeros(len(seeds), limit - 1, dtype=torch.long, device=META)
            row = Rows(written, written, [limit - 1] * len(seeds))
            self._forward(row, None, going.cache, self.backbone.crossing(written, 0))
            self._next(going, torch.zeros(len(seeds), dtype=torch.long, device=META), limit - 1)
        home = [[0] * limit for _ in seeds]
        return Rollout(sheet.ids, sheet.logprob, [limit] * len(seeds), home)

    def verdict_logits(self, features: Encoded, rows: list[list[int]], adapters: bool) -> Tensor:
        """As a stage."""
        with self.clock.phase("verdicts"):
            return super().verdict_logits(features, rows, adapters)

    def score(self, features: Encoded, answered: Answered, adapters: bool, **options) -> Tensor:
        """As a stage."""
        with self.clock.phase("scores" if adapters else "reference scores"):
            return super().score(features, answered, adapters, **options)

    def _following(self, grid: tuple[int, int]) -> int:
        """No position is looked at."""
        return len(self._prefix_ids(grid))

    def _places(self, grid: tuple[int, int], size: int) -> Tensor:
        """Rope positions (3, size) of no value."""
        return torch.zeros(3, size, dtype=torch.long, device=META)
