"""The update that begins where the rollout's forward pass ended: the same hidden states and
gradients as a pass from the images on.
"""

from dataclasses import replace

import pytest
import torch
from small_engines import ROWS, SIZES, engine_of, leaves, worst
from tiny import SHAPES, images

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered, owners
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method import learner as learning
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import StepPlan
from vise_fast.model import load as model
from vise_fast.profile.flops import executed_flops


def shares_forward(engine, config):
    return StepPlan.of(config, engine.keeps_keys).shares_forward


WORDS = [
    "--train.batch=3",
    "--rollout.samples=2",
    "--rollout.views=1",
    "--rollout.box_tokens=18",
    "--rollout.query_tokens=8",
    "--train.lr=1e-3",
]
# samples and views in one batch
ALIKE = [
    "--rollout.regrounder=policy",
    "--rollout.view_temperature=0.7",
    "--rollout.temperature=0.7",
]
TRAINED = 3  # of the four images of small_engines.py, whose sizes and questions differ in length
FAN = [2, 1, 3, 1]


def asked(engine, features, trained):
    """(prefixes, prompts, the first prompts with their graph) as the method makes them."""
    every = list(range(len(ROWS)))
    if not trained:
        prefixes = engine.prefill(features, True)
        return prefixes, engine.prompt(prefixes, every, ROWS), None
    rooted = engine.prefill(features.select(every[:trained]), True, graph=True)
    prefixes = rooted.detach()
    kept = engine.prompt(rooted, every[:trained], ROWS[:trained])
    if trained < len(ROWS):
        prefixes = prefixes.stack(engine.prefill(features.select(every[trained:]), True))
    prompts = kept.over(prefixes)
    if trained < len(ROWS):
        prompts = prompts.stack(engine.prompt(prefixes, every[trained:], ROWS[trained:]))
    return prefixes, prompts, kept


def generated(engine, prompts, limit=9):
    return engine.generate(prompts, FAN, limit, list(range(sum(FAN))), 1.0)


@pytest.mark.parametrize("trained", [1, TRAINED, len(SIZES)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_sampled_from_does_not_depend_on_what_is_kept(shape, trained):
    _, engine = engine_of(shape)
    features = engine.encode(images(SIZES))
    plain_prefixes, plain, _ = asked(engine, features, 0)
    prefixes, prompts, kept = asked(engine, features, trained)
    assert prefixes.following == plain_prefixes.following
    assert prompts.following == plain.following
    assert prompts.owner == plain.owner
    assert torch.allclose(prompts.last, plain.last, atol=1e-5) and not prompts.last.requires_grad
    assert kept.last.requires_grad and len(kept) == len(kept.prefixes) == trained
    truth = generated(engine, plain)
    found = generated(engine, prompts)
    assert truth.rows() == found.rows()
    assert torch.allclose(truth.logprob, found.logprob, atol=1e-5)


@pytest.mark.parametrize("limit", [9, 1])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2], [0, 2]])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_gradients_equal_those_of_a_pass_from_the_images_on(shape, chosen, limit):
    net, engine = engine_of(shape)
    features = engine.encode(images(SIZES))
    _, prompts, kept = asked(engine, features, TRAINED)
    answers = generated(engine, prompts, limit)
    owner = owners(FAN)
    rows = [n for n, image in enumerate(owner) if image in chosen]
    questions = [ROWS[i] for i in chosen]
    answered = Answered(questions, answers.select(rows), [chosen.index(owner[n]) for n in rows])
    truth = engine.score(features.select(chosen), answered, True)
    found = engine.score(features.select(chosen), answered, True, prompts=kept.select(chosen))
    assert torch.allclose(found, truth, atol=1e-5)
    weights = torch.linspace(0.5, 2, len(truth))
    gradients = [
        torch.autograd.grad((hidden.sum(1) * weights).sum(), leaves(net))
        for hidden in (found, truth)
    ]
    assert worst(*gradients) <= 1e-5


def stepped(words, monkeypatch, engine_class=FastEngine):
    """(gradient, metrics, update's FLOPs, config) of one step."""
    config = configuration.load(None, [*WORDS, *words])
    policy = model.load(config)
    fast = engine_class is FastEngine
    backbone = policy.backbone if fast else StockBackbone(policy.model)
    engine = engine_class(backbone, policy.tokens)
    learn = Learner(policy, engine, config)
    kept = []

    def keep(norm):
        kept.append(torch.cat([p.grad.flatten() for p in learn.parameters.values()]))

    monkeypatch.setattr(learn, "_apply", keep)
    slices = play_batch(engine, Scenes(config).batch(0, 3), config, 0)
    with executed_flops() as counter:
        metrics = learn.learn(slices, 0)
    assert all(played.boxes.asked is None for played in slices), "a spent graph is dropped"
    return kept[0], metrics, counter.get_total_flops(), (engine, config)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--update.views_too=true", "--rollout.views=2", *ALIKE],
        ["--update.kl=k1_reward"],
        ALIKE,
        ["--rollout.regrounder=reference"],
    ],
)
def test_a_step_has_the_same_gradient_either_way_and_costs_less(monkeypatch, words):
    gradient, metrics, flops, how = stepped(words, monkeypatch)
    truth, expected, more, _ = stepped([*words, "--train.share_forward=false"], monkeypatch)
    assert shares_forward(*how)
    assert metrics["reward"] == pytest.approx(expected["reward"], abs=1e-6)
    assert metrics["kl"] == pytest.approx(expected["kl"], abs=1e-6)
    excess = ((gradient - truth).abs().max() / truth.abs().max()).item()
    assert truth.abs().max() > 0 and excess <= 1e-5, excess
    assert flops < 0.85 * more, (flops, more)


def test_few_scored_images_are_computed_alone(monkeypatch):
    """A graph of three images for the sake of one would cost more than a new pass over that one."""
    calls = []
    real = FastEngine.score

    def score(self, *args, **named):
        calls.append(named.get("prompts") is not None)
        return real(self, *args, **named)

    monkeypatch.setattr(FastEngine, "score", score)
    aims = learning.Learner._targets

    def one(self, *args):
        (target,), metrics = aims(self, *args)
        target.scored[2:] = False
        return [replace(target, scored=target.scored)], metrics

    monkeypatch.setattr(Learner, "_targets", one)
    stepped([], monkeypatch)
    assert calls == [False, False]


@pytest.mark.parametrize(
    "words",
    [
        ["--train.micro_batch=1"],
        ["--train.checkpointing=true"],
        ["--train.share_forward=false"],
        ["--reward.preset=as_released"],
    ],
)
def test_where_memory_is_short_the_update_computes_all_again(words):
    config = configuration.load(None, [*WORDS, *words])
    policy = model.load(config)
    assert not shares_forward(FastEngine(policy.backbone, policy.tokens), config)


def test_the_stock_engine_keeps_nothing(monkeypatch):
    *_, how = stepped([], monkeypatch, StockEngine)
    assert not shares_forward(*how)
