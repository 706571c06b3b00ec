"""Questions and how their answers are read: queries, boxes, and verdicts as probabilities: P(yes)
against P(no) over every one-token spelling, by hand.
"""

from types import SimpleNamespace

import pytest
import torch

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Counters, Rollout
from vise_fast.images.drawn import Scenes
from vise_fast.method import roles
from vise_fast.method.roles import Question, Sampling
from vise_fast.model import load as model
from vise_fast.system.errors import NumericFault


class Held(list):
    """What an engine keeps, by name; it remembers what was put over and under it."""

    def over(self, prefixes):
        return Held([*self, "over", *prefixes])

    def stack(self, below):
        return Held([*self, "stacked on", *below])


class Scripted:
    """An engine that answers in given words and writes down what it was asked."""

    def __init__(self, *written):
        self.written = list(written)
        self.prompted = []
        style = SimpleNamespace(
            ask=lambda: "ask", ground=lambda query: f"where is {query}", space="1000"
        )
        self.tokens = SimpleNamespace(
            style=style, row=lambda text: [text], text=lambda ids: self.written[ids[0]]
        )

    def prompt(self, prefixes, owner, rows):
        self.prompted.append((list(prefixes), owner, rows))
        return Held([f"prompt {len(self.prompted)}"])

    def generate(self, prompted, fan, limit, seeds, temperature):
        self.generated = (list(prompted), fan, limit, seeds, temperature)
        count = sum(fan)
        ids = torch.arange(count)[:, None].repeat(1, 2)
        return Rollout(ids, torch.zeros(count, 2), [1 + n % 2 for n in range(count)])


def test_verdicts_are_means_over_the_wordings_whose_spread_is_counted_by_verdict():
    engine = SimpleNamespace(counters=Counters(), home=lambda tensor: tensor)
    found = [torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.4, 0.5, 0.7])]
    assert roles._averaged(engine, found).tolist() == pytest.approx([0.3, 0.5, 0.8])
    assert engine.counters.take()["verdict_spread"] == pytest.approx((0.1 + 0 + 0.1) / 3)
    assert roles._averaged(engine, found[:1]) is found[0]


def test_queries_are_read_and_unreadable_ones_have_a_stand_in():
    engine = Scripted("<query>a red dog</query>", "what?", "<query>cat</query>")
    queries = roles.ask(engine, Held(["p"]), [0, 1, 2], [7, 8, 9], Sampling(20, 0.7))
    assert queries.texts == ["a red dog", "object", "cat"]
    assert queries.readable == [True, False, True]
    assert queries.written == engine.written
    assert queries.lengths == [1, 2, 1]
    assert engine.prompted == [(["p"], [0, 1, 2], [["ask"]] * 3)]
    assert engine.generated == (["prompt 1"], [1, 1, 1], 20, [7, 8, 9], 0.7)


@pytest.mark.parametrize("space, asked", [("pixels", True), ("1000", False), ("1024", False)])
def test_sizes_are_asked_for_only_where_boxes_come_in_pixels(space, asked):
    style = SimpleNamespace(space=space)
    sizes = {7: (30, 40), 9: (50, 60)}
    engine = SimpleNamespace(tokens=SimpleNamespace(style=style), sizes=lambda prefixes: prefixes)
    found = roles._sizes(engine, sizes, [9, 7, 9])
    assert found == ([(50, 60), (30, 40), (50, 60)] if asked else [None] * 3)


ANSWERS = ["[10, 20, 30, 40]", "nowhere", "[900, 800, 100, 1200]", "[1, 2, 3, 4]"]


