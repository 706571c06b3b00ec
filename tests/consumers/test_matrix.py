"""The rows of the matrix in docs/ADAPTER.md: forms of an adapter, by those who open them."""

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vise_fast import nano
from vise_fast.config import schema
from vise_fast.engine.choose import open_engine
from vise_fast.images import scenes
from vise_fast.method import roles
from vise_fast.method.roles import Question, Sampling
from vise_fast.model import load as model
from vise_fast.system.randomness import generator

NAMES = ("red circle", "blue square", "green triangle")
WITH_ADAPTER = ("as a run leaves it", "portable", "language-only")
WHOLE = ("linked", "merged")
SCENES = [scenes.draw(generator(5, index, "consumer"), size=128).pixels for index in range(3)]


def base():
    return AutoModelForImageTextToText.from_pretrained(nano.DIRECTORY)


def answers(loaded, processor):
    """What a stock model says where these objects are, greedily."""
    said = []
    for pixels in SCENES:
        for name in NAMES:
            question = {"type": "text", "text": f"find {name}"}
            image = {"type": "image", "image": Image.fromarray(pixels)}
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": [image, question]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids = loaded.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
            said.append(
                processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            )
    return said


def ours(directory):
    """What our engine says, greedily; with the adapter in `directory`, or without one."""
    config = schema.load(None, ["--model.device=cpu"])
    policy = model.load(config, directory and str(directory))
    engine = open_engine(policy, config)
    prefix = engine.prefill(
        engine.encode([torch.from_numpy(p) for p in SCENES]), directory is not None
    )
    questions = [Question(image, name) for image in range(len(SCENES)) for name in NAMES]
    found = roles.ground(engine, prefix, questions, Sampling(24, temperature=0.0))
    return [text.strip() for text in found.written]


@pytest.fixture(scope="module")
def wanted(adapter):
    """Our words with the adapter; they are other than the base's."""
    said = ours(adapter)
    assert said != ours(None)
    return said


@pytest.fixture(scope="module")
def without_projectors(forms):
    return ours(forms["language-only"])


@pytest.fixture
def words(wanted, without_projectors):
    """{form: what it should say}."""
    return lambda form: without_projectors if form == "language-only" else wanted


@pytest.mark.parametrize("form", [*WITH_ADAPTER, *WHOLE])
def test_auto_processor_opens_it(forms, form):
    processor = AutoProcessor.from_pretrained(forms[form])
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert processor.image_processor.patch_size == processor.video_processor.patch_size == 8


@pytest.mark.parametrize("form", WITH_ADAPTER)
def test_peft_generates_our_words(forms, words, form):
    loaded = PeftModel.from_pretrained(base(), str(forms[form]))
    assert answers(loaded, AutoProcessor.from_pretrained(forms[form])) == words(form)


@pytest.mark.parametrize("form", [*WITH_ADAPTER, "linked"])
def test_load_adapter_generates_our_words(forms, words, form):
    loaded = base()
    loaded.load_adapter(str(forms[form]))
    assert answers(loaded, AutoProcessor.from_pretrained(forms[form])) == words(form)


@pytest.mark.parametrize("form", [*WITH_ADAPTER, *WHOLE])
def test_from_pretrained_of_the_directory_generates_our_words(
    forms, words, form, tmp_path, monkeypatch
):
    """The adapters name their base "nano": here a directory of that name."""
    (tmp_path / "nano").symlink_to(nano.DIRECTORY)
    monkeypatch.chdir(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(forms[form])
    assert answers(loaded, AutoProcessor.from_pretrained(forms[form])) == words(form)
