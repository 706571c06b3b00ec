"""The nouns of the engine, and what it asks of a model: features of images, stretches of keys and
values, rows of new tokens, which row sees which stretch, and the `Backbone` protocol.

The tokens of a step form a tree: image prefix, question, answer. A *level* holds the rows of one
depth, a *segment* what a level left behind for those below it. Nothing here knows a model family;
a family is one file that implements `Backbone` (qwen3_vl.py).

Shapes: P patches, C vision width, n packed tokens, N rows of a level, T tokens of a row, E text
width, V vocabulary, M entries of a bank, F rows that share an entry, S keys of an entry, H query
heads, KV key heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vise_fast.model.attending.flash import BIAS_ROW
from vise_fast.system.machine.staging import put

Observe = Callable[[int, Tensor, Tensor], None]
"""(layer, q (n, H, D), k (n, KV, D)) of the packed tokens of a forward pass, to be looked at."""
See = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (N, H, D), k, v (N, KV, D)) -> attention output (N, H, D) of one new token per row."""


class KeysValues(NamedTuple):
    """Keys and values of one layer, (N, KV, T, D) each."""

    keys: Tensor
    values: Tensor


class Grid:
    """Which entry each row sees, as a (M, F) table of rows. `owner`: the entry of each row, int64
    (N,); `uniform`: rows are entry-major with F rows each, so that views suffice.
    """

    def __init__(self, owner: list[int], entries: int, device: torch.device | str = "cpu") -> None:
        ranks = _ranks(owner, entries)
        self.rows = len(owner)
        self.entries = entries
        self.fan = max(ranks) + 1
        slots = [entry * self.fan + rank for entry, rank in zip(owner, ranks, strict=True)]
        self.uniform = slots == list(range(entries * self.fan))
        self._slot = None if self.uniform else put(slots, device)
        self.owner = put(owner, device)

    def spread(self, x: Tensor) -> Tensor:
        """Rows (N, ...) to (M, F, ...); slots without a row are zero."""
        if self._slot is not None:
            table = x.new_zeros(self.entries * self.fan, *x.shape[1:])
            x = table.index_copy_(0, self._slot, x)
        return x.view(self.entries, self.fan, *x.shape[1:])

    def gather(self, x: Tensor) -> Tensor:
        """(M, F, ...) back to rows (N, ...)."""
        x = x.reshape(self.entries * self.fan, *x.shape[2:])
        return x if self._slot is None else x.index_select(0, self._slot)


def _ranks(owner: list[int], entries: int) -> list[int]:
    """How many earlier rows see the same entry, for each row."""
    counts = [0] * entries
    ranks = []
    for entry in owner:
        ranks.append(counts[entry])
        counts[entry] += 1
    return ranks


@dataclass
class Part:
    """A bank of keys and values (M, KV, S, D) each; lengths (M,): valid keys of each entry, None:
    all S.

    bias: additive (M, at least S) in the keys' dtype instead, for banks whose padding is not all at
    the end. causal: token t of a row sees the first t + 1 keys of its entry.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    grid: Grid | None = None
    causal: bool = False
    bias: Tensor | None = None

    def key_bias(self) -> Tensor | None:
        """Additive (M, S): -inf on padding, None when there is none. Rows start where GPU kernels
        want them.
        """
        size = self.keys.shape[2]
        if self.bias is not None:
            return self.bias[:, :size]
        if self.lengths is None:
            return None
        places = torch.arange(-(-size // BIAS_ROW) * BIAS_ROW, device=self.keys.device)
        beyond = places >= self.lengths[:, None]
        zeros = torch.zeros(beyond.shape, dtype=self.keys.dtype, device=self.keys.device)
        return zeros.masked_fill_(beyond, -torch.inf)[:, :size]


@dataclass
class Features:
    """Vision features before the mergers: last (P, C), taps [(P, C)] per deepstack layer, grids
    [(rows, columns)] in patches per image.
    """

    last: Tensor
    taps: list[Tensor]
    grids: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.grids)

    def select(self, images: list[int]) -> Features:
        """The features of some images, in that order."""
        if images == list(range(len(self))):
            return self
        pick = put(self._patches(images), self.last.device)
        return Features(
            self.last[pick], [tap[pick] for tap in self.taps], [self.grids[i] for i in images]
        )

    def _patches(self, images: list[int]) -> Tensor:
        """The rows of these images' patches."""
        sizes = [rows * columns for rows, columns in self.grids]
        runs = torch.arange(sum(sizes)).split(sizes)
        return torch.cat([runs[i] for i in images])


