"""The conversation around an image: from a checkpoint's chat template, or from the family's row."""

import copy

import pytest
from transformers import AutoTokenizer

from vise_fast.model.families import FAMILIES
from vise_fast.model.load import template_of
from vise_fast.nano import DIRECTORY as NANO
from vise_fast.system.errors import ConfigError
from vise_fast.text.tokens import QWEN, Template, written_by

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    found = copy.copy(AutoTokenizer.from_pretrained(NANO))
    found.chat_template = None
    return found


def test_a_chat_template_is_followed(tokenizer):
    tokenizer.chat_template = GEMMA
    found = template_of(tokenizer, FAMILIES["gemma3"])
    bos = tokenizer.bos_token or ""
    assert found.head == f"{bos}<start_of_turn>user\n\n\n<start_of_image>"
    assert found.tail == "<end_of_image>\n\n"
    assert found.turn == "<end_of_turn>\n<start_of_turn>model\n"


def test_a_system_turn_goes_where_the_chat_template_puts_it(tokenizer):
    tokenizer.chat_template = GEMMA
    found = template_of(tokenizer, FAMILIES["gemma3"], "be brief")
    assert "<start_of_turn>system\nbe brief<end_of_turn>\n<start_of_turn>user" in found.head


@pytest.mark.parametrize(
    "text", ["{{ messages[0]['content'] + 'x' }}", "{{ raise_exception('no') }}", ""]
)
def test_without_one_for_images_the_row_s_is_used(tokenizer, text):
    tokenizer.chat_template = text or None
    assert written_by(tokenizer, "<image>") is None
    found = template_of(tokenizer, FAMILIES["smolvlm"])
    assert found.head.startswith("<|im_start|>User:<fake_token_around_image>")


def test_qwen3_vl_keeps_its_own(tokenizer):
    tokenizer.chat_template = GEMMA
    assert template_of(tokenizer, FAMILIES["qwen3_vl"]) == QWEN
    asked = template_of(tokenizer, FAMILIES["qwen3_vl"], "be brief")
    assert asked.head == "<|im_start|>system\nbe brief<|im_end|>\n" + QWEN.head


def test_a_system_turn_that_has_no_place_is_refused():
    with pytest.raises(ConfigError, match="prompts.system"):
        Template("USER: ", "", " ASSISTANT:").with_system("be brief")
