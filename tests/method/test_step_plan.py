"""What a step consists of, field by field, for the presets and for each setting that changes it."""

from dataclasses import fields, replace

import pytest

from vise_fast.config.schema import load
from vise_fast.method.step_plan import GONE, KEEP, WITHOUT_GHOSTS, GhostKind, Lengths, StepPlan

CONTROL = GhostKind("control0", control=0)
PAPER = StepPlan(
    samples=1,
    views=1,
    policy_asks=True,
    policy_boxes_views=True,
    policy_judges=True,
    one_batch=True,
    kinds=(GONE,),
    judges_ghosts=True,
    trains_views=False,
    shares_forward=True,
    keeps_reference=False,
)
ROBUST = StepPlan(
    samples=3,
    views=2,
    policy_asks=False,
    policy_boxes_views=False,
    policy_judges=False,
    one_batch=False,
    kinds=(GONE, CONTROL, KEEP),
    judges_ghosts=True,
    trains_views=False,
    shares_forward=True,
    keeps_reference=True,
)
SIZES = ["--train.batch=4", "--rollout.samples=3", "--rollout.views=2"]
SIZES += ["--rollout.view_temperature=0"]
POLICY = ["--rollout.asker=policy", "--rollout.regrounder=policy", "--reward.judge=policy"]
ALIKE = ["--rollout.temperature=0.7", "--rollout.view_temperature=0.7"]


def planned(*words, keeps_keys=True):
    return StepPlan.of(load(None, list(words)), keeps_keys)


def robust(*words, keeps_keys=True):
    return planned(*SIZES, *words, keeps_keys=keeps_keys)


def changed(plan, truth):
    """The fields in which two plans differ."""
    names = [field.name for field in fields(StepPlan)]
    return {name for name in names if getattr(plan, name) != getattr(truth, name)}


# ---- presets -------------------------------------------------------------------------------------


def test_the_paper_s_step():
    plan = planned("--reward.preset=paper")
    assert changed(plan, PAPER) == set()
    assert (plan.ghosts, plan.boxes, plan.trained) == (1, 2, 1)


def test_the_robust_step():
    plan = robust()
    assert changed(plan, ROBUST) == set()
    assert (plan.ghosts, plan.boxes, plan.trained) == (9, 5, 1)


def test_the_released_step_scores_other_tokens_and_shares_nothing():
    plan = planned("--reward.preset=as_released")
    assert changed(plan, PAPER) == {"shares_forward"}


def test_the_released_step_keeps_no_graph_whoever_judges():
    plan = planned("--reward.preset=as_released", "--reward.judge=reference")
    assert not plan.shares_forward
    assert plan.keeps_reference


# ---- who plays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, fields_changed",
    [
        ("--rollout.asker=policy", {"policy_asks"}),
        ("--rollout.regrounder=policy", {"policy_boxes_views"}),
        ("--reward.judge=policy", {"policy_judges", "keeps_reference"}),
    ],
)
def test_each_player_is_chosen_alone(word, fields_changed):
    assert changed(robust(word), ROBUST) == fields_changed


def test_one_player_that_samples_alike_boxes_everything_in_one_batch():
    assert robust("--rollout.regrounder=policy", *ALIKE).one_batch
    assert not robust("--rollout.regrounder=reference", *ALIKE).one_batch
    for views in (0.6, 0.8):
        unlike = ["--rollout.temperature=0.7", f"--rollout.view_temperature={views}"]
        assert not robust("--rollout.regrounder=policy", *unlike).one_batch


def test_the_whole_step_played_by_the_policy():
    plan = robust(*POLICY, *ALIKE)
    wanted = {"policy_asks", "policy_boxes_views", "policy_judges", "one_batch", "keeps_reference"}
    assert changed(plan, ROBUST) == wanted
    assert not plan.keeps_reference


