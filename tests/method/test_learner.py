"""The update on the embedded model: slices add up, the reference never moves, bad gradients change
nothing, schedules.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_batches import SMALL
from vise_kernels import linear_logprob

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered, Rollout
from vise_fast.images.drawn import Scenes
from vise_fast.method import consensus, token_scores
from vise_fast.method import learner as learners
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import MAX_SKIPPED, Learner, learning_rate
from vise_fast.method.toward_consensus import likelihood
from vise_fast.model import load as model
from vise_fast.ranks.ranks import Alone
from vise_fast.system.checkpoint import Corrupt
from vise_fast.system.errors import NumericFault

SAMPLED_VIEWS = [
    "--rollout.regrounder=policy",
    "--rollout.temperature=1",
    "--rollout.view_temperature=1",
]


def setup(*words):
    config = configuration.load(None, [*SMALL, *words])
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    return config, Learner(policy, engine, config), Scenes(config)


def moved(*words):
    """As `setup`, with an adapter that says something: the KL is not zero."""
    config, learner, source = setup(*words)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    learner.policy.backbone.refresh()
    return config, learner, source


def spoil_gradients(monkeypatch):
    """From here on one entry of the gradient is not a number."""
    honest = torch.nn.utils.clip_grad_norm_

    def spoilt(parameters, clip):
        parameters = list(parameters)
        parameters[0].grad[0, 0] = math.nan
        return honest(parameters, clip)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt)


def adapter_of(learner):
    return {name: p.detach().clone() for name, p in learner.parameters.items()}


def moments_of(learner):
    """Copies by (parameter, name)."""
    found = {}
    for name, parameter in learner.parameters.items():
        for key, value in learner.optimizer.state[parameter].items():
            found[name, key] = value.clone()
    return found


def step(config, learner, source, index=0, micro=0):
    train = config.train.model_copy(update={"micro_batch": micro})
    cut = config.model_copy(update={"train": train})
    slices = play_batch(learner.engine, source.batch(index, config.train.batch), cut, index)
    return slices, learner.learn(slices, index)


CONSENSUS = ("--update.consensus=0.5", "--rollout.views=3", "--update.tempered=true")


@pytest.mark.parametrize(
    "words",
    [(), ("--reward.preset=paper", "--rollout.samples=2", "--train.batch=4"), CONSENSUS],
    ids=["robust", "paper", "consensus"],
)
def test_micro_batches_do_not_change_samples_or_result(words):
    (one,), metrics = step(*setup(*words))
    parts, cut_metrics = step(*setup(*words), micro=1)
    assert len(parts) == 4
    boxes = []
    queries = []
    for part in parts:
        boxes += samples_of(part)
        queries += part.queries.written
    assert samples_of(one) == boxes
    assert one.queries.written == queries
    assert metrics["reward"] == pytest.approx(cut_metrics["reward"], abs=1e-6)
    assert metrics["grad_norm"] > 0
    assert metrics["grad_norm"] == pytest.approx(cut_metrics["grad_norm"], rel=1e-4)
    assert metrics["policy_loss"] != 0
    for name in ("policy_loss", "kl", "kl_loss", "scored"):
        assert metrics[name] == pytest.approx(cut_metrics[name], rel=1e-4, abs=1e-6), name


def gaps(metrics):
    return metrics["logprob_gap"], metrics["logprob_gap_worst"]


@pytest.mark.parametrize("tempered", [False, True])
def test_answers_are_scored_as_they_were_sampled(tempered, monkeypatch):
    """At temperature 1, whatever they were sampled and are scored at; no further pass over the
    model, and over the head only where they are scored at another temperature.
    """
    heads = []
    real = token_scores.linear_logprob

    def counted(*given, **more):
        heads.append(1)
        return real(*given, **more)

    monkeypatch.setattr(token_scores, "linear_logprob", counted)
    words = (f"--update.tempered={str(tempered).lower()}", "--rollout.temperature=0.6")
    _, metrics = step(*moved(*words))
    mean, worst = gaps(metrics)
    assert 0 < mean < 1e-5 and mean < worst < 1e-4
    assert len(heads) == tempered
    _, cut = step(*moved(*words), micro=1)
    assert gaps(cut) == pytest.approx(gaps(metrics), abs=1e-5)


@pytest.mark.parametrize("micro", [0, 1])
def test_an_answer_that_is_scored_otherwise_is_seen(micro, monkeypatch):
    """.25 nat on one token of every scored answer: the worst is that, the mean its share."""
    real = Rollout.packed_logprob
    counted = []

    def shifted(self):
        logprob = real(self).clone()
        start = 0
        for length in self.lengths:
            logprob[start] += 0.25
            start += length
        counted.append((len(self.lengths), start))
        return logprob

    monkeypatch.setattr(Rollout, "packed_logprob", shifted)
    mean, worst = gaps(step(*setup(), micro=micro)[1])
    answers, tokens = (sum(column) for column in zip(*counted, strict=True))
    assert worst == pytest.approx(0.25, abs=1e-4)
    assert mean == pytest.approx(0.25 * answers / tokens, abs=1e-5)


def test_only_the_first_update_on_the_same_answers_is_looked_at():
    """From the second on the policy has moved: that is no fault of the score."""
    config, learner, source = setup("--update.reuse=2", "--train.lr=0.01")
    assert gaps(step(config, learner, source)[1])[1] < 1e-4


def samples_of(played):
    """What was written about the images themselves."""
    return played.boxes.written[: len(played.evidence.box_1000)]


def test_the_reference_never_moves_and_the_policy_does():
    config, learner, source = setup()
    engine = learner.engine
    image = source.batch(5, 1)
    features = engine.encode([image[0].pixels])
    row = [engine.tokens.row(engine.tokens.style.ask())]
    before = [engine.verdict_logits(features, row, adapters) for adapters in (False, True)]
    for index in range(2):
        step(config, learner, source, index)
    after = [engine.verdict_logits(features, row, adapters) for adapters in (False, True)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_a_non_finite_gradient_changes_nothing_and_many_end_the_run(monkeypatch):
    config, learner, source = setup()
    step(config, learner, source, 0)
    weights = adapter_of(learner)
    moments = moments_of(learner)
    spoil_gradients(monkeypatch)
    with pytest.raises(NumericFault, match="not finite"):
        for index in range(1, 1 + MAX_SKIPPED):
            step(config, learner, source, index)
    assert all(torch.equal(weights[n], p) for n, p in learner.parameters.items())
    after = moments_of(learner)
    assert moments and moments.keys() == after.keys()
    assert all(torch.equal(moments[key], value) for key, value in after.items())


def test_so_many_in_a_row_are_counted_from_the_first():
    _, learner, _ = setup()
    for _ in range(MAX_SKIPPED - 1):
        learner._skip()
    with pytest.raises(NumericFault, match=f"{MAX_SKIPPED} times in a row"):
        learner._skip()


BETA = ["--update.beta=0.5", "--update.eta=0.25"]


def test_beta_turns_at_tau():
    """Just above the target it rises, just below it falls; by eta, from the configured value."""
    _, metrics = step(*moved(*BETA))
    kl = metrics["kl"]
    assert kl > 0 and metrics["beta"] == 0.5
    for tau, wanted in ((0.99 * kl, 0.625), (1.01 * kl, 0.375)):
        config, learner, source = moved(*BETA, f"--update.tau={tau!r}")
        step(config, learner, source)
        assert learner.beta.value == pytest.approx(wanted), tau / kl


def test_the_kl_is_the_mean_over_the_answers_that_are_scored():
    """One of four images teaches something. The KL that steers beta knows only that one."""
    config, learner, source = moved(*BETA, "--train.share_forward=false")
    (played,) = play_batch(learner.engine, source.batch(0, 4), config, 0)
    (targets,), _ = learner._targets([played], learner._score([played], 0))
    teaches = targets.scored[:12].view(4, 3).any(1).nonzero()[0, 0]
    own = torch.arange(12) // 3 == teaches
    readable = played.evidence.query_readable & own
    played.evidence = replace(played.evidence, query_readable=readable)
    (targets,), _ = learner._targets([played], learner._score([played], 0))
    chosen = targets.scored.nonzero()[:, 0].tolist()
    assert chosen and len(chosen) <= 3
    with torch.no_grad():
        tokens = learner.scorer.score(played, chosen)
    means = [piece.mean().item() for piece in tokens.kl.split(tokens.lengths)]
    metrics = learner.learn([played], 0)
    assert metrics["scored"] == len(chosen) / 12
    assert metrics["kl"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert metrics["kl_loss"] == pytest.approx(0.5 * sum(means) / 12, rel=1e-5)


def test_beta_stays_where_a_step_is_skipped(monkeypatch):
    config, learner, source = moved(*BETA)
    assert not learner.moving
    step(config, learner, source, 0)
    assert not learner.moving
    before = learner.beta.value
    assert before != 0.5
    spoil_gradients(monkeypatch)
    _, metrics = step(config, learner, source, 1)
    assert math.isnan(metrics["grad_norm"]) and math.isfinite(metrics["kl"])
    assert learner.beta.value == before


@pytest.mark.parametrize("judge", ["policy", "reference"])
def test_the_reference_scores_are_the_base_models_whoever_judged(judge):
    """The judge's prefixes serve the reference's scores only where the reference judged."""
    config, learner, source = moved(f"--reward.judge={judge}", "--train.share_forward=false")
    (played,) = play_batch(learner.engine, source.batch(0, 4), config, 0)
    assert (played.reference is None) == (judge == "policy")
    everyone = list(range(12))
    with torch.no_grad():
        found = learner.scorer.score(played, everyone)
        played.reference = None  # computed again, adapters off
        truth = learner.scorer.score(played, everyone)
    assert (found.reference - truth.reference).abs().max() < 1e-4
    assert (found.reference - found.logprob).abs().max() > 1e-2


@pytest.mark.parametrize("kl", ["k1_loss", "k1_reward"])
def test_the_kl_is_taken_from_the_rewards_only_as_k1_reward(kl):
    """Beta times the mean log-ratio of each sample's tokens, slice by slice."""
    config, learner, source = moved(*BETA, f"--update.kl={kl}", "--train.micro_batch=3")
    slices = play_batch(learner.engine, source.batch(0, 4), config, 0)
    reward = torch.linspace(-1, 1, 12, dtype=torch.float64)
    wanted = reward.clone()
    if kl == "k1_reward":
        ratios = []
        for played, size in zip(slices, (9, 3), strict=True):
            with torch.no_grad():
                tokens = learner.scorer.score(played, list(range(size)))
            pieces = (tokens.logprob - tokens.reference).split(tokens.lengths)
            ratios += [piece.mean().item() for piece in pieces]
        wanted -= 0.5 * torch.tensor(ratios, dtype=torch.float64)
        assert (wanted - reward).abs().max() > 1e-2
    found = learner._learned_from(slices, reward)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kl,advantage",
    [
        ("exact", "grpo"),
        ("k2", "ema"),
        ("k3", "dr_grpo"),
        ("k1_loss", "rloo"),
        ("k1_reward", "rloo"),
    ],
)
def test_every_estimator_takes_a_step(kl, advantage):
    words = [f"--update.kl={kl}", f"--update.advantage={advantage}", "--train.lr=1e-3"]
    views = ["--update.views_too=true", "--rollout.views=2"]
    config, learner, source = setup(*words, *views, *SAMPLED_VIEWS)
    before = adapter_of(learner)
    for index in range(2):
        _, metrics = step(config, learner, source, index)
    assert math.isfinite(metrics["grad_norm"])
    assert any(not torch.equal(before[n], p) for n, p in learner.parameters.items())


