"""Qwen3-VL: its own forward pass over the tensors transformers and PEFT own. Vision once, tokens in
trees, adapters on or off.

Three parts: `encode` (the frozen vision tower, qwen3_vl_vision.py), `merge` (mergers, which may
carry LoRA) and `forward` (the decoder over *levels*, the nodes of a tree prefix → prompt →
completion: each level packed, every linear one product over all levels). Left out: video, padding
tokens, dropout, any mutation of the modules.

Shapes: n packed tokens, N rows of a level, T tokens of a row, C vision width, E text width, H query
heads, KV key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from vise_kernels import Recast, heads, heads_backward
from vise_kernels.dispatch import stands_for_a_gpu
from vise_kernels.heads import Parts, Turn
from vise_kernels.raised import Normed

from vise_fast.model.attending.attention import attend, attend_packed
from vise_fast.model.lora_linear import Copy, FusedLinear, Norm, Pack, Swiglu, recomputed
from vise_fast.model.products import linear as product
from vise_fast.model.qwen3_vl_vision import VisionTower
from vise_fast.model.raised_layer import RaisedLayer
from vise_fast.model.tree import (
    Attend,
    Features,
    KeysValues,
    Level,
    Observe,
    Parent,
    Part,
    See,
    Segment,
)

# Language attention and MLP plus the projectors; nothing inside the vision blocks.
LANGUAGE_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
PROJECTOR_TARGETS = r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
LORA_TARGETS = f"{LANGUAGE_TARGETS}|{PROJECTOR_TARGETS}"
MROPE_SECTION = [24, 20, 20]
SWIGLU = Swiglu()


class Rotation(NamedTuple):
    """cos and sin (n, D / 2) in fp32 of packed tokens."""

    cos: Tensor
    sin: Tensor


class Packs(NamedTuple):
    """The LoRA factors of one decoder layer's products; None with adapters off."""

    qkv: Pack | None
    out: Pack | None
    gate_up: Pack | None
    down: Pack | None


OFF = Packs(None, None, None, None)


