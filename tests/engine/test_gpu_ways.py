"""Ways that only a GPU takes by itself, taken on a CPU: image, question and answer as one row, and
layers whose products take the LoRA factors along. Same numbers, same gradients.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny import SHAPES, TinyTokens, build, images

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import GraphedEngine
from vise_fast.engine.rollout import Answered, Rollout
from vise_fast.model.qwen3_vl import Qwen3VL

SIZES = [(16, 24), (8, 8), (24, 16)]
ROWS = [[10, 11, 12], [13], [14, 15, 16, 17, 18]]


def engine(shape, *, joins=False, chains=False, kind=FastEngine):
    made = kind(Qwen3VL(build(shape), joins=joins), TinyTokens(), poll=4)
    made.chains = chains
    return made


def answered(owner, lengths):
    """Answers of these lengths to the questions about some images."""
    longest = max(lengths)
    ids = torch.randint(7, 60, (len(lengths), longest), generator=torch.Generator().manual_seed(3))
    home = [row.tolist() for row in ids]
    rollout = Rollout(ids, torch.zeros(ids.shape), list(lengths), home)
    return Answered(ROWS, rollout, owner)


FANS = {
    "one each": ([0, 1, 2], [4, 1, 6]),
    "one token": ([0, 1, 2], [1, 1, 1]),
    "several": ([0, 0, 1, 2, 2, 2], [3, 5, 1, 2, 2, 4]),
    "out of order": ([2, 0, 1], [3, 2, 4]),
    "some tokens alone": ([0, 0, 1, 1, 2, 2], [1] * 6),
}


def gradients(made, given, recompute=False):
    """Hidden states and the gradient of every master."""
    features = made.encode(images(SIZES))
    hidden = made.score(features, given, True, recompute=recompute)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weights).sum().backward()
    found = []
    for linear in made.backbone.fused():
        found += [master.grad for master in linear.masters()]
    return hidden.detach(), found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fan", FANS)
@pytest.mark.parametrize("joins", [False, True])
def test_one_row_scores_as_the_tree(shape, fan, joins):
    given = answered(*FANS[fan])
    wanted, grads = gradients(engine(shape), given)
    found, others = gradients(engine(shape, joins=joins, chains=True), given)
    assert torch.allclose(found, wanted, atol=2e-4)
    for grad, other in zip(grads, others, strict=True):
        assert torch.allclose(grad, other, atol=2e-4 * (1 + grad.abs().max().item()))


@pytest.mark.parametrize("fan", ["one each", "several"])
def test_one_row_with_layers_computed_again(fan):
    given = answered(*FANS[fan])
    wanted, grads = gradients(engine("gqa2"), given)
    found, others = gradients(engine("gqa2", joins=True, chains=True), given, recompute=True)
    assert torch.allclose(found, wanted, atol=2e-4)
    for grad, other in zip(grads, others, strict=True):
        assert torch.allclose(grad, other, atol=2e-4 * (1 + grad.abs().max().item()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
def test_verdicts_without_gradients(shape, adapters):
    plain = engine(shape)
    wanted = plain.verdict_logits(plain.encode(images(SIZES)), ROWS, adapters)
    for joins, chains in ((True, False), (False, True), (True, True)):
        other = engine(shape, joins=joins, chains=chains)
        found = other.verdict_logits(other.encode(images(SIZES)), ROWS, adapters)
        assert torch.allclose(found, wanted, atol=5e-4)


def rollout(made, adapters):
    prefixes = made.prefill(made.encode(images(SIZES)), adapters)
    prompts = made.prompt(prefixes, [0, 1, 2], ROWS)
    return made.generate(prompts, [2, 1, 3], 9, list(range(6)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("kind", [FastEngine, GraphedEngine])
def test_layers_with_factors_below_their_weights_sample_the_same(shape, adapters, kind):
    wanted = rollout(engine(shape), adapters)
    other = engine(shape, joins=True, kind=kind)
    assert other.backbone.raised is not None
    for _ in range(3):  # the same buffers again
        found = rollout(other, adapters)
        assert found.rows() == wanted.rows()
        assert torch.allclose(found.logprob, wanted.logprob, atol=1e-4)


def test_changed_masters_are_taken_over_below_the_weights():
    plain = engine("gqa2")
    other = engine("gqa2", joins=True)
    for made in (plain, other):
        with torch.no_grad():
            for linear in made.backbone.fused():
                for master in linear.masters():
                    master.mul_(-0.5)
        made.backbone.refresh()
    wanted = rollout(plain, True)
    found = rollout(other, True)
    assert found.rows() == wanted.rows()
    assert torch.allclose(found.logprob, wanted.logprob, atol=1e-4)


def test_without_gradients_scores_are_those_with_them():
    given = answered(*FANS["several"])
    other = engine("gqa2", joins=True, chains=True)
    features = other.encode(images(SIZES))
    with torch.no_grad():
        alone = other.score(features, given, True)
    assert torch.allclose(alone, other.score(features, given, True), atol=2e-4)


def test_prefixes_that_nobody_asks_about_cost_nothing():
    """The views' prefixes lie behind the images'; a question about an image reads no view."""
    made = engine("gqa2")
    prefixes = made.prefill(made.encode(images(SIZES)), True)
    few = made.prompt(prefixes, [0, 1], ROWS[:2])
    alone = made.prompt(prefixes.select([0, 1]), [0, 1], ROWS[:2])
    assert torch.allclose(few.last, alone.last, atol=1e-5)
    assert few.prefixes is prefixes
    assert prefixes.segment.first(2).keys[0].data_ptr() == prefixes.segment.keys[0].data_ptr()


# ---- what is chosen by the device ----------------------------------------------------------------


def elsewhere(kind="meta", **changes):
    """An engine over a device that holds no numbers, or any other, by name."""
    shapes = {"patch": 16, "merge_size": 2, "depth": 28, "decoder_weights": 1_700_000_000}
    backbone = SimpleNamespace(device=torch.device(kind), **(shapes | changes))
    return FastEngine(backbone, TinyTokens())


def test_ways_are_chosen_by_the_device():
    here = elsewhere("cpu")
    assert (here.poll, here.joins, here.chains) == (1, True, False)
    away = elsewhere()
    assert (away.poll, away.joins, away.chains) == (8, False, True)
    assert FastEngine(away.backbone, TinyTokens(), poll=3).poll == 3


def picture(tokens):
    """The size of one whose tokens, with the 150 of a question, are so many."""
    return 32, 32 * (tokens - 150)


def test_on_a_gpu_sharing_gains_where_it_saves_more_than_its_launches():
    """260 launches a layer, 6 us each: 43.68 ms for 28 layers. 1.7 G weights are 8.5 us a token at
    400 TFLOP/s: 5138.8 tokens.
    """
    away = elsewhere()
    assert not away.gains_by_sharing([picture(5138)])
    assert away.gains_by_sharing([picture(5139)])
    assert not away.gains_by_sharing([picture(2569), picture(2569)])
    assert away.gains_by_sharing([picture(2569), picture(2570)])
    assert elsewhere("cpu").gains_by_sharing([picture(151)])


class Taken(Exception):
    """Which way was taken."""


ONE_ROW = [(True, None, None, True, "_score_chains"), (True, None, None, False, "_score_fans")]
BY_THE_TREE = [
    (chains, prefixes, None, each, "_questions")
    for chains, prefixes in ((False, None), (False, "cached"), (True, "cached"))
    for each in (True, False)
]
GONE_ON = [
    (chains, None, "asked", each, "_score_answers")
    for chains in (True, False)
    for each in (True, False)
]


@pytest.mark.parametrize("chains, prefixes, prompts, each, way", ONE_ROW + BY_THE_TREE + GONE_ON)
def test_the_way_of_scoring_is_chosen_by_what_is_at_hand(
    monkeypatch, chains, prefixes, prompts, each, way
):
    """All give the same numbers, so that nothing else would tell."""
    made = elsewhere("cpu")
    made.chains = chains

    def take(name):
        def taken(*_):
            raise Taken(name)

        return taken

    for name in ("_score_chains", "_score_fans", "_questions", "_score_answers"):
        monkeypatch.setattr(made, name, take(name))
    given = SimpleNamespace(one_each=each, rows=[])
    with pytest.raises(Taken, match=f"^{way}$"):
        made.score(None, given, True, prefixes=prefixes, prompts=prompts)