@dataclass
class Segment:
    """Keys and values of one stretch of tokens: per layer (N, KV, T, D); lengths (N,) where rows
    are ragged, else None.

    bias: additive (N, T) instead of lengths where the padding is not all at the end (`join`).
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.keys[0].shape[0]

    @property
    def tokens(self) -> int:
        """T: of the longest row."""
        return self.keys[0].shape[2]

    def first(self, rows: int) -> Segment:
        """Views of the first rows; nothing is copied."""
        if rows == self.rows:
            return self
        lengths = None if self.lengths is None else self.lengths[:rows]
        bias = None if self.bias is None else self.bias[:rows]
        keys = [k[:rows] for k in self.keys]
        return Segment(keys, [v[:rows] for v in self.values], lengths, bias)

    def part(self, layer: int, grid: Grid | None, stop: int | None = None) -> Part:
        """One layer's bank, of the first `stop` tokens."""
        keys = self.keys[layer][:, :, :stop]
        return Part(keys, self.values[layer][:, :, :stop], self.lengths, grid, bias=self.bias)

    def keep(self, layer: KeysValues) -> None:
        """Add the next layer. Its tensors are views, of all levels' keys or of a whole qkv product:
        kept as they are, they would keep those alive.
        """
        self.keys.append(_alone(layer.keys))
        self.values.append(_alone(layer.values))

    def select(self, rows: Tensor | list[int]) -> Segment:
        """A copy of some rows."""
        rows = put(rows, self.keys[0].device)
        lengths = None if self.lengths is None else self.lengths[rows]
        bias = None if self.bias is None else self.bias[rows]
        return Segment([k[rows] for k in self.keys], [v[rows] for v in self.values], lengths, bias)

    def detach(self) -> Segment:
        """The same keys and values without their graph."""
        keys = [k.detach() for k in self.keys]
        return Segment(keys, [v.detach() for v in self.values], self.lengths, self.bias)

    def counts(self) -> Tensor:
        """(N,) tokens of each row; for segments without a bias."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.rows,), self.tokens, device=self.keys[0].device)

    @torch.no_grad()
    def stack(self, below: Segment) -> Segment:
        """A copy of these rows and, after them, of another segment's; without their graph."""
        keys = [_stacked(a, b) for a, b in zip(self.keys, below.keys, strict=True)]
        values = [_stacked(a, b) for a, b in zip(self.values, below.values, strict=True)]
        equal = self.tokens == below.tokens and self.lengths is None and below.lengths is None
        return Segment(keys, values, None if equal else torch.cat([self.counts(), below.counts()]))

    def visible(self) -> Tensor:
        """Additive (N, T): -inf on padding."""
        bias = self.keys[0].new_zeros(self.rows, self.tokens)
        if self.lengths is None:
            return bias
        places = torch.arange(self.tokens, device=bias.device)
        return bias.masked_fill_(places >= self.lengths[:, None], -torch.inf)

    def join(self, rows: Tensor, later: Segment, room: int) -> Segment:
        """A copy of some rows, each followed by the same row of `later` and `room` empty tokens."""
        keys = [_joined(a[rows], b, room) for a, b in zip(self.keys, later.keys, strict=True)]
        values = [_joined(a[rows], b, room) for a, b in zip(self.values, later.values, strict=True)]
        if self.lengths is None and later.lengths is None:
            return Segment(keys, values)
        bias = torch.cat([self.visible()[rows], later.visible()], 1)
        return Segment(keys, values, bias=F.pad(bias, (0, room)))


def _alone(x: Tensor) -> Tensor:
    """A copy with a storage of its own, whatever the strides of `x` look like."""
    return x.clone(memory_format=torch.contiguous_format)


def _stacked(above: Tensor, below: Tensor) -> Tensor:
    """(N, KV, T, D) and (N', KV, T', D) as (N + N', KV, max(T, T'), D), padded with zeros."""
    room = max(above.shape[2], below.shape[2])
    wide = [F.pad(x, (0, 0, 0, room - x.shape[2])) for x in (above, below)]
    return torch.cat(wide)


def _joined(first: Tensor, second: Tensor, room: int) -> Tensor:
    """(N, KV, T, D) and (N, KV, T', D) as (N, KV, T + T' + room, D), the room not written."""
    before = first.shape[2]
    after = before + second.shape[2]
    count, heads, _, dim = second.shape
    whole = second.new_empty(count, heads, after + room, dim)
    whole[:, :, :before] = first
    whole[:, :, before:after] = second
    return whole


