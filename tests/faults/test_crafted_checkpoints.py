"""A checkpoint whose hashes are right and whose content cannot be: it is passed over with one line,
and the run goes on from the one before it to the result of a run that nothing happened to.

What needs no model to be seen is tests/system/test_checkpoint.py.
"""

import hashlib
import json
import math
import os
import shutil

import pytest
import torch
from faults.forked import again, go, words
from faults.left import left, steps_saved
from safetensors.torch import load_file, save_file

KEEP = {"run__keep": 5}


def sealed(path):
    """Sizes and hashes of the manifest fit what lies in the checkpoint now."""
    content = json.loads((path / "manifest.json").read_text())
    for name, entry in content["files"].items():
        data = (path / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(content))


def state(change):
    """A change of state.json."""

    def craft(path):
        content = json.loads((path / "state.json").read_text())
        change(content)
        (path / "state.json").write_text(json.dumps(content))

    return craft


def text(name, content):
    return lambda path: (path / name).write_bytes(content)


def tensors(group, change):
    """A change of a group's first tensor by name, and of all of them: change(name, tensors)."""

    def craft(path):
        file = path / f"{group}.safetensors"
        found = load_file(file)
        change(min(found), found)
        save_file(found, file)

    return craft


def put(value):
    """One number of a tensor."""
    return lambda name, found: found[name].view(-1)[:1].fill_(value)


def moment(key, change):
    """A change of one parameter's `key` among the moments."""

    def craft(name, found):
        change(f"{name.rpartition('/')[0]}/{key}", found)

    return tensors("optimizer", craft)


def reshaped(name, found):
    found[name] = found[name].T.contiguous()


def longer_by_one(name, found):
    found[name] = torch.cat([found[name].flatten(), torch.zeros(1)])


def retyped(dtype):
    def craft(name, found):
        found[name] = found[name].to(dtype)

    return craft


def gone(name, found):
    del found[name]


def another(name, found):
    found[f"x{name}"] = found[name].clone()


def added(name, found):
    found[name] = torch.zeros(1)


def without(*keys):
    """Something is missing in the state."""

    def change(content):
        *parents, last = keys
        for key in parents:
            content = content[key]
        del content[last]

    return state(change)


def saying(value, *keys):
    """Something else stands in the state."""

    def change(content):
        *parents, last = keys
        for key in parents:
            content = content[key]
        content[last] = value

    return state(change)


