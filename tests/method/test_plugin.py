"""A reward of the user's own: whatever it does wrong is one line with its own file and line, and
known before a model is loaded.
"""

import json
import sys

import numpy as np
import pytest
import torch
from small_runs import SMALL

from vise_fast import train
from vise_fast.config.schema import RewardConfig
from vise_fast.method import invented, rewards
from vise_fast.model import load as model
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, NumericFault
from vise_fast.system.plugin import travels

HEAD = "import torch\nfrom vise_fast.rewards import register\n\n"
GOOD = """@register({name!r})
def mine(evidence, parts, config, rng):
    reward = {body}
    return reward, evidence.readable
"""
BODIES = {
    # name: (expression, part of the line); it stands on line 6
    "raises": ("undefined_name", "line 6: NameError: name 'undefined_name'"),
    "divides": ("1 / 0", "line 6: ZeroDivisionError"),
    "exits": ("exit(0)", "line 6: SystemExit"),
    "recurses": ("(lambda f: f(f))(lambda f: f(f))", "RecursionError"),
    "asks for what is not there": ("evidence.truth_1000.sum()", "line 6: AttributeError"),
    "says a fault of ours": (
        "register('vise')(mine)",
        "line 6: reward 'vise' is registered twice",
    ),
    "one number": ("torch.tensor(1.0)", "reward of shape () for 12 boxes"),
    "too few": ("parts.size[:-1]", "reward of shape (11,) for 12 boxes"),
    "a row too deep": ("parts.agreement", "reward of shape (12, 2) for 12 boxes"),
    "a list": ("parts.size.tolist()", "returned a list of 12 as reward"),
    "an array": ("parts.size.numpy()", "returned a ndarray as reward"),
    "nothing": ("None", "returned nothing as reward"),
    "truth values": ("parts.open", "returned torch.bool as reward"),
    "complex numbers": ("parts.size + 1j", "returned torch.complex128 as reward"),
    "NaN": ("parts.size * float('nan')", "is not finite"),
    "infinity": ("parts.size / 0", "is not finite"),
    "what was never judged": ("evidence.gone", "is not finite"),
    "its evidence": ("evidence.box_1000.mul_(0)[:, 0]", "changes the evidence"),
}
FILES = {
    # name: (text, part of the line)
    "no python": ("def (", "line 1: SyntaxError"),
    "later no python": ("x = 1\n\nif x:\n", "line 3: IndentationError"),
    "a missing import": ("import os\nimport no_such_module", "line 2: ModuleNotFoundError"),
    "raises": ("x = 1\nraise ValueError('two\\nlines')", "line 2: ValueError: two lines"),
    "raises below": ("def f():\n    return {}['a']\n\nf()", "line 2: KeyError"),
    "exits": ("import sys\nsys.exit()", "line 2: SystemExit"),
    "registers twice": (HEAD + GOOD.format(name="a_b", body="1") * 2, "line 8: reward 'a_b' is"),
    "takes a shipped name": (HEAD + GOOD.format(name="vise", body="1"), "line 4: reward 'vise' is"),
    "registers without a name": (HEAD + "@register\ndef mine(*_): ...", "line 4: register needs"),
    "not UTF-8": (b"x = '\xff'", "SyntaxError"),
    "zeros": (b"\0\0\0", "SyntaxError"),
    "nothing at all": ("", "unknown reward 'test_wrong'"),
    "three words": (HEAD + "@register('test_wrong')\ndef mine(a, b, c): ...", "line 4: TypeError"),
    "no function": (HEAD + "register('test_wrong')(5)", "TypeError: 'int' object is not callable"),
    "returns nothing": (HEAD + "@register('test_wrong')\ndef mine(*_): ...", "returned nothing"),
    "returns a list": (
        HEAD + "@register('test_wrong')\ndef mine(e, *_): return [e.readable, e.readable]",
        "line 4) returned a list of 2",
    ),
    "returns three": (
        HEAD + "@register('test_wrong')\ndef mine(*_): return 1, 2, 3",
        "returned a tuple of 3",
    ),
    "says numbers of what is known": (
        HEAD + "@register('test_wrong')\ndef mine(e, p, *_): return p.size, p.size",
        "returned torch.float64 as known",
    ),
}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Names that a test registers are gone after it."""
    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))


def settings(file, name="test_wrong", **stated):
    return RewardConfig(name=name, plugin=str(file), **stated)


def written(tmp_path, text):
    file = tmp_path / "my rewards.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(config, truth=False):
    with pytest.raises(ConfigError) as caught:
        rewards.check(config, truth)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BODIES)
def test_what_goes_wrong_in_a_call_is_known_at_the_start(tmp_path, name):
    body, part = BODIES[name]
    file = written(tmp_path, HEAD + GOOD.format(name="test_wrong", body=body))
    said = refusal(settings(file))
    assert part in said
    assert str(file) in said or "is not finite" in said


@pytest.mark.parametrize("name", FILES)
def test_what_goes_wrong_in_the_file_is_known_at_the_start(tmp_path, name):
    text, part = FILES[name]
    file = written(tmp_path, text)
    said = refusal(settings(file))
    assert part in said
    assert str(file) in said or "unknown reward" in said or "int" in said


def test_a_file_that_cannot_be_python_is_known_at_the_start(tmp_path):
    file = tmp_path / "rewards.txt"
    file.write_text(HEAD)
    assert f"{file}: not a python file" in refusal(settings(file))


def test_what_a_fault_says_is_cut_at_the_start_of_an_essay(tmp_path):
    said = refusal(settings(written(tmp_path, "raise ValueError('x' * 1000)")))
    assert f"ValueError: {'x' * 300}; correct it" in said


def test_a_helper_of_the_plugins_own_is_blamed_on_the_line_that_calls_it(tmp_path, monkeypatch):
    (tmp_path / "test_helper_of_mine.py").write_text("def half(x):\n    return x.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = HEAD + "import test_helper_of_mine as h\n" + GOOD.format(name="w", body="h.half(parts)")
    assert "line 7: AttributeError" in refusal(settings(written(tmp_path, text), "w"))


def test_memory_that_ran_out_is_known_with_and_without_torch(monkeypatch):
    assert travels() == (MemoryError, torch.OutOfMemoryError)
    monkeypatch.delitem(sys.modules, "torch")
    assert travels() == (MemoryError,)


def test_a_failed_file_leaves_nothing_registered(tmp_path):
    before = set(rewards._REGISTRY)
    text = HEAD + GOOD.format(name="test_wrong", body="parts.size") + "\n1 / 0\n"
    file = written(tmp_path, text)
    refusal(settings(file))
    assert set(rewards._REGISTRY) == before
    file.write_text(text.replace("1 / 0", ""))  # corrected, in the same process
    rewards.check(settings(file), truth=False)


@pytest.mark.parametrize("name", ["vise", "random", "shuffled", "area_only"])
@pytest.mark.parametrize("sem", ["paper", "contrast"])
@pytest.mark.parametrize("sufficiency", [False, True])
@pytest.mark.parametrize("preset", ["robust", "paper", "as_released"])
def test_the_shipped_rewards_pass(name, sem, sufficiency, preset):
    config = RewardConfig(name=name, sem=sem, sufficiency=sufficiency, preset=preset)
    rewards.check(config, truth=False)


def test_invented_evidence_has_everything_that_may_happen():
    made = invented.evidence(RewardConfig(controls=3), truth=True)
    groups = made.readable.view(-1, made.group_size)
    assert 0 < int(made.readable.sum()) < len(made.readable) and groups.any(1).all()
    assert not made.placed[made.readable].all() and not made.view_usable.any(1).all()
    assert not made.view_readable.all() and not made.query_readable.all()
    assert made.gone.isnan().any() and made.seen.isnan().any() and made.control.shape[1] == 3
    scores = rewards.score(made, RewardConfig(), np.random.default_rng(0))
    assert 0 < int(scores.carries.sum()) < len(scores.carries)
    assert not scores.carries[-made.group_size :].any()  # the gate is closed
    plain = invented.evidence(RewardConfig(sem="paper", sufficiency=False), truth=False)
    assert plain.control is None and plain.keep is None and plain.truth_1000 is None


def test_area_only_without_an_area_term_is_refused_at_the_start():
    assert "constant" in refusal(RewardConfig(name="area_only", w_area=0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "float64"])
def test_any_real_number_will_do(tmp_path, dtype):
    body = f"(parts.size * 8).to(torch.{dtype}).requires_grad_({'float' in dtype})"
    file = written(tmp_path, HEAD + GOOD.format(name="test_wrong", body=body))
    rewards.check(settings(file), truth=False)
    made = invented.evidence(RewardConfig(), truth=False)
    scores = rewards.score(made, settings(file), np.random.default_rng(0))
    assert scores.reward.dtype == torch.float64 and not scores.reward.requires_grad


# ---- while training ------------------------------------------------------------------------------


LATER = """
calls = 0

