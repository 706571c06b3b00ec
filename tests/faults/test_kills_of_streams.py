"""A run over a stream, or over several places, that is killed by a real SIGKILL and goes on: the
same adapter, optimizer, metrics and texts, byte for byte, as of a run that nothing happened to.
"""

import os
import signal
import tarfile

import numpy as np
import pytest
from faults.forked import go, restart, words
from faults.left import left, sound, steps_saved
from faults.places import At
from PIL import Image as Pillow

from vise_fast.images import scenes

STEPS = 4
STREAM = {"data__stream": True, "data__buffer": 5, "data__holdout": 0.2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two shards and a list of drawn scenes, which the model has something to say of."""
    home = tmp_path_factory.mktemp("streams")
    names = []
    for number in range(14):
        scene = scenes.draw(np.random.default_rng(number), size=96, max_objects=3)
        names.append(f"{number:02d}.png")
        Pillow.fromarray(scene.pixels).save(home / names[-1])
    for shard, chosen in enumerate((names[:6], names[6:11])):
        with tarfile.open(home / f"shard-{shard}.tar", "w") as made:
            for name in chosen:
                made.add(home / name, name)
    (home / "list.txt").write_text("\n".join(names[11:]))
    return home


def sources(home):
    shards = f"{home}/shard-*.tar"
    both = f"[{shards}=2, {home}/list.txt=1]"
    return {
        "a stream": {"data__dir": shards, **STREAM},
        "a mixture of streams": {"data__mix": both, **STREAM},
        "a mixture": {"data__mix": both},
    }


def shot(place):
    """A real SIGKILL at a call."""
    return At(place, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("kind", ["a stream", "a mixture of streams", "a mixture"])
def test_it_goes_on_as_if_nothing_had_happened(place, tmp_path, kind):
    settings = {"train__steps": STEPS, "train__batch": 3, **sources(place)[kind]}
    undisturbed = tmp_path / "undisturbed"
    outcome = go(words(undisturbed, **settings), undisturbed)
    assert outcome.code == 0, outcome.err
    wanted = left(undisturbed)
    assert sum(record["grad_norm"] > 0 for record in wanted.metrics) > STEPS / 2
    directory = tmp_path / "run"
    codes = []
    for where in ("write metrics.jsonl #2 half", "rename checkpoints/step_3"):
        outcome = go(restart(directory, **settings), directory, shot(where))
        codes.append(outcome.code)
        sound(directory)
    assert codes == [-signal.SIGKILL] * 2 and 0 < steps_saved(directory) < STEPS
    outcome = go(restart(directory, **settings), directory)
    assert outcome.code == 0, outcome.err
    found = left(directory)
    assert found.contents == wanted.contents and found.metrics == wanted.metrics
    assert found == wanted
