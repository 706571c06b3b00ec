"""The notebooks: their cells run from top to bottom, with small numbers in the cell that holds
them. No Jupyter is needed for it.
"""

import json
from pathlib import Path

import PIL.Image
import pytest
import skimage.data

ROOT = Path(__file__).parents[1]
SMALL = {
    "nano_on_a_cpu": 'STEPS, SCENES, RUN = 1, 4, "run"',
    "qwen3_vl_2b_nf4": 'PHOTOS, WORDS = "photos", ["--model.quant=nf4", "--run.dir=run"]',
}


def cells(name):
    content = json.loads((ROOT / "examples" / "notebooks" / f"{name}.ipynb").read_text())
    assert content["nbformat"] == 4
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"]], "kept without outputs"
    return ["".join(cell["source"]) for cell in code]


def run(name):
    """Everything that the cells define, the first of them replaced by small numbers."""
    first, *others = cells(name)
    names = {}
    exec(first, names)
    small = {}
    exec(SMALL[name], small)
    assert small.keys() <= names.keys()
    names |= small
    for cell in others:
        exec(compile(cell, name, "exec"), names)
    return names


def test_the_notebook_of_the_embedded_model_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run("nano_on_a_cpu")
    assert names["code"] == 0 and (tmp_path / "run" / "adapter").is_dir()
    assert names["adapter"].picture.size == (128, 128)
    assert "sampled_iou" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_of_the_real_model_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        picture = PIL.Image.fromarray(getattr(skimage.data, name)())
        picture.resize((160, 120)).save(tmp_path / "photos" / f"{name}.png")
    assert run("qwen3_vl_2b_nf4")["code"] == 4
    said = capsys.readouterr()
    assert "predicted" in said.out and "hf download" in said.err
