"""Who plays which role: queries and view boxes from the policy or from the reference, on an adapter
that says something else.
"""

import pytest
import torch

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method.experience import play_batch
from vise_fast.model import load as model
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


def played(*words, adapter=0.0, seed=0):
    """One batch; `adapter`: the size of the random numbers in the adapter's second factors (0:
    policy and reference are the same).
    """
    config = configuration.load(None, [*SMALL, *words, f"--train.seed={seed}"])
    policy = model.load(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=adapter)
    policy.backbone.refresh()
    engine = FastEngine(policy.backbone, policy.tokens)
    (one,) = play_batch(engine, Scenes(config).batch(0, 3), config, 0)
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
