"""Work that is never done twice: a whole step, rollout and update, counted on any machine (answers
locked to 14 and 22 tokens).
"""

import json
from pathlib import Path

import benches
import pytest
import torch
from transformers import AutoConfig

from vise_fast.engine.fast import FastEngine
from vise_fast.method import token_scores
from vise_fast.method.experience import Draws, play
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import Lengths, StepPlan
from vise_fast.model import load as model
from vise_fast.profile.flops import executed_flops
from vise_fast.profile.host_syncs import Work
from vise_fast.profile.minimal import Shapes, minimal_step

ROOT = Path(__file__).parents[2]
subjects = benches.module("_subjects")
GHOSTS = {"paper": 1, "robust": 3}


def small_2b():
    """Qwen3-VL-2B's proportions at a sixteenth of its width and half its depth; LoRA rank 1 as 16
    is to 2048.
    """
    shape = json.loads((ROOT / "configs" / "models" / "mid-100m.json").read_text())
    shape["text_config"] |= {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 9728,
        "dtype": "float32",
    }
    shape["text_config"]["rope_parameters"]["mrope_section"] = [6, 5, 5]
    shape["vision_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_heads": 1,
        "out_hidden_size": 128,
    }
    return shape | {
        "image_token_id": 9723,
        "video_token_id": 9724,
        "vision_start_token_id": 9720,
        "vision_end_token_id": 9721,
    }


class Step:
    """An engine and its learner on locked answers; `rollout` and `update` hold the counters of each
    half.
    """

    def __init__(self, directory, preset, batch, *words, size=(96, 128)):
        self.config = subjects.Subject("small", directory, True).config(preset, batch, list(words))
        self.policy = model.load(self.config, weights="random")
        self.policy.tokens = subjects.Locked(self.policy.tokens)
        self.engine = FastEngine(self.policy.backbone, self.policy.tokens, poll=8)  # as on a GPU
        self.learner = Learner(self.policy, self.engine, self.config)
        self.images = subjects.pictures(*size, batch)

    def play(self):
        return [play(self.engine, self.images, self.config, Draws(0, 1))]

    def run(self):
        self.engine.counters.take()
        slices = self.play()
        self.rollout = self.engine.counters.take()
        metrics = self.learner.learn(slices, 1)
        assert metrics["scored"] == 1, "every box should be part of the update"
        self.update = self.engine.counters.take()
        return self

    def minimal(self, preset, directory):
        """The closed form's terms."""
        tokens = self.engine.tokens
        rollout = self.config.rollout
        query = subjects.QUERIES[tokens.style.name]
        height, width = self.images[0].pixels.shape[:2]
        lengths = Lengths(
            len(tokens.head),
            len(tokens.tail),
            len(tokens.row(tokens.style.ask())),
            len(tokens.row(tokens.style.ground(query))),
            len(tokens.verdict_row(tokens.style.verify(query))),
        )
        plan = StepPlan.of(self.config)
        assert plan.ghosts == GHOSTS[preset] * rollout.samples
        assert plan.policy_judges == (preset == "paper")
        shapes = Shapes.of(AutoConfig.from_pretrained(directory), 1)
        return minimal_step(shapes, plan, lengths, (height, width))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("small_2b")
    subjects._write(small_2b(), str(path))
    return str(path)


@pytest.mark.parametrize("preset, samples, views", [("paper", 1, 1), ("robust", 4, 2)])
def test_every_distinct_image_is_encoded_and_prefilled_once(directory, preset, samples, views):
    words = [f"--rollout.samples={samples}", f"--rollout.views={views}"]
    step = Step(directory, preset, 2, *words).run()
    distinct = 2 * (1 + views + GHOSTS[preset] * samples)
    assert step.rollout["images_encoded"] == distinct
    # under a reference judge the image itself has a second prefix: another adapter state
    assert step.rollout["prefixes"] == distinct + (2 if preset == "robust" else 0)
    assert step.rollout["verdicts"] == 2 * (1 + GHOSTS[preset] * samples)
    assert step.update["images_encoded"] == 0
    # the policy's own is the rollout's; the reference has the judge's, where there is one
    assert step.update["prefixes"] == (0 if preset == "robust" else 2)


def test_sequential_forwards_of_one_image(directory):
    step = Step(directory, "paper", 1).run()
    # the image's with gradients, the view's without; so with the two questions for boxes
    prefills = 2
    assert step.rollout["forwards"] - prefills + step.rollout["decode_steps"] == 39 <= 42
    decoded = 13 + 21  # queries and boxes; verdicts are not decoded
    assert step.rollout["decode_steps"] == decoded
    assert step.update["decode_steps"] == 0
    assert step.update["forwards"] == 2