def test_views_learn_against_their_images_other_views():
    """From their mean agreement with the samples that carry; below the mean as well as above."""
    _, learner, _ = setup(
        "--update.views_too=true", "--rollout.samples=2", "--rollout.views=3", *SAMPLED_VIEWS
    )
    reward = torch.tensor([[0.2, 0.4, 0.9], [0.4, 9.0, 0.3], [0.7, 9.0, 9.0], [0.7, 9.0, 9.0]])
    carries = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]).bool()
    scores = SimpleNamespace(view_reward=reward.double(), view_carries=carries)
    targets = learner._view_targets(scores)
    # of 0.3, 0.4 and 0.6; the second image has one view alone
    wanted = torch.tensor([-0.2, -0.05, 0.25, 0.0, 0.0, 0.0])
    torch.testing.assert_close(targets.advantage, wanted, atol=1e-6, rtol=0)
    assert targets.scored.tolist() == [True, True, True, False, False, False]


def full_logprobs(learner, played, adapters, temperature):
    """(answers, T, V) log-softmax of the logits over the temperature, banned ids left out; by one
    forward pass per answer.
    """
    engine = learner.engine
    found = []
    for n, ids in enumerate(played.boxes.answers.rows()):
        image = played.boxes.owner[n]
        features = played.features.select([image])
        alone = Answered([played.boxes.rows[image]], played.boxes.answers.select([n]), [0])
        with torch.no_grad():
            logits = engine.backbone.logits(engine.score(features, alone, adapters))
        logits = logits.masked_fill(engine.banned, -torch.inf)
        found.append(((logits / temperature).log_softmax(-1), torch.tensor(ids)))
    return found


