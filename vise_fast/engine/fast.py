"""The rollout engine: encode each image once, prefill its prefix once, fork it for every question, decode all answers together.

Images become `Features` (adapters play no part in them), features become `Prefixes` (keys and values of one adapter state), questions
fork a prefix into `Prompts`, prompts fork into sampled rows: a `Rollout`. `score` runs the same tree in one pass, with gradients, for the
update. Ids in, ids out: what is asked and how answers are read is none of its business. Sampling is counter-based per row, so batching,
compaction of finished rows and micro-batches do not change what is sampled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from vise_kernels import sample

from vise_fast.model.attention import Grid
from vise_fast.model.qwen3_vl import Backbone, Features, Level, Ragged, Segment
from vise_fast.system.clock import Clock
from vise_fast.text.tokens import Tokens


@dataclass
class Counters:
    """Work done since the last `take`: a regression in work done twice shows here on any machine."""

    images_encoded: int = 0
    prefixes: int = 0
    forwards: int = 0
    decode_steps: int = 0
    verdicts: int = 0
    tokens_decoded: int = 0
    host_reads: int = 0

    def take(self) -> dict[str, int]:
        values = asdict(self)
        self.__init__()
        return values


@dataclass
class Prefixes:
    """Image prefixes under one adapter state: their keys and values and the rope position that comes next, per image.

    trained: the first images once more, with the graph of their forward pass.
    """

    segment: Segment
    following: list[int]
    adapters: bool
    trained: Prefixes | None = None

    def __len__(self) -> int:
        return len(self.following)

    def select(self, images: list[int]) -> Prefixes:
        """The prefixes of some images, in that order."""
        if images == list(range(len(self))):
            return self
        return Prefixes(
            self.segment.select(images), [self.following[i] for i in images], self.adapters
        )


@dataclass
class Prompts:
    """Questions forked from prefixes: owner[r] is the prefix of row r; last (R, E) the hidden state that predicts the first token.

    trained: the first rows once more, with the graph of their forward pass.
    """

    prefixes: Prefixes
    owner: list[int]
    segment: Segment
    following: list[int]
    last: Tensor
    trained: Prompts | None = None

    def __len__(self) -> int:
        return len(self.following)

    def select(self, rows: list[int]) -> Prompts:
        """The questions in some rows, each of an image of its own, in that order."""
        if rows == list(range(len(self))):
            return self
        prefixes = self.prefixes.select([self.owner[r] for r in rows])
        return Prompts(
            prefixes,
            list(range(len(rows))),
            self.segment.select(rows),
            [self.following[r] for r in rows],
            self.last[rows],
        )


@dataclass
class Rollout:
    """Sampled answers: ids (N, T) padded, logprob (N, T) under the sampling distribution, lengths including the end token.

    home: the padded ids as lists, where they came to the host together with the lengths.
    """

    ids: Tensor
    logprob: Tensor
    lengths: list[int]
    home: list[list[int]] | None = None

    def mask(self) -> Tensor:
        """fp32 (N, T): 1 on sampled tokens."""
        steps = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (steps < torch.tensor(self.lengths, device=self.ids.device)[:, None]).float()

    def rows(self) -> list[list[int]]:
        return [
            row[:n]
            for row, n in zip(
                self.ids.tolist() if self.home is None else self.home, self.lengths, strict=True
            )
        ]

    def packed(self) -> Tensor:
        """The sampled ids (sum of lengths,), row by row; no host sync."""
        width = self.ids.shape[1]
        places = [row * width + t for row, length in enumerate(self.lengths) for t in range(length)]
        return self.ids.flatten()[torch.tensor(places, device=self.ids.device)]

    def select(self, rows: list[int]) -> Rollout:
        home = None if self.home is None else [self.home[r] for r in rows]
        return Rollout(self.ids[rows], self.logprob[rows], [self.lengths[r] for r in rows], home)


@dataclass
class _Active:
    """The rows still being decoded. `start`: where in the buffer the first new token goes."""

    rows: list[int]
    owner_prefix: list[int]
    owner_prompt: list[int]
    ids: Tensor
    positions: Tensor
    seeds: Tensor
    buffer: Segment
    start: int = 0
    parents: list[tuple[Segment, Grid]] = field(default_factory=list)


class Engine:
    """Fast generation and scoring with one backbone; stateless between calls but for its counters."""

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
        self.chunk = chunk
        self.interrupted = lambda: None
        self.clock = Clock(self.device)

    def forget(self) -> None:
        """Drop what is kept between calls, when memory runs out: nothing here."""

    # ---- images and prefixes ---------------------------------------------------------------------

    def encode(self, images: list[Tensor]) -> Features:
        self.counters.images_encoded += len(images)
        return self.backbone.encode(images)

    def prefix_level(self, features: Features, adapters: bool) -> tuple[Level, list[int]]:
        """The level of head + image + tail per image, and each image's next rope position."""
        merged, deep = self.backbone.merge(features, adapters)
        merge = self.backbone.merge_size
        head = self.tokens.head
        tail = self.tokens.tail
        ids = []
        rows = []
        positions = []
        lengths = []
        following = []
        start = 0
        known = {
            grid: _prefix_positions(len(head), grid[0] // merge, grid[1] // merge, len(tail))
            for grid in set(features.grids)
        }
        for grid in features.grids:
            places = grid[0] // merge * (grid[1] // merge)
            ids += head + [self.tokens.image_token] * places + tail
            rows.append(torch.arange(places) + start + len(head))
            position, after = known[grid]
            positions.append(position), following.append(after)
            lengths.append(position.shape[1])
            start += lengths[-1]
        image_rows = torch.cat(rows).to(self.device)
        embeds = self.backbone.embed(torch.tensor(ids, device=self.device)).index_copy(
            0, image_rows, merged.to(self.backbone.dtype)
        )
        self.counters.prefixes += len(features)
        positions = torch.cat(positions, 1).to(self.device)
        return Level(
            embeds,
            positions,
            Ragged(lengths, self.device),
            deep_rows=image_rows,
            deep=deep,
            read="none",
        ), following

    def prefill(self, features: Features, adapters: bool, trained: int = 0) -> Prefixes:
        """trained: so many images, the first, keep the graph of this pass (`Prefixes.trained`), for `score`."""
        if not trained:
            with torch.no_grad():
                return self._prefill(features, adapters)
        with torch.enable_grad():
            first = self._prefill(features.select(list(range(trained))), adapters)
        if trained == len(features):
            return Prefixes(first.segment.detach(), first.following, adapters, first)
        rest = self.prefill(features.select(list(range(trained, len(features)))), adapters)
        return Prefixes(
            first.segment.stack(rest.segment), first.following + rest.following, adapters, first
        )

    def _prefill(self, features: Features, adapters: bool) -> Prefixes:
        level, following = self.prefix_level(features, adapters)
        _, (segment,) = self._forward([level], adapters)
        return Prefixes(segment, following, adapters)

    def _forward(
        self, levels: list[Level], adapters: bool, recompute: bool = False, keep: bool = True
    ) -> tuple[list[Tensor], list[Segment]]:
        self.counters.forwards += 1
        return self.backbone.forward(levels, adapters, recompute, keep)

    def _text_level(
        self, rows: list[list[int]], starts: list[int], parents: list, read: str = "last"
    ) -> Level:
        """A level of plain token rows, row r at rope positions starts[r], starts[r] + 1, …"""
        ids = torch.tensor([token for row in rows for token in row], device=self.device)
        positions = torch.tensor(
            [start + t for row, start in zip(rows, starts, strict=True) for t in range(len(row))],
            device=self.device,
        )
        return Level(
            self.backbone.embed(ids),
            positions.expand(3, -1),
            Ragged([len(row) for row in rows], self.device),
            parents,
            read=read,
        )

    # ---- questions -------------------------------------------------------------------------------

    def prompt(
        self, prefixes: Prefixes, owner: list[int], rows: list[list[int]], trained: int = 0
    ) -> Prompts:
        """Fork prefixes: row r of question ids continues prefix owner[r].

        trained: so many rows, the first, keep the graph of this pass (`Prompts.trained`); their prefixes must have.
        """
        if not trained:
            with torch.no_grad():
                return self._prompt(prefixes, owner, rows)
        with torch.enable_grad():
            first = self._prompt(prefixes.trained, owner[:trained], rows[:trained])
        if trained == len(rows):
            return Prompts(
                prefixes, owner, first.segment.detach(), first.following, first.last.detach(), first
            )
        rest = self.prompt(prefixes, owner[trained:], rows[trained:])
        last = torch.cat([first.last.detach(), rest.last])
        return Prompts(
            prefixes,
            owner,
            first.segment.stack(rest.segment),
            first.following + rest.following,
            last,
            first,
        )

    def _prompt(self, prefixes: Prefixes, owner: list[int], rows: list[list[int]]) -> Prompts:
        starts = [prefixes.following[i] for i in owner]
        level = self._text_level(
            rows, starts, [(prefixes.segment, Grid(owner, len(prefixes), self.device))]
        )
        (hidden,), (segment,) = self._forward([level], prefixes.adapters)
        following = [start + len(row) for start, row in zip(starts, rows, strict=True)]
        return Prompts(prefixes, owner, segment, following, hidden)

    @torch.no_grad()
    def verdict_logits(self, features: Features, rows: list[list[int]], adapters: bool) -> Tensor:
        """Next-token logits (R, V) of one opened question per image; prefix and question in one pass, nothing kept."""
        outs = []
        for start in range(0, len(features), self.chunk):
            chosen = list(range(start, min(start + self.chunk, len(features))))
            levels, _ = self._tree(features.select(chosen), [rows[i] for i in chosen], adapters)
            (_, hidden), _ = self._forward(levels, adapters, keep=False)
            outs.append(self.backbone.logits(hidden))
        self.counters.verdicts += len(features)
        return torch.cat(outs)

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
        """[prefix level, question level], one question per image, and each image's rope position after its prefix."""
        prefix, following = self.prefix_level(features, adapters)
        return [prefix, self._text_level(rows, following, [(0, None)])], following

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
        """fan[r] answers to prompt r, at most `limit` tokens each; seeds per answer; temperature 0 is greedy."""
        owner_prompt = [r for r, count in enumerate(fan) for _ in range(count)]
        rows = len(owner_prompt)
        device = self.device
        ids = torch.full((rows, limit), self.tokens.pad, device=device)
        logprob = torch.zeros(rows, limit, device=device)
        done_at = torch.full((rows,), limit, device=device)
        eos = torch.tensor(self.tokens.eos, device=device)
        index = torch.tensor(owner_prompt, device=device)
        logits = self.backbone.logits(prompts.last)[index]
        positions = torch.tensor(prompts.following, device=device)[index]
        active = _Active(
            list(range(rows)),
            [prompts.owner[p] for p in owner_prompt],
            owner_prompt,
            index,
            positions,
            torch.tensor(seeds, device=device),
            *self._continuation(prompts, fan, limit),
        )
        self._attach(active, prompts)
        for step in range(limit):
            token, score = sample(
                logits,
                temperature=temperature,
                banned=self.banned,
                seed=active.seeds,
                position=step,
            )
            where = torch.tensor(active.rows, device=device)
            fresh = done_at[where] > step
            ids[where, step] = torch.where(fresh, token, self.tokens.pad)
            logprob[where, step] = torch.where(fresh, score, 0.0)
            ended = fresh & torch.isin(token, eos)
            done_at[where] = torch.where(ended, step + 1, done_at[where])
            if step + 1 == limit or self._polls(step + 1):
                self.interrupted()
                home = torch.cat(
                    [ids, done_at[:, None]], 1
                ).tolist()  # the one host sync: answers and lengths together
                self.counters.host_reads += 1
                alive = [home[row][-1] > step + 1 for row in active.rows]
                if step + 1 == limit or not any(alive):
                    break
                if sum(alive) <= 0.75 * len(alive):
                    token = token[self._compact(active, alive, prompts)]
            see = self.backbone.growing(active.parents, active.buffer, active.start + step)
            hidden = self.backbone.decode(
                token, active.positions + step, see, prompts.prefixes.adapters
            )
            self.counters.decode_steps += 1
            self.counters.tokens_decoded += len(active.rows)
            logits = self.backbone.logits(hidden)
        lengths = [row[-1] for row in home]
        longest = max(lengths)
        return Rollout(
            ids[:, :longest], logprob[:, :longest], lengths, [row[:longest] for row in home]
        )

    def _polls(self, written: int) -> bool:
        """Whether to look for finished rows after this many tokens: every `poll`, and not before two of them, as answers are rarely shorter."""
        return written % self.poll == 0 and (self.poll == 1 or written >= 2 * self.poll)

    def _continuation(self, prompts: Prompts, fan: list[int], limit: int) -> tuple[Segment, int]:
        """The buffer for new keys, and where in it they start.

        On a CPU, where a step costs calls rather than bytes, rows that share nothing get prefix, question and answer in one bank.
        """
        if not self.joins or set(fan) != {1}:
            return self.backbone.buffer(sum(fan), limit), 0
        owner = torch.tensor(prompts.owner, device=self.device)
        bank = prompts.prefixes.segment.join(owner, prompts.segment, limit)
        return bank, bank.keys[0].shape[2] - limit

    def _attach(self, active: _Active, prompts: Prompts) -> None:
        if active.start:
            return
        prefix_grid = Grid(active.owner_prefix, len(prompts.prefixes), self.device)
        prompt_grid = Grid(active.owner_prompt, len(prompts.owner), self.device)
        active.parents = [(prompts.prefixes.segment, prefix_grid), (prompts.segment, prompt_grid)]

    def _compact(self, active: _Active, alive: list[bool], prompts: Prompts) -> Tensor:
        """Drop finished rows, so that they stop costing; the keys written so far move to a smaller buffer. Returns the places kept."""
        keep = torch.tensor([i for i, lives in enumerate(alive) if lives], device=self.device)
        pick = lambda items: [item for item, lives in zip(items, alive, strict=True) if lives]
        active.rows = pick(active.rows)
        active.owner_prefix = pick(active.owner_prefix)
        active.owner_prompt = pick(active.owner_prompt)
        active.positions = active.positions[keep]
        active.seeds = active.seeds[keep]
        active.buffer = active.buffer.select(keep)
        self._attach(active, prompts)
        return keep

    # ---- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        features: Features,
        rows: list[list[int]],
        answers: Rollout,
        owner: list[int],
        adapters: bool,
        prefixes: Prefixes | None = None,
        recompute: bool = False,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """Hidden states (sum of lengths, E) that predict each sampled token, packed row by row.

        One question per image (rows[i] about image i); answer n belongs to image owner[n]. Each prefix and question is computed once for
        all its answers. `prefixes`: cached ones of this adapter state, for passes without gradient. `prompts`: these very questions as
        they were asked under this adapter state, with their graph (`Prompts.trained`): then only the answers are computed.
        """
        if prompts is None:
            hidden = self._score_tree(features, rows, answers, owner, adapters, prefixes, recompute)
        else:
            hidden = self._score_answers(prompts, answers, owner, recompute)
        return torch.cat(hidden)[_scored_rows(owner, answers.lengths, len(rows)).to(self.device)]

    def score_released(
        self,
        features: Features,
        rows: list[list[int]],
        answers: Rollout,
        owner: list[int],
        adapters: bool,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """The released code's span, for `as_released`: everything after the prompt's length before image tokens were expanded.

        Hidden states (tokens, E) and the ids (tokens,) they are scored on, packed; tokens per answer. Image tokens are among them.
        """
        hidden = self._score_tree(
            features, rows, answers, owner, adapters, None, False, read_all=True
        )
        hidden += [hidden[0][:0]] * (3 - len(hidden))
        tokens = self.tokens
        merge = self.backbone.merge_size
        prefixes = [
            tokens.head + [tokens.image_token] * (r // merge * (c // merge)) + tokens.tail
            for r, c in features.grids
        ]
        cuts = [
            part.split(sizes)
            for part, sizes in zip(
                hidden,
                (
                    [len(p) for p in prefixes],
                    [len(r) for r in rows],
                    [n - 1 for n in answers.lengths],
                ),
                strict=True,
            )
        ]
        states = []
        ids = []
        lengths = []
        for n, (image, answer) in enumerate(zip(owner, answers.rows(), strict=True)):
            start = len(tokens.head) + 1 + len(tokens.tail) + len(rows[image])
            states.append(torch.cat([cuts[0][image], cuts[1][image], cuts[2][n]])[start - 1 :])
            ids.append(
                torch.tensor((prefixes[image] + rows[image] + answer)[start:], device=self.device)
            )
            lengths.append(len(ids[-1]))
        return torch.cat(states), torch.cat(ids), lengths

    def _score_tree(
        self,
        features,
        rows,
        answers: Rollout,
        owner,
        adapters: bool,
        prefixes: Prefixes | None,
        recompute: bool,
        read_all: bool = False,
    ) -> list[Tensor]:
        """Hidden states of the levels: [prefix], question (its last tokens) and, where any answer has more than one token, answers."""
        if prefixes is None:
            levels, following = self._tree(features, rows, adapters)
        else:
            levels = [self._text_level(rows, prefixes.following, [(prefixes.segment, None)])]
            following = prefixes.following
        question = len(levels) - 1
        starts = [start + len(row) for start, row in zip(following, rows, strict=True)]
        if max(answers.lengths) > 1:
            inputs = [row[:-1] for row in answers.rows()]
            levels.append(self._answer_level(inputs, owner, starts, question, prefixes))
        for level in levels[: question + 1] if read_all else []:
            level.read = "all"
        hidden, _ = self._forward(levels, adapters, recompute, keep=False)
        return hidden

    def _score_answers(
        self, prompts: Prompts, answers: Rollout, owner: list[int], recompute: bool
    ) -> list[Tensor]:
        """What `_score_tree` gives, where prefix and question have been computed."""
        if max(answers.lengths) == 1:
            return [prompts.last]
        grid = Grid(owner, len(prompts), self.device)
        starts = [prompts.following[i] for i in owner]
        parents = [(prompts.prefixes.segment, grid), (prompts.segment, grid)]
        level = self._text_level([row[:-1] for row in answers.rows()], starts, parents, read="all")
        hidden, _ = self._forward([level], prompts.prefixes.adapters, recompute, keep=False)
        return [prompts.last, *hidden]

    def _answer_level(
        self, inputs, owner, starts, question: int, prefixes: Prefixes | None
    ) -> Level:
        grid = Grid(owner, len(starts), self.device)
        prefix = 0 if prefixes is None else prefixes.segment
        return self._text_level(
            inputs, [starts[i] for i in owner], [(prefix, grid), (question, grid)], read="all"
        )


def _prefix_positions(head: int, height: int, width: int, tail: int) -> tuple[Tensor, int]:
    """Rope positions (3, head + height·width + tail) of an image prefix and the next free one (Qwen3-VL's rule for stills)."""
    before = torch.arange(head).expand(3, -1)
    r, c = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = (
        torch.stack([torch.zeros(height * width, dtype=torch.long), r.flatten(), c.flatten()])
        + head
    )
    start = head + max(height, width)
    after = (torch.arange(tail) + start).expand(3, -1)
    return torch.cat([before, image, after], 1), start + tail


def _scored_rows(owner: list[int], lengths: list[int], questions: int) -> Tensor:
    """For each sampled token, the row of cat([questions' last, answer inputs]) that predicts it."""
    picks = []
    start = questions
    for image, length in zip(owner, lengths, strict=True):
        picks.append(torch.tensor([image]))
        picks.append(torch.arange(start, start + length - 1))
        start += length - 1
    return torch.cat(picks)