@register("test_later")
def mine(evidence, parts, config, rng):
    global calls
    calls += 1
    if calls == {when}:
        {what}
    return parts.size, evidence.readable
"""


def go(tmp_path, capsys, file, *words, name="test_later"):
    run = ["--run.dir", str(tmp_path / "run"), "--eval.scenes", "0", "--train.steps", "2"]
    named = ["--reward.plugin", str(file), "--reward.name", name]
    code = console.run(train.main, [*SMALL, *run, *named, *words])
    return code, capsys.readouterr().err.strip().splitlines()


def test_a_reward_that_fails_later_is_one_line_and_what_was_done_is_saved(tmp_path, capsys):
    file = written(tmp_path, HEAD + LATER.format(when=3, what="raise IndexError('out')"))
    code, said = go(tmp_path, capsys, file)
    assert code == 2 and said[-1].startswith("error: reward 'test_later' failed")
    assert f"{file} line 12: IndexError: out" in said[-1]
    assert (tmp_path / "run" / "checkpoints" / "step_1").is_dir()


def test_a_reward_that_is_not_finite_later_is_exit_6(tmp_path, capsys):
    what = "return parts.size * float('nan'), evidence.readable"
    code, said = go(tmp_path, capsys, written(tmp_path, HEAD + LATER.format(when=2, what=what)))
    assert code == 6 and "is not finite" in said[-1]


def test_memory_that_runs_out_in_a_reward_is_not_the_rewards_fault(tmp_path):
    file = written(tmp_path, HEAD + LATER.format(when=1, what="raise MemoryError"))
    with pytest.raises(MemoryError):
        rewards.check(settings(file, "test_later"), truth=False)


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_nothing_is_loaded_or_left_behind_for_a_broken_reward(tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(model, "load", lambda *_, **__: pytest.fail("loaded"))
    file = written(tmp_path, HEAD + GOOD.format(name="test_later", body="1 / 0"))
    code, said = go(tmp_path, capsys, file, *words)
    assert code == 2 and len(said) == 1 and "ZeroDivisionError" in said[0]
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_held_to_its_own_reward(tmp_path, capsys, monkeypatch):
    """The reward of the run, not that of the words, is what will be used."""
    file = written(tmp_path, HEAD + GOOD.format(name="test_later", body="parts.size"))
    assert go(tmp_path, capsys, file, "--train.steps", "1")[0] == 0
    file.write_text("1 / 0")
    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))
    rewards._REGISTRY.pop("test_later")
    for known in [name for name in rewards.plugin.sys.modules if name.startswith("vise_fast_plug")]:
        monkeypatch.delitem(rewards.plugin.sys.modules, known)
    words = ["--run.dir", str(tmp_path / "run"), "--resume", "auto", "--train.steps", "2"]
    assert console.run(train.main, words) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


# ---- the oracle ----------------------------------------------------------------------------------


def test_help_names_the_rewards_there_are():
    described = RewardConfig.model_fields["name"].description
    listed = described.removeprefix("registered reward: ").removesuffix(", or your own")
    shipped = {
        name
        for name, function in rewards._REGISTRY.items()
        if function.__module__ == rewards.__name__
    }
    assert {name.split(" ")[0] for name in listed.split(", ")} == shipped


def test_the_oracle_works_on_drawn_scenes(tmp_path, capsys):
    words = ["--reward.name", "oracle", "--run.dir", str(tmp_path / "run"), "--eval.scenes", "0"]
    assert console.run(train.main, [*SMALL, *words, "--train.steps", "1"]) == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["carries"] > 0  # queries name objects, so the truth is known
    assert console.run(train.main, [*SMALL, *words, "--dry-run"]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_the_oracle_is_refused_on_photographs(tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(model, "load", lambda *_, **__: pytest.fail("loaded"))
    run = ["--run.dir", str(tmp_path / "run"), "--data.dir", str(tmp_path)]
    assert console.run(train.main, ["--reward.name", "oracle", *run, *words]) == 2
    assert "photographs do not have" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_reward_of_ones_own_may_see_the_truth_of_drawn_scenes(tmp_path, capsys):
    body = "evidence.truth_1000[:, 0] / 1000"
    file = written(tmp_path, HEAD + GOOD.format(name="test_later", body=body))
    assert go(tmp_path, capsys, file, "--train.steps", "1")[0] == 0
    with pytest.raises(ConfigError, match="AttributeError|TypeError"):
        rewards.check(settings(file, "test_later"), truth=False)


def test_a_reward_that_is_not_finite_is_not_learned_from():
    """Not the place of a plugin alone: whoever registers one."""
    rewards.register("test_wrong")(lambda e, p, c, r: (p.size * float("nan"), e.readable))
    made = invented.evidence(RewardConfig(), truth=False)
    with pytest.raises(NumericFault):
        rewards.score(made, RewardConfig(name="test_wrong"), np.random.default_rng(0))
