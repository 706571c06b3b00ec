"""Who plays which role: queries and view boxes from the policy or from the reference, on an adapter
that says something else.
"""

from types import SimpleNamespace

import pytest
import torch
from small_batches import EVERY_VERDICT

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images import views
from vise_fast.images.drawn import Scenes
from vise_fast.method import experience, roles, verdicts
from vise_fast.method.experience import Draws, attention_share, play_batch
from vise_fast.model import load as model
from vise_fast.ranks.ranks import Alone
from vise_fast.system.errors import ConfigError

SMALL = [
    "--train.batch=3",
    "--rollout.samples=2",
    "--rollout.views=2",
    "--rollout.box_tokens=24",
    "--rollout.query_tokens=8",
    "--reward.w_sem=0",
    "--reward.w_geo=1",
]
POLICY = ["--rollout.asker=policy", "--rollout.regrounder=policy"]
REFERENCE = ["--rollout.asker=reference", "--rollout.regrounder=reference"]
SAMPLED = "--rollout.view_temperature=1"
GREEDY = "--rollout.view_temperature=0"


def opened(*words, adapter=0.0, seed=0):
    """Configuration and engine; `adapter`: the size of the random numbers in the adapter's second
    factors (0: policy and reference are the same).
    """
    config = configuration.load(None, [*SMALL, *words, f"--train.seed={seed}"])
    policy = model.load(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=adapter)
    policy.backbone.refresh()
    return config, FastEngine(policy.backbone, policy.tokens)


def played(*words, step=0, **how):
    """One batch."""
    config, engine = opened(*words, **how)
    (one,) = play_batch(engine, Scenes(config).batch(0, 3), config, step)
    return one


def views_of(one):
    return one.evidence.view_box_1000, one.evidence.view_readable


def test_policy_and_reference_write_the_same_while_the_adapter_is_zero():
    joint = played(*POLICY, SAMPLED)
    split = played(*REFERENCE, SAMPLED)
    assert joint.queries.written == split.queries.written
    assert torch.equal(joint.evidence.box_1000, split.evidence.box_1000)
    for a, b in zip(views_of(joint), views_of(split), strict=True):
        assert torch.equal(a, b)


def test_the_reference_asks_and_boxes_the_views_whatever_the_adapter_says():
    base = played(*REFERENCE)
    moved = played(*REFERENCE, adapter=0.1)
    own = played(*POLICY, GREEDY, adapter=0.1)
    assert base.queries.written == moved.queries.written != own.queries.written
    for a, b in zip(views_of(base), views_of(moved), strict=True):
        assert torch.equal(a, b)
    # the samples are the policy's
    assert not torch.equal(base.evidence.box_1000, moved.evidence.box_1000)


def test_greedy_views_follow_no_seed():
    """Two flips of one image are one question, and have one greedy answer."""
    one = played(*POLICY, GREEDY, "--view.kinds=flip")
    rows = one.evidence.view_box_1000.view(3, 2, 2, 4)
    assert torch.equal(rows[:, :, 0], rows[:, :, 1])


def test_sampled_views_differ():
    one = played(*POLICY, SAMPLED, "--view.kinds=flip")
    rows = one.evidence.view_box_1000.view(3, 2, 2, 4)
    assert not torch.equal(rows[:, :, 0], rows[:, :, 1])


@pytest.mark.parametrize(
    "words",
    [
        ("--rollout.regrounder=reference", SAMPLED),
        ("--rollout.regrounder=policy", GREEDY),
    ],
)
def test_views_train_only_as_the_policy_samples_them(words):
    with pytest.raises(ConfigError, match="views_too"):
        configuration.load(None, [*SMALL, *words, "--update.views_too=true"])


@pytest.mark.parametrize("asker", ["policy", "reference"])
def test_the_judges_prefixes_are_kept_only_where_the_reference_judges(asker):
    asks = f"--rollout.asker={asker}"
    assert played(asks, "--reward.judge=policy", adapter=0.1).reference is None
    kept = played(asks, "--reward.judge=reference", adapter=0.1).reference
    assert len(kept) == 3 and not kept.adapters


@pytest.mark.parametrize("share", [True, False])
def test_questions_keep_a_graph_only_where_the_forward_pass_is_shared(share):
    one = played(f"--train.share_forward={str(share).lower()}", adapter=0.1)
    assert (one.boxes.asked is not None) == share


def test_no_truth_is_a_box_without_area():
    truths = experience._table([(1.0, 2.0, 3.0, 4.0), None])
    assert truths.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]


# ---- verdicts ------------------------------------------------------------------------------------

JUDGED = [
    "--reward.w_sem=0.5",
    "--reward.sem=contrast",
    "--reward.controls=2",
    "--reward.sufficiency=true",
    "--reward.gate=0",
    *EVERY_VERDICT,
]


