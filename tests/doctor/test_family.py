"""`doctor --model DIR`: what is known of a family, and the row of one that is not."""

import json

import pytest

from vise_fast.doctor import __main__ as doctor
from vise_fast.model.families import FAMILIES
from vise_fast.nano import DIRECTORY as NANO
from vise_fast.system import console

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PALIGEMMA = {
    "model_type": "paligemma",
    "image_token_index": 5,
    "vision_config": SMALL | {"model_type": "siglip_vision_model", "image_size": 28},
    "text_config": SMALL | {"model_type": "gemma", "vocab_size": 67, "num_key_value_heads": 1},
}


def said(capsys, directory):
    code = console.run(doctor.main, ["--model", str(directory)])
    told = capsys.readouterr()
    return code, told.out + told.err


def written(where, content):
    (where / "config.json").write_text(json.dumps(content))
    return where


def test_a_known_family(capsys):
    code, text = said(capsys, NANO)
    assert code == 0 and "family qwen3_vl: engine fast, generic or stock" in text


def test_an_unknown_one_gets_the_row_to_begin_with(capsys, tmp_path):
    assert "paligemma" not in FAMILIES
    code, text = said(capsys, written(tmp_path, PALIGEMMA))
    assert code == 0 and "which has no row" in text
    for line in ("model_type='paligemma'", "tower='vision_tower'", "language=LANGUAGE", "pixels=?"):
        assert line in text
    assert "multi_modal_projector" in text


@pytest.mark.parametrize(
    "content, lack",
    [
        ({"model_type": "llama"}, "no images"),
        ({"model_type": "odd", "vision_config": {}, "text_config": {}}, "image_token_id"),
    ],
)
def test_what_it_lacks(capsys, tmp_path, content, lack):
    code, text = said(capsys, written(tmp_path, content))
    assert code == 0 and lack in text and "register(" not in text


def test_no_model_directory(capsys, tmp_path):
    assert said(capsys, tmp_path)[0] == 2
