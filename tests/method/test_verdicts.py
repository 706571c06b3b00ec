"""Fewer verdicts: what is not asked must not matter, and the full image must stay worth nothing.

Boxes are given, not sampled: tight ones, a wide one with no room beside it, the full image, one
that cannot be read, one twice.
"""

from dataclasses import replace

import pytest
import torch
from small_batches import EVERY_VERDICT

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images import views
from vise_fast.images.drawn import Scenes
from vise_fast.method import rewards, roles
from vise_fast.method.evidence import Evidence
from vise_fast.method.slices import Draws, Slice
from vise_fast.method.step_plan import StepPlan
from vise_fast.method.verdicts import implied_by, judge
from vise_fast.model import load as model
from vise_fast.system.errors import NumericFault

FULL = (0.0, 0.0, 1000.0, 1000.0)
WIDE = (100.0, 0.0, 800.0, 1000.0)
ASIDE = (0.0, 0.0, 90.0, 130.0)
SAMPLES = 6
IMAGES = 3


@pytest.fixture(scope="module")
def nano():
    policy = model.load(configuration.load(None, []))
    return FastEngine(policy.backbone, policy.tokens)


class Scene:
    """Three images with one true object each, and six boxes about each."""

    def __init__(self, engine, *words):
        small = [f"--rollout.samples={SAMPLES}", "--reward.w_sem=0.5", "--reward.gate=0"]
        self.config = configuration.load(None, [*small, *EVERY_VERDICT, *words])
        source = Scenes(self.config)
        images = source.batch(0, IMAGES)
        things = [source.scene(image.key).objects[-1] for image in images]
        plan = StepPlan.of(self.config)
        pixels = [image.pixels for image in images]
        self.part = Slice(engine, self.config, plan, Draws(3, 0), pixels)
        self.names = [thing.name for thing in things]
        rows = [
            [thing.box_1000, thing.box_1000, shifted(thing.box_1000), WIDE, FULL, ASIDE]
            for thing in things
        ]
        self.box = torch.tensor(rows, dtype=torch.float64).view(-1, 4)
        self.readable = torch.ones(len(self.box), dtype=torch.bool)
        self.readable[SAMPLES + 2] = False
        self.seen = self.asked(self.part.pixels, self.names)

    def asked(self, images, names):
        engine = self.part.engine
        return roles.verify(engine, engine.encode(images), names, False)

    def judged(self):
        """The verdicts, and how many the engine gave."""
        queries = roles.Queries(self.names, [True] * IMAGES, self.names, [2] * IMAGES)
        boxes = roles.Boxes(self.box, self.readable, [], None, [], [])
        self.part.engine.counters.take()
        verdicts = judge(self.part, queries, boxes, self.seen)
        return verdicts, self.part.engine.counters.take()["verdicts"]

    def evidence(self, verdicts):
        """With one view each, which says nothing here."""
        rows = len(self.box)
        eye = torch.eye(3, dtype=torch.float64).expand(rows, 1, 3, 3)
        controls = [p for name, p in verdicts.p.items() if name.startswith("control")]
        return Evidence(
            box_1000=self.box,
            readable=self.readable,
            view_box_1000=self.box[:, None],
            view_readable=self.readable[:, None],
            view_usable=self.readable[:, None],
            matrix_px=eye,
            height=torch.full((rows,), 128),
            width=torch.full((rows,), 128),
            seen=self.seen.repeat_interleave(SAMPLES),
            gone=verdicts.p["gone"],
            query_readable=torch.ones(rows, dtype=torch.bool),
            group_size=SAMPLES,
            control=torch.stack(controls, 1) if controls else None,
            keep=verdicts.p.get("keep"),
            judged=verdicts.judged,
            further=verdicts.further,
        )

    def semantic(self, verdicts):
        return rewards.semantic(self.evidence(verdicts), self.config.reward)


def shifted(box):
    return tuple(min(value + 30, 1000.0) for value in box)


def full_boxes():
    return torch.arange(IMAGES * SAMPLES) % SAMPLES == 4


