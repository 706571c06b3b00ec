"""Qwen3-VL: its own forward pass over the tensors transformers and PEFT own. Vision once, tokens in trees, adapters on or off.

Three parts: `encode` (frozen vision tower, up to but not including the mergers), `merge` (mergers, which may carry LoRA) and `forward`
(the decoder over *levels*: the nodes of a tree prefix → prompt → completion, each level packed, every linear one product over all levels).
What is left out: video, padding tokens, dropout, any mutation of the modules.

Shapes: P patches, n packed tokens, N rows of a level, T tokens of a row, C vision width, E text width, KV key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from vise_kernels import heads, heads_backward, patchify
from vise_kernels.heads import Parts, Turn

from vise_fast.model.attention import Grid, Part, attend
from vise_fast.model.lora_linear import FusedLinear, Norm, Pack, Swiglu, recomputed
from vise_fast.model.products import linear, linear_gelu_tanh

# Language attention and MLP plus the projectors; nothing inside the vision blocks (METHOD section
# 6).
LORA_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    r"|model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
)

SWIGLU = Swiglu()
See = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (N, H, D), k, v (N, KV, D)) -> attention output (N, H, D) of one new token per row."""
# On a CPU: patches that go through the vision tower together, so that a block's activations stay in
# the cache.
ENCODE_AT_ONCE = 1024


@dataclass
class Features:
    """Vision features before the mergers: last (P, C), taps [(P, C)] per deepstack layer, grids [(rows, columns)] in patches per image."""

    last: Tensor
    taps: list[Tensor]
    grids: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.grids)

    def select(self, images: list[int]) -> Features:
        """The features of some images, in that order."""
        if images == list(range(len(self.grids))):
            return self
        starts = []
        total = 0
        for rows, columns in self.grids:
            starts.append((total, rows * columns))
            total += rows * columns
        pick = torch.cat([torch.arange(starts[i][0], sum(starts[i])) for i in images]).to(
            self.last.device
        )
        return Features(
            self.last[pick], [tap[pick] for tap in self.taps], [self.grids[i] for i in images]
        )


@dataclass
class Segment:
    """Keys and values of one stretch of tokens: per layer (N, KV, T, D); lengths (N,) where rows are ragged, else None.

    bias: additive (N, T) instead of lengths where the padding is not all at the end (`join`).
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor | None = None
    bias: Tensor | None = None

    def part(self, layer: int, grid: Grid | None, stop: int | None = None) -> Part:
        """One layer's bank, of the first `stop` tokens."""
        return Part(
            self.keys[layer][:, :, :stop],
            self.values[layer][:, :, :stop],
            self.lengths,
            grid,
            bias=self.bias,
        )

    def select(self, rows) -> Segment:
        """A copy of some rows."""
        lengths, bias = (None if x is None else x[rows] for x in (self.lengths, self.bias))
        return Segment([k[rows] for k in self.keys], [v[rows] for v in self.values], lengths, bias)

    def detach(self) -> Segment:
        """The same keys and values without their graph."""
        return Segment(
            [k.detach() for k in self.keys],
            [v.detach() for v in self.values],
            self.lengths,
            self.bias,
        )

    def counts(self) -> Tensor:
        """(N,) tokens of each row; for segments without a bias."""
        rows, _, tokens, _ = self.keys[0].shape
        return (
            torch.full((rows,), tokens, device=self.keys[0].device)
            if self.lengths is None
            else self.lengths
        )

    @torch.no_grad()
    def stack(self, below: Segment) -> Segment:
        """A copy of these rows and, after them, of another segment's; without their graph."""
        sizes = [segment.keys[0].shape[2] for segment in (self, below)]
        first, second = (
            (lambda x, room=max(sizes) - size: F.pad(x, (0, 0, 0, room))) for size in sizes
        )
        keys, values = (
            [torch.cat([first(a), second(b)]) for a, b in zip(x, y, strict=True)]
            for x, y in ((self.keys, below.keys), (self.values, below.values))
        )
        ragged = sizes[0] != sizes[1] or self.lengths is not None or below.lengths is not None
        return Segment(keys, values, torch.cat([self.counts(), below.counts()]) if ragged else None)

    def visible(self) -> Tensor:
        """Additive (N, T): -inf on padding."""
        rows, _, tokens, _ = self.keys[0].shape
        bias = self.keys[0].new_zeros(rows, tokens)
        if self.lengths is None:
            return bias
        return bias.masked_fill_(
            torch.arange(tokens, device=bias.device) >= self.lengths[:, None], -torch.inf
        )

    def join(self, rows: Tensor, later: Segment, room: int) -> Segment:
        """A copy of some rows, each followed by the same row of `later` and by `room` empty tokens."""

        def bank(first: Tensor, second: Tensor) -> Tensor:
            (count, heads, tokens, dim) = second.shape
            before = first.shape[2]
            whole = second.new_empty(count, heads, before + tokens + room, dim)
            whole[:, :, :before], whole[:, :, before : before + tokens] = first[rows], second
            return whole

        keys, values = (
            [bank(a, b) for a, b in zip(x, y, strict=True)]
            for x, y in ((self.keys, later.keys), (self.values, later.values))
        )
        if self.lengths is None and later.lengths is None:
            return Segment(keys, values)
        return Segment(
            keys,
            values,
            bias=F.pad(torch.cat([self.visible()[rows], later.visible()], 1), (0, room)),
        )


