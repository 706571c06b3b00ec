"""Every family as a model directory: loaded, trained by a step, resumed, exported, evaluated,
merged and quantised by the same code as the first one.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, adapter, go, lines
from tiny import images
from tiny_families import CONFIGS, bare

from vise_fast.config.schema import Config
from vise_fast.engine.choose import engine_of, open_engine
from vise_fast.engine.rollout import Answered, Rollout
from vise_fast.estimate.rehearsal import rehearse
from vise_fast.evaluate import __main__ as evaluate
from vise_fast.evaluate.held_out import examine
from vise_fast.export import __main__ as exported
from vise_fast.export import merged
from vise_fast.images.drawn import Scenes
from vise_fast.images.sources import open_source
from vise_fast.method.experience import play_batch
from vise_fast.method.groups.named_again import named_again
from vise_fast.method.learner import Learner
from vise_fast.method.roles import Queries
from vise_fast.method.slices import Draws, Slice
from vise_fast.method.step_plan import StepPlan
from vise_fast.model import load, quantise
from vise_fast.model.families import FAMILIES
from vise_fast.model.saved import export
from vise_fast.nano import DIRECTORY as NANO
from vise_fast.system import checkpoint, console
from vise_fast.system.errors import ConfigError

TOKENS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def saved(family, where):
    """A model directory with the embedded model's tokenizer and questions."""
    model = bare(family)
    model.config.vise_prompts = "short"
    model.generation_config.eos_token_id = 2
    model.save_pretrained(where)
    for name in TOKENS:
        shutil.copyfile(NANO / name, where / name)
    return where


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def directory(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def settings(directory, **model):
    return Config.model_validate(
        {
            "model": {"path": str(directory), "device": "cpu", **model},
            "train": {"batch": 2, "warmup": 0, "lr": 1e-2, "schedule": "constant"},
            "rollout": {"samples": 2, "views": 1, "query_tokens": 4, "box_tokens": 6},
            "reward": {"name": "random"},
            "scenes": {"size": 32},
            "eval": {"scenes": 2, "attention": False},
            "lora": {"r": 2, "alpha": 4},
        }
    )


def opened(config, adapter=None):
    policy = load.load(config, adapter)
    return policy, open_engine(policy, config)


def step(policy, engine, config, number=0):
    learner = Learner(policy, engine, config)
    learn(learner, engine, config, number)
    return learner


def learn(learner, engine, config, number):
    source = open_source(config, load.grid_multiple(config.model.path))
    slices = play_batch(engine, source.batch(number, config.train.batch), config, number)
    for played in slices:  # a random model writes no box: every answer is scored all the same
        played.evidence.readable.fill_(True)
        played.evidence.query_readable.fill_(True)
        played.evidence.box_1000.copy_(torch.tensor([100.0, 100, 500, 500]))
        played.evidence.seen.fill_(0.9)
    return learner.learn(slices, number)


def verdicts(engine):
    rows = [[10, 11, 12], [13]]
    return engine.verdict_logits(engine.encode(images([(32, 32), (24, 40)])), rows, True)


def masters(policy):
    return {name: p.detach().clone() for name, p in policy.parameters().items()}


def test_what_a_box_holds_is_named_by_every_family(directory):
    """`reward.unique`: a cutout of any shape is a picture that the family takes."""
    config = settings(directory)
    config.reward.unique = True
    _, engine = opened(config)
    pixels = images([(64, 64), (48, 80)])
    part = Slice(engine, config, StepPlan.of(config), Draws(0, 0), pixels)
    boxes = torch.tensor([[100.0, 100, 500, 500], [0, 333, 1000, 350]]).repeat_interleave(2, 0)
    answers = SimpleNamespace(box_1000=boxes.double(), readable=torch.ones(4, dtype=torch.bool))
    back = named_again(part, Queries(["red circle"] * 2, [True] * 2, [], []), answers)
    assert back.shape == (2,) and not back.any()  # a random model says something else


def test_a_step_a_checkpoint_an_adapter_and_a_merge(directory, tmp_path):
    config = settings(directory)
    policy, engine = opened(config)
    before = masters(policy)
    learner = step(policy, engine, config)
    moved = [name for name, p in policy.parameters().items() if not torch.equal(p, before[name])]
    assert len(moved) == len(before), "every LoRA tensor is trained"
    path = checkpoint.save(tmp_path, 1, *_state(learner), keep=1)
    learn(learner, engine, config, 1)
    after = masters(policy)
    resumed, again = opened(config)
    second = Learner(resumed, again, config)
    tensors, state = checkpoint.load(path)
    second.load(tensors, state["learner"])
    learn(second, again, config, 1)
    for name, p in resumed.parameters().items():
        assert torch.equal(p, after[name]), f"resumed elsewhere: {name}"
    _exported_and_merged(resumed, again, config, tmp_path)


def _state(learner):
    tensors, state = learner.state()
    return tensors, {"learner": state}


def _exported_and_merged(policy, engine, config, where):
    """The adapter loads again to the same numbers; merged, it needs no PEFT."""
    truth = verdicts(engine)
    made = export.export(policy, config, where / "adapter")
    _, reopened = opened(config, str(made))
    assert torch.equal(verdicts(reopened), truth)
    both = merged.load(config, str(made))
    loss = merged.merge(both)
    # fp32 weights near 1 round an update near 1e-2
    assert loss.matrices == len(policy.parameters()) // 2 and loss.relative < 1e-5
    whole = both.base_model.unload()
    whole.save_pretrained(where / "merged")
    for name in TOKENS:
        shutil.copyfile(NANO / name, where / "merged" / name)
    fresh = settings(where / "merged")
    _, plain = opened(fresh)
    assert (verdicts(plain) - truth).abs().max() < 2e-5 * truth.abs().max()


def test_evaluated_without_an_adapter_and_with(directory):
    config = settings(directory)
    _, engine = opened(config)
    base, after = examine(engine, Scenes(config, 1), config, (False, True))
    assert base.n == after.n == 2
    # an adapter that has not moved is the base
    assert after.values == base.values | {"free_kl": after.values["free_kl"]}
    assert abs(after.values["free_kl"]) < 1e-6 and "greedy_iou" in base.values


def between(policy):
    """Projector layers, which stay whole."""
    return len([name for name in policy.parameters() if ".layers." not in name]) // 2


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantised_bases(directory, quant):
    config = settings(directory, quant=quant)
    policy, engine = opened(config)
    held = [type(m) for m in policy.model.modules() if "bitsandbytes" in type(m).__module__]
    kinds = [kind.__name__ for kind in held]
    assert kinds.count(quantise.KINDS[quant]) == len(policy.parameters()) // 2 - between(policy)
    before = masters(policy)
    step(policy, engine, config)
    assert any(not torch.equal(p, before[n]) for n, p in policy.parameters().items())
    # against the same numbers in whole weights: nf4 rounds nothing else, bitsandbytes' own int8
    # product rounds the activations as well
    truth = verdicts(dequantised(directory, policy))
    apart = (verdicts(engine) - truth).norm() / truth.norm()
    assert apart < (0.05 if quant == "int8" else 1e-5)


def dequantised(directory, policy):
    """The engine of the unquantised base, its weights those that the quantised ones stand for, and
    of the same adapter.
    """
    other, engine = opened(settings(directory))
    held = dict(policy.model.named_modules())
    for name, module in other.model.named_modules():
        twin = held[name]
        if "bitsandbytes" in type(twin).__module__:
            module.weight.data.copy_(quantise.dequantised(twin, torch.float32))
    for name, p in other.parameters().items():
        p.data.copy_(policy.parameters()[name].data)
    return engine


def test_the_engine_says_why(directory):
    config = settings(directory)
    row = FAMILIES[load.read_config(str(directory)).model_type]
    choice = engine_of(config, row)
    assert choice.path == "generic" and row.model_type in choice.reason
    with pytest.raises(ConfigError, match="no forward pass of its own"):
        engine_of(settings(directory, engine="fast"), row)


@pytest.mark.parametrize("family", ["gemma3", "smolvlm"])
def test_the_commands_themselves(family, tmp_path, capsys):
    """A dry run (plan, probe, two steps, a checkpoint, an adapter) and, of one family, a whole run
    and what becomes of its adapter.
    """
    home = saved(family, tmp_path / family)
    words = ["--model.path", home, "--scenes.size", 32, "--rollout.box_tokens", 4, *SMALL]
    assert go(*words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "GiB predicted" in said and "probe    style short" in said and "bit for bit" in said
    if family != "smolvlm":
        return
    run = tmp_path / "run"
    assert go(*words, "--run.dir", run, "--train.steps", 1) == 0
    said = capsys.readouterr().out
    assert "engine   generic: smolvlm runs through transformers' forward" in said
    assert console.run(evaluate.main, ["--adapter", str(run / "adapter"), "--scenes", "2"]) == 0
    form = ["--form", "language-only", "--adapter", str(run / "adapter"), "--out", str(run / "out")]
    assert console.run(exported.main, form) == 0
    kept = load_file(run / "out" / "adapter_model.safetensors")
    assert kept and not [name for name in kept if "connector" in name]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_planned_step_holds_what_the_model_holds(directory, checkpointing):
    """Weights and masters to the byte; the rest is in the peak of some phase."""
    config = settings(directory)
    config.train.checkpointing = checkpointing
    model_config = load.read_config(str(directory))
    planned = rehearse(config, model_config, [(32, 32)] * 2, torch.float32, device="cpu").phases
    policy, _ = opened(config)
    frozen = {p.data_ptr(): p for p in policy.model.parameters() if not p.requires_grad}
    weights = sum(p.numel() * 4 for p in frozen.values())
    masters = sum(p.numel() * 4 for p in policy.parameters().values())
    for phase, parts in planned.items():
        assert parts["LoRA masters"] == masters, phase
        assert 0 <= parts["weights"] - weights < 4096, phase  # and the buffers of rope
    assert {"rollout", "activations", "optimizer"} <= set().union(*planned.values())


def test_a_step_in_bf16_goes_where_the_fp32_one_goes(directory):
    """The gradient of the masters; forward passes round to 8 bits."""
    gradients = []
    for dtype in ("float32", "bfloat16"):
        config = settings(directory, dtype=dtype)
        policy, engine = opened(config)
        answers = torch.tensor([[10, 11, 2], [12, 13, 14]])
        answered = Answered([[20, 21], [22]], Rollout(answers, answers * 0.0, [3, 3]), [0, 1])
        features = engine.encode(images([(32, 32), (24, 40)]))
        hidden = engine.score(features, answered, True)
        logits = engine.backbone.logits(hidden)
        value = logits.log_softmax(-1).gather(1, answered.answers.packed()[:, None]).sum()
        gradients.append(torch.autograd.grad(value, list(policy.parameters().values())))
    ups = [torch.cat([g.flatten().float() for g in some]) for some in gradients]
    assert torch.nn.functional.cosine_similarity(*ups, dim=0) > 0.98


def test_the_embedded_model_trains_alike_on_all_three_engines(tmp_path):
    """The same ids are sampled, so the same rewards are earned and the same adapter is learned."""
    rewards = []
    adapters = []
    for engine in ("fast", "generic", "stock"):
        run = tmp_path / engine
        words = ["--run.dir", run, "--train.steps", 1, "--run.report", "false", "--eval.scenes", 1]
        assert go(*SMALL, *words, "--model.engine", engine) == 0
        rewards.append([(line["reward"], line["kl"]) for line in lines(run / "metrics.jsonl")])
        adapters.append(adapter(run))
    for found, learned in zip(rewards[1:], adapters[1:], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(rewards[0]), atol=1e-5, rtol=0)
        ours = torch.cat([x.flatten() for x in learned.values()])
        fast = torch.cat([adapters[0][name].flatten() for name in learned])
        assert (ours - fast).norm() / fast.norm() < 1e-4
