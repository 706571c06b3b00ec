"""The fast engine against transformers' own forward and generate: logits, gradients, greedy ids,
sampled log-probs, counts.
"""

import pytest
import torch
from small_engines import (
    ROWS,
    SIZES,
    engine_of,
    leaves,
    relative,
    sampled,
    stock_inputs,
    stock_logits,
    switched,
)
from tiny import EOS, PAD, SHAPES, VOCAB, TinyTokens, images

from vise_fast.engine.fast import Sheet, _prefix_positions
from vise_fast.engine.rollout import Answered, Rollout, owners

OWNER = owners([3] * 4)


def log_probs(logits, ids):
    """(n,) of the ids (n,) under logits (n, V)."""
    return logits.log_softmax(-1).gather(1, torch.as_tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
def test_next_token_logits_equal_stock(shape, adapters):
    model, engine = engine_of(shape)
    pictures = images(SIZES)
    features = engine.encode(pictures)
    forked = engine.forked_verdict_logits(engine.prefill(features, adapters), [0, 1, 2, 3], ROWS)
    joint = engine.verdict_logits(features, ROWS, adapters)
    for i, picture in enumerate(pictures):
        with torch.no_grad(), switched(model, adapters):
            truth = stock_logits(model, engine, picture, ROWS[i])[-1]
        assert relative(forked[i], truth) < 1e-4
        assert relative(joint[i], truth) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_forks_share_one_prefix_whatever_the_fan(shape):
    _, engine = engine_of(shape)
    prefixes = engine.prefill(engine.encode(images(SIZES)), True)
    owner = [2, 0, 0, 3, 2]
    rows = [[9], [10, 11], [12, 13, 14], [7, 8], [21]]
    together = engine.prompt(prefixes, owner, rows).last
    for i in range(5):
        alone = engine.prompt(prefixes, owner[i : i + 1], rows[i : i + 1]).last
        assert relative(together[i], alone[0]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
def test_greedy_equals_stock_generate(shape, adapters):
    model, engine = engine_of(shape)
    pictures = images(SIZES)
    prompts = engine.prompt(engine.prefill(engine.encode(pictures), adapters), [0, 1, 2, 3], ROWS)
    answers = engine.generate(prompts, [1, 2, 1, 1], 9, seeds=[0, 1, 2, 3, 4], temperature=0.0)
    rows = answers.rows()
    assert rows[1] == rows[2]
    settings = {
        "max_new_tokens": 9,
        "do_sample": False,
        "suppress_tokens": torch.where(engine.banned)[0].tolist(),
        "eos_token_id": 1,
        "pad_token_id": PAD,
    }
    for i, row in enumerate([rows[0], rows[1], rows[3], rows[4]]):
        inputs = stock_inputs(engine, pictures[i], ROWS[i])
        with torch.no_grad(), switched(model, adapters):
            out = model.generate(**inputs, **settings)
        assert row == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_scored_logprob_equals_the_samplers_own():
    _, engine = engine_of("gqa2")
    features, answers = sampled(engine, images(SIZES))
    assert len(set(answers.lengths)) > 1, "the fixture should mix lengths"
    with torch.no_grad():
        hidden = engine.score(features, Answered(ROWS, answers, OWNER), True)
    logits = engine.backbone.logits(hidden).masked_fill(engine.banned, -torch.inf)
    scored = log_probs(logits, answers.packed())
    assert (scored - answers.logprob[answers.mask().bool()]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prefix_update_equals_row_by_row_stock(shape, recompute):
    model, engine = engine_of(shape)
    pictures = images(SIZES)
    features, answers = sampled(engine, pictures)
    hidden = engine.score(features, Answered(ROWS, answers, OWNER), True, recompute=recompute)
    weights = torch.linspace(-1, 1, len(hidden))
    loss = (log_probs(engine.backbone.logits(hidden), answers.packed()) * weights).sum()
    fast = torch.autograd.grad(loss, leaves(model))
    scores = []
    for row, image in zip(answers.rows(), OWNER, strict=True):
        logits = stock_logits(model, engine, pictures[image], ROWS[image] + row)
        scores.append(log_probs(logits[-len(row) - 1 : -1], row))
    total = (torch.cat(scores) * weights).sum()
    truth = torch.autograd.grad(total, leaves(model))
    assert abs(loss.item() - total.item()) <= 1e-5 * abs(total.item()) + 1e-5
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, a, b in zip(names, fast, truth, strict=True):
        assert relative(a, b) < 1e-4, f"{name}: {relative(a, b)}"


def test_reference_scores_from_cached_prefixes():
    _, engine = engine_of("gqa2")
    features, answers = sampled(engine, images(SIZES))
    answered = Answered(ROWS, answers, OWNER)
    with torch.no_grad():
        fresh = engine.score(features, answered, False)
        prefixes = engine.prefill(features, False)
        cached = engine.score(features, answered, False, prefixes=prefixes)
    assert relative(cached, fresh) < 1e-5


def test_questions_that_were_asked_are_not_computed_again():
    """Answers over the prompts they were sampled from score as from the images on."""
    _, engine = engine_of("gqa2")
    features, answers = sampled(engine, images(SIZES))
    answered = Answered(ROWS, answers, OWNER)
    with torch.no_grad():
        prompts = engine.prompt(engine.prefill(features, True), [0, 1, 2, 3], ROWS)
        found = engine.score(features, answered, True, prompts=prompts)
        assert relative(found, engine.score(features, answered, True)) < 1e-5


def test_single_token_answers_are_scored():
    _, engine = engine_of("gqa2")
    features = engine.encode(images(SIZES[:2]))
    answers = Rollout(torch.tensor([[1], [1]]), torch.zeros(2, 1), [1, 1])
    with torch.no_grad():
        hidden = engine.score(features, Answered(ROWS[:2], answers, [0, 1]), True)
        truth = engine.verdict_logits(features, ROWS[:2], True)
        assert relative(engine.backbone.logits(hidden), truth) < 1e-5


def test_sampling_does_not_depend_on_the_batch():
    _, engine = engine_of("gqa2")
    pictures = images(SIZES)
    _, together = sampled(engine, pictures)
    features = engine.encode(pictures[2:3])
    prompts = engine.prompt(engine.prefill(features, True), [0], [ROWS[2]])
    alone = engine.generate(prompts, [3], 12, seeds=[6, 7, 8])
    assert alone.rows() == together.rows()[6:9]


def test_encode_does_not_depend_on_neighbours():
    _, engine = engine_of("gqa5_deep3")
    pictures = images(SIZES)
    features = engine.encode(pictures)
    for i, picture in enumerate(pictures):
        alone = engine.encode([picture])
        picked = features.select([i])
        assert relative(picked.last, alone.last) < 1e-5
        assert all(relative(a, b) < 1e-5 for a, b in zip(picked.taps, alone.taps, strict=True))


def test_a_row_that_has_ended_takes_no_more_tokens():
    """Not one: neither an id, nor a log-prob, nor another end."""
    sheet = Sheet.blank(3, 5, TinyTokens(), torch.device("cpu"))
    columns = [[9, EOS, 9], [9, 9, 9], [EOS, EOS, 9], [9, 9, EOS], [EOS, 9, EOS]]
    for step, tokens in enumerate(columns):
        score = torch.full((3,), -1.0 - step)
        sheet.write(step, torch.arange(3), torch.tensor(tokens), score)
    assert sheet.ids.tolist() == [
        [9, 9, EOS, PAD, PAD],
        [EOS, PAD, PAD, PAD, PAD],
        [9, 9, 9, EOS, PAD],
    ]
    assert sheet.done_at.tolist() == [3, 1, 4]
    assert sheet.logprob.tolist() == [
        [-1, -2, -3, 0, 0],
        [-1, 0, 0, 0, 0],
        [-1, -2, -3, -4, 0],
    ]


@pytest.mark.parametrize("poll", [1, 4])
def test_answers_end_at_their_first_end_token(poll):
    _, engine = engine_of("gqa2")
    engine.poll = poll
    _, answers = sampled(engine, images(SIZES))
    assert len(set(answers.lengths)) > 1, "the fixture should mix lengths"
    for ids, logprob, length in zip(answers.ids, answers.logprob, answers.lengths, strict=True):
        assert (ids[:length] == EOS).nonzero()[:, 0].tolist() in ([], [length - 1])
        assert length == 12 or ids[length - 1] == EOS
        assert (ids[length:] == PAD).all() and (logprob[length:] == 0).all()
        assert (logprob[:length] < 0).all()


@pytest.mark.parametrize("poll, steps, reads", [(1, 11, 12), (4, 11, 2), (5, 11, 2)])
def test_finished_rows_are_looked_for_every_poll(poll, steps, reads):
    """Not before two of them; and at the last token. Nothing ends an answer here before the limit
    of 12.
    """
    _, engine = engine_of("gqa2")
    engine.poll = poll
    engine.tokens.eos = [VOCAB]
    engine.counters.take()
    _, answers = sampled(engine, images(SIZES))
    counts = engine.counters.take()
    assert answers.lengths == [12] * 12
    assert (counts["decode_steps"], counts["host_reads"]) == (steps, reads)
    assert counts["tokens_decoded"] == 12 * steps


def test_decoding_ends_with_the_longest_answer_and_drops_finished_rows():
    _, engine = engine_of("gqa2")
    engine.tokens.eos = list(range(30, VOCAB))
    engine.counters.take()
    heard = []
    engine.interrupted = lambda: heard.append(torch.is_grad_enabled())
    _, answers = sampled(engine, images(SIZES))
    counts = engine.counters.take()
    longest = max(answers.lengths)
    assert longest < 12
    assert counts["decode_steps"] == longest - 1 and counts["host_reads"] == longest
    assert heard and not any(heard), "nothing is kept for a backward pass"
    assert counts["tokens_decoded"] < 12 * (longest - 1)


def test_positions_of_a_prefix():
    """Head and tail count on in all three; the image stands still in time and counts rows and
    columns; the tail follows its longer side.
    """
    positions, following = _prefix_positions(2, (2, 3), 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert following == 7


def test_samples_differ_and_greedy_answers_do_not():
    _, engine = engine_of("gqa2")
    prompts = engine.prompt(engine.prefill(engine.encode(images(SIZES[:1])), True), [0], [ROWS[0]])
    drawn = engine.generate(prompts, [6], 8, seeds=list(range(6))).rows()
    greedy = engine.generate(prompts, [6], 8, seeds=list(range(6)), temperature=0.0).rows()
    assert len({tuple(row) for row in drawn}) > 1
    assert len({tuple(row) for row in greedy}) == 1


def test_on_a_cpu_rows_that_share_nothing_decode_in_one_bank():
    _, engine = engine_of("gqa2")
    prompts = engine.prompt(engine.prefill(engine.encode(images(SIZES)), True), [0, 1, 2, 3], ROWS)
    alone = engine._start(prompts, [1, 1, 1, 1], 5, [0, 1, 2, 3])
    assert alone.start == alone.buffer.tokens - 5 and not alone.parents
    wanted = engine.generate(prompts, [2, 1, 1, 1], 5, seeds=[0, 9, 1, 2, 3], temperature=0.0)
    found = engine.generate(prompts, [1, 1, 1, 1], 5, seeds=[0, 1, 2, 3], temperature=0.0)
    assert found.rows() == [row for n, row in enumerate(wanted.rows()) if n != 1]
    shared = engine._start(prompts, [2, 1, 1, 1], 5, [0, 1, 2, 3, 4])
    assert shared.start == 0 and len(shared.parents) == 2


@pytest.mark.parametrize("limit", [1, 12])
def test_the_released_span_equals_stock(limit):
    """Everything after the prompt's length before image tokens were expanded: ids, and the hidden
    states that predict them.
    """
    model, engine = engine_of("gqa2")
    pictures = images(SIZES)
    features, answers = sampled(engine, pictures, limit=limit)
    with torch.no_grad():
        span = engine.score_released(features, Answered(ROWS, answers, OWNER), True)
    found = zip(span.hidden.split(span.lengths), span.ids.split(span.lengths), strict=True)
    tokens = engine.tokens
    for (hidden, ids), row, image in zip(found, answers.rows(), OWNER, strict=True):
        asked = stock_inputs(engine, pictures[image], ROWS[image] + row)["input_ids"][0]
        start = len(tokens.head) + 1 + len(tokens.tail) + len(ROWS[image])
        assert ids.tolist() == asked[start:].tolist()
        with torch.no_grad():
            logits = stock_logits(model, engine, pictures[image], ROWS[image] + row)
        assert relative(engine.backbone.logits(hidden), logits[start - 1 : -1]) < 1e-4