class Qwen3VL:
    """The fast forward of one Qwen3-VL model; a `Backbone`."""

    def __init__(self, model: Any, joins: bool | None = None) -> None:
        """joins: lay LoRA down factors below the weights (raised_layer.py); None: on a GPU."""
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        text = core.config.text_config
        self.config = core.config
        self.head: nn.Linear = core.lm_head
        self.attend: Attend = attend
        self.kv_heads: int = text.num_key_value_heads
        self.heads: int = text.num_attention_heads
        self.head_dim: int = text.head_dim
        self.eps: float = text.rms_norm_eps
        self.scale: float = text.head_dim**-0.5
        self._text = core.model.language_model
        self.dtype: torch.dtype = self._text.norm.weight.dtype
        visual = core.model.visual
        self.vision = VisionTower(visual)
        self.patch = self.vision.patch
        self.merge_size = self.vision.merge_size
        if joins is None:
            joins = self.device.type == "cuda" or stands_for_a_gpu(self.device)
        self.layers = [_Layer(layer, joins) for layer in self._text.layers]
        self.depth = len(self.layers)
        self.decoder_weights = sum(linear.size for linear in self._products())
        self.mergers = [_Merger(m) for m in [visual.merger, *visual.deepstack_merger_list]]
        self.norm = Norm(self._text.norm.weight, self.eps)
        self.rope_inverse = self._text.rotary_emb.inv_freq.float().to(self.device)
        sections = text.rope_parameters.get("mrope_section", MROPE_SECTION)
        self.rope_axis = _interleaved(sections, len(self.rope_inverse)).to(self.device)
        self.listen(lambda: None)
        self._recast = self._open()
        self._packs = [layer.packs() for layer in self.layers]
        self.raised = self._raised() if RaisedLayer.takes(self._products()) else None
        """Layers without gradients, where the weights are laid out for them."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._text.norm.weight.device

    def fused(self) -> list[FusedLinear]:
        """Every product that may carry LoRA."""
        groups: list[_Layer | _Merger] = [*self.layers, *self.mergers]
        found: list[FusedLinear] = []
        for group in groups:
            found += group.linears
        return found

    def _products(self) -> list[FusedLinear]:
        """Those of the decoder layers."""
        found: list[FusedLinear] = []
        for layer in self.layers:
            found += layer.linears
        return found

    def listen(self, poll: Callable[[], None]) -> None:
        """Call `poll` between layers, forwards and backwards; it may raise."""
        self._poll = poll
        self.vision.poll = poll

    def _heard(self, grad: Tensor) -> None:
        """Between two layers of a backward pass; the gradient stays as it is."""
        self._poll()

    def _open(self) -> Recast | None:
        """The LoRA factors in the compute dtype, and what takes changed masters over."""
        copies: list[Copy] = []
        for linear in self.fused():
            copies += linear.open(self.dtype)
        if not copies:
            return None
        sources, targets, scales = zip(*copies, strict=True)
        return Recast(list(sources), list(targets), list(scales))

    def _raised(self) -> list[RaisedLayer]:
        norms = [*(layer.norm1 for layer in self.layers[1:]), self.norm]
        pairs = zip(self.layers, norms, strict=True)
        return [RaisedLayer(layer.linears, layer.norm2, norm) for layer, norm in pairs]

    def refresh(self) -> None:
        """Recast the LoRA masters, in place (addresses stay valid for captured graphs)."""
        if self._recast is not None:
            self._recast()

    # ---- vision ----------------------------------------------------------------------------------

    def encode(self, images: list[Tensor]) -> Features:
        """uint8 (H, W, 3) images, sides multiples of patch times merge_size, to features before the
        mergers; each image attends to itself only.
        """
        return self.vision.encode(images)

    def merge(self, features: Features, adapters: bool) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings (tokens, E), and what each early layer adds to them (deepstack)."""
        inputs = [features.last, *features.taps]
        last, *taps = [m(x, adapters) for m, x in zip(self.mergers, inputs, strict=True)]
        return last, taps

    # ---- decoder ---------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """(n,) to (n, E)."""
        return self._text.embed_tokens(ids)

    def rope(self, positions: Tensor) -> Rotation:
        """For positions (3, n); the three axes interleave as mrope_section says."""
        angles = positions.T.float().index_select(1, self.rope_axis) * self.rope_inverse
        return Rotation(angles.cos(), angles.sin())

    def pack(self, index: int, adapters: bool) -> Packs:
        """The LoRA factors of decoder layer `index`."""
        return self._packs[index] if adapters else OFF

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
        Segment of each level.

        The last layer computes nothing beyond keys and values for tokens that nobody reads.
        recompute: save no activations inside a layer. observe: sees every layer's queries and keys.
        """
        x = torch.cat([level.embeds for level in levels])
        turn = self.rope(torch.cat([level.positions for level in levels], 1))
        segments = [Segment([], [], level.rag.valid) for level in levels]
        if self.raised is not None and not torch.is_grad_enabled():
            return self._forward_raised(x, turn, levels, adapters, keep, observe)
        run = self._recomputed if recompute else self._whole_layer
        shared = _Pass(turn, levels, observe, keep)
        for index in range(len(self.layers)):
            self._poll()
            if x.requires_grad:
                x.register_hook(self._heard)
            x, banks = run(index, x, self.pack(index, adapters), shared)
            for segment, bank in zip(segments if keep else [], banks, strict=keep):
                segment.keep(bank)
            if len(x) == len(turn.cos):
                x = self._deepstack(x, index, levels)
        hidden = recomputed(self.norm, x)
        return list(hidden.split([level.rows_read() for level in levels])), segments if keep else []

    def _forward_raised(
        self,
        x: Tensor,
        turn: Rotation,
        levels: list[Level],
        adapters: bool,
        keep: bool,
        observe: Observe | None,
    ) -> tuple[list[Tensor], list[Segment]]:
        """`forward` without gradients, layer by raised layer."""
        assert self.raised is not None
        segments = [Segment([], [], level.rag.valid) for level in levels]
        both = Normed(x, self.layers[0].norm1(x))
        for index, layer in enumerate(self.raised):
            self._poll()
            packs = self.pack(index, adapters)
            norms = Turn(*self.layers[index].qk_norms, *turn, self.eps)
            parts = layer.heads(both.norm, norms, self.heads, packs.qkv)
            if observe is not None:
                observe(index, parts.q, parts.k)
            found = self._attend_levels(index, both.sum, parts, levels, keep)
            for segment, bank in zip(segments if keep else [], found.banks, strict=keep):
                segment.keep(bank)
            if found.attended is None:
                both = Normed(x[:0], x[:0])
                continue
            middle = layer.after_attention(found.x, found.attended, packs.out)
            both = layer.mlp(middle, packs.gate_up, packs.down)
            if len(both.sum) == len(turn.cos):
                both = self._deepened(both, index, levels, layer)
        hidden = both.norm.split([level.rows_read() for level in levels])
        return list(hidden), segments if keep else []

    def _deepened(
        self, both: Normed, index: int, levels: list[Level], layer: RaisedLayer
    ) -> Normed:
        """After the deepstack; normed again where that changed anything."""
        x = self._deepstack(both.sum, index, levels)
        return both if x is both.sum else Normed(x, layer.following(x))

    def _recomputed(self, *args: Any) -> tuple[Tensor, list[KeysValues]]:
        """`_whole_layer`, run again for the backward pass."""
        return checkpoint(self._whole_layer, *args, use_reentrant=False)

    def _whole_layer(
        self, index: int, x: Tensor, packs: Packs, shared: _Pass
    ) -> tuple[Tensor, list[KeysValues]]:
        parts = self.qkv(index, x, shared.turn, packs)
        if shared.observe is not None:
            shared.observe(index, parts.q, parts.k)
        return self.layer(index, x, parts, shared.levels, packs, shared.keep)

    def qkv(self, index: int, x: Tensor, turn: Rotation, packs: Packs) -> Parts:
        """q (n, H, D) and k (n, KV, D), normed and rotated, and v (n, KV, D) of decoder layer
        `index`.
        """
        layer = self.layers[index]
        wide = layer.qkv(x, packs.qkv, layer.norm1)
        return _parted(wide, Turn(*layer.qk_norms, *turn, self.eps), self.heads)

    def layer(
        self,
        index: int,
        x: Tensor,
        parts: Parts,
        levels: list[Level],
        packs: Packs,
        keep: bool = True,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Decoder layer `index` behind its queries, keys and values: hidden states of all tokens
        (in the last layer of those that are read) and the keys and values of each level.
        """
        found = self._attend_levels(index, x, parts, levels, keep)
        if found.attended is None:
            return x[:0], found.banks
        layer = self.layers[index]
        x = found.x + layer.out(found.attended, packs.out)
        return self._mlp(layer, x, packs), found.banks

    def _attend_levels(
        self, index: int, x: Tensor, parts: Parts, levels: list[Level], keep: bool
    ) -> _LayerAttention:
        """Every level over what it sees; in the last layer only what is read."""
        final = index + 1 == len(self.layers)
        if self._stands_alone(levels, keep):
            return self._attend_alone(x, parts, levels[0], final)
        sizes = [level.rag.count for level in levels]
        kept: list[Tensor] = []
        outs: list[Tensor] = []
        banks: list[KeysValues] = []
        pieces = zip(levels, *(t.split(sizes) for t in (x, *parts)), strict=True)
        for level, x_, q, k, v in pieces:
            banks.append(KeysValues(*(level.rag.pad(t).transpose(1, 2) for t in (k, v))))
            seen = [self._parent(index, parent, banks, levels) for parent in level.parents]
            if final and level.read == "none":
                continue
            last = level.rag.last() if final and level.read == "last" else None
            out = self._attended(level, q, seen, banks[-1], last)
            picked = last
            if final and isinstance(level.read, Tensor):
                picked = level.read
                out = out[picked]
            outs.append(out)
            kept.append(x_ if picked is None else x_[picked])
        if not outs:
            return _LayerAttention(x[:0], None, banks)
        return _LayerAttention(_together(kept), _together(outs), banks)

    def _stands_alone(self, levels: list[Level], keep: bool) -> bool:
        """Rows that see nothing but themselves, and whose keys nobody asks for."""
        return len(levels) == 1 and not keep and not levels[0].parents and self.attend is attend

    def _attend_alone(self, x: Tensor, parts: Parts, level: Level, final: bool) -> _LayerAttention:
        out = attend_packed(*parts, level.rag, self.scale).flatten(1)
        if not final or level.read == "all":
            return _LayerAttention(x, out, [])
        read = level.read if isinstance(level.read, Tensor) else level.rag.last()
        return _LayerAttention(x[read], out[read], [])

    def _attended(
        self, level: Level, q: Tensor, seen: list[Part], own: KeysValues, last: Tensor | None
    ) -> Tensor:
        """(n, H·D) of all tokens of a level, or (N, H·D) of each row's last one."""
        if last is not None:
            parts = [*seen, Part(*own, level.rag.valid)]
            return self.attend(q[last][:, None], parts, self.scale).flatten(1)
        out = self.attend(level.rag.pad(q), [*seen, Part(*own, causal=True)], self.scale)
        return level.rag.pack(out).flatten(1)

    def _parent(
        self, index: int, parent: Parent, banks: list[KeysValues], levels: list[Level]
    ) -> Part:
        if isinstance(parent.source, Segment):
            return parent.source.part(index, parent.grid)
        return Part(*banks[parent.source], levels[parent.source].rag.valid, parent.grid)

    def _mlp(self, layer: _Layer, x: Tensor, packs: Packs) -> Tensor:
        wide = layer.gate_up(x, packs.gate_up, layer.norm2)
        return x + layer.down(wide, packs.down, SWIGLU)

    def _deepstack(self, x: Tensor, index: int, levels: list[Level]) -> Tensor:
        start = 0
        for level in levels:
            if level.deep_rows is not None and index < len(level.deep):
                x = x.index_add(0, level.deep_rows + start, level.deep[index])
            start += level.rag.count
        return x

    def decode(self, ids: Tensor, positions: Tensor, see: See, adapters: bool) -> Tensor:
        """One token per row: ids (N,), positions (N,); `see` keeps the keys and values and attends.
        Hidden states (N, E).
        """
        x = self.embed(ids)
        turn = self.rope(positions.expand(3, -1))
        if self.raised is not None:
            return self._decode_raised(x, turn, see, adapters)
        for index, layer in enumerate(self.layers):
            packs = self.pack(index, adapters)
            out = see(index, *self.qkv(index, x, turn, packs))
            x = x + layer.out(out.flatten(1), packs.out)
            x = self._mlp(layer, x, packs)
        return self.norm(x)

    def _decode_raised(self, x: Tensor, turn: Rotation, see: See, adapters: bool) -> Tensor:
        assert self.raised is not None
        both = Normed(x, self.layers[0].norm1(x))
        for index, layer in enumerate(self.raised):
            packs = self.pack(index, adapters)
            norms = Turn(*self.layers[index].qk_norms, *turn, self.eps)
            out = see(index, *layer.heads(both.norm, norms, self.heads, packs.qkv))
            middle = layer.after_attention(both.sum, out.flatten(1), packs.out)
            both = layer.mlp(middle, packs.gate_up, packs.down)
        return both.norm

    def growing(self, parents: Sequence[Parent], buffer: Segment, at: int) -> See:
        """For `decode`: rows see their parents (segments) and what `buffer` holds; the new keys and
        values go to its place `at`.
        """

        seen = [(p.source, p.grid) for p in parents if isinstance(p.source, Segment)]

        def see(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            buffer.keys[index].select(2, at).copy_(k)
            buffer.values[index].select(2, at).copy_(v)
            parts = [segment.part(index, grid) for segment, grid in seen]
            own = buffer.part(index, None, at + 1)
            return self.attend(q[:, None], [*parts, own], self.scale)[:, 0]

        return see

    def buffer(self, rows: int, tokens: int) -> Segment:
        """Empty keys and values for `tokens` new tokens of each row."""
        shape = (rows, self.kv_heads, tokens, self.head_dim)

        def banks() -> list[Tensor]:
            return [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.layers]

        return Segment(banks(), banks())

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (n, V) of hidden states (n, E)."""
        return product(hidden, self.head.weight).float()


class _Pass(NamedTuple):
    """What all layers of a forward pass share."""

    turn: Rotation
    levels: list[Level]
    observe: Observe | None
    keep: bool


class _LayerAttention(NamedTuple):
    """Of one layer: the hidden states that go on (n, E), what they saw (n, H·D; None: nobody reads
    any), and the keys and values of each level.
    """

    x: Tensor
    attended: Tensor | None
    banks: list[KeysValues]


class _Layer:
    """One decoder layer's tensors."""

    def __init__(self, layer: Any, joins: bool) -> None:
        attn = layer.self_attn
        mlp = layer.mlp
        eps = attn.config.rms_norm_eps
        self.norm1 = Norm(layer.input_layernorm.weight, eps)
        self.norm2 = Norm(layer.post_attention_layernorm.weight, eps)
        self.qkv = FusedLinear([attn.q_proj, attn.k_proj, attn.v_proj], joins)
        self.out = FusedLinear([attn.o_proj], joins)
        self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj], joins)
        self.down = FusedLinear([mlp.down_proj], joins)
        self.linears = [self.qkv, self.out, self.gate_up, self.down]
        self.qk_norms = (attn.q_norm.weight, attn.k_norm.weight)

    def packs(self) -> Packs:
        """The factors as of the last `refresh`."""
        return Packs(*(linear.cached for linear in self.linears))


