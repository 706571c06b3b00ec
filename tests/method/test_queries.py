"""Words of the user's own in a step: who is asked what, and what is not asked any more."""

from dataclasses import replace

import pytest
import torch
from small_runs import CHANGING, SMALL, adapter, go, lines

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method import roles
from vise_fast.method.evidence import VISIBLE
from vise_fast.method.experience import play_batch
from vise_fast.model import load as model

WORDS = [
    "--train.batch=4",
    "--rollout.samples=2",
    "--rollout.views=2",
    "--rollout.box_tokens=24",
    "--rollout.query_tokens=8",
    "--reward.w_sem=0",
    "--reward.w_geo=1",
]
ABSENT = ("white cross", "orange cross", "cyan cross", "purple cross", "yellow cross")


@pytest.fixture(scope="module", params=["reference", "policy"])
def opened(request):
    config = configuration.load(None, [*WORDS, f"--rollout.asker={request.param}"])
    policy = model.load(config)
    return config, FastEngine(policy.backbone, policy.tokens)


def played(opened, images, **changes):
    config, engine = opened
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    return play_batch(engine, images, config, 0)


def batch(opened, words):
    """Four scenes, with what each is asked for."""
    images = Scenes(opened[0]).batch(0, 4)
    return [replace(image, **words.get(i, {})) for i, image in enumerate(images)]


def texts(slices):
    return [text for one in slices for text in one.queries.texts]


def test_an_image_whose_query_is_given_is_not_asked(opened, monkeypatch):
    (plain,) = played(opened, batch(opened, {}))
    asked = []
    real = roles.ask
    monkeypatch.setattr(roles, "ask", lambda *args: asked.append(list(args[2])) or real(*args))
    (one,) = played(opened, batch(opened, {1: {"given": "red circle"}, 3: {"given": "a hull"}}))
    assert asked == [[0, 2]]
    assert one.queries.texts[1::2] == ["red circle", "a hull"]
    assert one.queries.texts[::2] == plain.queries.texts[::2], "the others ask what they would"
    assert one.queries.lengths[1::2] == [0, 0] and min(one.queries.lengths[::2]) > 0
    assert all(one.queries.readable[1::2]) and one.evidence.query_readable[2:4].all()
    rows = [i for i in range(8) if i // 2 in (0, 2)]
    assert torch.equal(one.evidence.box_1000[rows], plain.evidence.box_1000[rows])


def test_where_all_are_given_nothing_is_decoded_for_a_query(opened, monkeypatch):
    monkeypatch.setattr(roles, "ask", lambda *args: pytest.fail("asked"))
    limits = []
    engine = opened[1]
    real = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda *args: limits.append(args[2]) or real(*args), raising=True
    )
    (one,) = played(opened, batch(opened, {i: {"given": "red circle"} for i in range(4)}))
    assert one.queries.texts == ["red circle"] * 4
    assert limits and set(limits) == {24}, "boxes alone are decoded"


def test_of_tried_phrases_the_first_that_is_seen_is_asked_for(opened):
    source = Scenes(opened[0])
    scenes = [source.scene(image.key) for image in source.batch(0, 4)]
    (plain,) = played(opened, batch(opened, {}))
    words = {i: {"tried": (*ABSENT, *scene.names)} for i, scene in enumerate(scenes)}
    images = batch(opened, words)
    (one,) = played(opened, images)
    engine = opened[1]
    features = engine.encode([image.pixels for image in images])
    prefixes = engine.prefill(features, adapters=opened[0].rollout.asker == "policy")
    for i, image in enumerate(images):
        p = roles.verify_forked(engine, prefixes, [i] * len(image.tried), list(image.tried))
        seen = [w for w, value in zip(image.tried, p.tolist(), strict=True) if value >= VISIBLE]
        assert one.queries.texts[i] == (seen[0] if seen else plain.queries.texts[i])
    assert set(texts([one])) & {name for scene in scenes for name in scene.names}


def test_where_none_is_seen_the_model_names_something(opened, monkeypatch):
    (plain,) = played(opened, batch(opened, {}))
    real = roles.verify_forked

    def blind(engine, prefixes, owner, queries):
        return real(engine, prefixes, owner, queries) * 0

    monkeypatch.setattr(roles, "verify_forked", blind)
    (one,) = played(opened, batch(opened, {i: {"tried": ABSENT} for i in range(4)}))
    assert one.queries == plain.queries


def test_slices_ask_the_same(opened):
    words = {0: {"given": "red circle"}, 1: {"tried": ("blue square", "red circle")}}
    images = batch(opened, words)
    whole = played(opened, images)
    for size in (1, 3):
        parts = played(opened, images, micro_batch=size)
        assert texts(parts) == texts(whole)
        boxes = torch.cat([part.evidence.box_1000 for part in parts])
        assert torch.equal(boxes, whole[0].evidence.box_1000)


def test_a_run_with_words_goes_on_bit_for_bit(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("red circle\nblue square\nwhite cross\ngreen triangle\nyellow circle\n")
    own = ["--data.queries", words, "--data.queries_share=0.7", "--data.queries_tries=2", *SMALL]
    own += ["--eval.scenes=0", "--run.report=false"]
    assert go(*own, "--train.steps=3", "--run.dir", tmp_path / "whole") == 0
    assert go(*own, "--train.steps=2", "--run.dir", tmp_path / "parts") == 0
    on = ["--resume", "auto", "--run.dir", tmp_path / "parts", "--train.steps=3"]
    assert go(*on) == 0
    one, other = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    kept = [{k: v for k, v in line.items() if k not in CHANGING} for line in one]
    assert kept == [{k: v for k, v in line.items() if k not in CHANGING} for line in other]
    assert any(line["own_words"] > 0 for line in one)
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    words.write_text("another word\n")
    assert go(*on[:-1], "--train.steps=4") == 3
