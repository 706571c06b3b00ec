"""Balance over queries: the weights by hand, what is kept of the counts, and the update."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_batches import SMALL

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method.experience import play_batch
from vise_fast.method.groups import balance
from vise_fast.method.groups.balance import Balance, figures, read, weights
from vise_fast.method.learner import Learner
from vise_fast.model import load as model

GROUNDED = [
    *SMALL,
    "--reward.w_sem=0",
    "--reward.w_geo=1",
    "--reward.gate=0",  # whatever is asked for is learned from
]
BALANCED = "--data.balance=1"


# ---- weights -------------------------------------------------------------------------------------


def test_what_was_asked_more_often_than_the_mean_counts_less():
    counts = {"cup": 6, "dog": 2, "owl": 1}  # mean 3
    asked = ["The cup.", "dog", "owl", "hat", None]
    assert weights(counts, asked, 1.0).tolist() == [0.5, 1, 1, 1, 1]
    assert weights(counts, asked, 0.5).tolist() == [0.5**0.5, 1, 1, 1, 1]
    assert weights(counts, asked, 0.0).tolist() == [1] * 5
    assert weights({}, asked, 1.0).tolist() == [1] * 5


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_run_of_batches_by_brute_force(strength):
    """Counted anew from everything asked before, batch by batch."""
    draws = np.random.default_rng(3)
    phrases = ["a cup", "CUP!", "dog", "the dog", "owl", None, "hat", "cups"]
    share = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]
    names = {"a cup": "cup", "CUP!": "cup", "the dog": "dog"}
    tally = Balance(strength)
    past = []
    for _ in range(30):
        batch = [phrases[i] for i in draws.choice(len(phrases), 5, p=share)]
        distinct = set(past)
        expected = []
        for phrase in batch:
            n = past.count(names.get(phrase, phrase))
            mean = len(past) / max(len(distinct), 1)
            expected.append(1.0 if phrase is None or n == 0 else min(1, (mean / n) ** strength))
        assert tally.weights(batch).tolist() == pytest.approx(expected, rel=1e-12)
        tally.add(batch)
        past += [names.get(phrase, phrase) for phrase in batch if phrase is not None]
    assert sum(tally.counts.values()) == len(past) and tally.counts["cup"] == past.count("cup")
    assert min(expected) < 1


def test_the_figures_are_the_least_weight_and_the_mean():
    assert figures(torch.tensor([0.5, 1.0, 0.75])) == {"balance_least": 0.5, "balance_mean": 0.75}


# ---- what is kept --------------------------------------------------------------------------------


def test_the_most_asked_are_kept_and_of_equal_ones_the_latest(monkeypatch):
    monkeypatch.setattr(balance, "LARGEST", 3)
    tally = Balance(1.0)
    tally.add(["cup", "cup", "dog", "owl"])
    assert tally.counts == {"cup": 2, "dog": 1, "owl": 1}
    tally.add(["hat"])
    assert tally.counts == {"cup": 2, "owl": 1, "hat": 1}
    tally.add(["owl", "pig"])
    assert list(tally.counts.items()) == [("cup", 2), ("owl", 2), ("pig", 1)]


def test_a_new_phrase_finds_a_place_among_ten_thousand():
    tally = Balance(1.0)
    tally.add([f"thing {n}" for n in range(10_005)])
    assert len(tally.counts) == 10_000
    assert "thing 4" not in tally.counts and "thing 5" in tally.counts
    tally.add(["cup"])
    assert len(tally.counts) == 10_000 and tally.counts["cup"] == 1


def test_nothing_is_counted_where_all_count_alike():
    tally = Balance(0.0)
    tally.add(["cup", "cup"])
    assert tally.counts == {} and tally.state() == {}


def test_counts_go_through_json_with_their_order():
    tally = Balance(1.0)
    tally.add(["owl", "cup", "dog", "cup", "Stra\u00dfe"])
    tally.add(["owl"])
    other = Balance(1.0)
    other.load(read(json.loads(json.dumps(tally.state()))))
    assert list(other.counts.items()) == list(tally.counts.items())
    assert read({}) == {}


# ---- in the update -------------------------------------------------------------------------------


def setup(*words):
    config = configuration.load(None, [*GROUNDED, *words])
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    return config, Learner(policy, engine, config), Scenes(config)


WORDS = ("red circle", "a red circle", "blue square", "white cross")


def played(config, learner, source, index, micro=0):
    """Four scenes, asked for the same four phrases in every batch."""
    train = config.train.model_copy(update={"micro_batch": micro})
    cut = config.model_copy(update={"train": train})
    pairs = zip(source.batch(index, 4), WORDS, strict=True)
    images = [replace(image, given=word) for image, word in pairs]
    return play_batch(learner.engine, images, cut, index)


def learned(config, learner, source, index):
    return learner.learn(played(config, learner, source, index), index)


def targets_of(learner, slices):
    targets, metrics = learner._targets(slices, learner._score(slices, 0), learner._asked(slices))
    rows = [3 * len(one.images) for one in slices]  # the views' follow
    pairs = list(zip(targets, rows, strict=True))
    advantage = torch.cat([target.advantage[:n] for target, n in pairs])
    return advantage, torch.cat([target.scored[:n] for target, n in pairs]), metrics


def test_advantages_and_nothing_else_are_weighed():
    config, learner, source = setup(BALANCED)
    slices = played(config, learner, source, 0)
    plain, scored, _ = targets_of(learner, slices)
    learner.balance.add(["The red circle!"] * 5 + ["hat", "owl"])
    weighed, still, metrics = targets_of(learner, slices)
    mean = 7 / 3
    expected = [mean / 5, mean / 5, 1.0, 1.0]
    each = torch.tensor(expected).repeat_interleave(3)
    assert torch.equal(weighed, plain * each) and not torch.equal(weighed, plain)
    assert torch.equal(still, scored) and scored.any()
    assert metrics["balance_least"] == pytest.approx(mean / 5)
    assert metrics["balance_mean"] == pytest.approx(sum(expected) / 4)
    one_by_one = played(config, learner, source, 0, micro=1)
    torch.testing.assert_close(targets_of(learner, one_by_one)[0], weighed, atol=1e-6, rtol=0)


def test_queries_that_could_not_be_read_are_not_counted():
    config, learner, source = setup(BALANCED)
    slices = played(config, learner, source, 0)
    slices[0].queries.readable[1] = False
    asked = learner._asked(slices)
    assert asked == ["red circle", None, "blue square", "white cross"]


def test_a_batch_counts_once_and_after_its_update():
    config, learner, source = setup(BALANCED)
    metrics = [learned(config, learner, source, index) for index in range(2)]
    assert metrics[0]["balance_least"] == 1
    assert metrics[1]["balance_least"] == pytest.approx(4 / 3 / 2)
    assert learner.balance.counts == {"red circle": 4, "blue square": 2, "white cross": 2}
    _, plain, _ = setup()
    assert not {"balance_least", "balance_mean"} & set(learned(config, plain, source, 0))
    assert "asked" not in plain.state()[1]


def test_an_update_that_fails_before_it_moves_counts_nothing(monkeypatch):
    """It is done again, as where memory runs out."""
    config, learner, source = setup(BALANCED)

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(learner, "_gradient", fail)
        with pytest.raises(MemoryError):
            learned(config, learner, source, 0)
    assert learner.balance.counts == {}


def test_a_run_that_was_killed_goes_on_bit_for_bit():
    config, learner, source = setup(BALANCED)
    metrics = [learned(config, learner, source, index) for index in range(3)]
    assert metrics[2]["balance_least"] == pytest.approx(8 / 3 / 4) and metrics[2]["scored"] > 0
    _, killed, _ = setup(BALANCED)
    for index in range(2):
        learned(config, killed, source, index)
    tensors, state = killed.state()
    _, resumed, _ = setup(BALANCED)
    resumed.load(copy.deepcopy(tensors), json.loads(json.dumps(state)))
    assert learned(config, resumed, source, 2) == metrics[2]
    for name, parameter in learner.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])
    assert list(resumed.balance.counts.items()) == list(learner.balance.counts.items())


def test_a_checkpoint_from_before_there_were_counts_is_loaded():
    config, learner, source = setup(BALANCED)
    learned(config, learner, source, 0)
    tensors, state = learner.state()
    del state["asked"]
    learner.load(copy.deepcopy(tensors), state)
    assert learner.balance.counts == {}