class _Merger:
    """A patch merger: norm (before or after the 2x2 shuffle), two linears with GELU between."""

    def __init__(self, merger: Any) -> None:
        self.norm = merger.norm
        self.width: int = merger.hidden_size
        self.postshuffle: bool = merger.use_postshuffle_norm
        self.linears = [FusedLinear([merger.linear_fc1]), FusedLinear([merger.linear_fc2])]

    def __call__(self, x: Tensor, adapters: bool) -> Tensor:
        first, second = self.linears
        wide = x.view(-1, self.width) if self.postshuffle else x
        normed = self.norm(wide).view(-1, self.width)
        inside = first(normed, first.cached if adapters else None)
        return second(inside, second.cached if adapters else None, F.gelu)


def _together(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _interleaved(sections: list[int], size: int) -> Tensor:
    """Which of the three axes each rotary frequency turns by, int64 (size,)."""
    axis = torch.zeros(size, dtype=torch.long)
    for dim in (1, 2):
        axis[dim : sections[dim] * 3 : 3] = dim
    return axis


def _parted(qkv: Tensor, turn: Turn, queries: int) -> Parts:
    """`heads`, differentiable in qkv, which alone is saved. Where nothing is saved, the values are
    copied out, so that qkv can go.
    """
    if torch.is_grad_enabled():
        return Parts(*_Parted.apply(qkv, turn, queries))
    parts = heads(qkv, turn, queries)
    return parts._replace(v=parts.v.contiguous())


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, turn: Turn, queries: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv)
        ctx.turn = turn
        return tuple(heads(qkv, turn, queries))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        (qkv,) = ctx.saved_tensors
        return heads_backward(qkv, ctx.turn, Parts(dq, dk, dv)), None, None