def test_boxes_are_read_sorted_and_clamped():
    engine = Scripted(*ANSWERS)
    asked = [Question(1, "a dog", [3, 4]), Question(0, "a cat"), Question(0, "it", [9])]
    boxes = roles.ground(engine, Held(["p"]), asked, Sampling(30))
    assert boxes.box_1000.tolist() == [
        [10, 20, 30, 40],
        [0, 0, 0, 0],
        [100, 800, 900, 1000],
        [1, 2, 3, 4],
    ]
    assert boxes.readable.tolist() == [True, False, True, True]
    assert boxes.written == ANSWERS and boxes.owner == [0, 0, 1, 2] and boxes.asked is None
    assert boxes.rows == [["where is a dog"], ["where is a cat"], ["where is it"]]
    assert engine.prompted == [(["p"], [1, 0, 0], boxes.rows)]
    assert engine.generated == (["prompt 1"], [2, 1, 1], 30, [3, 4, 0, 9], 1.0)


@pytest.mark.parametrize("more", [0, 2])
def test_the_first_questions_keep_their_graph(more):
    """They are asked on the rooted prefixes, the others on the rest, and decoded together."""
    engine = Scripted(*ANSWERS)
    asked = [Question(n, f"thing {n}") for n in range(2 + more)]
    rooted = Held(["r0", "r1"])
    boxes = roles.ground(engine, Held(["all"]), asked, Sampling(30), rooted)
    rows = [[f"where is thing {n}"] for n in range(2 + more)]
    first = (["r0", "r1"], [0, 1], rows[:2])
    rest = [(["all"], [2, 3], rows[2:])] if more else []
    assert engine.prompted == [first, *rest]
    assert boxes.asked == ["prompt 1"] and boxes.rows == rows
    together = ["prompt 1", "over", "all"] + (["stacked on", "prompt 2"] if more else [])
    assert engine.generated[0] == together


def test_verdicts_that_are_no_numbers_are_refused():
    assert roles.finite(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericFault, match="not a number"):
            roles.finite(torch.tensor([0.5, bad]))


YES = [1, 4]
NO = [0, 2, 6]


def by_hand(logits):
    """The definition, on the whole vocabulary's probabilities in float64."""
    p = logits.double().softmax(-1)
    yes = p[:, YES].sum(-1)
    return yes / (yes + p[:, NO].sum(-1))


def test_p_visible_is_the_share_of_yes_among_yes_and_no():
    logits = 3 * torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    engine = SimpleNamespace(tokens=SimpleNamespace(yes=YES, no=NO))
    p = roles._probability(engine, logits)
    assert p.dtype == torch.float64
    torch.testing.assert_close(p, by_hand(logits), atol=1e-6, rtol=0)
    assert p.min() < 0.05 and p.max() > 0.95


def test_equal_logits_are_one_half_and_other_words_do_not_count():
    engine = SimpleNamespace(tokens=SimpleNamespace(yes=[0], no=[1]))
    logits = torch.tensor([[2.0, 2.0, -5.0], [2.0, 2.0, 90.0]])
    assert roles._probability(engine, logits).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("adapters", [True, False])
def test_a_verdict_is_read_from_the_next_token_after_the_question(adapters):
    """`verify` and `verify_forked` on the embedded model, against its logits."""
    config = configuration.load(None, [])
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    features = engine.encode([image.pixels for image in Scenes(config).batch(0, 3)])
    queries = ["red circle", "large blue square", "object"]
    tokens = engine.tokens
    rows = [tokens.verdict_row(tokens.style.verify(query)) for query in queries]
    p = engine.verdict_logits(features, rows, adapters).double().softmax(-1)
    yes = p[:, tokens.yes].sum(-1)
    truth = yes / (yes + p[:, tokens.no].sum(-1))
    engine.counters.take()
    found = roles.verify(engine, features, queries, adapters)
    torch.testing.assert_close(found, truth, atol=1e-6, rtol=0)
    assert engine.counters.take()["host_reads"] == 1
    there = roles.verify(engine, features, queries, adapters, stay=True)
    assert torch.equal(there, found)
    assert engine.counters.take()["host_reads"] == 0
    prefixes = engine.prefill(features, adapters)
    forked = roles.verify_forked(engine, prefixes, [0, 1, 2], queries)
    torch.testing.assert_close(forked, truth, atol=1e-5, rtol=0)