class Ragged:
    """Rows of different lengths, packed (n, ...) or padded (N, T, ...); equal ones are plain views.
    `valid`: int64 (N,) lengths, None where all are equal.
    """

    def __init__(self, lengths: list[int], device: torch.device | str) -> None:
        self.device = device
        self.lengths = lengths
        self.longest = max(lengths)
        self.count = sum(lengths)
        uniform = min(lengths) == self.longest
        self.valid = None if uniform else put(lengths, device)
        self._slots = None if uniform else put(self._places(), device)

    def _places(self) -> list[int]:
        """Where each packed token lies in the padded table, row after row."""
        places: list[int] = []
        for row, length in enumerate(self.lengths):
            places += range(row * self.longest, row * self.longest + length)
        return places

    @functools.cached_property
    def ends(self) -> Tensor:
        """Where rows begin and end among the packed tokens, int32 (N + 1,)."""
        return put(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)

    def last(self) -> Tensor:
        """Packed index of each row's last token."""
        return put([end - 1 for end in accumulate(self.lengths)], self.device)

    def pad(self, x: Tensor) -> Tensor:
        """(n, ...) to (N, T, ...), zeros on padding."""
        if self._slots is not None:
            table = x.new_zeros(len(self.lengths) * self.longest, *x.shape[1:])
            x = table.index_copy(0, self._slots, x)
        return x.view(len(self.lengths), self.longest, *x.shape[1:])

    def pack(self, x: Tensor) -> Tensor:
        """(N, T, ...) to (n, ...)."""
        x = x.flatten(0, 1)
        return x if self._slots is None else x.index_select(0, self._slots)


class Parent(NamedTuple):
    """What rows see besides themselves: a cached segment or the index of an earlier level, and
    which entry of it each row sees (None: row r sees entry r).
    """

    source: Segment | int
    grid: Grid | None


@dataclass
class Level:
    """Rows of new tokens at one depth of the tree.

    embeds (n, E) packed; positions (3, n); deep: packed image rows and what each early layer adds
    there; read: whose final hidden states are wanted: "all" tokens, the "last" of each row, or
    "none"; or those of some, in order: places of packed tokens, int64 (R,).
    """

    embeds: Tensor
    positions: Tensor
    rag: Ragged
    parents: list[Parent] = field(default_factory=list)
    deep_rows: Tensor | None = None
    deep: list[Tensor] = field(default_factory=list)
    read: Literal["all", "last", "none"] | Tensor = "all"

    def rows_read(self) -> int:
        """How many hidden states come back."""
        if isinstance(self.read, Tensor):
            return len(self.read)
        return {"all": self.rag.count, "last": len(self.rag.lengths), "none": 0}[self.read]


class Attend(Protocol):
    """Attention of q (N, T, H, D) over all parts together."""

    def __call__(self, q: Tensor, parts: list[Part], scale: float) -> Tensor: ...


class Backbone(Protocol):
    """One model as the engine sees it: a forward pass over weights that transformers and PEFT own.

    It computes with a copy of the LoRA masters in the compute dtype; `refresh` takes a new one.
    """

    patch: int
    """pixels along a patch"""
    merge_size: int
    """patches along an image token"""
    scale: float
    """of the attention scores"""
    dtype: torch.dtype
    attend: Attend
    depth: int
    """decoder layers"""
    decoder_weights: int
    """elements of the decoder layers' frozen products"""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def head(self) -> torch.nn.Linear:
        """The LM head, (V, E)."""

    def listen(self, poll: Callable[[], None]) -> None:
        """Call `poll` between layers, forwards and backwards; it may raise."""

    def refresh(self) -> None:
        """Take over changed LoRA masters, in place: addresses stay valid for captured graphs."""

    def encode(self, images: list[Tensor]) -> Features:
        """uint8 (H, W, 3) images, sides multiples of patch times merge_size; no adapters inside."""

    def merge(self, features: Features, adapters: bool) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings (tokens, E), and what each early layer adds to them, as large."""

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (n,) to (n, E)."""

    def forward(
        self,
        levels: list[Level],
        adapters: bool,
        *,
        recompute: bool = False,
        keep: bool = True,
        observe: Observe | None = None,
    ) -> tuple[list[Tensor], list[Segment]]:
        """Final-normed hidden states of what each level's `read` asks for and, with `keep`, the
        Segment of each level. recompute: save no activations inside a layer. observe: called with
        every layer's queries and keys.
        """

    def decode(self, ids: Tensor, positions: Tensor, see: See, adapters: bool) -> Tensor:
        """One token per row: ids (N,), positions (N,); `see` keeps the keys and values and attends.
        Hidden states (N, E).
        """

    def growing(self, parents: Sequence[Parent], buffer: Segment, at: int) -> See:
        """For `decode`: rows see their parents (segments) and what `buffer` holds; the new keys and
        values go to its place `at`.
        """

    def buffer(self, rows: int, tokens: int) -> Segment:
        """Empty keys and values for `tokens` new tokens of each row."""

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (n, V) of hidden states (n, E)."""
