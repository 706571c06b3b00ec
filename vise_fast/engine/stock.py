"""The rollout engine over transformers' own forward (`engine: stock`): plain, unshared, one row at
a time.

Same interface and same sampled ids as `fast.FastEngine` and `generic.GenericEngine`, so that it is
the plain version they are tested against, for every family that has a row (model/families.py).
Every row is its own full sequence with its own image, encoded anew: nothing is encoded once for two
questions, and the counters say so. Left out: batching (rows would need padding), quick answers.

    engine = StockEngine(StockBackbone(policy.model), policy.tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from vise_kernels import sample

from vise_fast.engine.rollout import Answered, Counters, ReleasedSpan, Rollout, owners
from vise_fast.model.stock_modules import StockModules
from vise_fast.system.machine.clock import Clock
from vise_fast.text.tokens import Tokens


class StockBackbone(StockModules):
    """The stock modules of a model, with PEFT around it or without."""


@dataclass
class Pictures:
    """Images as the stock model takes them, not encoded: pixels [(patches, channels·temporal·p·p)]
    or [(1, 3, S, S)], grids [(rows, columns)] in patches.
    """

    pixels: list[Tensor]
    grids: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.grids)

    def select(self, images: list[int]) -> Pictures:
        """Some images, in that order."""
        return Pictures([self.pixels[i] for i in images], [self.grids[i] for i in images])


@dataclass
class StockPrefixes:
    """Which images, under which adapter state: no work is done or shared."""

    pictures: Pictures
    adapters: bool

    def __len__(self) -> int:
        return len(self.pictures)

    def select(self, images: list[int]) -> StockPrefixes:
        """Those of some images, in that order."""
        return StockPrefixes(self.pictures.select(images), self.adapters)


@dataclass
class StockPrompts:
    """Row r asks rows[r] about image owner[r]."""

    prefixes: StockPrefixes
    owner: list[int]
    rows: list[list[int]]


class Answer(NamedTuple):
    """One answer as it is sampled: its ids, and the log-prob of each (0-d)."""

    ids: list[int]
    scores: list[Tensor]


class StockEngine:
    """See `rollout.Engine`; the arguments and results are the same."""

    keeps_keys = False
    measures_attention = False

    def gains_by_sharing(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """There is nothing to share."""
        return False

    def __init__(self, backbone: StockBackbone, tokens: Tokens) -> None:
        self.backbone = backbone
        self.tokens = tokens
        self.counters = Counters()
        self.device = backbone.device
        self.banned = tokens.banned().to(self.device)
        self.interrupted: Callable[[], None] = lambda: None
        self.clock = Clock(self.device)

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def home(self, values: Tensor) -> Tensor:
        """Values on the CPU: a host sync, counted."""
        self.counters.host_reads += 1
        return values.cpu()

    def sizes(self, prefixes: StockPrefixes) -> list[tuple[int, int] | None]:
        """(height, width) in pixels of each image as the model sees it."""
        return [self.backbone.size(grid) for grid in prefixes.pictures.grids]

    def encode(self, images: list[Tensor]) -> Pictures:
        """uint8 (H, W, 3) images on the model's grid."""
        pixels, grids = self.backbone.pixels(images)
        sizes = [rows * columns or 1 for rows, columns in grids]
        return Pictures(list(pixels.split(sizes)), grids)

    def prefill(self, features: Pictures, adapters: bool, *, graph: bool = False) -> StockPrefixes:
        """Notes the adapter state. Raises ValueError where a graph is asked for."""
        if graph:
            raise ValueError("the stock engine keeps no graph between calls")
        return StockPrefixes(features, adapters)

    def prompt(
        self, prefixes: StockPrefixes, owner: list[int], rows: list[list[int]]
    ) -> StockPrompts:
        """Notes who asks what."""
        return StockPrompts(prefixes, owner, rows)

    @torch.no_grad()
    def verdict_logits(self, features: Pictures, rows: list[list[int]], adapters: bool) -> Tensor:
        """Next-token logits (R, V) of one opened question per image."""
        prefixes = StockPrefixes(features, adapters)
        return self.forked_verdict_logits(prefixes, list(range(len(rows))), rows)

    @torch.no_grad()
    def forked_verdict_logits(
        self, prefixes: StockPrefixes, owner: list[int], rows: list[list[int]]
    ) -> Tensor:
        """Row r about image owner[r]."""
        self.counters.verdicts += len(rows)
        last = []
        with self.backbone.adapters(prefixes.adapters):
            for image, row in zip(owner, rows, strict=True):
                out = self._forward(prefixes.pictures, image, row)
                last.append(out.last_hidden_state[0, -1])
        return self.backbone.logits(torch.stack(last))

    @torch.no_grad()
    def generate(
        self,
        prompts: StockPrompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """fan[r] answers to prompt r, one after the other."""
        answers = []
        with self.backbone.adapters(prompts.prefixes.adapters):
            for r, seed in zip(owners(fan), seeds, strict=True):
                answers.append(self._answer(prompts, r, limit, seed, temperature))
        return self._rollout(answers)

    def _rollout(self, answers: list[Answer]) -> Rollout:
        """The answers side by side, padded."""
        lengths = [len(answer.ids) for answer in answers]
        ids = torch.full((len(answers), max(lengths)), self.tokens.pad, device=self.device)
        logprob = torch.zeros(ids.shape, device=self.device)
        for n, answer in enumerate(answers):
            ids[n, : lengths[n]] = torch.tensor(answer.ids, device=self.device)
            logprob[n, : lengths[n]] = torch.stack(answer.scores)
        return Rollout(ids, logprob, lengths)

    def score(
        self,
        features: Pictures,
        answered: Answered,
        adapters: bool,
        *,
        prefixes: StockPrefixes | None = None,
        recompute: bool = False,
        prompts: StockPrompts | None = None,
    ) -> Tensor:
        """Hidden states (sum of lengths, E), each answer from its own full sequence; `prefixes` is
        ignored.
        """
        whole = self._sequences(features, answered, adapters, recompute)
        pairs = zip(whole, answered.answers.lengths, strict=True)
        return torch.cat([states[-length:] for states, length in pairs])

    def score_released(
        self, features: Pictures, answered: Answered, adapters: bool
    ) -> ReleasedSpan:
        """The released code's span; see `fast.FastEngine.score_released`."""
        tokens = self.tokens
        states: list[Tensor] = []
        scored: list[Tensor] = []
        whole = self._sequences(features, answered, adapters)
        answers = zip(answered.owner, answered.answers.rows(), whole, strict=True)
        for image, answer, hidden in answers:
            row = answered.rows[image]
            start = len(tokens.head) + 1 + len(tokens.tail) + len(row)
            ids = (self._prefix_ids(features, image) + row + answer)[start:]
            states.append(hidden[start - 1 :])
            scored.append(torch.tensor(ids, device=self.device))
        return ReleasedSpan(torch.cat(states), torch.cat(scored), [len(ids) for ids in scored])

    def _sequences(
        self, features: Pictures, answered: Answered, adapters: bool, recompute: bool = False
    ) -> list[Tensor]:
        """Hidden states (T, E) of each answer's sequence without its last token."""
        outs = []
        with self.backbone.adapters(adapters):
            for image, ids in zip(answered.owner, answered.answers.rows(), strict=True):
                place = (features, image, answered.rows[image] + ids[:-1])
                if recompute:
                    outs.append(checkpoint(self._forward, *place, use_reentrant=False))
                else:
                    outs.append(self._forward(*place))
        return [out.last_hidden_state[0] for out in outs]

    def _answer(
        self, prompts: StockPrompts, r: int, limit: int, seed: int, temperature: float
    ) -> Answer:
        """One sampled answer."""
        row = prompts.rows[r]
        out = self._forward(prompts.prefixes.pictures, prompts.owner[r], row, cached=True)
        answer = Answer([], [])
        seeds = torch.tensor([seed], device=self.device)
        for step in range(limit):
            logits = self.backbone.logits(out.last_hidden_state[:, -1])
            token, score = sample(
                logits, temperature=temperature, banned=self.banned, seed=seeds, position=step
            )
            answer.ids.append(int(token))
            answer.scores.append(score[0])
            self.interrupted()
            if answer.ids[-1] in self.tokens.eos or step + 1 == limit:
                break
            out = self._next(token, out.past_key_values)
        return answer

    def _next(self, token: Tensor, keys_values: Any) -> Any:
        """The stock forward of one more token (1,) of the row that was forwarded last: its rope
        offset is module state.
        """
        self.counters.decode_steps += 1
        self.counters.tokens_decoded += 1
        ids = token[None]
        more = self.backbone.crossing(ids, 0)
        return self.backbone.forward(
            input_ids=ids, past_key_values=keys_values, use_cache=True, **more
        )

    def _forward(self, pictures: Pictures, image: int, row: list[int], cached: bool = False) -> Any:
        """The stock forward of head + image + tail + row."""
        ids = torch.tensor([self._prefix_ids(pictures, image) + row], device=self.device)
        self.counters.images_encoded += 1
        self.counters.prefixes += 1
        self.counters.forwards += 1
        inputs = self.backbone.inputs(pictures.pixels[image], [pictures.grids[image]])
        inputs |= self.backbone.marks(ids) | self.backbone.crossing(ids, len(self.tokens.head))
        return self.backbone.forward(input_ids=ids, use_cache=cached, **inputs)

    def _prefix_ids(self, pictures: Pictures, image: int) -> list[int]:
        places = self.backbone.image_tokens(pictures.grids[image])
        return self.tokens.head + [self.tokens.image_token] * places + self.tokens.tail
