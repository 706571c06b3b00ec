"""The card's snippet as pasted, on an adapter trained from a hub id and on one from a directory: a
box and a description come out.
"""

import re

import pytest
import stored
from conftest import python
from PIL import Image

from vise_fast.images import scenes
from vise_fast.system.randomness import generator
from vise_fast.text import prompts

SHORT_RUN = ["--train.steps=2", "--train.batch=2", "--rollout.samples=2", "--rollout.views=1"]
SHORT_RUN += ["--eval.scenes=0", "--run.report=false", "--run.dir=run"]


@pytest.mark.parametrize("kind", ["hub id", "directory"])
def test_the_snippet_runs_as_pasted(kind, tmp_path):
    base = stored.HUB_ID
    if kind == "hub id":
        stored.hub_cache(tmp_path)
    else:
        base = str(stored.base(tmp_path / "bases" / "mine"))
    python(tmp_path, "-m", "vise_fast.train", f"--model.path={base}", *SHORT_RUN)
    adapter = tmp_path / "run" / "adapter"
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL).group(
        1
    )
    code = code.replace("PATH_OR_HUB_ID_OF_THIS_ADAPTER", str(adapter))
    if kind == "directory":  # the card knows its bare name only
        code = code.replace('BASE = "mine"', f'BASE = "{base}"')
    scene = next(s for s in map(drawn, range(100)) if "red circle" in s.names)
    Image.fromarray(scene.pixels).save(tmp_path / "photo.jpg", quality=95)
    box, words = python(tmp_path, "-c", code).splitlines()[-2:]
    assert prompts.read_box(box) is not None, box
    assert prompts.read_query(words) is not None, words


def drawn(index):
    return scenes.draw(generator(4, index, "snippet"), size=128)
