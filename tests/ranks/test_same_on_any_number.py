"""One, two and three ranks train the same adapter: same texts, same figures, adapters within the
order of sums; out of memory on one of them changes nothing.

The long form, 20 updates on up to four ranks, is `bench/ranks.py same`.
"""

import json

import pytest
import torch
from faults.forked import go, words
from forked_ranks import HELD, adapter, apart, go_together, telling, told

from vise_fast.engine.fast import FastEngine
from vise_fast.method.learner import Learner
from vise_fast.report.alarms import Alarms
from vise_fast.system.console import read_lines

BOUND = 1e-4
SETTINGS = {"train__batch": 3, "train__steps": 3, "eval__scenes": 0, "rollout__views": 2}


def said(run, **more):
    return words(run, **(SETTINGS | more))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, and what it wrote."""
    home = tmp_path_factory.mktemp("alone")
    prepare = telling(home / "texts")
    assert go(said(home / "run"), home / "run", prepare=lambda: prepare(0)).code == 0
    return home


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_change_nothing_but_the_order_of_sums(alone, tmp_path, count):
    outcomes = go_together(
        said(tmp_path / "run"), tmp_path / "run", count, telling(tmp_path / "texts")
    )
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes[0].err
    assert told(tmp_path / "texts") == told(alone / "texts")
    differences = apart(tmp_path / "run", alone / "run")
    assert max(differences.values()) <= BOUND, differences
    assert all(outcome.out == "" for outcome in outcomes[1:]), "only rank 0 tells"


def test_what_a_run_on_two_ranks_says_of_them(tmp_path):
    outcomes = go_together(said(tmp_path / "run", train__steps=1), tmp_path / "run", 2)
    assert "ranks    2 on 1 machine(s), [2, 1] images of each batch" in outcomes[0].out
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert (env["ranks"], env["nodes"], env["gradients_by"]) == (2, 1, "gloo")
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["ranks"]["images"] == [2, 1] and line["slowest_rank"] in (0, 1)
    assert line["gradient_bytes"] == 4 * adapter(tmp_path / "run").numel()
    assert line["communication_bytes"] >= line["gradient_bytes"]
    assert len(line["ranks"]["peak_gib"]) == 2 and 0 <= line["communication_share"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "images/s of each rank" in page


def keeping_gradients(place):
    """Rank 0 leaves the first update's gradients, clipped, in a file."""

    def prepare(rank):
        apply = Learner._apply

        def apply_and_keep(self, norm):
            if rank == 0 and not place.exists():
                torch.save([p.grad for p in self.parameters.values()], place)
            return apply(self, norm)

        Learner._apply = apply_and_keep

    return prepare


WHOLE_BATCH = {
    "a moving baseline, permuted rewards, the KL in them, attention": {
        "update__advantage": "ema",
        "update__tempered": "true",
        "update__kl": "k1_reward",
        "train__attention_every": 1,
        "reward__name": "shuffled",
    },
    "views that are trained too": {
        "update__views_too": "true",
        "rollout__regrounder": "policy",
        "rollout__view_temperature": 1.0,
        "rollout__temperature": 1.0,
    },
    "answers that are learned from twice": {"update__reuse": 2},
    "the consensus of the views": {"update__consensus": 0.5},
    "each of their boxes": {"update__consensus": 0.5, "update__consensus_of": "each"},
    "words that must come back, and often asked ones count less": {
        "reward__unique": "true",
        "data__balance": 1.0,
    },
    "that of another image": {"update__consensus": 0.5, "reward__name": "shuffled"},
}
FIGURES = ("reward_mean", "advantage_rms", "scored", "unique_queries", "beta", "grad_norm")


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_what_needs_the_whole_batch_sees_it(tmp_path, name):
    """Gradients within 1e-5 of the largest entry (fp32). Adapters are not compared: where a
    gradient is nothing but rounding, Adam's first steps are as large as anywhere.
    """
    gradients = []
    for count in (1, 2):
        run = tmp_path / str(count)
        words = said(run, train__steps=2, **WHOLE_BATCH[name])
        kept = tmp_path / f"{count}.pt"
        outcome = go_together(words, run, count, keeping_gradients(kept))[0]
        assert outcome.code == 0, outcome.err
        gradients.append(torch.load(kept))
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    one, two = (torch.cat([g.flatten() for g in some if g is not None]) for some in gradients)
    assert (one - two).abs().max() <= 1e-5 * one.abs().max()
    lines = (read_lines(tmp_path / count / "metrics.jsonl") for count in ("1", "2"))
    for one, two in zip(*lines, strict=True):
        for figure in (*HELD, *FIGURES, *(["attention_share"] if "attention" in name else [])):
            assert two[figure] == pytest.approx(one[figure], abs=BOUND), figure


