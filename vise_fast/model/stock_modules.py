"""A model's stock modules (transformers, with PEFT around them) as the generic engine sees them:
the frozen tower once, then the stock forward pass over what the tower said.

The tower's outputs are recorded module by module, as the family's row names them (families.py), and
played back where the stock forward would run the tower again: projector, placeholders, masks and
positions stay transformers' own. Adapters play no part in what is recorded. Nothing is mutated
beyond a call. Left out: batching, caches, sampling (engine/generic.py).

Shapes: N images, P patches of all of them, T tokens, E text width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from vise_kernels import patchify

from vise_fast.model.base import believed, read_json
from vise_fast.model.families import Family, row_of
from vise_fast.model.saved.side_files import home_of
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine.staging import put

PREPROCESSOR = "preprocessor_config.json"
OWN = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize")
"""What is taken from a checkpoint's preprocessor_config.json; sizes and tiles are the row's."""
Tree = Any
"""A tensor, or tensors in a model's output."""


@dataclass
class Encoded:
    """What the tower said of N images: outputs by module name, rows of each image in them, and the
    grid of each, (rows, columns) in patches; (0, 0) where images are squares.
    """

    said: dict[str, Tree]
    sizes: list[int]
    grids: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.sizes)

    def select(self, images: list[int]) -> Encoded:
        """Those of some images, in that order; an image may be asked for twice."""
        if images == list(range(len(self))):
            return self
        runs = torch.arange(sum(self.sizes)).split(self.sizes)
        rows = torch.cat([runs[i] for i in images])
        said = {
            name: _map(tree, lambda x: x[put(rows, x.device)]) for name, tree in self.said.items()
        }
        return Encoded(said, [self.sizes[i] for i in images], [self.grids[i] for i in images])