@pytest.mark.parametrize("tempered, scored_at", [("true", 0.5), ("false", 1.0)])
def test_answers_are_scored_at_one_or_at_the_temperature_they_were_sampled_at(tempered, scored_at):
    config, learner, source = moved("--rollout.temperature=0.5", f"--update.tempered={tempered}")
    (played,) = play_batch(learner.engine, source.batch(0, 4), config, 0)
    everyone = list(range(12))
    with torch.no_grad():
        scores = learner.scorer.score(played, everyone)
    policy = full_logprobs(learner, played, True, scored_at)
    base = full_logprobs(learner, played, False, scored_at)
    own, others, kl = ([] for _ in range(3))
    for (table, ids), (reference, _) in zip(policy, base, strict=True):
        own.append(table.gather(1, ids[:, None])[:, 0])
        others.append(reference.gather(1, ids[:, None])[:, 0])
        allowed = ~learner.engine.banned
        kl.append((table.exp() * (table - reference))[:, allowed].sum(1))
    for found, truth in ((scores.logprob, own), (scores.reference, others), (scores.kl, kl)):
        torch.testing.assert_close(found, torch.cat(truth), atol=2e-4, rtol=2e-4)


def gradient_of(share, *, equal=False):
    """Of the first batch, KL left out; the targets too. equal: as if every answer earned the
    same.
    """
    alone = ["--update.beta=0", "--update.beta_min=0", "--train.clip=1e9", "--rollout.views=3"]
    config, learner, source = moved(f"--update.consensus={share}", *alone)
    slices = play_batch(learner.engine, source.batch(0, 4), config, 0)
    scores = learner._score(slices, 0)
    if equal:
        scores = replace(scores, reward=torch.full_like(scores.reward, 0.5))
    targets, _ = learner._targets(slices, scores)
    learner._gradient(slices, targets, 12)
    found = [p.grad for p in learner.parameters.values() if p.grad is not None]
    return torch.cat([grad.flatten() for grad in found]) if found else None, targets