@pytest.mark.parametrize("judge", ["policy", "reference"])
def test_verdicts_are_the_judges_on_the_ghosts_of_each_box(judge):
    """Asked again by hand, one box at a time: the box hidden, all but the box, and a box of its
    size elsewhere.
    """
    config, engine = opened(*JUDGED, f"--reward.judge={judge}", adapter=0.02)
    (one,) = play_batch(engine, Scenes(config).batch(0, 3), config, 0)
    evidence = one.evidence
    assert evidence.control.shape == (6, 2)
    rows = evidence.judged.nonzero()[:, 0].tolist()
    assert rows and torch.equal(evidence.judged, evidence.placed & evidence.query_readable)
    first = {}
    for row in rows:
        image = row // 2
        box = evidence.box_1000[row]
        place = first.setdefault((image, *box.tolist()), row)

        def verdict(hidden, region="inside", image=image):
            pixels = [one.images[image].pixels]
            owner = torch.tensor([0])
            ghosts = views.ghost(pixels, owner, hidden[None], config.ghost, region)
            features = engine.encode(ghosts)
            return roles.verify(engine, features, [one.queries.texts[image]], judge == "policy")

        assert evidence.gone[row] == pytest.approx(verdict(box).item(), abs=1e-5)
        assert evidence.keep[row] == pytest.approx(verdict(box, "outside").item(), abs=1e-5)
        for c in range(2):
            rng = Draws(config.train.seed, 0).generator(f"control{c}", place, 2)
            elsewhere = torch.tensor(views.control_box(rng, box)[0])
            truth = verdict(elsewhere).item()
            assert evidence.control[row, c] == pytest.approx(truth, abs=1e-5)


BOX = (10.0, 20.0, 30.0, 40.0)
OTHER = (10.0, 20.0, 30.0, 41.0)
FLAT = (10.0, 20.0, 30.0, 20.0)


def to_hide(boxes, gate=0.5, seen=(0.5, 0.5, 0.5), judges=True, **changes):
    """What there is to judge of two boxes on each of three images; a view's box follows."""
    known = {"readable": [True] * 7, "queries": [True] * 3} | changes
    part = SimpleNamespace(
        plan=SimpleNamespace(samples=2, judges_ghosts=judges),
        config=SimpleNamespace(reward=SimpleNamespace(gate=gate)),
        pixels=[None] * 3,
    )
    given = SimpleNamespace(
        box_1000=torch.tensor([*boxes, BOX], dtype=torch.float64),
        readable=torch.tensor(known["readable"]),
    )
    queries = SimpleNamespace(readable=known["queries"])
    return verdicts._hidden(part, queries, given, torch.tensor(seen, dtype=torch.float64))


def test_a_box_drawn_twice_on_an_image_is_judged_once():
    """The first row's draw places its control; the same box on another image is another."""
    hidden = to_hide([BOX, BOX, OTHER, BOX, BOX, OTHER])
    assert hidden.rows == [0, 1, 2, 3, 4, 5]
    assert hidden.slot == [0, 0, 1, 2, 3, 4]
    assert hidden.image == [0, 1, 1, 2, 2]
    assert hidden.first == [0, 2, 3, 4, 5]
    assert hidden.box_1000.tolist() == [list(b) for b in (BOX, OTHER, BOX, BOX, OTHER)]


def test_boxes_that_are_none_and_images_that_are_not_open_are_not_judged():
    every = [BOX] * 6
    assert to_hide([BOX, FLAT, FLAT, BOX, BOX, BOX]).rows == [0, 3, 4, 5]
    unread = [True, False, True, True, False, True, True]
    assert to_hide(every, readable=unread).rows == [0, 2, 3, 5]
    assert to_hide(every, queries=[True, False, True]).rows == [0, 1, 4, 5]
    assert to_hide(every, seen=(0.5, 0.49, 1.0)).rows == [0, 1, 4, 5]
    nothing = to_hide(every, judges=False)
    assert nothing.rows == nothing.slot == nothing.image == nothing.first == []


def test_ghosts_are_judged_so_many_at_once(monkeypatch):
    """Per image of the slice; the last may be fewer, and none is lost."""
    wanted = played(*JUDGED, adapter=0.02).evidence
    monkeypatch.setattr(verdicts, "GHOSTS_AT_ONCE", 1)
    config, engine = opened(*JUDGED, adapter=0.02)
    encoded = []
    honest = engine.encode

    def counted(images):
        encoded.append(len(images))
        return honest(images)

    monkeypatch.setattr(engine, "encode", counted)
    (one,) = play_batch(engine, Scenes(config).batch(0, 3), config, 0)
    rows = one.evidence.judged.nonzero()[:, 0].tolist()
    boxes = {(row // 2, *one.evidence.box_1000[row].tolist()) for row in rows}
    ghosts = 4 * len(boxes)  # the box, two controls, all but the box
    rest = [ghosts % 3] if ghosts % 3 else []
    assert encoded == [3 + 6] + [3] * (ghosts // 3) + rest
    for name in ("gone", "keep", "control"):
        found = getattr(one.evidence, name)
        torch.testing.assert_close(found, getattr(wanted, name), atol=1e-5, rtol=0)


def test_nothing_is_judged_that_no_reward_reads_or_nobody_sees():
    assert not played().evidence.judged.any()
    unseen = played(*JUDGED, "--reward.gate=1")
    assert not unseen.evidence.judged.any()
    assert unseen.evidence.gone.tolist() == [0] * 6
    assert played(*JUDGED, "--reward.sem=paper").evidence.control is None
    assert played(*JUDGED, "--reward.sufficiency=false").evidence.keep is None


@pytest.mark.parametrize("every, step, measured", [(0, 0, 0), (1, 0, 1), (1, 3, 1), (2, 1, 0)])
def test_attention_is_measured_every_so_many_steps(every, step, measured):
    one = played(f"--train.attention_every={every}", step=step)
    assert (one.attention is not None) == measured
    share = attention_share([one], Alone())
    assert set(share) == ({"attention_share"} if measured else set())
    if measured:
        assert one.attention.shape == (3,)
        assert 0 < share["attention_share"] < 1
        assert share["attention_share"] == pytest.approx(one.attention.mean().item())