CRAFTED = {
    "no learner": without("learner"),
    "no alarms": without("alarms"),
    "no moments' numbers": without("learner", "optimizer"),
    "no beta": without("learner", "beta"),
    "an empty beta": saying({}, "learner", "beta"),
    "no baseline": without("learner", "baseline"),
    "no count of skipped steps": without("learner", "skipped"),
    "no averages": without("alarms", "averages"),
    "no start of an alarm": without("alarms", "since"),
    "a learner that is a list": saying([1], "learner"),
    "beta not a number": saying(math.nan, "learner", "beta", "value"),
    "beta without end": saying(math.inf, "learner", "beta", "value"),
    "beta below zero": saying(-1.0, "learner", "beta", "value"),
    "beta in words": saying("small", "learner", "beta", "value"),
    "beta of 400 digits": saying(10**400, "learner", "beta", "value"),
    "a baseline not a number": saying({"value": math.nan}, "learner", "baseline"),
    "skipped steps in words": saying("many", "learner", "skipped"),
    "skipped steps below zero": saying(-3, "learner", "skipped"),
    "an average not a number": saying(math.nan, "alarms", "averages", "kl"),
    "an average of something else": saying({"x": 1.0}, "alarms", "averages"),
    "half a step seen": saying(0.5, "alarms", "seen"),
    "no step": without("step"),
    "another step": saying(7, "step"),
    "a step below zero": saying(-2, "step"),
    "a step that is true": saying(True, "step"),
    "a state that is a list": text("state.json", b"[]"),
    "a state of brackets": text("state.json", b"[" * 200_000),
    "an adapter not a number": tensors("adapter", put(math.nan)),
    "an adapter without end": tensors("adapter", put(math.inf)),
    "an adapter of another shape": tensors("adapter", reshaped),
    "an adapter of whole numbers": tensors("adapter", retyped(torch.int32)),
    "an adapter that lacks a tensor": tensors("adapter", gone),
    "an adapter with one more tensor": tensors("adapter", another),
    "an adapter of no tensors": text("adapter.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    "an adapter of brackets": text("adapter.safetensors", b"\0\0\x01\0\0\0\0\0" + b"[" * 65536),
    "an adapter that is no file of tensors": text("adapter.safetensors", b"PK\3\4" * 100),
    "moments not a number": moment("exp_avg", put(math.nan)),
    "moments without end": moment("exp_avg_sq", put(math.inf)),
    "second moments below zero": moment("exp_avg_sq", put(-1.0)),
    "moments of another shape": moment("exp_avg", reshaped),
    "moments of another length": moment("exp_avg_sq", longer_by_one),
    "moments of another type": moment("exp_avg", retyped(torch.float64)),
    "moments of whole numbers": moment("exp_avg_sq", retyped(torch.int64)),
    "moments that lack a part": moment("exp_avg", gone),
    "moments without steps": moment("step", gone),
    "moments after no number of steps": moment("step", put(math.nan)),
    "moments after several steps": moment("step", longer_by_one),
    "moments of another optimizer": moment("momentum_buffer", added),
    "moments of somebody else": tensors("optimizer", another),
    "a configuration of garbage": text("config.yaml", b"\0\1\2"),
    "a configuration of unknown settings": text("config.yaml", b"train:\n  speed: 3\n"),
    "a configuration of wrong values": text("config.yaml", b"train:\n  steps: many\n"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with both its checkpoints."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert go(words(directory, **KEEP), directory).code == 0
    return directory


@pytest.fixture(scope="module")
def undisturbed(finished):
    return left(finished)


@pytest.mark.parametrize("name", CRAFTED)
def test_it_is_passed_over_with_a_line(name, finished, undisturbed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    newest = directory / "checkpoints" / "step_2"
    CRAFTED[name](newest)
    sealed(newest)
    outcome = go(again(directory), directory)
    assert outcome.code == 0 and len(outcome.complaints) == 1, outcome.err
    assert outcome.complaints[0].startswith("warning: ") and "step_2" in outcome.err
    assert left(directory) == undisturbed


@pytest.mark.parametrize("name", ["no beta", "an adapter not a number", "moments that lack a part"])
def test_the_only_one_is_refused(name, finished, tmp_path):
    """By name, or where there is no older one: one line, nothing trained, nothing overwritten."""
    for asked in ("auto", "step"):
        directory = tmp_path / asked
        shutil.copytree(finished, directory)
        newest = directory / "checkpoints" / "step_2"
        CRAFTED[name](newest)
        sealed(newest)
        if asked == "auto":
            shutil.rmtree(directory / "checkpoints" / "step_1")
        wanted = again(directory) if asked == "auto" else ["--resume", str(newest)]
        outcome = go(wanted, directory)
        assert outcome.code == 3 and len(outcome.complaints) == 1, outcome.err
        assert outcome.errors and steps_saved(directory) == 2
        assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == (
            finished / "adapter" / "adapter_model.safetensors"
        ).read_bytes()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, endless])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "evaluation.json", "run.json", "env.json"]
)
def test_a_pipe_or_a_device_in_the_run_is_not_read(make, name, finished, undisturbed, tmp_path):
    """Lines are refused in one line; a JSON file counts as absent, which is said, and is written
    anew.
    """
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    make(directory / name)
    outcome = go(again(directory), directory)
    if name.endswith(".jsonl"):
        assert outcome.code == 4 and len(outcome.complaints) == 1, outcome.err
        assert name in outcome.err and "no regular file" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    assert name == "env.json" or (len(outcome.complaints) == 1 and name in outcome.err)
    assert left(directory) == undisturbed
