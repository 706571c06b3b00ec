"""The generic engine: encode once, prefill once, fork, decode together, for every family that has a
row (model/families.py), over transformers' own forward.

Same interface and same sampled ids as `fast.FastEngine`. A prefix is the model's own cache after
head, image and tail; a question is asked on a copy of it, answers on copies of that. Rows of
different lengths are padded at their end and masked, with positions told by hand. What it costs
beside the fast engine: a copy of the cache per fork, the stock model's eager decode, LoRA as PEFT
computes it, and an update that computes prefix and question again. Left out: CUDA graphs, the
packed tree, going on from the rollout's forward pass.

    engine = GenericEngine(StockModules(policy.model), policy.tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from vise_kernels import sample

from vise_fast.engine.fast import COMPACT_BELOW, Sheet
from vise_fast.engine.rollout import Answered, Counters, ReleasedSpan, Rollout, owners
from vise_fast.model.stock_modules import Encoded, StockModules
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine.clock import Clock
from vise_fast.system.machine.staging import put
from vise_fast.text.tokens import Tokens


@dataclass
class Kept:
    """Keys and values per layer (rows, KV, S, D) as the model's cache holds them, and which of the
    text's S slots are tokens, bool (rows, S). Layers of cross-attention hold the image's instead.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    whole: bool
    """no slot is padding"""

    @classmethod
    def of(cls, cache: Any, valid: Tensor, whole: bool) -> Kept:
        """What a cache holds after a pass."""
        keys = [layer.keys for layer in cache.layers]
        return cls(keys, [layer.values for layer in cache.layers], valid, whole)

    def select(self, rows: list[int]) -> Kept:
        """A copy of some rows, differentiable; all of them in their order are taken as they are."""
        if rows == list(range(len(self.valid))):
            return self
        places = put(rows, self.valid.device)
        keys = [k.index_select(0, places) for k in self.keys]
        values = [v.index_select(0, places) for v in self.values]
        return Kept(keys, values, self.valid[places], self.whole)

    def cache(self) -> DynamicCache:
        """The same as a cache of the model's; it grows by new tensors, not in these."""
        cache = DynamicCache()
        for keys, values in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys = keys
            layer.values = values
            cache.layers.append(layer)
        return cache


@dataclass
class GenericPrefixes:
    """Image prefixes under one adapter state, and the position that comes next in each."""

    kept: Kept
    following: list[int]
    grids: list[tuple[int, int]]
    adapters: bool

    def __len__(self) -> int:
        return len(self.following)

    def select(self, images: list[int]) -> GenericPrefixes:
        """The prefixes of some images, in that order."""
        if images == list(range(len(self))):
            return self
        following = [self.following[i] for i in images]
        grids = [self.grids[i] for i in images]
        return GenericPrefixes(self.kept.select(images), following, grids, self.adapters)


@dataclass
class GenericPrompts:
    """Questions on copies of their prefixes; last (R, E): the state that predicts the first token;
    following: the position after each question.
    """

    kept: Kept
    following: list[int]
    last: Tensor
    adapters: bool

    def __len__(self) -> int:
        return len(self.following)


@dataclass
class Rows:
    """New tokens of N rows, padded at their end: ids and positions (N, T), lengths."""

    ids: Tensor
    positions: Tensor
    lengths: list[int]

    @property
    def valid(self) -> Tensor:
        """Bool (N, T)."""
        steps = torch.arange(self.ids.shape[1], device=self.ids.device)
        return steps < put(self.lengths, self.ids.device)[:, None]

    @property
    def whole(self) -> bool:
        """All are as long."""
        return min(self.lengths) == self.ids.shape[1]

    def last(self, hidden: Tensor) -> Tensor:
        """(N, E) of each row's last token, from (N, T, E)."""
        places = put([n - 1 for n in self.lengths], hidden.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), places]