# ---- ghosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, names",
    [
        ([], ["gone", "control0", "keep"]),
        (["--reward.controls=3"], ["gone", "control0", "control1", "control2", "keep"]),
        (["--reward.sufficiency=false"], ["gone", "control0"]),
        (["--reward.sem=paper"], ["gone", "keep"]),
        (["--reward.sem=paper", "--reward.sufficiency=false"], ["gone"]),
        (["--reward.sem=paper", "--reward.controls=3"], ["gone", "keep"]),
    ],
)
def test_a_box_gets_the_ghosts_that_the_reward_reads(words, names):
    plan = robust(*words)
    assert [kind.name for kind in plan.kinds] == names
    assert changed(plan, ROBUST) <= {"kinds"}
    assert plan.ghosts == 3 * len(names)


def test_controls_are_numbered_and_all_but_the_box_is_kept():
    kinds = {kind.name: kind for kind in robust("--reward.controls=2").kinds}
    assert kinds["gone"] == GhostKind("gone", "inside", None)
    assert kinds["keep"] == GhostKind("keep", "outside", None)
    assert [kinds[f"control{c}"].control for c in range(2)] == [0, 1]
    assert {kinds[f"control{c}"].region for c in range(2)} == {"inside"}


def test_without_a_semantic_term_no_ghost_is_judged():
    plan = robust("--reward.w_sem=0")
    assert changed(plan, ROBUST) == {"judges_ghosts"}
    assert plan.ghosts == 0


@pytest.mark.parametrize("name", WITHOUT_GHOSTS)
def test_rewards_that_read_no_verdict_ask_for_none(name):
    plan = robust(f"--reward.name={name}")
    assert changed(plan, ROBUST) == {"judges_ghosts"}
    assert plan.ghosts == 0


def test_permuted_rewards_are_rewards_and_need_their_verdicts():
    assert robust("--reward.name=shuffled") == ROBUST


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("kinds", [(GONE,), (GONE, CONTROL, KEEP)])
def test_every_sample_has_ghosts_of_its_own(samples, kinds):
    plan = StepPlan(samples=samples, kinds=kinds)
    assert plan.ghosts == samples * len(kinds)
    assert replace(plan, judges_ghosts=False).ghosts == 0


# ---- what the update needs -----------------------------------------------------------------------


def test_views_that_train_too_are_images_of_the_update():
    plan = robust("--rollout.regrounder=policy", *ALIKE, "--update.views_too=true")
    assert changed(plan, ROBUST) == {"policy_boxes_views", "one_batch", "trains_views"}
    assert plan.trained == 1 + 2
    assert replace(plan, views=4).trained == 1 + 4


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_batch_in_slices_keeps_nothing_for_the_update(micro):
    plan = robust(f"--train.micro_batch={micro}")
    assert changed(plan, ROBUST) == {"shares_forward", "keeps_reference"}


@pytest.mark.parametrize("micro", [0, 4])
def test_a_slice_as_large_as_the_batch_is_the_batch(micro):
    assert robust(f"--train.micro_batch={micro}") == ROBUST


@pytest.mark.parametrize("word", ["--train.checkpointing=true", "--train.share_forward=false"])
def test_no_graph_is_kept_where_memory_is_short(word):
    assert changed(robust(word), ROBUST) == {"shares_forward"}


def test_an_engine_without_keys_has_no_forward_pass_to_go_on_from():
    assert changed(robust(keeps_keys=False), ROBUST) == {"shares_forward"}
    paper = planned("--reward.preset=paper", keeps_keys=False)
    assert changed(paper, PAPER) == {"shares_forward"}


def test_the_published_figures_are_of_these_lengths():
    assert Lengths() == Lengths(head=4, tail=1, ask=80, ground=145, verify=80, query=14, box=22)


def test_the_defaults_are_the_paper_s_but_for_what_is_kept():
    assert changed(StepPlan(), PAPER) == {"shares_forward"}


def test_the_asker_is_asked_again_where_its_words_must_come_back():
    assert changed(robust("--reward.unique=true"), ROBUST) == {"names_again"}