def test_the_update_is_mixed_by_the_share_of_the_consensus():
    reinforce, _ = gradient_of(0)
    direct, targets = gradient_of(1)
    mixed, _ = gradient_of(0.25)
    wanted = 0.75 * reinforce + 0.25 * direct
    assert (mixed - wanted).norm() < 1e-4 * wanted.norm()
    cosine = torch.nn.functional.cosine_similarity(reinforce, direct, dim=0)
    assert direct.norm() > 0.05 * reinforce.norm() and cosine.abs() < 0.95
    assert all(target.scored.any() for target in targets)


def test_an_image_whose_answers_all_earn_the_same_still_learns_from_the_consensus():
    _, targets = gradient_of(0, equal=True)
    assert not any(target.scored.any() for target in targets)
    direct, targets = gradient_of(1, equal=True)
    assert any(target.scored.any() for target in targets) and direct.norm() > 0


def test_what_could_stand_in_a_digits_place_is_scored_as_the_whole_vocabulary_is():
    config, learner, source = moved("--rollout.temperature=0.5", *CONSENSUS)
    (played,) = play_batch(learner.engine, source.batch(0, 4), config, 0)
    with torch.no_grad():
        scores = learner.scorer.score(played, list(range(12)))
    tables = torch.cat([table for table, _ in full_logprobs(learner, played, True, 0.5)])
    truth = tables[scores.choices.digits.place][:, learner.engine.tokens.digits]
    assert len(truth) > 100
    torch.testing.assert_close(scores.choices.logprob, truth, atol=3e-4, rtol=3e-4)


