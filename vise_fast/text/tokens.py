"""Text to ids and back for one model: the chat pieces around an image, the answers' end, the
verdict words, the ids never sampled.

A conversation is head + image tokens + tail + row, where head and tail are the same for every
question about every image, so that one image prefix (head, image, tail) serves ask, ground and
verify. Nothing here needs an image processor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from vise_fast.images.geometry import Box
from vise_fast.system.errors import ConfigError
from vise_fast.text.prompts import Style

# Vision placeholders and turn markers: a sampled answer must not open a second image or a second
# turn.
NEVER_SAMPLED = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|im_start|>",
)
# The same of other families: what opens an image or a turn.
NEVER_SAMPLED_ELSEWHERE = (
    "<image>",
    "<|image|>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<start_of_turn>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
)
ENDS = ("<|im_end|>", "<|endoftext|>")
ENDS_ELSEWHERE = ("<end_of_turn>", "<end_of_utterance>", "<|eot_id|>", "<|end_of_text|>", "<eos>")


@dataclass(frozen=True)
class Template:
    """A conversation of one question: what stands before the image tokens, between them and the
    question, and between question and answer.
    """

    head: str
    tail: str
    turn: str

    def with_system(self, text: str) -> Template:
        """With a system turn before the question, where turns are written in ChatML. Raises
        ConfigError elsewhere.
        """
        if not text:
            return self
        turns = self.head.split("<|im_start|>user")
        if len(turns) != 2:
            raise ConfigError(
                "prompts.system: this model brings no chat template that says where a system turn "
                "goes; its files lack one; leave the setting out"
            )
        system = f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user"
        return Template(system + turns[1], self.tail, self.turn)


QWEN = Template(
    "<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
)
QUESTION = "\ufffcQUESTION\ufffc"


def written_by(tokenizer: Any, placeholder: str, system: str = "") -> Template | None:
    """The conversation as the tokenizer's own chat template writes it; None where it has none, or
    one that knows no images.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        said = [{"type": "text", "text": system}]
        messages.insert(0, {"role": "system", "content": said})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, AttributeError):  # one for texts alone
        return None
    head, image, rest = text.partition(placeholder)
    tail, asked, turn = rest.partition(QUESTION)
    return Template(head, tail, turn) if image and asked else None


class Tokens:
    """The ids one tokenizer gives to the pieces of a conversation."""

    def __init__(
        self,
        tokenizer,
        style: Style,
        vocabulary: int,
        image_token: int,
        template: Template = QWEN,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.image_token = image_token
        self.head = self.ids(template.head)
        self.tail = self.ids(template.tail)
        self.turn = self.ids(template.turn)
        self.eos = self._ends()
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos[0]
        self._take(style)

    def _take(self, style: Style) -> None:
        self.style = style
        self.opening = self.ids(style.verdict_opening)
        self.yes = self._verdict_words(style.yes)
        self.no = self._verdict_words(style.no)

    def in_style(self, style: Style) -> Tokens:
        """The same conversation in another prompt style. Raises ConfigError where its verdict words
        are no tokens.
        """
        other = copy.copy(self)
        other._take(style)
        return other

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without anything added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def written_boxes(self, boxes_1000: list[Box]) -> list[list[int]]:
        """Boxes as answers, with their end."""
        return [self.ids(self.style.write_box(box)) + [self.eos[0]] for box in boxes_1000]

    def row(self, text: str) -> list[int]:
        """What follows the image prefix: the question and the opening of the answer."""
        return self.ids(text) + self.turn

    def verdict_row(self, text: str) -> list[int]:
        """A question whose answer is already opened, so that the next token is the verdict."""
        return self.row(text) + self.opening

    def text(self, ids: list[int]) -> str:
        """The answer as text, up to its end token."""
        stop = next((i for i, token in enumerate(ids) if token in self.eos), len(ids))
        return self.tokenizer.decode(ids[:stop], skip_special_tokens=False)

    def banned(self) -> Tensor:
        """Bool (V,): ids that are never sampled: vision placeholders, turn markers, rows of the
        head without a token.
        """
        mask = torch.zeros(self.vocabulary, dtype=torch.bool)
        known = self.tokenizer.get_vocab()
        mask[max(known.values()) + 1 :] = True
        added = self.tokenizer.get_added_vocab()
        found = [known[name] for name in NEVER_SAMPLED if name in known]
        found += [added[name] for name in NEVER_SAMPLED_ELSEWHERE if name in added]
        # an image token may have no row in the head
        mask[[token for token in found if token < self.vocabulary]] = True
        return mask

    @cached_property
    def digits(self) -> list[int]:
        """The token of each digit 0..9, by itself."""
        return [self.ids(str(digit))[-1] for digit in range(10)]

    def _ends(self) -> list[int]:
        known = self.tokenizer.get_vocab()
        added = self.tokenizer.get_added_vocab()
        ends = [known[name] for name in ENDS if name in known]
        ends += [added[name] for name in ENDS_ELSEWHERE if name in added]
        if not ends and self.tokenizer.eos_token_id is not None:
            return [self.tokenizer.eos_token_id]
        return ends

    def _verdict_words(self, words: tuple[str, ...]) -> list[int]:
        """The ids that say these words behind the opening: of each word its own single token, and
        the one it ends in where opening and word are written together.

        Written together they may merge over the border: Qwen's tokenizer has a token `>No` and none
        `>Yes`. The opening is given as ids, so what follows it is the word's own token.
        """
        found = []
        for word in words:
            alone = self.ids(word)
            if len(alone) == 1:
                found += alone
            ids = self.ids(self.style.verdict_opening + word)
            if ids[: len(self.opening)] == self.opening and len(ids) == len(self.opening) + 1:
                found.append(ids[-1])
        unknown = self.tokenizer.unk_token_id
        found = [token for token in dict.fromkeys(found) if token != unknown]
        if not found:
            raise ConfigError(
                f"no verdict word of {words} is a single token of this tokenizer; verification "
                "needs one; use another tokenizer"
            )
        return found
