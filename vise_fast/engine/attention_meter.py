"""How much of its attention a model spends on the image while it answers: per decoder layer, mean
over heads and generated tokens.

METHOD section 8's figure. Answers are fed back in one teacher-forced pass; in each layer the share
is exp(lse over the image's keys - lse over all keys a token sees), so that one layer's scores exist
at a time and no softmax is ever written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vise_fast.engine.fast import Engine, Prefixes, Rollout
from vise_fast.model.attention import Grid, Part
from vise_fast.model.qwen3_vl import Level, Ragged


@torch.no_grad()
def image_share(
    engine: Engine,
    prefixes: Prefixes,
    owner: list[int],
    questions: list[list[int]],
    answers: Rollout,
) -> Tensor:
    """fp32 (layers, N) on the CPU: answer n to questions[n] about prefixes[owner[n]]; its queries
    are the tokens that predicted its tokens.
    """
    backbone = engine.backbone
    device = engine.device
    rows = [
        question + answer[:-1] for question, answer in zip(questions, answers.rows(), strict=True)
    ]
    level = _level(engine, prefixes, owner, rows)
    asks = _generating(questions, rows).to(device)
    cos, sin = backbone.rope(level.positions)
    shares = []
    x = level.embeds
    for index, layer in enumerate(backbone.layers):
        packs = [backbone._pack(linear, prefixes.adapters) for linear in layer.linears]
        q, k, _ = backbone._qkv(layer, x, cos, sin, packs[0])
        share = _share(engine, level, index, level.rag.pad(q), level.rag.pad(k))
        shares.append((share * asks).sum(1) / asks.sum(1))
        x, *_ = backbone._layer(index, x, cos, sin, [level], packs)
    return torch.stack(shares).cpu()


def _level(engine: Engine, prefixes: Prefixes, owner: list[int], rows: list[list[int]]) -> Level:
    """Question and answer of each row as one stretch behind its image."""
    device = engine.device
    starts = [prefixes.following[i] for i in owner]
    ids = torch.tensor([token for row in rows for token in row], device=device)
    positions = torch.tensor(
        [start + t for row, start in zip(rows, starts, strict=True) for t in range(len(row))],
        device=device,
    )
    parents = [(prefixes.segment, Grid(owner, len(prefixes), device))]
    return Level(
        engine.backbone.embed(ids),
        positions.expand(3, -1),
        Ragged([len(row) for row in rows], device),
        parents,
    )


def _generating(questions: list[list[int]], rows: list[list[int]]) -> Tensor:
    """fp32 (N, T): 1 where a token's output was sampled from: the question's last token and the
    answer's all but last.
    """
    steps = torch.arange(max(map(len, rows)))
    first, end = (torch.tensor([len(row) for row in group])[:, None] for group in (questions, rows))
    return ((steps >= first - 1) & (steps < end)).float()


def _share(engine: Engine, level: Level, index: int, q: Tensor, k: Tensor) -> Tensor:
    """Image share (N, T), mean over heads, of queries q (N, T, H, D) with own keys k (N, T, KV, D)
    in layer `index`.
    """
    scale = engine.backbone.scale
    (segment, grid) = level.parents[0]
    head = len(engine.tokens.head)
    tail = len(engine.tokens.tail)
    prefix = segment.part(index, grid)
    lengths = (
        prefix.lengths
        if prefix.lengths is not None
        else torch.full((prefix.keys.shape[0],), prefix.keys.shape[2], device=q.device)
    )
    image = Part(prefix.keys[:, :, head:], prefix.values[:, :, head:], lengths - head - tail, grid)
    own = Part(k.transpose(1, 2), k.transpose(1, 2), level.rag.valid, None, causal=True)
    total = torch.logaddexp(log_sum_exp(q, prefix, scale), log_sum_exp(q, own, scale))
    return (log_sum_exp(q, image, scale) - total).exp().mean(-1)


def log_sum_exp(q: Tensor, part: Part, scale: float) -> Tensor:
    """fp32 (N, T, H): log-sum-exp of the scores of q (N, T, H, D) over the keys of one part; keys
    are read once per entry, not per row.
    """
    grid = part.grid or Grid(list(range(q.shape[0])), q.shape[0], q.device)
    table = grid.spread(q).unflatten(3, (part.keys.shape[1], -1)).float()
    scores = torch.einsum("mftkrd,mksd->mftkrs", table, part.keys.float()) * scale
    if part.lengths is not None:
        beyond = torch.arange(scores.shape[-1], device=q.device) >= part.lengths[:, None]
        scores = scores.masked_fill(beyond[:, None, None, None, None], -torch.inf)
    if part.causal:
        later = torch.ones(q.shape[1], scores.shape[-1], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later[:, None, None], -torch.inf)
    return grid.gather(scores.logsumexp(-1).flatten(3))
