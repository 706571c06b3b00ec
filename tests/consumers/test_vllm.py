"""What vLLM says with an adapter, in a third environment: `make vllm`.

vLLM leaves the projectors' part out unless it is told otherwise: then its words are those of the
form `language-only`, and with `--enable-tower-connector-lora` those of the whole adapter.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from test_matrix import NAMES, SCENES, ours

from vise_fast import nano

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build" / "vllm" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM: make vllm makes it")


@pytest.fixture(scope="module")
def said(forms, tmp_path_factory):
    """{arm: vLLM's greedy answers}."""
    home = tmp_path_factory.mktemp("vllm")
    files = [home / f"{index}.png" for index in range(len(SCENES))]
    for file, pixels in zip(files, SCENES, strict=True):
        Image.fromarray(pixels).save(file)
    alone = {"base": None, "part": str(forms["portable"]), "lingual": str(forms["language-only"])}
    whole = {"whole": str(forms["portable"]), "run": str(forms["as a run leaves it"])}
    engines = [
        {"model": str(nano.DIRECTORY), "connector": False, "adapters": alone},
        {"model": str(nano.DIRECTORY), "connector": True, "adapters": whole},
        {"model": str(forms["merged"]), "connector": False, "adapters": {"merged": None}},
    ]
    questions = [f"find {name}" for name in NAMES]
    orders = {"images": [str(file) for file in files], "questions": questions, "engines": engines}
    (home / "orders.json").write_text(json.dumps(orders))
    words = [PYTHON, Path(__file__).parent / "vllm_words.py", home / "orders.json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, cwd=home, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_base_says_what_ours_says(said):
    assert said["base"] == ours(None)


def test_the_whole_adapter_says_our_words_where_the_connector_is_asked_for(said, forms):
    wanted = ours(forms["portable"])
    assert said["whole"] == said["run"] == wanted != said["base"]


def test_without_the_connector_the_projectors_part_is_left_out(said, forms):
    wanted = ours(forms["language-only"])
    assert said["part"] == said["lingual"] == wanted != said["whole"]


def test_a_merged_model_needs_no_flag(said):
    assert said["merged"] == said["whole"]