def updates_made(learner):
    return {int(learner.optimizer.state[p]["step"]) for p in learner.parameters.values()}


@pytest.mark.parametrize("words", [(), CONSENSUS], ids=["reinforce", "consensus"])
def test_a_rollout_can_be_learned_from_several_times(words):
    """Each time by the log-probs of the policy as it was when it sampled; one step of the run."""
    _, once = step(*setup(*words))
    config, learner, source = setup("--update.reuse=3", *words)
    _, metrics = step(config, learner, source)
    assert updates_made(learner) == {3} and not learner.moving
    for name in ("policy_loss", "kl", "grad_norm"):
        assert metrics[name] == pytest.approx(once[name], rel=1e-4, abs=1e-8)


def test_the_second_time_counts_by_what_has_changed_since_the_first():
    config, learner, source = setup("--update.reuse=2", "--update.beta=0", "--update.beta_min=0")
    slices = play_batch(learner.engine, source.batch(0, 4), config, 0)
    seen = []
    real = learners.loss.reinforce

    def watched(tokens, *rest):
        seen.append(tokens)
        return real(tokens, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners.loss, "reinforce", watched)
        learner.learn(slices, 0)
    first, second = seen
    assert first.earlier is None
    assert torch.equal(second.earlier, first.logprob.detach())
    moved_by = (second.logprob.detach() - second.earlier)[second.mask].abs()
    assert 1e-6 < moved_by.max() < 1


def text_likelihood(learner, played, image, box):
    """Of one box as an answer about one image, its tokens weighted."""
    tokens = learner.engine.tokens
    ids = torch.tensor([[*tokens.ids(tokens.style.write_box(box)), tokens.eos[0]]])
    answers = Rollout(ids, torch.zeros(0), [ids.shape[1]])
    alone = Answered([played.boxes.rows[image]], answers, [0])
    with torch.no_grad():
        hidden = learner.engine.score(played.features.select([image]), alone, True)
        logits = learner.engine.backbone.logits(hidden)
    table = logits.masked_fill(learner.engine.banned, -torch.inf).log_softmax(-1)
    weight = torch.tensor([0.1] + [1, 0.4, 0.1, 0.1] * 4 + [0.1])
    return float((weight * table.gather(1, ids.T)[:, 0]).sum() / weight.sum())


@pytest.mark.parametrize("of", ["mean", "each"])
def test_the_likelihood_of_the_consensus_is_that_of_its_texts(of):
    words = ["--update.consensus=1", "--update.consensus_by=likelihood", "--rollout.views=3"]
    words.append(f"--update.consensus_of={of}")
    config, learner, source = moved(*words)
    (played,) = play_batch(learner.engine, source.batch(0, 4), config, 0)
    agreed = played.agreed = consensus.target(played.evidence, config.reward, of)
    known = [image for image in range(4) if agreed.known[3 * image]]
    with torch.no_grad():
        found = likelihood(
            learner.engine, config, played, [3 * image + 1 for image in range(4)], 12
        )
    total = 0.0
    for image in known:
        boxes = agreed.box_1000[3 * image][agreed.counts[3 * image]].tolist()
        total += sum(text_likelihood(learner, played, image, box) for box in boxes) / len(boxes)
    assert known and float(found) == pytest.approx(total * 3 / 12, rel=1e-4)
    _, metrics = step(*moved(*words))
    assert metrics["grad_norm"] > 0 and metrics["policy_loss"] == 0


def test_under_a_constant_reward_only_scoring_at_the_sampling_temperature_has_no_gradient():
    """The sum over all tokens of their chance of being sampled times the gradient of their score:
    what `ema` is left with where every answer earns the same.
    """
    torch.manual_seed(0)
    head = torch.randn(11, 5, dtype=torch.float64)
    left = {}
    for scored_at in (0.6, 1.0):
        hidden = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        hidden.requires_grad_()
        chance = (hidden.detach() @ head.T / 0.6).softmax(-1)[0]
        rows = hidden.expand(11, 5) / scored_at
        scored = linear_logprob(rows, head, torch.arange(11))
        (gradient,) = torch.autograd.grad((chance * scored).sum(), hidden)
        left[scored_at] = gradient.norm().item()
    assert left[0.6] < 1e-12 < 0.1 < left[1.0]


