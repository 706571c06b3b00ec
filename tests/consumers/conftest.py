"""What others do with an adapter, in an environment of their own: `make consumers`.

Collected only where torchvision imports, which the processors of transformers need. Nothing is
fetched: the base is the embedded model, as a directory or as a hub id in a cache of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stored

ROOT = Path(__file__).parents[2]

try:
    import torchvision  # noqa: F401  # whether it is there is all that counts
except (ImportError, RuntimeError):
    collect_ignore_glob = ["test_*.py"]


def python(home, *words, cwd=None):
    """A Python process that sees the hub cache in `home` and no network; what it says."""
    known = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **known, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    env.pop("HF_HUB_CACHE", None)
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, env=env, cwd=cwd or home, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """An adapter of the embedded model whose words differ from its base's."""
    return stored.adapter(tmp_path_factory.mktemp("consumed") / "adapter")


@pytest.fixture(scope="session")
def forms(adapter):
    """The adapter in every form: {name: directory}."""
    made = {"as a run leaves it": adapter}
    for form in ("portable", "linked", "merged", "language-only"):
        made[form] = adapter.parent / form
        words = ["--form", form, "--adapter", adapter, "--out", made[form]]
        python(adapter.parent, "-m", "vise_fast.export", *words)
    return made
