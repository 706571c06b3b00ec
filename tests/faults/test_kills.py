"""A run that is killed, at any call that touches its files, is the same run when it goes on: the
same adapter, metrics and texts, byte for byte. Here: the start, the first evaluation, the loop.
"""

import pytest
from faults.forked import KILLED, go, restart, words
from faults.left import left, sound
from faults.places import kill_at

START = (
    "make .",
    "open .lock",
    "write .lock",
    "open .run.json.partial",
    "write .run.json.partial half",
    "sync .run.json.partial",
    "rename run.json",
    "sync .",
    "open .config.yaml.partial",
    "write .config.yaml.partial half",
    "rename config.yaml",
    "write .env.json.partial half",
    "rename env.json",
    "open metrics.jsonl",
    "open samples.jsonl",
)
FIRST_EVALUATION = (
    "open .evaluation.json.partial",
    "write .evaluation.json.partial half",
    "sync .evaluation.json.partial",
    "rename evaluation.json",
)
FIRST_UPDATE = (
    "write metrics.jsonl",
    "write metrics.jsonl half",
    "make samples",
    "open samples/.step_1_0.png.partial",
    "write samples/.step_1_0.png.partial half",
    "rename samples/step_1_0.png",
    "write samples.jsonl",
    "write samples.jsonl half",
    "sync metrics.jsonl",
    "sync samples.jsonl",
    "make checkpoints",
    "make checkpoints/.step_1.partial",
    "open checkpoints/.step_1.partial/adapter.safetensors",
    "write checkpoints/.step_1.partial/adapter.safetensors half",
    "write checkpoints/.step_1.partial/optimizer.safetensors half",
    "write checkpoints/.step_1.partial/config.yaml half",
    "write checkpoints/.step_1.partial/state.json half",
    "write checkpoints/.step_1.partial/manifest.json half",
    "sync checkpoints/.step_1.partial/manifest.json",
    "sync checkpoints/.step_1.partial",
    "rename checkpoints/step_1",
    "sync checkpoints",
)
SECOND_UPDATE = (
    "write metrics.jsonl #2",
    "write metrics.jsonl #2 half",
    "write samples/.step_2_0.png.partial half",
    "rename samples/step_2_0.png",
    "write samples.jsonl #2 half",
    "make checkpoints/.step_2.partial",
    "write checkpoints/.step_2.partial/optimizer.safetensors half",
    "open checkpoints/.step_2.partial/manifest.json",
    "rename checkpoints/step_2",
    "sync checkpoints #2",
    "rename checkpoints/.step_1.removed",
    "remove checkpoints/.step_1.removed/*",
    "remove checkpoints/.step_1.removed/* #3",
    "rmdir checkpoints/.step_1.removed",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    outcome = go(words(directory), directory)
    assert outcome.code == 0, outcome.err
    return directory


def test_the_undisturbed_run_learns_and_says_nothing_on_standard_error(undisturbed):
    """Else the comparisons below would say little."""
    found = left(undisturbed)
    assert all(record["grad_norm"] > 0 and record["parse_rate"] > 0 for record in found.metrics)
    assert len({record["grad_norm"] for record in found.metrics}) == 2
    assert {"adapter/adapter_model.safetensors", "plots/kl.png"} <= found.names


@pytest.mark.parametrize("place", START + FIRST_EVALUATION + FIRST_UPDATE + SECOND_UPDATE)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(undisturbed, place, tmp_path):
    directory = tmp_path / "run"
    assert go(words(directory), directory, kill_at(place)).code == KILLED
    sound(directory)
    outcome = go(restart(directory), directory)
    assert outcome.code == 0, outcome.err
    assert left(directory) == left(undisturbed)