class StockModules:
    """The modules under the names the rest of the trainer uses; `source`: where the checkpoint's
    small files lie.

    Raises ConfigError for a head that is no plain product.
    """

    def __init__(self, model: Any, source: str | None = None) -> None:
        self.model = model
        self.core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.core.config
        self.row: Family = row_of(model)
        self.head: nn.Linear = self.core.lm_head
        self.dtype = self.head.weight.dtype
        self.source = source
        self._check_head()
        self._kept = kept_modules(self.core.model, self.row)
        self._processor: Any = None
        normal = self._normalisation()
        self.mean = tuple(normal.get("image_mean", self.row.mean))
        self.std = tuple(normal.get("image_std", self.row.std))

    def _check_head(self) -> None:
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        if self.head.bias is not None or cap:
            raise ConfigError(
                f"the head of {self.row.model_type} has a bias or caps its logits; the exact KL "
                "is computed from a plain product; choose another model"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def refresh(self) -> None:
        """Nothing is cached of the adapters."""

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (n, V) of hidden states (n, E)."""
        return F.linear(hidden, self.head.weight).float()

    @contextlib.contextmanager
    def adapters(self, on: bool) -> Iterator[None]:
        """The model with its adapters on or off."""
        if on or self.core is self.model:
            yield
        else:
            with self.model.disable_adapter():
                yield

    # ---- pixels ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: list[Tensor]) -> Encoded:
        """uint8 (H, W, 3) images through the frozen tower, all in one pass."""
        pixels, grids = self.pixels(images)
        said: dict[str, Tree] = {}
        with _recording(self._named(), said), self.adapters(False):
            self._tower(self.inputs(pixels, grids))
        sizes = [rows * columns or 1 for rows, columns in grids]
        return Encoded({name: self._pruned(tree) for name, tree in said.items()}, sizes, grids)

    def pixels(self, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised patches (P, values) or squares (N, 3, S, S) of uint8 (H, W, 3) images, and the
        grid of each.
        """
        if self.row.pixels != "patches":
            return self._squares(images), [(0, 0)] * len(images)
        vision = self.config.vision_config
        patches, grid = patchify(
            images,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )
        grids = [(rows, columns) for _, rows, columns in grid.tolist()]
        return patches.to(self.device), grids

    def _squares(self, images: list[Tensor]) -> Tensor:
        """(N, 3, S, S): each picture as one tile, by the family's own image processor."""
        side = self.row.side(self.config)
        pictures = [Image.fromarray(image.cpu().numpy()) for image in images]
        if self.row.pixels in ("tiles", "anyres"):  # they would letterbox: 0..1000 stays valid
            pictures = [
                picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures
            ]
        out = self.processor()(images=pictures, return_tensors="np")
        values = np.asarray(out["pixel_values"])
        tiles = values.reshape(len(images), -1, *values.shape[-3:])[:, 0]
        return torch.from_numpy(np.ascontiguousarray(tiles)).to(self.device, self.dtype)

    def processor(self) -> Any:
        """The family's image processor of transformers, set to one tile of the tower's size."""
        if self._processor is None:
            side = self.row.side(self.config)
            square = {"height": side, "width": side}
            sizes: dict[str, Any] = {key: {"longest_edge": side} for key in self.row.edge}
            if self.row.pixels == "anyres":
                sizes["image_grid_pinpoints"] = [[side, side]]
            settings = {"size": square} | sizes | dict(self.row.settings) | self._normalisation()
            self._processor = getattr(transformers, self.row.image_processor)(**settings)
        return self._processor

    def _normalisation(self) -> dict[str, Any]:
        """What the checkpoint says of levels and resampling. Raises EnvironmentFault."""
        home = None if self.source is None else home_of(self.source)
        if home is None or not (home / PREPROCESSOR).is_file():
            return {}
        with believed(f"{PREPROCESSOR} of {self.source}"):
            stated = read_json(Path(home) / PREPROCESSOR)
        return {key: stated[key] for key in OWN if stated.get(key) is not None}

    def inputs(self, pixels: Tensor, grids: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The arguments of the stock forward that stand for the images."""
        return INPUTS[self.row.pixels](self, pixels, grids)

    def blank(self, features: Encoded) -> dict[str, Tensor]:
        """Such arguments for images whose tower was recorded: shapes alone, without memory."""
        shape: tuple[int, ...] = sum(features.sizes), 1
        if self.row.pixels != "patches":
            side = self.row.side(self.config)
            shape = len(features), 3, side, side
        one = torch.ones((), dtype=self.dtype, device=self.device)
        return self.inputs(one.expand(shape), features.grids)

    def marks(self, ids: Tensor) -> dict[str, Tensor]:
        """The argument that tells image tokens apart in ids (N, T), where the model asks for it."""
        types = self.row.types
        return {types: (ids == self.image_token).long()} if types else {}

    def crossing(self, ids: Tensor, start: int) -> dict[str, Tensor]:
        """The mask of cross-attention of ids (N, T): from token `start` on they see the first
        tile; nothing where the model has no such layers.
        """
        if not self.row.crosses:
            return {}
        tiles = self.config.vision_config.max_num_tiles
        mask = torch.zeros(*ids.shape, 1, tiles, dtype=torch.long, device=ids.device)
        mask[:, start:, 0, 0] = 1
        return {"cross_attention_mask": mask}

    def size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of an image with this grid as the tower sees it."""
        if self.row.pixels != "patches":
            return self.row.side(self.config), self.row.side(self.config)
        patch = self.config.vision_config.patch_size
        return grid[0] * patch, grid[1] * patch

    def image_tokens(self, grid: tuple[int, int]) -> int:
        """Image tokens of an image with this grid."""
        if self.row.image_tokens is not None:
            return self.row.image_tokens(self.config)
        return grid[0] * grid[1] // self.config.vision_config.spatial_merge_size**2

    # ---- the tower -------------------------------------------------------------------------------

    def _named(self) -> dict[str, nn.Module]:
        return {name: self.core.model.get_submodule(name) for name in self._kept.outputs}

    def _tower(self, inputs: dict[str, Tensor]) -> None:
        """Runs the tower; what is between it and the language model too, for nothing."""
        core = self.core.model
        if hasattr(core, "get_image_features"):
            core.get_image_features(**inputs)
        else:
            core.get_submodule(self.row.tower)(**inputs)

    def _pruned(self, tree: Tree) -> Tree:
        """Of a tower that returns all its layers, those that are read."""
        if not isinstance(tree, Mapping) or tree.get("hidden_states") is None:
            return tree
        layers = tree["hidden_states"]
        chosen = getattr(self.config, "vision_feature_layer", None)
        wanted = [chosen] if isinstance(chosen, int) else list(chosen or [])
        places = {layer % len(layers) for layer in wanted}
        kept = tuple(x if i in places else None for i, x in enumerate(layers))
        maker: Any = type(tree)
        return maker(**{**tree, "hidden_states": kept})

    @contextlib.contextmanager
    def recorded(self, features: Encoded) -> Iterator[None]:
        """Inside, the tower says what it said; its blocks are not run."""
        stand_ins: dict[str, Callable] = {}
        for name in self._kept.skipped:
            stand_ins[name] = _same
        for name, tree in features.said.items():
            stand_ins[name] = _Said(tree)
        if self.row.entry:
            last = next(iter(features.said.values()))
            stand_ins[self.row.entry] = _Said(last.new_zeros(()).expand(last.shape))
        modules: dict[str, Any] = {n: self.core.model.get_submodule(n) for n in stand_ins}
        before = {name: vars(module).get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = stand_ins[name]
        try:
            yield
        finally:
            for name, module in modules.items():
                _restore(module, before[name])

    # ---- the language model ----------------------------------------------------------------------

    def positions(self, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Rope positions (3, T) of one prefix, ids (T,), as the model itself tells them."""
        marks = (ids == self.image_token).int()[None]
        thw = torch.tensor([[1, *grid]], device=ids.device)
        places, _ = self.core.model.get_rope_index(
            ids[None], mm_token_type_ids=marks, image_grid_thw=thw
        )
        return places[:, 0]

    @property
    def image_token(self) -> int:
        """The id that stands for the image."""
        return image_token(self.config)

    def forward(self, **inputs: Any) -> Any:
        """The stock forward below the head: its output object."""
        return self.core.model(**inputs)

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Inside, decoder layers save their inputs alone; not with a cache."""
        text = self.core.model.get_submodule(self._text())
        layers: list[Any] = [m for m in text.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _checkpoint
            layer.training = True  # of the layer alone: its modules' dropout stays off
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = False
                layer.training = False

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, the language model writes its attention weights out."""
        text = self.core.model.get_submodule(self._text()).config
        before = text._attn_implementation
        text._attn_implementation = "eager"
        try:
            yield
        finally:
            text._attn_implementation = before

    def _text(self) -> str:
        names = ("language_model", "text_model")
        return next(name for name in names if hasattr(self.core.model, name))


def image_token(config: Any) -> int:
    """The id that stands for the image in a model's config."""
    found = getattr(config, "image_token_id", None)
    return config.image_token_index if found is None else found


def _checkpoint(function: Callable, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


@dataclass(frozen=True)
class Kept:
    """Names below `model`: modules whose outputs are recorded, and those that are skipped then."""

    outputs: list[str]
    skipped: list[str]


def kept_modules(core: nn.Module, row: Family) -> Kept:
    """One module as a whole; of blocks the last, and those a deepstack taps.

    Raises ConfigError where the row names none.
    """
    names = [name for name, _ in core.named_modules() if re.fullmatch(row.tower, name)]
    if not names:
        raise ConfigError(
            f"the row of family {row.model_type} names no tower: nothing matches {row.tower}; "
            "look at model.named_modules()"
        )
    if len(names) == 1:
        return Kept(names, [])
    any_core: Any = core
    taps = getattr(any_core.config.vision_config, "deepstack_visual_indexes", None) or []
    wanted = {*taps, len(names) - 1}
    outputs = [name for i, name in enumerate(names) if i in wanted]
    return Kept(outputs, [name for name in names if name not in outputs])


class _Said:
    """A forward pass that says what was said."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        return _map(self.tree, lambda x: x)  # a container of its own: the model writes into it


def _restore(module: Any, forward: Any) -> None:
    """The module's own forward pass again, or what a library had set over it."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _same(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


@contextlib.contextmanager
def _recording(modules: dict[str, nn.Module], said: dict[str, Tree]) -> Iterator[None]:
    """Inside, what each module returns is kept."""

    def keeper(name: str) -> Callable:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            said[name] = _map(out, lambda x: x)

        return keep

    handles = [module.register_forward_hook(keeper(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _map(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """The same containers with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        maker: Any = type(tree)
        return maker(**{name: _map(value, change) for name, value in tree.items()})
    if isinstance(tree, tuple | list):
        return type(tree)(_map(value, change) for value in tree)
    return tree


# ---- how each kind of model takes images ---------------------------------------------------------

Grids = list[tuple[int, int]]


def _patches(modules: StockModules, pixels: Tensor, grids: Grids) -> dict[str, Tensor]:
    thw = torch.tensor([[1, *grid] for grid in grids], device=modules.device)
    return {"pixel_values": pixels, "image_grid_thw": thw}


def _square(modules: StockModules, pixels: Tensor, grids: Grids) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


def _listed(modules: StockModules, pixels: Tensor, grids: Grids) -> dict[str, Tensor]:
    return {"pixel_values": pixels[:, None]}


def _tiles(modules: StockModules, pixels: Tensor, grids: Grids) -> dict[str, Tensor]:
    """The picture is the first tile; the tower wants all of them."""
    most = modules.config.vision_config.max_num_tiles
    tiles = pixels.new_zeros(len(pixels), 1, most, *pixels.shape[1:])
    tiles[:, 0, 0] = pixels
    mask = torch.zeros(len(pixels), 1, most, dtype=torch.long, device=modules.device)
    mask[:, :, 0] = 1
    return {
        "pixel_values": tiles,
        "aspect_ratio_ids": torch.ones(len(pixels), 1, dtype=torch.long, device=modules.device),
        "aspect_ratio_mask": mask,
    }


def _anyres(modules: StockModules, pixels: Tensor, grids: Grids) -> dict[str, Tensor]:
    """As of several images: each is its base tile alone."""
    size = torch.tensor([list(pixels.shape[-2:])] * len(pixels), device=modules.device)
    several = torch.tensor([len(pixels) + 1], device=modules.device)
    return {"pixel_values": pixels, "image_sizes": size, "batch_num_images": several}


INPUTS: dict[str, Callable[[StockModules, Tensor, Grids], dict[str, Tensor]]] = {
    "patches": _patches,
    "square": _square,
    "listed": _listed,
    "tiles": _tiles,
    "anyres": _anyres,
}