def test_as_released_scores_image_tokens_too():
    config, learner, source = setup("--reward.preset=as_released")
    (played,), metrics = step(config, learner, source)
    lengths = learner.scorer.score(played, [0]).lengths
    assert lengths[0] > played.boxes.answers.lengths[0] + 50
    assert math.isfinite(metrics["grad_norm"])


def test_the_rollouts_own_pass_is_gone_on_from_where_half_its_images_are_scored():
    """Of fewer, computing theirs again costs less than the graph of all."""
    asked = Prompted(range(4))
    played = SimpleNamespace(boxes=SimpleNamespace(asked=asked))
    assert token_scores._asked(played, [0, 3]) == [0, 3]
    assert token_scores._asked(played, [0, 1, 2]) == [0, 1, 2]
    assert token_scores._asked(played, [2]) is None
    played.boxes.asked = Prompted(range(5))
    assert token_scores._asked(played, [1, 2]) is None
    played.boxes.asked = None
    assert token_scores._asked(played, [0, 1, 2, 3]) is None


class Prompted(list):
    """Questions by number."""

    def select(self, rows):
        return [self[row] for row in rows]


def test_the_share_of_different_queries_is_the_batchs():
    slices = [
        SimpleNamespace(queries=SimpleNamespace(texts=texts)) for texts in (["a", "b"], ["a", "a"])
    ]
    assert learners._unique_queries(slices, Alone()) == 0.5
    assert learners._unique_queries(slices[:1], Alone()) == 1


def test_learning_rate_schedules():
    words = ["--train.lr=1e-3", "--train.warmup=4", "--train.steps=12"]
    constant = configuration.load(None, [*words, "--train.schedule=constant"])
    cosine = configuration.load(None, [*words, "--train.schedule=cosine"])
    rates = [learning_rate(s, constant) for s in (0, 1, 3, 4, 11)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    assert learning_rate(4, cosine) == pytest.approx(1e-3)
    assert learning_rate(8, cosine) == pytest.approx(5e-4)
    assert 0 < learning_rate(11, cosine) < 1e-4


@pytest.mark.parametrize("warmup", [0, 4, 12])
def test_the_cosine_goes_from_the_rate_to_nothing(warmup):
    words = ["--train.lr=1e-3", f"--train.warmup={warmup}", "--train.steps=12"]
    config = configuration.load(None, [*words, "--train.schedule=cosine"])
    left = 12 - warmup
    for step in range(left + 1):
        share = step / left if left else 0.0
        wanted = 1e-3 * (1 + math.cos(math.pi * share)) / 2
        assert learning_rate(warmup + step, config) == pytest.approx(wanted, abs=1e-12)
    for step in range(warmup):
        assert learning_rate(step, config) == pytest.approx(1e-3 * (step + 1) / warmup)


# ---- the optimizer -------------------------------------------------------------------------------


def test_the_optimizer_is_the_configurations():
    words = ["--train.lr=0.25", "--train.weight_decay=0.125", "--optim.eps=0.0625"]
    config = configuration.load(None, [*words, "--optim.betas=0.5,0.75"])
    (group,) = learners.make_optimizer([torch.nn.Parameter(torch.zeros(3))], config).param_groups
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.25, 0.125, 0.0625)
    assert tuple(group["betas"]) == (0.5, 0.75)


def test_the_optimizers_rate_is_that_of_the_step():
    _, learner, _ = setup("--train.lr=1e-3", "--train.warmup=4", "--train.steps=12")
    for index, rate in ((0, 2.5e-4), (3, 1e-3)):
        assert learner._set_lr(index) == pytest.approx(rate)
        assert [group["lr"] for group in learner.optimizer.param_groups] == [pytest.approx(rate)]


def pretend(learner, size=0.5):
    """Gradients, as if a batch had been scored."""
    for parameter in learner.parameters.values():
        parameter.grad = torch.full_like(parameter, size)


