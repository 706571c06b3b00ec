"""Decoding that never asks the host: one step of all rows as a function of tensors alone, captured
once per shape as a CUDA graph and replayed.

`GraphedEngine.generate` samples exactly what `FastEngine.generate` samples. What differs between
tokens, rollouts and updates is data at fixed addresses: where prefixes and prompts lie and who sees
them (`vise_kernels.decode_attention`), the LoRA copies (refreshed in place), seeds, the step. So a
graph outlives optimizer steps, and prefixes are shared, not copied. Finished rows stay until all
are done: where a step's time is the weights' bytes they cost next to nothing.

A graph proves itself before it is used: its first replay must give the logits of the same step by
hand. One that cannot be captured or gives others is not used, nor any other in this run: that costs
speed, and is said. Left out: int8 with outliers, whose products choose their path on the host.

Run: `pytest tests/engine/test_graphed.py`; with a GPU `pytest -m gpu tests/engine/test_graphed.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels import decode_attention, sample
from vise_kernels.decode_attention import Banks, locate

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Prompts, Rollout, owners
from vise_fast.model.load import silent
from vise_fast.model.tree import Backbone, Segment
from vise_fast.system.machine.memory import exhausted
from vise_fast.system.machine.staging import put
from vise_fast.text.tokens import Tokens

PREFIX, PROMPT, OWN = range(3)
MOST = 4  # decoders kept: the longest unused one goes
TOLERANCE = 0.01  # between logits of a replay and of the step by hand, of the largest
WARM_UPS = 2  # runs before a capture: libraries choose their kernels, Triton compiles


class Shape(NamedTuple):
    """What a decoder was made for: answers at most, tokens of each at most, how they are drawn."""

    rows: int
    limit: int
    adapters: bool
    temperature: float


class GraphedEngine(FastEngine):
    """The engine with graphed decoding; without a GPU the same step runs by hand."""

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tokens,
        *,
        say: Callable[[str], None] = silent,
        **options,
    ) -> None:
        """say: where the line goes that graphs are off."""
        super().__init__(backbone, tokens, **options)
        self.captures = self.device.type == "cuda"
        self.decoders: dict[Shape, Decoder] = {}
        self.off = False
        """A graph could not be captured, or gave other logits: tokens are decoded by hand."""
        self.say = say

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """As `FastEngine.generate`."""
        owner = owners(fan)
        shape = Shape(bucket(len(owner)), limit, prompts.prefixes.adapters, temperature)
        decoder = None if self.off else self._decoder(shape)
        if decoder is not None:
            decoder.start(prompts, owner, seeds)
            decoder = self._proved(decoder)
        if decoder is None:
            return super().generate(prompts, fan, limit, seeds, temperature)
        for written in range(1, limit + 1):
            if written == limit or self._polls(written):
                self.interrupted()
                home = self.home(decoder.joined(len(owner))).tolist()
                if all(row[-1] <= written for row in home):
                    break
            decoder.replay()
            self.counters.decode_steps += 1
            self.counters.tokens_decoded += len(owner)
        decoder.let_go()
        return decoder.rollout(home)

    def forget(self) -> None:
        """Drop all graphs and their buffers; the next rollout captures anew."""
        self.decoders.clear()

    def _decoder(self, shape: Shape) -> Decoder | None:
        """The one for this shape; None where its graph cannot be captured."""
        decoder = self.decoders.pop(shape, None) or self._made(shape)
        if decoder is not None:
            self.decoders[shape] = decoder  # now the last one used
            while len(self.decoders) > MOST:
                del self.decoders[next(iter(self.decoders))]
        return decoder

    def _made(self, shape: Shape) -> Decoder | None:
        decoder = Decoder(self.backbone, self.tokens, self.banned, shape)
        if not self.captures:
            return decoder
        try:
            decoder.capture()
        except Exception as fault:  # whatever a driver, a library or a compiler raises
            if exhausted(fault):
                raise
            self._give_up(f"cannot be captured ({_first_line(fault)})")
            return None
        return decoder

    def _proved(self, decoder: Decoder) -> Decoder | None:
        """The decoder, started, if its graph does what the step does; asked once."""
        if decoder.graph is None or decoder.proved:
            return decoder
        gap = decoder.gap()
        if gap <= TOLERANCE:
            decoder.proved = True
            return decoder
        self._give_up(f"gives other logits than the step by hand (off by {gap:.2g} of the largest)")
        return None

    def _give_up(self, reason: str) -> None:
        self.off = True
        self.decoders.clear()
        self.say(f"decoding as a CUDA graph {reason}: off in this run, several times slower")


class Decoder:
    """State and step of up to `rows` answers of at most `limit` tokens; every tensor keeps its
    address from here on.
    """

    def __init__(self, backbone: Backbone, tokens: Tokens, banned: Tensor, shape: Shape) -> None:
        self.backbone = backbone
        self.banned = banned
        self.pad = tokens.pad
        self.shape = shape
        self.eos = put(tokens.eos, backbone.device)
        rows, limit, *_ = shape
        self.step = self._whole(1)
        self.token = self._whole(rows)
        self.first = self._whole(rows)
        self.seeds = self._whole(rows)
        self.ids = self._whole(rows, limit)
        self.done_at = self._whole(rows)
        self.logprob = torch.zeros(rows, limit, device=backbone.device)
        self.logits = torch.zeros(rows, len(banned), device=backbone.device)
        self.buffer = backbone.buffer(rows, limit)
        self._make_banks()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.proved = False

    def _whole(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.backbone.device)

    def _make_banks(self) -> None:
        """Per layer, the three banks a row sees: prefix, question, its own tokens."""
        rows = self.shape.rows
        self.owner = self._whole(3, rows)
        self.length = self._whole(3, rows)
        self.owner[OWN] = torch.arange(rows, device=self.owner.device)
        self.tables = self._whole(len(self.buffer.keys), 3, 3)
        self.banks = [
            Banks([k] * 3, [v] * 3, self.owner, self.length, table)
            for k, v, table in zip(self.buffer.keys, self.buffer.values, self.tables, strict=True)
        ]
        self._locate()

    def start(self, prompts: Prompts, owner: list[int], seeds: list[int]) -> None:
        """Take the prompts, answer r continuing prompt owner[r], and draw the first tokens."""
        n = len(owner)
        device = self.backbone.device
        index = put(owner, device)
        images = put([prompts.owner[p] for p in owner], device)
        self._place(PREFIX, prompts.prefixes.segment, images)
        self._place(PROMPT, prompts.segment, index)
        self._locate()
        self.first[:n] = put([prompts.following[p] for p in owner], device)
        self.seeds[:n] = put(seeds, device)
        self.logits[:n] = self.backbone.logits(prompts.last)[index]
        self.step.zero_()
        self.ids.fill_(self.pad)
        self.logprob.zero_()
        self.done_at[:n] = self.shape.limit
        self.done_at[n:] = 0
        self._draw()

    def _place(self, place: int, segment: Segment, entry: Tensor) -> None:
        """Let row r see entry[r] of a segment; rows nobody asked for see nothing but themselves."""
        n = len(entry)
        self.owner[place, :n] = entry
        self.length[place, :n] = segment.counts()[entry]
        self.owner[place, n:] = 0
        self.length[place, n:] = 0
        for bank, keys, values in zip(self.banks, segment.keys, segment.values, strict=True):
            bank.keys[place] = keys
            bank.values[place] = values

    def replay(self) -> None:
        """One more token of every row."""
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()

    def gap(self) -> float:
        """How far the logits of a replay are from those of the step by hand, of the largest; the
        state stays as it was. Reads home.
        """
        state = (self.step, self.token, self.ids, self.logprob, self.done_at, self.logits)
        before = [tensor.clone() for tensor in state]
        self._advance()
        by_hand = self.logits.clone()
        _restore(state, before)
        self.replay()
        far = (self.logits - by_hand).abs().max() / by_hand.abs().max().clamp_min(1e-6)
        _restore(state, before)
        gap = float(far)
        return gap if math.isfinite(gap) else math.inf

    def let_go(self) -> None:
        """Hold prefixes and prompts no longer; their addresses in the tables mean nothing until the
        next start.
        """
        layers = zip(self.banks, self.buffer.keys, self.buffer.values, strict=True)
        for bank, keys, values in layers:
            bank.keys[:] = [keys] * 3
            bank.values[:] = [values] * 3

    def joined(self, rows: int) -> Tensor:
        """(rows, limit + 1): ids and length of each answer, on the device."""
        return torch.cat([self.ids, self.done_at[:, None]], 1)[:rows]

    def rollout(self, home: list[list[int]]) -> Rollout:
        """Copies of the answers, `home` being `joined` on the host."""
        lengths = [row[-1] for row in home]
        longest = max(lengths)
        ids = self.ids[: len(home), :longest].clone()
        logprob = self.logprob[: len(home), :longest].clone()
        return Rollout(ids, logprob, lengths, [row[:longest] for row in home])

    def _advance(self) -> None:
        """The last tokens through the model, and the next ones drawn."""
        self.length[OWN] = self.step + 1
        place = self.first + self.step
        hidden = self.backbone.decode(self.token, place, self._see, self.shape.adapters)
        self.logits.copy_(self.backbone.logits(hidden))
        self.step += 1
        self._draw()

    def _see(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.buffer.keys[layer].index_copy_(2, self.step, k[:, :, None])
        self.buffer.values[layer].index_copy_(2, self.step, v[:, :, None])
        return decode_attention(q, self.banks[layer], scale=self.backbone.scale)

    def _draw(self) -> None:
        """Sample from the logits; a row that has ended writes padding."""
        place = self.step.expand(self.shape.rows)
        token, score = sample(
            self.logits,
            temperature=self.shape.temperature,
            banned=self.banned,
            seed=self.seeds,
            position=place,
        )
        fresh = self.done_at > self.step
        self.token.copy_(token)
        self.ids.scatter_(1, place[:, None], torch.where(fresh, token, self.pad)[:, None])
        self.logprob.scatter_(1, place[:, None], torch.where(fresh, score, 0.0)[:, None])
        ended = fresh & (token[:, None] == self.eos).any(1)
        self.done_at.copy_(torch.where(ended, self.step + 1, self.done_at))

    def _locate(self) -> None:
        places = torch.stack([locate(bank.keys, bank.values) for bank in self.banks])
        self.tables.copy_(put(places, self.tables.device))

    def capture(self) -> None:
        """Record one step as a CUDA graph; an answer of one token has none."""
        if self.shape.limit == 1:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step.zero_()
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self.step.zero_()
        graph = torch.cuda.CUDAGraph()
        # thread_local: images may be on their way to the GPU in another thread
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._advance()
        self.graph = graph


def _restore(state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, held in zip(state, before, strict=True):
        tensor.copy_(held)


def _first_line(fault: BaseException) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)


def decoder_bytes(backbone: Backbone, rows: int, limit: int) -> int:
    """What a decoder for so many answers keeps: keys and values, logits."""
    rows = bucket(rows)
    buffer = backbone.buffer(rows, limit)
    held = sum(t.numel() * t.dtype.itemsize for t in (*buffer.keys, *buffer.values))
    return held + rows * len(backbone.head.weight) * 4


def bucket(rows: int) -> int:
    """Rows of the decoder for so many answers: powers of two, multiples of 8 from there, of 32
    beyond 64; few graphs, little padding.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step