@dataclass
class Going:
    """Rows still being decoded: which they are, their places in the sheet, seeds, and positions of
    their first answer token.
    """

    rows: list[int]
    where: Tensor
    seeds: Tensor
    positions: Tensor
    cache: DynamicCache
    valid: Tensor
    whole: bool

    def select(self, alive: list[bool], device: torch.device) -> Tensor:
        """Drop the rows that are not alive; places (rows,) of the others."""
        keep = put([place for place, lives in enumerate(alive) if lives], device)
        self.rows = [row for row, lives in zip(self.rows, alive, strict=True) if lives]
        self.where = self.where[keep]
        self.seeds = self.seeds[keep]
        self.positions = self.positions[keep]
        self.valid = self.valid[keep]
        self.cache.batch_select_indices(keep)
        return keep


class GenericEngine:
    """See `rollout.Engine`; the arguments and results are the same. `poll`: look for finished rows
    every so many tokens; `chunk`: verdicts judged together at most.
    """

    keeps_keys = False

    def __init__(
        self, backbone: StockModules, tokens: Tokens, poll: int | None = None, chunk: int = 64
    ) -> None:
        self.backbone = backbone
        self.tokens = tokens
        self.counters = Counters()
        self.device = backbone.device
        self.banned = tokens.banned().to(self.device)
        self.poll = poll or (1 if self.device.type == "cpu" else 8)
        self.chunk = chunk
        # the keys of cross-attention are all the image's: there is no share to measure
        self.measures_attention = not backbone.row.crosses
        self.interrupted: Callable[[], None] = lambda: None
        self.clock = Clock(self.device)
        self._spans: dict[tuple[int, int], Tensor] = {}

    def gains_by_sharing(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """Nothing is shared with the update."""
        return False

    def forget(self) -> None:
        """Nothing large is kept between calls."""

    def home(self, values: Tensor) -> Tensor:
        """Values on the CPU: a host sync, counted."""
        self.counters.host_reads += 1
        return values.cpu()

    def sizes(self, prefixes: GenericPrefixes) -> list[tuple[int, int] | None]:
        """(height, width) in pixels of each image as the model sees it."""
        return [self.backbone.size(grid) for grid in prefixes.grids]

    # ---- images and prefixes ---------------------------------------------------------------------

    def encode(self, images: list[Tensor]) -> Encoded:
        """uint8 (H, W, 3) images on the model's grid."""
        self.counters.images_encoded += len(images)
        return self.backbone.encode(images)

    def prefill(self, features: Encoded, adapters: bool, *, graph: bool = False) -> GenericPrefixes:
        """Head, image and tail of every image in one pass. graph: with gradients, for `score`."""
        with torch.set_grad_enabled(graph), self.backbone.adapters(adapters):
            return self._prefill(features, adapters)

    def _prefill(self, features: Encoded, adapters: bool) -> GenericPrefixes:
        rows = self._rows_with_images(features, [[]] * len(features))
        out = self._pass_with_images(features, rows, cache=DynamicCache())
        kept = Kept.of(out.past_key_values, rows.valid, rows.whole)
        ends = [self._following(grid) for grid in features.grids]
        return GenericPrefixes(kept, ends, features.grids, adapters)

    def prompt(
        self, prefixes: GenericPrefixes, owner: list[int], rows: list[list[int]]
    ) -> GenericPrompts:
        """Fork prefixes: question ids rows[r] continue prefix owner[r]."""
        starts = [prefixes.following[i] for i in owner]
        new = self._rows(rows, starts)
        kept = prefixes.kept.select(owner)
        with torch.no_grad(), self.backbone.adapters(prefixes.adapters):
            out = self._continued(kept, new)
        valid = torch.cat([kept.valid, new.valid], 1)
        after = [start + len(row) for start, row in zip(starts, rows, strict=True)]
        grown = Kept.of(out.past_key_values, valid, kept.whole and new.whole)
        return GenericPrompts(grown, after, new.last(out.last_hidden_state), prefixes.adapters)

    @torch.no_grad()
    def verdict_logits(self, features: Encoded, rows: list[list[int]], adapters: bool) -> Tensor:
        """Next-token logits (R, V) of one opened question per image, prefix and question in one
        pass.
        """
        outs = []
        with self.backbone.adapters(adapters):
            for start in range(0, len(features), self.chunk):
                chosen = list(range(start, min(start + self.chunk, len(features))))
                some = features.select(chosen)
                whole = self._rows_with_images(some, [rows[i] for i in chosen])
                hidden = self._pass_with_images(some, whole).last_hidden_state
                outs.append(self.backbone.logits(whole.last(hidden)))
        self.counters.verdicts += len(features)
        return torch.cat(outs)

    @torch.no_grad()
    def forked_verdict_logits(
        self, prefixes: GenericPrefixes, owner: list[int], rows: list[list[int]]
    ) -> Tensor:
        """The same for images whose prefix is at hand."""
        self.counters.verdicts += len(rows)
        return self.backbone.logits(self.prompt(prefixes, owner, rows).last)

    # ---- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: GenericPrompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """fan[r] answers to prompt r, at most `limit` tokens each; a seed per answer; temperature 0
        is greedy.
        """
        with self.backbone.adapters(prompts.adapters):
            return self._generate(prompts, owners(fan), limit, seeds, temperature)

    def _generate(
        self,
        prompts: GenericPrompts,
        owner: list[int],
        limit: int,
        seeds: list[int],
        temperature: float,
    ) -> Rollout:
        going = self._start(prompts, owner, seeds)
        sheet = Sheet.blank(len(seeds), limit, self.tokens, self.device)
        logits = self.backbone.logits(prompts.last)[put(owner, self.device)]
        for step in range(limit):
            token, score = sample(
                logits, temperature=temperature, banned=self.banned, seed=going.seeds, position=step
            )
            sheet.write(step, going.where, token, score)
            if step + 1 == limit or (step + 1) % self.poll == 0:
                self.interrupted()
                home = self.home(sheet.joined()).tolist()  # the one host sync
                alive = [home[row][-1] > step + 1 for row in going.rows]
                if step + 1 == limit or not any(alive):
                    break
                if sum(alive) <= COMPACT_BELOW * len(alive):
                    token = token[going.select(alive, self.device)]
            logits = self._next(going, token, step)
        return sheet.rollout(home)

    def _start(self, prompts: GenericPrompts, owner: list[int], seeds: list[int]) -> Going:
        """All rows, before their first token."""
        kept = prompts.kept.select(owner)
        return Going(
            list(range(len(owner))),
            torch.arange(len(owner), device=self.device),
            put(seeds, self.device),
            put([prompts.following[p] for p in owner], self.device),
            kept.cache(),
            kept.valid,
            kept.whole,
        )

    def _next(self, going: Going, token: Tensor, step: int) -> Tensor:
        """Logits (rows, V) after one more token per row, the `step`-th."""
        new = Rows(token[:, None], going.positions[:, None] + step, [1] * len(token))
        going.valid = torch.cat([going.valid, new.valid], 1)
        mask = None if going.whole else going.valid
        more = self.backbone.crossing(new.ids, 0)
        out = self._forward(new, mask, going.cache, more)
        self.counters.decode_steps += 1
        self.counters.tokens_decoded += len(token)
        return self.backbone.logits(out.last_hidden_state[:, -1])

    # ---- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        features: Encoded,
        answered: Answered,
        adapters: bool,
        *,
        prefixes: GenericPrefixes | None = None,
        recompute: bool = False,
        prompts: Any = None,
    ) -> Tensor:
        """Hidden states (sum of lengths, E) that predict each sampled token, packed row by row.

        Each image prefix is computed once for all its answers, in a pass of its own; where every
        question has one answer, in the answer's. recompute: no activations are kept inside a layer,
        and every answer is its own full sequence.
        """
        answers = answered.answers.rows()
        asked = [answered.rows[i] for i in answered.owner]
        new = [row + ids[:-1] for row, ids in zip(asked, answers, strict=True)]
        with self.backbone.adapters(adapters):
            if prefixes is None and (answered.one_each or recompute):
                hidden, rows = self._score_whole(features.select(answered.owner), new, recompute)
            else:
                source = self._prefill(features, adapters) if prefixes is None else prefixes
                rows = self._rows(new, [source.following[i] for i in answered.owner])
                hidden = self._continued(source.kept.select(answered.owner), rows).last_hidden_state
        return _ends(hidden, rows.lengths, answered.answers.lengths)

    def _score_whole(
        self, features: Encoded, new: list[list[int]], recompute: bool
    ) -> tuple[Tensor, Rows]:
        """Every answer as one sequence from its image on: states (N, T, E), and its rows."""
        rows = self._rows_with_images(features, new)
        if not recompute:
            return self._pass_with_images(features, rows).last_hidden_state, rows
        with self.backbone.checkpointed():
            return self._pass_with_images(features, rows).last_hidden_state, rows

    def score_released(self, features: Encoded, answered: Answered, adapters: bool) -> ReleasedSpan:
        """The released code's span; see `fast.FastEngine.score_released`."""
        tokens = self.tokens
        answers = answered.answers.rows()
        asked = [answered.rows[i] for i in answered.owner]
        new = [row + ids for row, ids in zip(asked, answers, strict=True)]
        some = features.select(answered.owner)
        rows = self._rows_with_images(some, new)
        with self.backbone.adapters(adapters):
            hidden = self._pass_with_images(some, rows).last_hidden_state
        before = len(tokens.head) + 1 + len(tokens.tail)
        starts = [before + len(row) for row in asked]
        spans = list(zip(starts, rows.lengths, strict=True))
        states = [hidden[n, start - 1 : end - 1] for n, (start, end) in enumerate(spans)]
        ids = [rows.ids[n, start:end] for n, (start, end) in enumerate(spans)]
        return ReleasedSpan(torch.cat(states), torch.cat(ids), [len(x) for x in ids])

    @torch.no_grad()
    def attention_share(
        self,
        prefixes: GenericPrefixes,
        owner: list[int],
        questions: list[list[int]],
        answers: Rollout,
    ) -> Tensor:
        """fp32 (layers, N) on the CPU: see `attention_meter.image_share`. One pass of the stock
        model's eager attention, whose weights (N, heads, T, S) of all layers are held at once.
        """
        pairs = zip(questions, answers.rows(), strict=True)
        new = self._rows(
            [question + ids[:-1] for question, ids in pairs],
            [prefixes.following[i] for i in owner],
        )
        kept = prefixes.kept.select(owner)
        with self.backbone.adapters(prefixes.adapters), self.backbone.eager():
            out = self._continued(kept, new, output_attentions=True)
        image = self._image_slots([prefixes.grids[i] for i in owner], kept.valid.shape[1])
        steps = torch.arange(new.ids.shape[1], device=self.device)
        first = put([len(question) - 1 for question in questions], self.device)[:, None]
        asks = ((steps >= first) & new.valid).float()
        shares = []
        for weights in out.attentions:
            on_image = (weights[..., : image.shape[1]] * image[:, None, None]).sum(-1).mean(1)
            shares.append((on_image.float() * asks).sum(1) / asks.sum(1))
        return torch.stack(shares).cpu()

    def _image_slots(self, grids: list[tuple[int, int]], slots: int) -> Tensor:
        """(N, slots): 1 where a prefix holds its image."""
        head = len(self.tokens.head)
        ends = [head + self.backbone.image_tokens(grid) for grid in grids]
        places = torch.arange(slots, device=self.device)
        return ((places >= head) & (places < put(ends, self.device)[:, None])).float()

    # ---- passes ----------------------------------------------------------------------------------

    def _pass_with_images(
        self, features: Encoded, rows: Rows, cache: DynamicCache | None = None
    ) -> Any:
        """The stock forward over rows that begin with their images' prefixes."""
        self.counters.prefixes += len(features)
        backbone = self.backbone
        more = backbone.marks(rows.ids) | backbone.crossing(rows.ids, len(self.tokens.head))
        mask = None if rows.whole else rows.valid
        with backbone.recorded(features):
            return self._forward(rows, mask, cache, backbone.blank(features) | more)

    def _continued(self, kept: Kept, rows: Rows, **more: Any) -> Any:
        """The stock forward over rows that go on from what is kept."""
        mask = None
        if not (kept.whole and rows.whole):
            mask = torch.cat([kept.valid, rows.valid], 1)
        more |= self.backbone.crossing(rows.ids, 0)
        return self._forward(rows, mask, kept.cache(), more)

    def _forward(
        self,
        rows: Rows,
        mask: Tensor | None,
        cache: DynamicCache | None,
        more: dict[str, Any],
    ) -> Any:
        """mask: bool (N, S) of all slots so far, None where no slot is padding."""
        self.counters.forwards += 1
        if mask is not None:
            self._check_window(mask.shape[1])
        positions = rows.positions
        if self.backbone.row.mrope and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        return self.backbone.forward(
            input_ids=rows.ids,
            position_ids=positions,
            attention_mask=None if mask is None else mask.long(),
            past_key_values=cache,
            use_cache=cache is not None,
            **more,
        )

    def _check_window(self, slots: int) -> None:
        """A sliding window counts padding, which lies between question and answer. Raises
        ConfigError where it would not see all slots.
        """
        window = getattr(self.backbone.config.get_text_config(), "sliding_window", None)
        if window and slots > window:
            raise ConfigError(
                f"rows of {slots} tokens, padding among them, are longer than the sliding window "
                f"of {window} that {self.backbone.row.model_type} has; padding would count; use "
                "shorter questions or --model.engine stock"
            )

    # ---- rows ------------------------------------------------------------------------------------

    def _rows(self, rows: list[list[int]], starts: list[int]) -> Rows:
        """Texts that go on from these positions."""
        first = put(starts, self.device)[:, None]
        steps = torch.arange(max(map(len, rows)), device=self.device)
        return Rows(self._padded(rows), first + steps, [len(row) for row in rows])

    def _rows_with_images(self, features: Encoded, rows: list[list[int]]) -> Rows:
        """Prefixes, each followed by a row of its own."""
        prefixes = [self._prefix_ids(grid) for grid in features.grids]
        whole = [prefix + row for prefix, row in zip(prefixes, rows, strict=True)]
        ids = self._padded(whole)
        lengths = [len(row) for row in whole]
        if not self.backbone.row.mrope:
            steps = torch.arange(ids.shape[1], device=self.device)
            return Rows(ids, steps.expand(len(whole), -1), lengths)
        places = [self._places(grid, ids.shape[1]) for grid in features.grids]
        return Rows(ids, torch.stack(places, 1), lengths)

    def _places(self, grid: tuple[int, int], size: int) -> Tensor:
        """Rope positions (3, size) of a prefix and what follows it."""
        prefix = self._span(grid)
        after = torch.arange(size - prefix.shape[1], device=self.device) + self._following(grid)
        return torch.cat([prefix, after.expand(3, -1)], 1)

    def _span(self, grid: tuple[int, int]) -> Tensor:
        """Rope positions (3, prefix), asked of the model once per grid."""
        if grid not in self._spans:
            ids = put(self._prefix_ids(grid), self.device)
            self._spans[grid] = self.backbone.positions(ids, grid).to(self.device)
        return self._spans[grid]

    def _following(self, grid: tuple[int, int]) -> int:
        """The position after a prefix."""
        if not self.backbone.row.mrope:
            return len(self._prefix_ids(grid))
        return int(self._span(grid).max()) + 1

    def _prefix_ids(self, grid: tuple[int, int]) -> list[int]:
        places = self.backbone.image_tokens(grid)
        return self.tokens.head + [self.tokens.image_token] * places + self.tokens.tail

    def _padded(self, rows: list[list[int]]) -> Tensor:
        """(N, T) on the device."""
        longest = max(map(len, rows))
        return put([row + [self.tokens.pad] * (longest - len(row)) for row in rows], self.device)


def _ends(hidden: Tensor, lengths: list[int], wanted: list[int]) -> Tensor:
    """Of (N, T, E) the last `wanted[n]` of each row's `lengths[n]` tokens, packed."""
    width = hidden.shape[1]
    places: list[int] = []
    for row, (length, count) in enumerate(zip(lengths, wanted, strict=True)):
        places += range(row * width + length - count, row * width + length)
    return hidden.flatten(0, 1)[put(places, hidden.device)]