@pytest.mark.parametrize(
    "preset, words",
    [
        ("paper", []),
        ("robust", ["--rollout.samples=4"]),
        ("paper", ["--train.share_forward=false"]),
    ],
)
def test_executed_flops_are_the_minimal_ones(directory, preset, words):
    step = Step(directory, preset, 2, "--lora.r=1", *words)
    with executed_flops() as counter:
        step.run()
    minimal = 2 * sum(step.minimal(preset, directory).values())
    ratio = counter.get_total_flops() / minimal
    assert 0.9 < ratio <= 1.05, ratio


def test_a_group_is_scored_behind_one_prefix(directory):
    """G = 8: the update's FLOPs are those of one prefix and question and eight answers, forward and
    backward.

    The head's walk makes the gradients of log-prob and KL separately: one product more than the
    least.
    """
    step = Step(directory, "robust", 1, "--lora.r=1", "--rollout.samples=8", "--rollout.views=1")
    slices = step.play()
    with executed_flops() as counter:
        step.learner.learn(slices, 1)
    terms = step.minimal("robust", directory)
    least = terms["update"] + terms["reference"] + terms["loss"] * 4 / 3
    assert counter.get_total_flops() <= 1.05 * least


def test_only_completion_rows_pass_the_head(directory, monkeypatch):
    step = Step(directory, "paper", 2)
    rows = []
    updated = []
    monkeypatch.setattr(step.engine.backbone, "logits", noted(step.engine.backbone.logits, rows))
    scored = noted(token_scores.linear_logprob_kl, updated)
    monkeypatch.setattr(token_scores, "linear_logprob_kl", scored)
    step.run()
    queries = 2
    boxes = 4
    verdicts = 4
    assert sum(rows) == queries * 14 + boxes * 22 + verdicts
    assert updated == [2 * 22]


def noted(function, lengths):
    """The function; each call adds how many rows it was given."""

    def call(hidden, *rest, **named):
        lengths.append(len(hidden))
        return function(hidden, *rest, **named)

    return call


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_host_syncs_of_a_step(directory, preset):
    words = ["--rollout.samples=2"] if preset == "robust" else []
    step = Step(directory, preset, 2, *words).run()
    with Work(step.policy.model.parameters()) as work:
        step.run()
    assert work.total <= 8, dict(work.syncs)
    reported = step.rollout["host_reads"] + step.update["host_reads"]
    assert work.total == reported, "metrics.jsonl reports every one of them"


@pytest.mark.parametrize(
    "copy, waiting",
    [
        (lambda x: torch.tensor([0, 2], device="meta"), 1),
        (lambda x: torch.ones(3).to("meta"), 1),
        (lambda x: x.copy_(torch.ones(3, 4)), 1),
        (lambda x: x[[0, 2]], 1),
        (lambda x: torch.ones(3).to("meta", non_blocking=True), 0),
        (lambda x: x.copy_(torch.ones(3, 4), non_blocking=True), 0),
        (lambda x: torch.tensor([0, 2]), 0),
        (lambda x: x[1:, None], 0),
    ],
)
def test_copies_to_a_device_that_wait_are_syncs(copy, waiting):
    """A tensor without data stands for one on a device."""
    x = torch.empty(3, 4, device="meta")
    with Work() as work:
        copy(x)
    assert work.total == waiting, dict(work.syncs)


def test_one_copy_of_the_weights(directory):
    """Stacked projections and the modules' own parameters are the same memory; what the engine adds
    is LoRA in the compute dtype.
    """
    step = Step(directory, "paper", 1)
    frozen = [p for p in step.policy.model.parameters() if not p.requires_grad]
    owned = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
    fused = step.engine.backbone.fused()
    stacked = {linear.weight.untyped_storage().data_ptr() for linear in fused}
    assert stacked <= set(owned)
    assert sum(owned.values()) == sum({id(p): p.numel() * 4 for p in frozen}.values())


def test_a_wasteful_step_would_be_seen(directory):
    """The bound on FLOPs can fail: one more encode and prefill of the step's three images goes
    beyond it.
    """
    step = Step(directory, "paper", 1, "--lora.r=1", size=(256, 320))
    with executed_flops() as counter:
        step.engine.prefill(step.engine.encode([step.images[0].pixels] * 3), True)
        step.run()
    minimal = sum(step.minimal("paper", directory).values())
    assert counter.get_total_flops() / minimal > 1.05