@pytest.mark.parametrize("settled", [0.05, 0.4])
@pytest.mark.parametrize("controls", [1, 2])
def test_a_settled_box_is_asked_about_no_more_and_loses_no_more_than_that(nano, settled, controls):
    whole = Scene(nano, f"--reward.controls={controls}")
    all_, count = whole.judged()
    some = Scene(nano, f"--reward.controls={controls}", f"--reward.settled={settled}")
    few, fewer = some.judged()
    assert torch.equal(few.judged, all_.judged)
    assert (few.p["gone"] - all_.p["gone"]).abs().max() < 1e-5
    hides = whole.seen.repeat_interleave(SAMPLES) * (1 - all_.p["gone"])
    assert torch.equal(few.further, all_.judged & (hides > settled))
    for name in set(few.p) - {"gone"}:
        difference = (few.p[name] - all_.p[name])[few.further]
        assert difference.abs().max() < 1e-5
        assert (few.p[name][~few.further] == 0).all()
    lost = whole.semantic(all_) - some.semantic(few)
    assert (lost[few.further].abs() < 1e-4).all()
    assert (lost >= -1e-4).all() and (lost <= settled + 1e-4).all()
    # five boxes an image, of which one is there twice; one cannot be read
    pairs = IMAGES * (SAMPLES - 1) - 1
    kinds = 2 + controls
    assert count == kinds * pairs
    distinct = {
        (r // SAMPLES, *whole.box[r].tolist()) for r in few.further.nonzero()[:, 0].tolist()
    }
    assert fewer == pairs + (kinds - 1) * len(distinct) < count


def test_where_every_box_is_settled_nothing_further_is_asked(nano):
    scene = Scene(nano, "--reward.settled=0.999999")
    verdicts, count = scene.judged()
    assert not verdicts.further.any() and count == IMAGES * (SAMPLES - 1) - 1
    assert (scene.semantic(verdicts) == 0).all()


@pytest.mark.parametrize("share", [0.9, 1.0, 1e-9])
def test_an_implied_verdict_is_that_of_the_box_that_implies_it(nano, share):
    whole, _ = Scene(nano).judged()
    scene = Scene(nano, f"--reward.implied={share}")
    asked = []
    real = roles.verify

    def counted(engine, features, texts, *args, **kwargs):
        asked.append(len(texts))
        return real(engine, features, texts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "verify", counted)
        few, count = scene.judged()
    pairs = IMAGES * (SAMPLES - 1) - 1
    others = 2 * pairs  # controls and keeps, together and last
    while others > 0:
        others -= asked.pop()
    assert others == 0 and all(n <= IMAGES for n in asked) and count == sum(asked) + 2 * pairs
    assert torch.equal(few.judged, whole.judged) and torch.equal(few.further, whole.judged)
    assert (few.p["keep"] - whole.p["keep"]).abs().max() < 1e-5
    for row in whole.judged.nonzero()[:, 0].tolist():
        mine = few.p["gone"][row]
        near = [r for r in range(len(scene.box)) if r // SAMPLES == row // SAMPLES]
        sources = [r for r in near if whole.judged[r] and abs(whole.p["gone"][r] - mine) < 1e-5]
        assert any(r == row or implies(scene.box[r], scene.box[row], mine, share) for r in sources)
    if share == 0.9:
        assert sum(asked) < pairs


def implies(box, other, p, share):
    """Whether a box whose verdict is p says the same of another; written out."""
    sides = [max(0.0, min(box[i + 2], other[i + 2]) - max(box[i], other[i])) for i in range(2)]
    common = float(sides[0] * sides[1])
    if p <= 0.1:
        return common >= share * area(box) - 1e-6
    return p >= 0.9 and common >= share * area(other) - 1e-6


def area(box):
    return float((box[2] - box[0]) * (box[3] - box[1]))


def test_who_implies_whom():
    """Small in large in larger, and another image; asked: the middle one."""
    box = torch.tensor([[40, 40, 60, 60], [30, 30, 70, 70], [0, 0, 90, 90]], dtype=torch.float64)
    box = torch.cat([box, box[:1]])
    image = torch.tensor([0, 0, 0, 1])
    asked = torch.tensor([False, True, False, False])
    for p, wanted in ((0.05, [-1, 1, 1, -1]), (0.95, [1, 1, -1, -1]), (0.5, [-1] * 4)):
        table = torch.full((4,), 0.5, dtype=torch.float64)
        table[1] = p
        assert implied_by(image, box, table, asked, 1.0).tolist() == wanted
        assert implied_by(image, box, table, asked, 0.0).tolist() == [-1] * 4
    for p, wanted in ((0.05, [-1, 1, 1, -1]), (0.95, [1, 1, -1, -1])):
        table[1] = p
        found = implied_by(image, box, table, asked, 0.5).tolist()
        assert found == wanted, "more than the share is enough"
    off = box + torch.tensor([2.0, 0, 2, 0])  # the middle one keeps 0.95 of itself
    off[1] = box[1]
    off[2] = torch.tensor([32.0, 0, 90, 90])
    table = torch.tensor([0.5, 0.0, 0.5, 0.5], dtype=torch.float64)
    assert implied_by(image, off, table, asked, 0.95).tolist()[2] == 1
    assert implied_by(image, off, table, asked, 0.96).tolist()[2] == -1


@pytest.mark.parametrize("words", [[], ["--reward.settled=0.05"]])
def test_shared_controls_are_the_first_clear_one_of_the_image(nano, words):
    scene = Scene(nano, "--reward.shared_controls=true", *words)
    verdicts, count = scene.judged()
    asked = 0
    for image in range(IMAGES):
        rows = [r for r in range(image * SAMPLES, (image + 1) * SAMPLES) if verdicts.further[r]]
        first = {}
        shared = None
        for row in rows:
            box = scene.box[row]
            place = first.setdefault(tuple(box.tolist()), row)
            rng = scene.part.draws.generator("control0", place, SAMPLES)
            spot, kind = views.control_box(rng, box)
            if kind == "far" and shared is None:
                shared = spot
            mine = shared if kind == "far" else spot
            owner = torch.tensor([image])
            hidden = torch.tensor([mine], dtype=torch.float64)
            ghosts = views.ghost(scene.part.pixels, owner, hidden, scene.config.ghost, "inside")
            truth = scene.asked(ghosts, [scene.names[image]]).item()
            assert verdicts.p["control0"][row] == pytest.approx(truth, abs=1e-5)
        kinds = [
            views.control_box(scene.part.draws.generator("control0", r, SAMPLES), scene.box[r])
            for r in first.values()
        ]
        asked += len(first) + sum(kind == "random" for _, kind in kinds)
        asked += any(kind == "far" for _, kind in kinds)
    assert count == IMAGES * (SAMPLES - 1) - 1 + asked


@pytest.mark.parametrize(
    "words",
    [
        ["--reward.shared_controls=true"],
        ["--reward.shared_controls=true", "--reward.sufficiency=false"],
        ["--reward.shared_controls=true", "--reward.settled=0.1"],
        ["--reward.shared_controls=true", "--reward.sufficiency=false", "--reward.implied=0.9"],
    ],
)
def test_the_full_image_stays_worth_nothing(nano, words):
    scene = Scene(nano, *words)
    verdicts, _ = scene.judged()
    value = scene.semantic(verdicts)
    tight = torch.arange(len(value)) % SAMPLES == 0
    assert value[full_boxes()].abs().max() < 1e-5 < 0.3 < value[tight].max()


def test_what_was_not_asked_may_be_anything(nano):
    scene = Scene(nano, "--reward.settled=0.4")
    verdicts, _ = scene.judged()
    evidence = scene.evidence(verdicts)
    assert (~verdicts.further & verdicts.judged).any()
    unknown = torch.where(verdicts.further, evidence.keep, torch.nan)
    holed = replace(evidence, keep=unknown)
    reward = scene.config.reward
    assert torch.equal(rewards.semantic(holed, reward), rewards.semantic(evidence, reward))
    figures = rewards.measure(holed, rewards.dissect(holed, reward), evidence.gone, verdicts.judged)
    assert figures["keep"] == pytest.approx(float(evidence.keep[verdicts.further].mean()))
    asked = verdicts.further.nonzero()[0]
    with pytest.raises(NumericFault, match="keep"):
        replace(evidence, keep=evidence.keep.index_fill(0, asked, torch.nan))