def test_the_optimizer_finds_room_for_its_moments_before_anything_changes(monkeypatch):
    """Bytes: two moments and a copy of every fp32 master, then the copy alone; where there is no
    room, nothing has moved.
    """
    _, learner, _ = setup()
    numbers = sum(p.numel() for p in learner.parameters.values())
    asked = []
    honest = torch.empty

    def spied(size, *args, **options):
        if options.get("dtype") == torch.uint8:
            asked.append(size)
        return honest(size, *args, **options)

    monkeypatch.setattr(torch, "empty", spied)
    for _ in range(2):
        pretend(learner)
        learner._apply(1.0)
    assert asked == [12 * numbers, 4 * numbers]
    before = adapter_of(learner)
    monkeypatch.setattr(learner, "_make_room", lambda: [].pop())
    pretend(learner)
    with pytest.raises(IndexError):
        learner._apply(1.0)
    assert not learner.moving
    assert all(torch.equal(before[n], p) for n, p in learner.parameters.items())


def test_an_optimizers_step_that_breaks_off_leaves_the_adapter_in_between(monkeypatch):
    _, learner, _ = setup()
    monkeypatch.setattr(learner.optimizer, "step", lambda: [].pop())
    pretend(learner)
    with pytest.raises(IndexError):
        learner._apply(1.0)
    assert learner.moving


def test_after_an_optimizers_step_no_gradient_is_kept_and_skips_are_forgotten():
    _, learner, _ = setup()
    for _ in range(MAX_SKIPPED - 1):
        learner._apply(math.nan)
    assert learner.skipped == MAX_SKIPPED - 1 and not learner.moving
    before = adapter_of(learner)
    pretend(learner)
    learner._apply(1.0)
    assert learner.skipped == 0
    assert all(parameter.grad is None for parameter in learner.parameters.values())
    assert all(not torch.equal(before[n], p) for n, p in learner.parameters.items())
    for _ in range(MAX_SKIPPED - 1):
        learner._apply(math.inf)


def test_gradients_are_scaled_to_the_limit_together():
    _, learner, _ = setup("--train.clip=2")
    for size, factor in ((1.0, None), (1e-6, 1.0)):
        pretend(learner, size)
        norm = size * math.sqrt(sum(p.numel() for p in learner.parameters.values()))
        assert learner._clip().item() == pytest.approx(norm, rel=1e-4)
        wanted = size * (factor or 2 / norm)
        for parameter in learner.parameters.values():
            assert parameter.grad.max().item() == pytest.approx(wanted, rel=1e-4)


def test_a_batch_that_teaches_nothing_moves_nothing_and_says_so():
    """Every query unreadable: no answer is scored, neither beta nor baseline nor adapter moves."""
    config, learner, source = setup()
    (played,) = play_batch(learner.engine, source.batch(0, 4), config, 0)
    nobody = torch.zeros(12, dtype=torch.bool)
    played.evidence = replace(played.evidence, query_readable=nobody)
    before = adapter_of(learner)
    metrics = learner.learn([played], 0)
    assert (metrics["scored"], metrics["kl"], metrics["grad_norm"]) == (0, 0, 0)
    assert metrics["beta"] == learner.beta.value == config.update.beta
    assert learner.baseline.value is None and learner.skipped == 0
    assert all(torch.equal(before[n], p) for n, p in learner.parameters.items())


# ---- what is remembered --------------------------------------------------------------------------


STATE = {"optimizer": {}, "beta": {"value": 0.5}, "baseline": {"value": 0.25}, "skipped": 3}
NO_STATES = {
    "beta not a number": {"beta": {"value": math.nan}},
    "beta without end": {"beta": {"value": math.inf}},
    "beta below zero": {"beta": {"value": -1e-9}},
    "beta in words": {"beta": {"value": "0.5"}},
    "beta nothing": {"beta": {"value": None}},
    "beta without a value": {"beta": {}},
    "beta a number": {"beta": 0.5},
    "beta of 400 digits": {"beta": {"value": 10**400}},
    "baseline not a number": {"baseline": {"value": math.nan}},
    "baseline a list": {"baseline": [0.5]},
    "skipped below zero": {"skipped": -1},
    "skipped true": {"skipped": True},
    "skipped a fraction": {"skipped": 1.0},
    "optimizer a number": {"optimizer": 5},
    "optimizer nothing": {"optimizer": None},
}
NO_COUNTS = {
    "a list": ["cup"],
    "nothing": None,
    "a word that was never asked": {"cup": 0},
    "a fraction": {"cup": 1.5},
    "true": {"cup": True},
    "in words": {"cup": "3"},
    "too many": {str(n): 1 for n in range(10_001)},
}


