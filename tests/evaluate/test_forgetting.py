"""Free answers: the KL to the base against one computed token by token on the stock modules, what
is counted, and what is too much.
"""

import re

import numpy as np
import pytest
import torch

from vise_fast.config import schema as config
from vise_fast.engine.fast import FastEngine
from vise_fast.evaluate import forgetting
from vise_fast.evaluate.held_out import compare, held_out
from vise_fast.evaluate.look import Look
from vise_fast.evaluate.results import Results
from vise_fast.images.drawn import Scenes
from vise_fast.model import load as model
from vise_fast.report.alarms import looked_at

SETTINGS = ["--eval.scenes=3", "--eval.batch=2", "--eval.attention=false"]


@pytest.fixture(scope="module")
def shipped():
    """The shipped model with an adapter that says something, and three scenes."""
    settings = config.load(None, SETTINGS)
    policy = model.load(settings)
    torch.manual_seed(0)
    for name, parameter in policy.parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    policy.backbone.refresh()
    return settings, policy, Scenes(settings)


def described(settings, count):
    changed = settings.eval.model_copy(update={"describe": count})
    return settings.model_copy(update={"eval": changed})


def test_the_kl_is_the_exact_one_along_what_was_written(shipped):
    """Token by token, by full softmax: the policy's distribution against the base's."""
    settings, policy, source = shipped
    engine = FastEngine(policy.backbone, policy.tokens)
    look = Look(engine, source.held_out(3)[:2], 0, settings)
    rows, answers = forgetting._described(look, [0, 1], True)
    tops, bottoms = forgetting.measure(look, True)["free_kl"]
    for image, ids in enumerate(answers.rows()):
        kl = 0.0
        for n in range(len(ids)):
            row = [rows[image] + ids[:n]]
            logits = []
            for adapters in (True, False):
                features = look.features.select([image])
                found = engine.verdict_logits(features, row, adapters)[0].double()
                logits.append(found.masked_fill(engine.banned, -torch.inf).log_softmax(-1))
            p = logits[0].exp()
            kl += float((p * (logits[0] - logits[1])).nan_to_num(0).sum())
        assert tops[image] == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl > 0
    assert bottoms.tolist() == answers.lengths


def test_of_an_adapter_that_says_nothing_it_is_zero(shipped):
    settings, _, source = shipped
    fresh = model.load(settings)
    found = held_out(FastEngine(fresh.backbone, fresh.tokens), source, settings, True)
    assert found.values["free_kl"] == pytest.approx(0, abs=1e-6)


def test_only_as_many_images_as_were_asked_for_count_whatever_the_batch(shipped):
    settings, policy, source = shipped
    engine = FastEngine(policy.backbone, policy.tokens)
    for count in (0, 1, 3, 9):
        base, adapter = compare(engine, source, described(settings, count))
        known = {name for name in adapter.marks if name.startswith("free_")}
        assert known == ({"free_kl", "free_length", "free_yes"} if count else set())
        assert "free_kl" not in base.marks
        if count:
            asked = [1.0] * min(count, 3) + [0.0] * max(3 - count, 0)
            assert adapter.marks["free_length"][1].tolist() == asked
            assert base.marks["free_yes"][1].tolist() == [4 * n for n in asked]
    whole = held_out(engine, source, described(settings, 3), True)
    one = settings.model_copy(
        update={"eval": settings.eval.model_copy(update={"batch": 1, "describe": 3})}
    )
    cut = held_out(engine, source, one, True)
    for name in ("free_kl", "free_length", "free_yes"):
        assert cut.values[name] == pytest.approx(whole.values[name], abs=1e-4), name


def test_what_it_costs(shipped):
    """No image is encoded and no prefix computed for it: one answer per image, the questions, and
    two passes over what was written.
    """
    settings, policy, source = shipped
    engine = FastEngine(policy.backbone, policy.tokens)
    counts = []
    for count in (0, 3):
        compare(engine, source, described(settings, count))
        counts.append(engine.counters.take())
    without, with_it = counts
    assert with_it["images_encoded"] == without["images_encoded"]
    assert with_it["prefixes"] == without["prefixes"]
    assert with_it["verdicts"] - without["verdicts"] == 2 * 3 * len(forgetting.NAMES)
    batches = 2  # of two images and of one
    assert with_it["forwards"] - without["forwards"] == batches * (2 * 2 + 2)


def test_pretrained_models_are_asked_in_plain_words():
    class Tokens:
        class style:
            name = "natural"

    asked = forgetting.plain(Tokens())
    assert not asked.opened and "Describe" in asked.describe
    assert len(set(asked.questions)) == len(forgetting.ABOUT)


# ---- the alarm -----------------------------------------------------------------------------------


def arm(n=40, **means):
    rng = np.random.default_rng(0)
    return Results(
        n, {name: (mean * rng.uniform(0.9, 1.1, n), np.ones(n)) for name, mean in means.items()}
    )


FORGOTTEN = [
    ({"free_kl": 0.15}, None),
    ({"free_kl": 0.25}, "0.25 nat per token from the base's (limit 0.2)"),
    ({"free_length": 30}, None),
    ({"free_length": 19}, "19 tokens instead of 40"),
    ({"free_length": 81}, "81 tokens instead of 40"),
    ({"free_yes": 0.65}, None),
    ({"free_yes": 0.75}, "75% yes instead of 50%"),
    ({"free_yes": 0.2}, "20% yes instead of 50%"),
]


@pytest.mark.parametrize("changed, said", FORGOTTEN)
def test_free_answers_that_are_no_longer_the_base_s(changed, said):
    base = {"free_length": 40.0, "free_yes": 0.5}
    text = looked_at(arm(**base), arm(**({"free_kl": 0.01} | base | changed)), 0.02)["forgetting"]
    assert (text is None) == (said is None)
    if said is not None:
        # the means of forty draws are a hundredth off those they are drawn about
        told = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
        wanted = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", said)]
        assert told[: len(wanted)] == pytest.approx(wanted, rel=0.05)


def test_a_run_that_measures_none_has_none():
    assert looked_at(arm(own_area=0.1), arm(own_area=0.1), 0.02)["forgetting"] is None
