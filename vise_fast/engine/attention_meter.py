"""How much of its attention a model spends on the image while it answers: per decoder layer, mean
over heads and generated tokens.

The paper's figure. Answers are fed back in one teacher-forced pass; in each layer the share
is exp(lse over the image's keys - lse over all keys a token sees), so that one layer's scores exist
at a time and no softmax is ever written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.generic import GenericEngine
from vise_fast.engine.rollout import Engine, Held, Prefixes, Rollout
from vise_fast.model.tree import Grid, Level, Parent, Part


@torch.no_grad()
def image_share(
    engine: Engine,
    prefixes: Held,
    owner: list[int],
    questions: list[list[int]],
    answers: Rollout,
) -> Tensor:
    """fp32 (layers, N) on the CPU: answer n to questions[n] about prefixes[owner[n]]; its queries
    are the tokens that predicted its tokens. Raises TypeError for an engine that cannot tell.
    """
    if isinstance(engine, GenericEngine) and engine.measures_attention:
        return engine.attention_share(prefixes, owner, questions, answers)
    if not isinstance(engine, FastEngine):
        raise TypeError(f"{type(engine).__name__} keeps no keys: no attention can be measured")
    level, asks = _fed_back(engine, prefixes, owner, questions, answers)
    shares: list[Tensor] = []

    def observe(index: int, q: Tensor, k: Tensor) -> None:
        share = _share(engine, level, index, level.rag.pad(q), level.rag.pad(k))
        shares.append((share * asks).sum(1) / asks.sum(1))

    engine.backbone.forward([level], prefixes.adapters, keep=False, observe=observe)
    return torch.stack(shares).cpu()


def _fed_back(
    engine: FastEngine,
    prefixes: Prefixes,
    owner: list[int],
    questions: list[list[int]],
    answers: Rollout,
) -> tuple[Level, Tensor]:
    """The level of questions and answers, and which of its tokens ask, fp32 (N, T)."""
    pairs = zip(questions, answers.rows(), strict=True)
    rows = [question + answer[:-1] for question, answer in pairs]
    starts = [prefixes.following[i] for i in owner]
    grid = Grid(owner, len(prefixes), engine.device)
    level = engine.text_level(rows, starts, [Parent(prefixes.segment, grid)])
    level.read = "none"
    return level, _generating(questions, rows).to(engine.device)


def _generating(questions: list[list[int]], rows: list[list[int]]) -> Tensor:
    """fp32 (N, T): 1 where a token's output was sampled from: the question's last token and the
    answer's all but last.
    """
    steps = torch.arange(max(map(len, rows)))
    first = torch.tensor([len(row) for row in questions])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    return ((steps >= first - 1) & (steps < end)).float()


def _share(engine: FastEngine, level: Level, index: int, q: Tensor, k: Tensor) -> Tensor:
    """Image share (N, T), mean over heads, of queries q (N, T, H, D) with own keys k (N, T, KV, D)
    in layer `index`.
    """
    scale = engine.backbone.scale
    segment, grid = level.parents[0]
    assert not isinstance(segment, int)
    head = len(engine.tokens.head)
    tail = len(engine.tokens.tail)
    prefix = segment.part(index, grid)
    lengths = segment.counts() - head - tail
    image = Part(prefix.keys[:, :, head:], prefix.values[:, :, head:], lengths, grid)
    bank = k.transpose(1, 2)
    own = Part(bank, bank, level.rag.valid, None, causal=True)
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


@torch.no_grad()
def image_map(engine: Engine, prefixes: Prefixes, question: list[int], answer: Rollout) -> Tensor:
    """fp32 (tokens,) on the CPU, sum 1: where on the one image behind `prefixes` the one answer to
    a question looked, of the attention that went to the image; mean over layers, heads and the
    tokens that predicted the answer. Raises TypeError for an engine that keeps no keys.
    """
    if not isinstance(engine, FastEngine):
        raise TypeError(f"{type(engine).__name__} keeps no keys: no attention can be measured")
    level, asks = _fed_back(engine, prefixes, [0], [question], answer)
    maps: list[Tensor] = []

    def observe(index: int, q: Tensor, k: Tensor) -> None:
        weights = _over_image(engine, level, index, level.rag.pad(q))
        maps.append((weights * asks[0][:, None]).sum(0) / asks.sum())

    engine.backbone.forward([level], prefixes.adapters, keep=False, observe=observe)
    return torch.stack(maps).mean(0).cpu()


def _over_image(engine: FastEngine, level: Level, index: int, q: Tensor) -> Tensor:
    """(T, tokens): softmax over the image's keys alone, mean over heads, of q (1, T, H, D)."""
    segment, grid = level.parents[0]
    assert not isinstance(segment, int)
    head = len(engine.tokens.head)
    count = int(segment.counts()[0]) - head - len(engine.tokens.tail)
    keys = segment.part(index, grid).keys[0, :, head : head + count].float()
    groups = q[0].float().unflatten(1, (keys.shape[0], -1))
    scores = torch.einsum("tkrd,ksd->tkrs", groups, keys) * engine.backbone.scale
    return scores.softmax(-1).mean((1, 2))