@pytest.mark.parametrize("change", NO_STATES.values(), ids=NO_STATES)
def test_a_state_that_no_learner_made_is_not_loaded(change):
    for wrong in (STATE | change, {k: v for k, v in STATE.items() if k not in change}, [STATE]):
        with pytest.raises(Corrupt, match="not a learner's"):
            learners._Remembered.read(wrong)


@pytest.mark.parametrize("counts", NO_COUNTS.values(), ids=NO_COUNTS)
def test_counts_that_no_learner_made_are_not_loaded(counts):
    with pytest.raises(Corrupt, match="not a learner's"):
        learners._Remembered.read(STATE | {"asked": counts})


def test_counts_are_loaded_in_their_order_and_old_checkpoints_have_none():
    counts = {str(n): 1 for n in reversed(range(10_000))}
    found = learners._Remembered.read(STATE | {"asked": counts}).asked
    assert list(found.items()) == list(counts.items())
    assert learners._Remembered.read(STATE).asked == {}


def test_a_state_at_its_limits_is_loaded():
    found = learners._Remembered.read(STATE)
    assert (found.numbers, found.skipped) == ({}, 3)
    least = {"optimizer": {"a/step": 1}, "beta": {"value": 0}, "baseline": {}, "skipped": 0}
    found = learners._Remembered.read(least)
    assert (found.numbers, found.skipped) == ({"a/step": 1}, 0)
    learners._Remembered.read(STATE | {"baseline": {"value": -3.0}})


def without_one(adapter):
    adapter.popitem()


def one_more(adapter):
    adapter["another"] = torch.zeros(3)


def changed_one(change):
    """The last tensor becomes something else."""

    def damage(adapter):
        name, tensor = adapter.popitem()
        adapter[name] = change(tensor)

    return damage


def poisoned(number):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return changed_one(change)


NO_ADAPTERS = {
    "one is missing": (without_one, "other tensors"),
    "one more": (one_more, "other tensors"),
    "another shape": (changed_one(lambda tensor: tensor[:-1]), "other tensors"),
    "the same numbers in another order": (changed_one(lambda tensor: tensor.T), "other tensors"),
    "whole numbers": (changed_one(lambda tensor: tensor.int()), "not finite"),
    "not a number": (poisoned(math.nan), "not finite"),
    "without end": (poisoned(-math.inf), "not finite"),
}


def test_an_adapter_of_another_model_is_not_loaded_and_nothing_changes():
    _, learner, _ = setup()
    learner.beta.value = 0.125
    before = adapter_of(learner)
    for damage, message in NO_ADAPTERS.values():
        wrong = {name: tensor + 1 for name, tensor in before.items()}
        damage(wrong)
        with pytest.raises(Corrupt, match=message):
            learner.load({"adapter": wrong, "optimizer": {}}, STATE)
        assert all(torch.equal(before[n], p) for n, p in learner.parameters.items())
        assert (learner.beta.value, learner.baseline.value, learner.skipped) == (0.125, None, 0)
    right = {name: tensor + 1 for name, tensor in before.items()}
    learner.load({"adapter": right, "optimizer": {}}, STATE)
    assert all(torch.equal(right[n], p) for n, p in learner.parameters.items())
    assert (learner.beta.value, learner.baseline.value, learner.skipped) == (0.5, 0.25, 3)


def test_state_round_trip_is_bitwise():
    config, learner, source = setup()
    for index in range(2):
        step(config, learner, source, index)
    tensors, state = learner.state()
    _, other, _ = setup()
    other.load(copy.deepcopy(tensors), state)
    step(config, learner, source, 2)
    step(config, other, source, 2)
    assert all(torch.equal(p, other.parameters[n]) for n, p in learner.parameters.items())
    assert learner.beta.value == other.beta.value
