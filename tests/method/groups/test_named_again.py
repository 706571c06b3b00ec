"""Whether the words come back: who is asked, about what, and what it does to a batch."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from small_batches import SMALL
from torch import Tensor

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.estimate.meta_model import MetaEngine
from vise_fast.estimate.rehearsal import rehearse
from vise_fast.images import geometry
from vise_fast.images.drawn import Scenes
from vise_fast.method import roles
from vise_fast.method.evidence import Evidence
from vise_fast.method.experience import play_batch
from vise_fast.method.groups import cutout
from vise_fast.method.groups.named_again import named_again
from vise_fast.method.learner import Learner
from vise_fast.method.slices import Draws, Slice
from vise_fast.method.step_plan import StepPlan
from vise_fast.model import load as model

GROUNDED = [
    *SMALL,
    "--reward.w_sem=0",
    "--reward.w_geo=1",
]
UNIQUE = "--reward.unique=true"


@pytest.fixture(scope="module")
def opened():
    policy = model.load(configuration.load(None, GROUNDED))
    return policy, FastEngine(policy.backbone, policy.tokens)


def configured(*words, micro=0):
    return configuration.load(None, [*GROUNDED, *words, f"--train.micro_batch={micro}"])


def played(opened, *words, images=None, micro=0):
    config = configured(*words, micro=micro)
    source = Scenes(config)
    return play_batch(opened[1], images or source.batch(0, 4), config, 0, source.truth)


def answering(monkeypatch, say):
    """A stand-in for the asker about cutouts: say(place among those asked) is what it names."""
    real = roles.ask
    calls = []

    def ask(engine, prefixes, owner, seeds, sampling):
        if sampling.temperature > 0:
            return real(engine, prefixes, owner, seeds, sampling)
        calls.append((len(owner), prefixes.adapters, sampling))
        texts = [say(i) for i in owner]
        readable = [text is not None for text in texts]
        named = [text or roles.UNREADABLE_QUERY for text in texts]
        return roles.Queries(named, readable, named, [1] * len(owner))

    monkeypatch.setattr(roles, "ask", ask)
    return calls


def same_but(one: Evidence, other: Evidence, *names):
    for field in fields(Evidence):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in names:
            continue
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def test_nobody_is_asked_unless_it_is_wanted(opened, monkeypatch):
    calls = answering(monkeypatch, lambda i: pytest.fail("asked"))
    (one,) = played(opened)
    assert one.evidence.named_again is None and not calls


@pytest.mark.parametrize("asker", ["reference", "policy"])
def test_whoever_asks_names_it_again_greedily(opened, monkeypatch, asker):
    texts = played(opened)[0].queries.texts
    said = [f"The {texts[0].upper()}!", "purple hull", None, texts[3]]
    calls = answering(monkeypatch, lambda i: said[i])
    (one,) = played(opened, UNIQUE, f"--rollout.asker={asker}")
    again = one.evidence.named_again.view(4, 3)
    assert again.tolist() == [[True] * 3, [False] * 3, [False] * 3, [True] * 3]
    ((count, adapters, sampling),) = calls
    assert (count, adapters, sampling.temperature) == (4, asker == "policy", 0)
    assert sampling.limit == 8


def test_where_all_words_come_back_nothing_else_changes(opened, monkeypatch):
    """Evidence and update bit for bit those without the question."""
    (plain,) = played(opened)
    texts = plain.queries.texts
    answering(monkeypatch, lambda i: texts[i])
    (one,) = played(opened, UNIQUE)
    assert one.evidence.named_again.all()
    same_but(plain.evidence, one.evidence, "named_again")
    metrics = []
    for slices, words in ((plain, ()), (one, (UNIQUE,))):
        learner = Learner(*opened, configured(*words))
        monkeypatch.setattr(learner, "_apply", lambda norm: None)
        metrics.append(learner.learn([slices], 0))
    assert metrics[1].pop("named_again") == 1
    assert metrics[0] == metrics[1] and metrics[0]["scored"] > 0


def test_groups_whose_words_do_not_come_back_carry_no_gradient(opened, monkeypatch):
    texts = played(opened)[0].queries.texts
    answering(monkeypatch, lambda i: texts[i] if i == 1 else "hull")
    (one,) = played(opened, UNIQUE)
    learner = Learner(*opened, configured(UNIQUE))
    targets, _ = learner._targets([one], learner._score([one], 0))
    assert targets[0].scored[:12].tolist() == [3 <= n < 6 for n in range(12)]
    answering(monkeypatch, lambda i: "hull")
    (none,) = played(opened, UNIQUE)
    metrics = learner.learn([none], 0)
    assert (metrics["named_again"], metrics["scored"], metrics["gated"]) == (0, 0, 1)


def test_their_ghosts_are_not_judged(opened, monkeypatch):
    words = ("--reward.w_sem=0.5", "--reward.gate=0", UNIQUE)
    texts = played(opened, *words)[0].queries.texts
    answering(monkeypatch, lambda i: texts[i] if i == 2 else "hull")
    judged = played(opened, *words)[0].evidence.judged
    assert judged[6:9].any() and not judged[:6].any() and not judged[9:].any()


def test_slices_hear_the_same(opened):
    """Of the embedded model itself."""
    (whole,) = played(opened, UNIQUE)
    assert whole.evidence.named_again.any()
    for micro in (1, 3):
        parts = played(opened, UNIQUE, micro=micro)
        again = torch.cat([part.evidence.named_again for part in parts])
        assert torch.equal(again, whole.evidence.named_again)


def test_words_of_the_user_s_are_compared_too(opened):
    """The true name of the only object comes back, a word for nothing does not."""
    config = configured(UNIQUE, "--scenes.max_objects=1")
    source = Scenes(config)
    images = source.batch(0, 4)
    names = [source.scene(image.key).names[0] for image in images]
    given = [
        replace(image, given=name if i % 2 else "white hull")
        for i, (image, name) in enumerate(zip(images, names, strict=True))
    ]
    (one,) = played(opened, UNIQUE, images=given)
    again = one.evidence.named_again.view(4, 3)[:, 0]
    assert not again[::2].any() and again[1::2].all()


def given_boxes(opened, boxes, readable, queries, **changes):
    """A slice of images, and two boxes on each of them, as if they had been sampled."""
    config = configured(UNIQUE, "--rollout.samples=2", **changes)
    pixels = [image.pixels for image in Scenes(config).batch(0, len(queries))]
    part = Slice(opened[1], config, StepPlan.of(config), Draws(0, 0), pixels)
    box = torch.tensor(boxes, dtype=torch.float64)
    found = SimpleNamespace(box_1000=box, readable=torch.tensor(readable))
    asked = roles.Queries(["red circle"] * len(queries), queries, [], [])
    return named_again(part, asked, found)


def test_images_without_a_box_or_a_query_are_not_asked_about(opened, monkeypatch):
    """Rows behind the samples are the views' boxes: nobody looks at them."""
    box = (100.0, 100.0, 500.0, 700.0)
    flat = (100.0, 100.0, 500.0, 100.0)
    zero = (0.0, 0.0, 0.0, 0.0)
    cut = []
    real = cutout.cutouts
    monkeypatch.setattr(
        cutout, "cutouts", lambda *args: cut.append(args[1].tolist()) or real(*args)
    )
    calls = answering(monkeypatch, lambda i: "red circle")
    boxes = [flat, zero, box, box, flat, box, box, box, box, box]
    readable = [True, False, False, False, True, True, True, True, True, True]
    found = given_boxes(opened, boxes, readable, [True, True, True, False])
    assert found.tolist() == [False, False, True, False]
    assert cut == [[list(box)]] and calls[0][0] == 1
    nobody = given_boxes(opened, boxes[:2], readable[:2], [True])
    assert nobody.tolist() == [False] and len(calls) == 1


def test_the_asker_sees_the_median_box(opened, monkeypatch):
    seen = []
    real = cutout.cutouts
    monkeypatch.setattr(cutout, "cutouts", lambda *args: seen.append(args[1]) or real(*args))
    (one,) = played(opened, UNIQUE)
    e = one.evidence
    for box, usable, found in zip(
        e.box_1000.view(4, 3, 4), e.placed.view(4, 3), seen[0], strict=True
    ):
        assert usable.any() and geometry.proper(found)
        assert found.tolist() == box[usable].quantile(0.5, 0).tolist()


def test_the_rehearsal_of_a_step_asks_too(opened, monkeypatch):
    asked = []
    real = MetaEngine.generate
    monkeypatch.setattr(
        MetaEngine, "generate", lambda *args, **more: asked.append(args[3]) or real(*args, **more)
    )
    shapes = opened[0].backbone.config
    times = []
    for words in ((), (UNIQUE,)):
        asked.clear()
        rehearse(configured(*words), shapes, [(64, 96)] * 4, torch.float32, device="cpu")
        times.append(asked.count(8))
    assert times[1] == 2 * times[0] > 0
