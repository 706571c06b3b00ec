"""Decoding that never asks the host: one step of all rows as a function of tensors alone, captured
once per shape as a CUDA graph and replayed.

`GraphedEngine.generate` samples exactly what `Engine.generate` samples. What differs between
tokens, rollouts and updates is data at fixed addresses: where prefixes and prompts lie and who sees
them (`vise_kernels.decode_attention`), the LoRA copies (refreshed in place), seeds, the step. So a
graph outlives optimizer steps, and prefixes are shared, not copied. Finished rows stay until all
are done: where a step's time is the weights' bytes they cost next to nothing. Left out: quantised
bases, whose products choose their path on the host.

Run: `pytest tests/engine/test_graphed.py`; with a GPU `pytest -m gpu tests/engine/test_graphed.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vise_kernels import decode_attention, sample
from vise_kernels.decode_attention import Banks, locate

from vise_fast.engine.fast import Engine, Prompts, Rollout
from vise_fast.model.qwen3_vl import Backbone
from vise_fast.text.tokens import Tokens

PREFIX, PROMPT, OWN = range(3)
WARM_UPS = 2  # runs before a capture: libraries choose their kernels, Triton compiles


class GraphedEngine(Engine):
    """The engine with graphed decoding; without a GPU the same step runs by hand."""

    def __init__(self, backbone: Backbone, tokens: Tokens, **options) -> None:
        super().__init__(backbone, tokens, **options)
        self.captures = self.device.type == "cuda"
        self.decoders: dict[tuple, Decoder] = {}

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """As `Engine.generate`."""
        owner = [r for r, count in enumerate(fan) for _ in range(count)]
        decoder = self._decoder(bucket(len(owner)), limit, prompts.prefixes.adapters, temperature)
        decoder.start(prompts, owner, seeds)
        for written in range(1, limit + 1):
            if written == limit or self._polls(written):
                self.interrupted()
                home = decoder.home(len(owner))
                self.counters.host_reads += 1
                if all(row[-1] <= written for row in home):
                    break
            decoder.replay()
            self.counters.decode_steps += 1
            self.counters.tokens_decoded += len(owner)
        decoder.let_go()
        lengths = [row[-1] for row in home]
        longest = max(lengths)
        ids, logprob = (x[: len(owner), :longest].clone() for x in (decoder.ids, decoder.logprob))
        return Rollout(ids, logprob, lengths, [row[:longest] for row in home])

    def forget(self) -> None:
        """Drop all graphs and their buffers; the next rollout captures anew."""
        self.decoders.clear()

    def _decoder(self, rows: int, limit: int, adapters: bool, temperature: float) -> Decoder:
        key = rows, limit, adapters, temperature
        if key not in self.decoders:
            self.decoders[key] = Decoder(
                self.backbone, self.tokens, self.banned, *key, captures=self.captures
            )
        return self.decoders[key]


class Decoder:
    """State and step of up to `rows` answers of at most `limit` tokens; every tensor keeps its
    address from here on.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tokens,
        banned: Tensor,
        rows: int,
        limit: int,
        adapters: bool,
        temperature: float,
        captures: bool,
    ) -> None:
        self.backbone = backbone
        self.banned = banned
        self.pad = tokens.pad
        self.rows = rows
        self.limit = limit
        self.adapters = adapters
        self.temperature = temperature
        device = backbone.device
        whole = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)
        self.eos = torch.tensor(tokens.eos, device=device)
        self.step = whole(1)
        self.token = whole(rows)
        self.first = whole(rows)
        self.seeds = whole(rows)
        self.ids = whole(rows, limit)
        self.done_at = whole(rows)
        self.logprob = torch.zeros(rows, limit, device=device)
        self.logits = torch.zeros(rows, len(banned), device=device)
        self.owner = whole(3, rows)
        self.length = whole(3, rows)
        self.owner[OWN] = torch.arange(rows, device=device)
        self.buffer = backbone.buffer(rows, limit)
        own = zip(self.buffer.keys, self.buffer.values, strict=True)
        self.tables = whole(len(self.buffer.keys), 3, 3)
        self.banks = [
            Banks([k] * 3, [v] * 3, self.owner, self.length, table)
            for (k, v), table in zip(own, self.tables, strict=True)
        ]
        self._locate()
        self.graph = self._capture() if captures and limit > 1 else None

    def start(self, prompts: Prompts, owner: list[int], seeds: list[int]) -> None:
        """Take the prompts, answer r continuing prompt owner[r], and draw the first tokens."""
        n = len(owner)
        device = self.backbone.device
        index = torch.tensor(owner, device=device)
        entries = torch.tensor([prompts.owner[p] for p in owner], device=device), index
        for place, (segment, entry) in enumerate(
            zip((prompts.prefixes.segment, prompts.segment), entries, strict=True)
        ):
            self.owner[place, :n] = entry
            self.length[place, :n] = (
                segment.keys[0].shape[2] if segment.lengths is None else segment.lengths[entry]
            )
            self.owner[place, n:], self.length[place, n:] = (
                0,
                0,
            )  # rows nobody asked for see nothing but themselves
            for bank, keys, values in zip(self.banks, segment.keys, segment.values, strict=True):
                bank.keys[place], bank.values[place] = keys, values
        self._locate()
        self.first[:n] = torch.tensor(prompts.following, device=device)[index]
        self.seeds[:n] = torch.tensor(seeds, device=device)
        self.logits[:n] = self.backbone.logits(prompts.last)[index]
        self.step.zero_(), self.ids.fill_(self.pad), self.logprob.zero_()
        self.done_at[:n], self.done_at[n:] = self.limit, 0
        self._draw()

    def replay(self) -> None:
        """One more token of every row."""
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()

    def let_go(self) -> None:
        """Hold prefixes and prompts no longer; their addresses in the tables mean nothing until the
        next start.
        """
        for bank, keys, values in zip(
            self.banks, self.buffer.keys, self.buffer.values, strict=True
        ):
            bank.keys[:], bank.values[:] = [keys] * 3, [values] * 3

    def home(self, rows: int) -> list[list[int]]:
        """ids and length of each answer, on the host: a sync."""
        return torch.cat([self.ids, self.done_at[:, None]], 1)[:rows].tolist()

    def _advance(self) -> None:
        """The last tokens through the model, and the next ones drawn."""
        self.length[OWN] = self.step + 1
        hidden = self.backbone.decode(self.token, self.first + self.step, self._see, self.adapters)
        self.logits.copy_(self.backbone.logits(hidden))
        self.step += 1
        self._draw()

    def _see(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.buffer.keys[layer].index_copy_(2, self.step, k[:, :, None])
        self.buffer.values[layer].index_copy_(2, self.step, v[:, :, None])
        return decode_attention(q, self.banks[layer], scale=self.backbone.scale)

    def _draw(self) -> None:
        """Sample from the logits; a row that has ended writes padding."""
        place = self.step.expand(self.rows)
        token, score = sample(
            self.logits,
            temperature=self.temperature,
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
        self.tables.copy_(torch.stack([locate(bank.keys, bank.values) for bank in self.banks]))

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step.zero_()
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self.step.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # images may be on their way to the GPU in another thread
            self._advance()
        return graph


def bucket(rows: int) -> int:
    """Rows of the decoder for so many answers: powers of two, multiples of 8 from there, of 32
    beyond 64; few graphs, little padding.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step
