"""The fast engine: encode each image once, prefill its prefix once, fork it for every question,
decode all answers together.

Images become `Features` (adapters play no part in them), features become `Prefixes` (keys and
values of one adapter state), questions fork a prefix into `Prompts`, prompts fork into sampled
rows: a `Rollout`. `score` runs the same tree in one pass, with gradients, for the update. Sampling
is counter-based per row, so batching, compaction of finished rows and micro-batches do not change
what is sampled. Knows no model family: it asks a `Backbone` (model/tree.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor
from vise_kernels import sample

from vise_fast.engine.rollout import (
    Answered,
    Counters,
    Prefixes,
    Prompts,
    ReleasedSpan,
    Rollout,
    owners,
)
from vise_fast.model.tree import Backbone, Features, Grid, Level, Parent, Ragged, Segment
from vise_fast.system.machine.clock import Clock
from vise_fast.system.machine.staging import put
from vise_fast.text.tokens import Tokens

# fewer rows alive than this share: finished ones are dropped, so that they stop costing
COMPACT_BELOW = 0.75
# On a GPU a shared forward pass saves the update one over prefixes and questions, and costs so many
# more launches a layer, for three backward graphs instead of one (bench/launches.py).
# On an H100 a launch has since taken 43 to 67 us, the Python around it included
# (docs/PERFORMANCE.md); of 32 images only the shared step was timed there.
LAUNCHES_OF_SHARING = 260
SECONDS_A_LAUNCH = 6e-6
FLOPS_A_SECOND = 4e14
QUESTION = 150
"""tokens of a question about a box"""


@dataclass
class Sheet:
    """Answers as they are written: ids and log-probs (N, limit), and where each row ended (N,)."""

    ids: Tensor
    logprob: Tensor
    done_at: Tensor
    eos: Tensor
    pad: int

    @classmethod
    def blank(cls, rows: int, limit: int, tokens: Tokens, device: torch.device) -> Sheet:
        """Padding everywhere, no row ended."""
        return cls(
            torch.full((rows, limit), tokens.pad, device=device),
            torch.zeros(rows, limit, device=device),
            torch.full((rows,), limit, device=device),
            put(tokens.eos, device),
            tokens.pad,
        )

    def write(self, step: int, where: Tensor, token: Tensor, score: Tensor) -> None:
        """Token `step` of the rows `where`; a row that has ended gets padding."""
        done_at = self.done_at[where]
        fresh = done_at > step
        self.ids[where, step] = torch.where(fresh, token, self.pad)
        self.logprob[where, step] = torch.where(fresh, score, 0.0)
        ended = fresh & torch.isin(token, self.eos)
        self.done_at[where] = torch.where(ended, step + 1, done_at)

    def joined(self) -> Tensor:
        """(N, limit + 1): ids and, last, the length: what comes home together."""
        return torch.cat([self.ids, self.done_at[:, None]], 1)

    def rollout(self, home: list[list[int]]) -> Rollout:
        """The answers, `home` being `joined` on the host."""
        lengths = [row[-1] for row in home]
        longest = max(lengths)
        ids = self.ids[:, :longest]
        logprob = self.logprob[:, :longest]
        return Rollout(ids, logprob, lengths, [row[:longest] for row in home])


@dataclass
class Active:
    """The rows still being decoded. `start`: where in the buffer the first new token goes."""

    rows: list[int]
    owner: list[int]
    """prompt of each row"""
    where: Tensor
    positions: Tensor
    seeds: Tensor
    buffer: Segment
    start: int
    parents: list[Parent] = field(default_factory=list)

    def select(self, alive: list[bool], keep: Tensor) -> None:
        """Drop the rows that are not alive (`keep`: places of those that are)."""
        self.rows = [row for row, lives in zip(self.rows, alive, strict=True) if lives]
        self.owner = [prompt for prompt, lives in zip(self.owner, alive, strict=True) if lives]
        self.where = self.where[keep]
        self.positions = self.positions[keep]
        self.seeds = self.seeds[keep]
        self.buffer = self.buffer.select(keep)


class FastEngine:
    """See `rollout.Engine`. `poll`: look for finished rows every so many tokens; `chunk`: verdicts
    judged together at most.
    """

    keeps_keys = True
    measures_attention = True

    def __init__(
        self, backbone: Backbone, tokens: Tokens, poll: int | None = None, chunk: int = 64
    ) -> None:
        self.backbone = backbone
        self.tokens = tokens
        self.counters = Counters()
        self.device = backbone.device
        self.banned = tokens.banned().to(self.device)
        self.poll = poll or (1 if self.device.type == "cpu" else 8)
        self.joins = self.device.type == "cpu"
        self.chains = not self.joins
        self.chunk = chunk
        self._interrupted: Callable[[], None] = lambda: None
        self.clock = Clock(self.device)

    @property
    def interrupted(self) -> Callable[[], None]:
        """Called between the steps of a long answer and the layers of a long pass; may raise."""
        return self._interrupted

    @interrupted.setter
    def interrupted(self, poll: Callable[[], None]) -> None:
        self._interrupted = poll
        self.backbone.listen(poll)

    def gains_by_sharing(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """See `rollout.Engine`. On a CPU always: there a launch costs next to nothing."""
        if self.device.type == "cpu":
            return True
        side = self.backbone.patch * self.backbone.merge_size
        tokens = sum(h * w // side**2 + QUESTION for h, w in sizes)
        saved = 2 * tokens * self.backbone.decoder_weights / FLOPS_A_SECOND
        return saved > LAUNCHES_OF_SHARING * self.backbone.depth * SECONDS_A_LAUNCH

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def home(self, values: Tensor) -> Tensor:
        """Values on the CPU: a host sync, counted."""
        self.counters.host_reads += 1
        return values.cpu()

    def sizes(self, prefixes: Prefixes) -> list[tuple[int, int] | None]:
        """Not kept: no style of this engine's families needs them."""
        return [None] * len(prefixes)

    # ---- images and prefixes ---------------------------------------------------------------------

    def encode(self, images: list[Tensor]) -> Features:
        """uint8 (H, W, 3) images on the model's grid."""
        self.counters.images_encoded += len(images)
        return self.backbone.encode(images)

    def prefill(self, features: Features, adapters: bool, *, graph: bool = False) -> Prefixes:
        """Head, image and tail of every image in one pass. graph: with gradients."""
        with torch.set_grad_enabled(graph):
            level, following = self.prefix_level(features, adapters)
            _, (segment,) = self._forward([level], adapters)
        return Prefixes(segment, following, adapters)

    def prefix_level(self, features: Features, adapters: bool) -> tuple[Level, list[int]]:
        """The level of head + image + tail per image, and each image's next rope position."""
        level = self._chain(features, [[]] * len(features), adapters)
        level.read = "none"
        return level, [self._span(grid)[1] for grid in features.grids]

    def _chain(self, features: Features, rows: list[list[int]], adapters: bool) -> Level:
        """The level of head + image + tail per image, each followed by a row of its own."""
        merged, deep = self.backbone.merge(features, adapters)
        ids = [self._prefix_ids(grid) for grid in features.grids]
        whole = [prefix + row for prefix, row in zip(ids, rows, strict=True)]
        sizes = [len(prefix) for prefix in ids]
        image_rows = put(self._image_rows(whole, sizes), self.device)
        embeds = self.backbone.embed(put(_flat(whole), self.device))
        embeds = embeds.index_copy(0, image_rows, merged.to(self.backbone.dtype))
        self.counters.prefixes += len(features)
        positions = put(self._chain_positions(features.grids, rows), self.device)
        rag = Ragged([len(row) for row in whole], self.device)
        return Level(embeds, positions, rag, deep_rows=image_rows, deep=deep)

    def _chain_positions(self, grids: list[tuple[int, int]], rows: list[list[int]]) -> Tensor:
        """Rope positions (3, n) of prefixes, each followed by its row."""
        known = {grid: self._span(grid) for grid in set(grids)}
        pieces: list[Tensor] = []
        for grid, row in zip(grids, rows, strict=True):
            positions, following = known[grid]
            pieces.append(positions)
            if row:
                pieces.append(torch.arange(following, following + len(row)).expand(3, -1))
        return torch.cat(pieces, 1)

    def _prefix_ids(self, grid: tuple[int, int]) -> list[int]:
        merge = self.backbone.merge_size
        places = (grid[0] // merge) * (grid[1] // merge)
        return self.tokens.head + [self.tokens.image_token] * places + self.tokens.tail

    def _image_rows(self, rows: list[list[int]], sizes: list[int]) -> Tensor:
        """Where the image tokens lie among the packed tokens of all rows; sizes: of the prefixes
        that they begin with.
        """
        head = len(self.tokens.head)
        tail = len(self.tokens.tail)
        runs = []
        start = 0
        for row, size in zip(rows, sizes, strict=True):
            runs.append(torch.arange(start + head, start + size - tail))
            start += len(row)
        return torch.cat(runs)

    def _span(self, grid: tuple[int, int]) -> tuple[Tensor, int]:
        """Rope positions of a prefix, and the next free one."""
        merge = self.backbone.merge_size
        sides = grid[0] // merge, grid[1] // merge
        return _prefix_positions(len(self.tokens.head), sides, len(self.tokens.tail))

    def _forward(
        self, levels: list[Level], adapters: bool, recompute: bool = False, keep: bool = True
    ) -> tuple[list[Tensor], list[Segment]]:
        self.counters.forwards += 1
        return self.backbone.forward(levels, adapters, recompute=recompute, keep=keep)

    def text_level(self, rows: list[list[int]], starts: list[int], parents: list[Parent]) -> Level:
        """A level of plain token rows, row r at rope positions starts[r], starts[r] + 1, …; the
        last of each is read.
        """
        places: list[int] = []
        for row, start in zip(rows, starts, strict=True):
            places += range(start, start + len(row))
        ids = put(_flat(rows), self.device)
        positions = put(places, self.device).expand(3, -1)
        rag = Ragged([len(row) for row in rows], self.device)
        return Level(self.backbone.embed(ids), positions, rag, parents, read="last")

    # ---- questions -------------------------------------------------------------------------------

    def prompt(self, prefixes: Prefixes, owner: list[int], rows: list[list[int]]) -> Prompts:
        """Fork prefixes: question ids rows[r] continue prefix owner[r]; with gradients where the
        prefixes carry them.
        """
        starts = [prefixes.following[i] for i in owner]
        seen = max(owner) + 1  # the views' prefixes lie behind the images'
        parents = [Parent(prefixes.segment.first(seen), Grid(owner, seen, self.device))]
        with torch.set_grad_enabled(prefixes.segment.keys[0].requires_grad):
            level = self.text_level(rows, starts, parents)
            (hidden,), (segment,) = self._forward([level], prefixes.adapters)
        following = [start + len(row) for start, row in zip(starts, rows, strict=True)]
        return Prompts(prefixes, owner, segment, following, hidden)

    @torch.no_grad()
    def verdict_logits(self, features: Features, rows: list[list[int]], adapters: bool) -> Tensor:
        """Next-token logits (R, V) of one opened question per image; prefix and question in one
        pass, nothing kept.
        """
        outs = []
        for start in range(0, len(features), self.chunk):
            chosen = list(range(start, min(start + self.chunk, len(features))))
            some = [rows[i] for i in chosen]
            hidden = self._last_hidden(features.select(chosen), some, adapters)
            outs.append(self.backbone.logits(hidden))
        self.counters.verdicts += len(features)
        return torch.cat(outs)

    def _last_hidden(self, features: Features, rows: list[list[int]], adapters: bool) -> Tensor:
        """(R, E) of the last token of each image's question."""
        if self.chains:
            level = self._chain(features, rows, adapters)
            level.read = "last"
            (hidden,), _ = self._forward([level], adapters, keep=False)
            return hidden
        levels, _ = self._tree(features, rows, adapters)
        (_, hidden), _ = self._forward(levels, adapters, keep=False)
        return hidden

    @torch.no_grad()
    def forked_verdict_logits(
        self, prefixes: Prefixes, owner: list[int], rows: list[list[int]]
    ) -> Tensor:
        """The same for images whose prefix is at hand."""
        self.counters.verdicts += len(rows)
        return self.backbone.logits(self.prompt(prefixes, owner, rows).last)

    def _tree(
        self, features: Features, rows: list[list[int]], adapters: bool
    ) -> tuple[list[Level], list[int]]:
        """[prefix level, question level], one question per image, and each image's rope position
        after its prefix.
        """
        prefix, following = self.prefix_level(features, adapters)
        return [prefix, self.text_level(rows, following, [Parent(0, None)])], following

    # ---- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """fan[r] answers to prompt r, at most `limit` tokens each; a seed per answer; temperature 0
        is greedy.
        """
        active = self._start(prompts, fan, limit, seeds)
        sheet = Sheet.blank(len(seeds), limit, self.tokens, self.device)
        logits = self.backbone.logits(prompts.last)[put(active.owner, self.device)]
        for step in range(limit):
            token, score = self._drawn(logits, active.seeds, step, temperature)
            sheet.write(step, active.where, token, score)
            if step + 1 == limit or self._polls(step + 1):
                self.interrupted()
                home = self.home(sheet.joined()).tolist()  # the one host sync
                alive = [home[row][-1] > step + 1 for row in active.rows]
                if step + 1 == limit or not any(alive):
                    break
                token = self._compact(active, alive, prompts, token)
            logits = self._next(active, token, step, prompts.prefixes.adapters)
        return sheet.rollout(home)

    def _start(self, prompts: Prompts, fan: list[int], limit: int, seeds: list[int]) -> Active:
        """All rows, before their first token."""
        owner = owners(fan)
        following = put([prompts.following[p] for p in owner], self.device)
        where = torch.arange(len(owner), device=self.device)
        seed = put(seeds, self.device)
        buffer, start = self._continuation(prompts, fan, limit)
        active = Active(list(range(len(owner))), owner, where, following, seed, buffer, start)
        self._attach(active, prompts)
        return active

    def _drawn(
        self, logits: Tensor, seeds: Tensor, step: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Token (rows,) `step` of each row, and its log-prob (rows,), from logits (rows, V)."""
        return sample(
            logits, temperature=temperature, banned=self.banned, seed=seeds, position=step
        )

    def _next(self, active: Active, token: Tensor, step: int, adapters: bool) -> Tensor:
        """Logits (rows, V) after one more token per row, the `step`-th."""
        see = self.backbone.growing(active.parents, active.buffer, active.start + step)
        hidden = self.backbone.decode(token, active.positions + step, see, adapters)
        self.counters.decode_steps += 1
        self.counters.tokens_decoded += len(active.rows)
        return self.backbone.logits(hidden)

    def _polls(self, written: int) -> bool:
        """Whether to look for finished rows after this many tokens: every `poll`, and not before
        two of them, as answers are rarely shorter.
        """
        return written % self.poll == 0 and (self.poll == 1 or written >= 2 * self.poll)

    def _continuation(self, prompts: Prompts, fan: list[int], limit: int) -> tuple[Segment, int]:
        """The buffer for new keys, and where in it they start.

        On a CPU, where a step costs calls rather than bytes, rows that share nothing get prefix,
        question and answer in one bank.
        """
        if not self.joins or set(fan) != {1}:
            return self.backbone.buffer(sum(fan), limit), 0
        owner = put(prompts.owner, self.device)
        bank = prompts.prefixes.segment.join(owner, prompts.segment, limit)
        return bank, bank.tokens - limit

    def _attach(self, active: Active, prompts: Prompts) -> None:
        """Let the rows see their prefix and question, unless their buffer holds them."""
        if active.start:
            return
        images = [prompts.owner[p] for p in active.owner]
        prefix = Grid(images, len(prompts.prefixes), self.device)
        question = Grid(active.owner, len(prompts), self.device)
        active.parents = [
            Parent(prompts.prefixes.segment, prefix),
            Parent(prompts.segment, question),
        ]

    def _compact(
        self, active: Active, alive: list[bool], prompts: Prompts, token: Tensor
    ) -> Tensor:
        """The last tokens (rows,) of the rows that go on; finished ones are dropped when they are
        many, and the keys written so far move to a smaller buffer.
        """
        if sum(alive) > COMPACT_BELOW * len(alive):
            return token
        places = [place for place, lives in enumerate(alive) if lives]
        keep = put(places, self.device)
        active.select(alive, keep)
        self._attach(active, prompts)
        return token[keep]

    # ---- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        features: Features,
        answered: Answered,
        adapters: bool,
        *,
        prefixes: Prefixes | None = None,
        recompute: bool = False,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """Hidden states (sum of lengths, E) that predict each sampled token, packed row by row.

        Each prefix and question is computed once for all its answers. `prefixes`: cached ones of
        this adapter state, for passes without gradient. `prompts`: these very questions as they
        were asked under this adapter state, with their graph: then only the answers are computed.
        """
        if prompts is not None:
            hidden = self._score_answers(prompts, answered, recompute)
        elif self.chains and prefixes is None and answered.one_each:
            return self._score_chains(features, answered, adapters, recompute)
        elif self.chains and prefixes is None:
            hidden = self._score_fans(features, answered, adapters, recompute)
        else:
            levels, following = self._questions(features, answered.rows, adapters, prefixes)
            self._add_answers(levels, following, answered, prefixes)
            hidden, _ = self._forward(levels, adapters, recompute, keep=False)
        lengths = answered.answers.lengths
        places = _scored_rows(answered.owner, lengths, len(answered.rows))
        return torch.cat(hidden)[put(places, self.device)]

    def _score_chains(
        self, features: Features, answered: Answered, adapters: bool, recompute: bool
    ) -> Tensor:
        """`score` where every question has one answer: image, question and answer are one row."""
        answers = answered.answers.rows()
        pairs = list(zip(answered.rows, answers, strict=True))
        level = self._chain(features, [row + ids[:-1] for row, ids in pairs], adapters)
        places: list[int] = []
        end = 0
        for size, ids in zip(level.rag.lengths, answers, strict=True):
            end += size
            places += range(end - len(ids), end)
        level.read = put(places, self.device)
        (hidden,), _ = self._forward([level], adapters, recompute, keep=False)
        return hidden

    def _score_fans(
        self, features: Features, answered: Answered, adapters: bool, recompute: bool
    ) -> list[Tensor]:
        """Hidden states of questions and answers: image and question are one row, which all answers
        to the question continue.
        """
        level = self._chain(features, answered.rows, adapters)
        level.read = "last"
        levels = [level]
        if max(answered.answers.lengths) > 1:
            ends = [self._span(grid)[1] for grid in features.grids]
            starts = [end + len(row) for end, row in zip(ends, answered.rows, strict=True)]
            grid = Grid(answered.owner, len(starts), self.device)
            levels.append(self._answer_level(answered, starts, [Parent(0, grid)]))
        hidden, _ = self._forward(levels, adapters, recompute, keep=False)
        return hidden

    def score_released(
        self, features: Features, answered: Answered, adapters: bool
    ) -> ReleasedSpan:
        """The released code's span, for `as_released`: everything after the prompt's length before
        image tokens were expanded.
        """
        levels, following = self._questions(features, answered.rows, adapters, None)
        for level in levels:
            level.read = "all"
        self._add_answers(levels, following, answered, None)
        hidden, _ = self._forward(levels, adapters, keep=False)
        prefixes = [self._prefix_ids(grid) for grid in features.grids]
        return self._released(hidden, prefixes, answered)

    def _released(
        self, hidden: list[Tensor], prefixes: list[list[int]], answered: Answered
    ) -> ReleasedSpan:
        """The span of each answer, cut from the levels' hidden states (all tokens)."""
        answers = answered.answers.rows()
        image = hidden[0].split([len(ids) for ids in prefixes])
        question = hidden[1].split([len(row) for row in answered.rows])
        empty = hidden[0][:0]
        written = hidden[2] if len(hidden) > 2 else empty
        answer = written.split([len(ids) - 1 for ids in answers])
        states: list[Tensor] = []
        scored: list[Tensor] = []
        for n, i in enumerate(answered.owner):
            row = answered.rows[i]
            start = len(self.tokens.head) + 1 + len(self.tokens.tail) + len(row)
            states.append(torch.cat([image[i], question[i], answer[n]])[start - 1 :])
            ids = (prefixes[i] + row + answers[n])[start:]
            scored.append(put(ids, self.device))
        return ReleasedSpan(torch.cat(states), torch.cat(scored), [len(ids) for ids in scored])

    def _questions(
        self,
        features: Features,
        rows: list[list[int]],
        adapters: bool,
        prefixes: Prefixes | None,
    ) -> tuple[list[Level], list[int]]:
        """[prefix,] question levels, and each image's rope position after its prefix."""
        if prefixes is None:
            return self._tree(features, rows, adapters)
        parents = [Parent(prefixes.segment, None)]
        return [self.text_level(rows, prefixes.following, parents)], prefixes.following

    def _add_answers(
        self,
        levels: list[Level],
        following: list[int],
        answered: Answered,
        prefixes: Prefixes | None,
    ) -> None:
        """The level of the answers, where any has more than one token."""
        if max(answered.answers.lengths) == 1:
            return
        starts = [start + len(row) for start, row in zip(following, answered.rows, strict=True)]
        grid = Grid(answered.owner, len(starts), self.device)
        prefix = 0 if prefixes is None else prefixes.segment
        parents = [Parent(prefix, grid), Parent(len(levels) - 1, grid)]
        levels.append(self._answer_level(answered, starts, parents))

    def _answer_level(self, answered: Answered, starts: list[int], parents: list[Parent]) -> Level:
        """All answers without their last token; all of it is read."""
        inputs = [row[:-1] for row in answered.answers.rows()]
        level = self.text_level(inputs, [starts[i] for i in answered.owner], parents)
        level.read = "all"
        return level

    def _score_answers(self, prompts: Prompts, answered: Answered, recompute: bool) -> list[Tensor]:
        """Hidden states of questions and answers, where prefix and question have been computed."""
        if max(answered.answers.lengths) == 1:
            return [prompts.last]
        grid = Grid(answered.owner, len(prompts), self.device)
        parents = [Parent(prompts.prefixes.segment, grid), Parent(prompts.segment, grid)]
        level = self._answer_level(answered, prompts.following, parents)
        hidden, _ = self._forward([level], prompts.prefixes.adapters, recompute, keep=False)
        return [prompts.last, *hidden]


def _flat(rows: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(rows))


def _prefix_positions(head: int, sides: tuple[int, int], tail: int) -> tuple[Tensor, int]:
    """Rope positions (3, head + height·width + tail) of an image prefix and the next free one
    (Qwen3-VL's rule for stills).
    """
    height, width = sides
    before = torch.arange(head).expand(3, -1)
    r, c = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    still = torch.zeros(height * width, dtype=torch.long)
    image = torch.stack([still, r.flatten(), c.flatten()]) + head
    start = head + max(height, width)
    after = (torch.arange(tail) + start).expand(3, -1)
    return torch.cat([before, image, after], 1), start + tail


def _scored_rows(owner: list[int], lengths: list[int], questions: int) -> Tensor:
    """For each sampled token, the row of cat([questions' last, answer inputs]) that predicts it."""
    picks: list[int] = []
    start = questions
    for image, length in zip(owner, lengths, strict=True):
        picks += [image, *range(start, start + length - 1)]
        start += length - 1
    return torch.tensor(picks)