class Ragged:
    """Rows of different lengths, packed (n, ...) or padded (N, T, ...); equal lengths are plain views."""

    def __init__(self, lengths: list[int], device: torch.device | str) -> None:
        self.device = device
        self.lengths = lengths
        self.longest = max(lengths)
        self.count = sum(lengths)
        self.uniform = min(lengths) == self.longest
        self.valid = None if self.uniform else torch.tensor(lengths, device=device)
        if not self.uniform:
            slots = [
                row * self.longest + t for row, length in enumerate(lengths) for t in range(length)
            ]
            self.slots = torch.tensor(slots, device=device)

    def last(self) -> Tensor:
        """Packed index of each row's last token."""
        return torch.tensor(self.lengths, device=self.device).cumsum(0) - 1

    def pad(self, x: Tensor) -> Tensor:
        if not self.uniform:
            x = x.new_zeros(len(self.lengths) * self.longest, *x.shape[1:]).index_copy(
                0, self.slots, x
            )
        return x.view(len(self.lengths), self.longest, *x.shape[1:])

    def pack(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.uniform else x.index_select(0, self.slots)


@dataclass
class Level:
    """Rows of new tokens at one depth of the tree.

    embeds (n, E) packed; positions (3, n); parents: what the rows see besides themselves, each a cached Segment or the index of an
    earlier level, with the Grid that says which entry each row sees; deep: packed image rows and what each early layer adds there;
    read: whose final hidden states are wanted: "all" tokens, the "last" of each row, or "none".
    """

    embeds: Tensor
    positions: Tensor
    rag: Ragged
    parents: list[tuple[Segment | int, Grid | None]] = field(default_factory=list)
    deep_rows: Tensor | None = None
    deep: list[Tensor] = field(default_factory=list)
    read: str = "all"

    def rows_read(self) -> int:
        """How many hidden states come back."""
        return {"all": self.rag.count, "last": len(self.rag.lengths), "none": 0}[self.read]


class Backbone:
    """The fast forward of one Qwen3-VL model. It computes with a copy of the LoRA masters: `refresh` after each change of them."""

    def __init__(self, model: nn.Module) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = core.config
        self.visual = core.model.visual
        self.text = core.model.language_model
        self.head = core.lm_head
        text = core.config.text_config
        vision = core.config.vision_config
        self.heads = text.num_attention_heads
        self.kv_heads = text.num_key_value_heads
        self.head_dim = text.head_dim
        self.attend = attend
        self.eps = text.rms_norm_eps
        self.scale = text.head_dim**-0.5
        self.patch = vision.patch_size
        self.merge_size = vision.spatial_merge_size
        self.temporal = vision.temporal_patch_size
        self.sections = text.rope_parameters.get("mrope_section", [24, 20, 20])
        self.tanh_gelu = vision.hidden_act == "gelu_pytorch_tanh"
        self.dtype = self.text.embed_tokens.weight.dtype
        self._build()
        self.refresh()

    def _build(self) -> None:
        self.layers = [_Layer(layer) for layer in self.text.layers]
        self.mergers = [
            _Merger(m) for m in [self.visual.merger, *self.visual.deepstack_merger_list]
        ]
        weight = self.visual.patch_embed.proj.weight
        # A still image shows the same pixels at every temporal tap, so the taps fold into one
        # product.
        self.patch_weight = weight.detach().float().sum(2).flatten(1).to(weight.dtype)
        self.patch_bias = self.visual.patch_embed.proj.bias
        self.rope_inverse = self.text.rotary_emb.inv_freq.float().to(self.device)
        self.rope_axis = torch.zeros(len(self.rope_inverse), dtype=torch.long)
        for dim in (1, 2):
            self.rope_axis[dim : self.sections[dim] * 3 : 3] = dim
        self.rope_axis = self.rope_axis.to(self.device)
        self._grids: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.encode_at_once = ENCODE_AT_ONCE if self.device.type == "cpu" else None

    @property
    def device(self) -> torch.device:
        return self.text.embed_tokens.weight.device

    def fused(self) -> list[FusedLinear]:
        return [f for group in [*self.layers, *self.mergers] for f in group.linears]

    @torch.no_grad()
    def refresh(self) -> None:
        """Recast the LoRA masters, in place (addresses stay valid for captured graphs)."""
        for linear in self.fused():
            fresh = linear.pack(self.dtype)
            old = getattr(linear, "cached", None)
            if old is None or fresh is None:
                linear.cached = fresh
            else:
                for held, new in zip([old.down, *old.up], [fresh.down, *fresh.up], strict=True):
                    held.copy_(new)

    def _pack(self, linear: FusedLinear, adapters: bool) -> Pack | None:
        return linear.cached if adapters else None

    # ---- vision ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: list[Tensor]) -> Features:
        """uint8 (H, W, 3) images, sides multiples of patch·merge, to features before the mergers; each image attends to itself only."""
        patches, _ = patchify(
            images, patch=self.patch, merge=self.merge_size, dtype=self.dtype, single_tap=True
        )
        return self.encode_patches(
            patches.to(self.device),
            [(image.shape[0] // self.patch, image.shape[1] // self.patch) for image in images],
        )

    @torch.no_grad()
    def encode_patches(self, patches: Tensor, grids: list[tuple[int, int]]) -> Features:
        """The same from normalised patches (P, 3·patch²) in merge order, one temporal tap."""
        parts = [
            self._tower(part, some)
            for part, some in _slices(patches, grids, self.encode_at_once or len(patches))
        ]
        if len(parts) == 1:
            return Features(*parts[0], grids)
        lasts, taps = zip(*parts, strict=True)
        return Features(
            torch.cat(lasts), [torch.cat(tap) for tap in zip(*taps, strict=True)], grids
        )

    def _tower(self, patches: Tensor, grids: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states (P, C) and deepstack taps of some images."""
        tables = [self._grid(grid) for grid in grids]
        x = F.linear(patches, self.patch_weight, self.patch_bias)
        x = x + torch.cat([t[0] for t in tables])
        cos = torch.cat([t[1] for t in tables])
        sin = torch.cat([t[2] for t in tables])
        runs = _runs([rows * columns for rows, columns in grids])
        taps = []
        for index, block in enumerate(self.visual.blocks):
            x = x + self._vision_attention(block.attn, block.norm1(x), cos, sin, runs)
            x = x + self._vision_mlp(block.mlp, block.norm2(x))
            if index in self.visual.deepstack_visual_indexes:
                taps.append(x)
        return x, taps

    def _vision_attention(
        self, attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int, int]]
    ) -> Tensor:
        qkv = attn.qkv(x).view(x.shape[0], 3, attn.num_heads, -1)
        qk = _rotate(qkv[:, :2], cos[:, None, None], sin[:, None, None])
        v = qkv[:, 2]
        outs = []
        for start, images, size in runs:
            stop = start + images * size
            q, k = (qk[start:stop, i].unflatten(0, (images, size)).transpose(1, 2) for i in (0, 1))
            out = F.scaled_dot_product_attention(
                q, k, v[start:stop].unflatten(0, (images, size)).transpose(1, 2)
            )
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return attn.proj(outs[0] if len(outs) == 1 else torch.cat(outs))

    def _vision_mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        first = mlp.linear_fc1
        return mlp.linear_fc2(
            linear_gelu_tanh(x, first.weight, first.bias)
            if self.tanh_gelu
            else mlp.act_fn(first(x))
        )

    def _grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Position embedding (P, C) and rotary cos, sin (P, d) of one patch grid, in merge order; computed once per grid."""
        if grid not in self._grids:
            rows, columns = _merge_order(*grid, self.merge_size, self.device)
            side = int(self.visual.pos_embed.weight.shape[0] ** 0.5)
            table = _bilinear(self.visual.pos_embed.weight.float(), side, grid, rows, columns).to(
                self.dtype
            )
            inverse = self.visual.rotary_pos_emb.inv_freq.float().to(self.device)
            angles = torch.cat([rows[:, None] * inverse, columns[:, None] * inverse], 1).repeat(
                1, 2
            )
            self._grids[grid] = (table, angles.cos(), angles.sin())
        return self._grids[grid]

    def merge(self, features: Features, adapters: bool) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings (tokens, E) and, per early decoder layer, what deepstack adds to them."""
        last, *taps = [
            merger(x, [self._pack(linear, adapters) for linear in merger.linears])
            for merger, x in zip(self.mergers, [features.last, *features.taps], strict=True)
        ]
        return last, taps

    # ---- decoder ---------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.text.embed_tokens.weight)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (n, D / 2) in fp32 for positions (3, n); the three axes interleave as mrope_section says."""
        angles = positions.T.float().index_select(1, self.rope_axis) * self.rope_inverse
        return angles.cos(), angles.sin()

    def forward(
        self, levels: list[Level], adapters: bool, recompute: bool = False, keep: bool = True
    ) -> tuple[list[Tensor], list[Segment]]:
        """Final-normed hidden states of what each level's `read` asks for and, with `keep`, the Segment of each level.

        The last layer computes nothing beyond keys and values for tokens that nobody reads. `recompute`: save no activations inside a layer.
        """
        x = torch.cat([level.embeds for level in levels])
        cos, sin = self.rope(torch.cat([level.positions for level in levels], 1))
        sizes = [level.rag.count for level in levels]
        segments = [Segment([], [], level.rag.valid) for level in levels]
        for index, layer in enumerate(self.layers):
            packs = [self._pack(linear, adapters) for linear in layer.linears]
            args = (index, x, cos, sin, levels, packs)
            x, *banks = (
                checkpoint(self._layer, *args, use_reentrant=False)
                if recompute
                else self._layer(*args)
            )
            for segment, k, v in zip(
                segments if keep else [], banks[::2], banks[1::2], strict=keep
            ):
                # k and v are views, of all levels' keys or of the whole qkv product: kept as they
                # are, they would keep those alive
                segment.keys.append(_compact(k)), segment.values.append(_compact(v))
            if len(x) == sum(sizes):
                x = self._deepstack(x, index, levels, sizes)
        hidden = recomputed(Norm(self.text.norm.weight, self.eps), x)
        return list(hidden.split([level.rows_read() for level in levels])), segments if keep else []

    def _layer(
        self, index: int, x: Tensor, cos: Tensor, sin: Tensor, levels: list[Level], packs
    ) -> tuple:
        layer = self.layers[index]
        final = index + 1 == len(self.layers)
        q, k, v = self._qkv(layer, x, cos, sin, packs[0])
        sizes = [level.rag.count for level in levels]
        outs = []
        kept = []
        banks = []
        for level, x_, q_, k_, v_ in zip(
            levels, x.split(sizes), q.split(sizes), k.split(sizes), v.split(sizes), strict=True
        ):
            own = level.rag.pad(k_).transpose(1, 2), level.rag.pad(v_).transpose(1, 2)
            banks.append(own)
            parts = [
                self._parent(index, source, grid, banks, levels) for source, grid in level.parents
            ]
            if final and level.read == "last":
                last = level.rag.last()
                out = self.attend(
                    q_[last][:, None], [*parts, Part(*own, level.rag.valid)], self.scale
                )
                outs.append(out.flatten(1)), kept.append(x_[last])
            elif not final or level.read == "all":
                out = self.attend(level.rag.pad(q_), [*parts, Part(*own, causal=True)], self.scale)
                outs.append(level.rag.pack(out).flatten(1)), kept.append(x_)
        if not outs:
            return (x[:0], *[bank for pair in banks for bank in pair])
        x, out = (pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in (kept, outs))
        x = x + layer.linears[1](out, packs[1])
        return (self._mlp(layer, x, packs), *[bank for pair in banks for bank in pair])

    def _parent(
        self, index: int, source: Segment | int, grid: Grid | None, banks: list, levels: list[Level]
    ) -> Part:
        if isinstance(source, Segment):
            return source.part(index, grid)
        return Part(*banks[source], levels[source].rag.valid, grid)

    def _qkv(
        self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, pack: Pack | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q (n, H, D), k (n, KV, D), and v (n, KV, D)."""
        return _parted(
            layer.linears[0](x, pack, layer.norm1),
            Turn(*layer.qk_norms, cos, sin, self.eps),
            self.heads,
        )

    def _mlp(self, layer: _Layer, x: Tensor, packs) -> Tensor:
        return x + layer.linears[3](layer.linears[2](x, packs[2], layer.norm2), packs[3], SWIGLU)

    def _deepstack(self, x: Tensor, index: int, levels: list[Level], sizes: list[int]) -> Tensor:
        start = 0
        for level, size in zip(levels, sizes, strict=True):
            if level.deep_rows is not None and index < len(level.deep):
                x = x.index_add(0, level.deep_rows + start, level.deep[index])
            start += size
        return x

    def decode(self, ids: Tensor, positions: Tensor, see: See, adapters: bool) -> Tensor:
        """One token per row: ids (N,), positions (N,); `see` keeps the keys and values and attends. Hidden states (N, E)."""
        x = self.embed(ids)
        cos, sin = self.rope(positions.expand(3, -1))
        for index, layer in enumerate(self.layers):
            packs = [self._pack(linear, adapters) for linear in layer.linears]
            out = see(index, *self._qkv(layer, x, cos, sin, packs[0]))
            x = x + layer.linears[1](out.flatten(1), packs[1])
            x = self._mlp(layer, x, packs)
        return Norm(self.text.norm.weight, self.eps)(x)

    def growing(self, parents: list[tuple[Segment, Grid | None]], buffer: Segment, at: int) -> See:
        """For `decode`: rows see their parents and what `buffer` holds; the new keys and values go to its place `at`."""

        def see(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            buffer.keys[index].select(2, at).copy_(k), buffer.values[index].select(2, at).copy_(v)
            parts = [source.part(index, grid) for source, grid in parents]
            return self.attend(q[:, None], [*parts, buffer.part(index, None, at + 1)], self.scale)[
                :, 0
            ]

        return see

    def buffer(self, rows: int, tokens: int) -> Segment:
        """Empty keys and values for `tokens` new tokens of each row."""
        shape = (rows, self.kv_heads, tokens, self.head_dim)
        new = lambda: [
            torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.layers
        ]
        return Segment(new(), new())

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (n, V) of hidden states (n, E)."""
        return linear(hidden, self.head.weight).float()


class _Layer:
    """One decoder layer's tensors: linears = [qkv, o, gate+up, down]."""

    def __init__(self, layer: nn.Module) -> None:
        attn = layer.self_attn
        mlp = layer.mlp
        eps = attn.config.rms_norm_eps
        self.norm1 = Norm(layer.input_layernorm.weight, eps)
        self.norm2 = Norm(layer.post_attention_layernorm.weight, eps)
        qkv = FusedLinear([attn.q_proj, attn.k_proj, attn.v_proj])
        self.linears = [
            qkv,
            FusedLinear([attn.o_proj]),
            FusedLinear([mlp.gate_proj, mlp.up_proj]),
            FusedLinear([mlp.down_proj]),
        ]
        self.qk_norms = attn.q_norm.weight, attn.k_norm.weight


class _Merger:
    """A patch merger: norm (before or after the 2x2 shuffle), two linears with GELU between."""

    def __init__(self, merger: nn.Module) -> None:
        self.norm = merger.norm
        self.width = merger.hidden_size
        self.postshuffle = merger.use_postshuffle_norm
        self.linears = [FusedLinear([merger.linear_fc1]), FusedLinear([merger.linear_fc2])]

    def __call__(self, x: Tensor, packs: list[Pack | None]) -> Tensor:
        x = (
            self.norm(x.view(-1, self.width))
            if self.postshuffle
            else self.norm(x).view(-1, self.width)
        )
        return self.linears[1](self.linears[0](x, packs[0]), packs[1], F.gelu)


def _parted(qkv: Tensor, turn: Turn, queries: int) -> Parts:
    """`heads`, differentiable in qkv, which alone is saved. Where nothing is saved, the values are copied out, so that qkv can go."""
    if torch.is_grad_enabled():
        return Parts(*_Parted.apply(qkv, turn, queries))
    parts = heads(qkv, turn, queries)
    return parts._replace(v=parts.v.contiguous())


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, turn: Turn, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv)
        ctx.turn = turn
        return tuple(heads(qkv, turn, queries))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        return heads_backward(*ctx.saved_tensors, ctx.turn, Parts(dq, dk, dv)), None, None


def _compact(x: Tensor) -> Tensor:
    """A copy with a storage of its own, whatever the strides of `x` look like."""
    return x.clone(memory_format=torch.contiguous_format)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in fp32, back in x's dtype: x cos + rotate_half(x) sin; without gradients."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    out = wide * cos
    (left, right) = wide.chunk(2, -1)
    (low, high) = out.chunk(2, -1)
    (before, after) = sin.chunk(2, -1)
    low.addcmul_(right, before, value=-1)
    high.addcmul_(left, after)
    return out.to(x.dtype)


def _slices(
    patches: Tensor, grids: list[tuple[int, int]], most: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Neighbouring images of at most `most` patches together (or one larger one): their patches and grids."""
    start = 0
    first = 0
    while first < len(grids):
        stop = first
        size = 0
        while stop < len(grids) and (
            stop == first or size + grids[stop][0] * grids[stop][1] <= most
        ):
            size += grids[stop][0] * grids[stop][1]
            stop += 1
        yield patches[start : start + size], grids[first:stop]
        start = start + size
        first = stop


def _runs(sizes: list[int]) -> list[tuple[int, int, int]]:
    """Neighbours of equal size as (first token, images, size): each run is one batched attention."""
    runs = []
    start = 0
    for size in sizes:
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, size)
        else:
            runs.append((start, 1, size))
        start += size
    return runs


def _merge_order(
    rows: int, columns: int, merge: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column of each patch in the order the merger wants: 2x2 blocks, row-major blocks, row-major inside."""
    r, c = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    blocks = lambda x: (
        x.view(rows // merge, merge, columns // merge, merge).transpose(1, 2).flatten()
    )
    return blocks(r), blocks(c)


def _bilinear(
    table: Tensor, side: int, grid: tuple[int, int], rows: Tensor, columns: Tensor
) -> Tensor:
    """The learned side×side position table sampled at a rows×columns grid (corners aligned), for the given patches."""
    y = torch.linspace(0, side - 1, grid[0], device=table.device)[rows]
    x = torch.linspace(0, side - 1, grid[1], device=table.device)[columns]
    y0 = y.long()
    x0 = x.long()
    y1 = (y0 + 1).clamp(max=side - 1)
    x1 = (x0 + 1).clamp(max=side - 1)
    dy = (y - y0)[:, None]
    dx = (x - x0)[:, None]
    top = table[y0 * side + x0] * (1 - dx) + table[y0 * side + x1] * dx
    bottom = table[y1 * side + x0] * (1 - dx) + table[y1 * side + x1] * dx
    return top * (1 - dy) + bottom * dy