def test_alarms_begin_at_the_bases_rates_on_every_rank(tmp_path):
    """Rank 0 alone evaluates; where another rank knew other rates it would stop by itself."""

    def prepare(rank):
        begin = Alarms.begin_at

        def noted(self, rates):
            (tmp_path / f"rates-{rank}").write_text(json.dumps(dict(rates)))
            return begin(self, rates)

        Alarms.begin_at = noted

    run = tmp_path / "run"
    outcomes = go_together(said(run, train__steps=1, eval__scenes=2), run, 2, prepare)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    rates = [json.loads((tmp_path / f"rates-{rank}").read_text()) for rank in (0, 1)]
    assert rates[0] == rates[1] and "own_parse_rate" in rates[0]


def test_evaluations_between_updates_are_the_same_and_choose_the_same(tmp_path):
    """Rank 0 measures, all wait for it and know the figures; the adapters differ by rounding."""
    more = {"eval__every": 1, "eval__scenes": 2, "eval__keep_best": "own_parse_rate"}
    found = {}
    for count in (1, 2):
        run = tmp_path / str(count)
        outcomes = go_together(said(run, **more, eval__patience=1), run, count)
        assert [outcome.code for outcome in outcomes] == [0] * count, outcomes[0].err
        lines = read_lines(run / "metrics.jsonl")
        course = [line for line in lines if "held_out/images" in line]
        assert len(course) == len([line for line in lines if "reward" in line]) > 1
        best = json.loads((run / "evaluation.json").read_text())["best"]
        found[count] = (course, best["step"], best["last"])
    (alone, *one), (together, *two) = found.values()
    assert one == two
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"held_out/seconds"}:
            assert mine[name] == pytest.approx(theirs[name], abs=BOUND), name


def test_an_alarm_ends_all_ranks_with_its_code(tmp_path):
    def alarmed(rank):
        update = Alarms.update

        def raised(self, step, metrics):
            said = update(self, step, metrics) | {"area": "grew"}
            self.take({"area": "grew"})
            return said

        Alarms.update = raised

    run = tmp_path / "run"
    more = {"train__stop_on_alarm": "true", "run__checkpoint_every": 0}
    outcomes = go_together(said(run, **more), run, 2, alarmed)
    assert [outcome.code for outcome in outcomes] == [7, 7], outcomes[0].err
    assert len(read_lines(run / "metrics.jsonl")) == 2 and adapter(run).numel()


def test_ordered_sums_repeat_bit_for_bit(tmp_path):
    for name in ("first", "second"):
        run = said(tmp_path / name, train__deterministic="true")
        assert go_together(run, tmp_path / name, 3)[0].code == 0
    assert torch.equal(adapter(tmp_path / "first"), adapter(tmp_path / "second"))


OUT_OF_MEMORY = {
    "before the exchange": (FastEngine, "prefill", 2),
    "with the evidence told": (FastEngine, "score", 1),
    "with the gradients summed": (Learner, "_make_room", 1),
}


@pytest.mark.parametrize("place", OUT_OF_MEMORY)
def test_a_rank_out_of_memory_halves_its_own_slice_only(alone, tmp_path, place):
    owner, name, nth = OUT_OF_MEMORY[place]

    def failing(rank):
        real, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == nth:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return real(*args, **kwargs)

        if rank == 0:
            setattr(owner, name, wrapped)

    outcomes = go_together(said(tmp_path / "run"), tmp_path / "run", 2, failing)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["ranks"]["halvings"] == [1, 0] and last["memory_halvings"] == 1
    assert max(apart(tmp_path / "run", alone / "run").values()) <= BOUND
