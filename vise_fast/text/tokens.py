"""Text to ids and back for one model: the chat pieces around an image, the answers' end, the
verdict words, the ids never sampled.

A conversation is head + image tokens + tail + row, where head and tail are the same for every
question about every image, so that one image prefix (head, image, tail) serves ask, ground and
verify. Nothing here needs an image processor.
"""

from __future__ import annotations

from functools import cached_property

import torch
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


class Tokens:
    """The ids one tokenizer gives to the pieces of a conversation."""

    def __init__(self, tokenizer, style: Style, vocabulary: int, image_token: int) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.vocabulary = vocabulary
        self.image_token = image_token
        self.head = self.ids("<|im_start|>user\n<|vision_start|>")
        self.tail = self.ids("<|vision_end|>")
        self.turn = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.eos = self._ends()
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos[0]
        self.opening = self.ids(style.verdict_opening)
        self.yes = self._verdict_words(style.yes)
        self.no = self._verdict_words(style.no)

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
        mask[[known[name] for name in NEVER_SAMPLED if name in known]] = True
        return mask

    @cached_property
    def digits(self) -> list[int]:
        """The token of each digit 0..9, by itself."""
        return [self.ids(str(digit))[-1] for digit in range(10)]

    def _ends(self) -> list[int]:
        known = self.tokenizer.get_vocab()
        return [known[name] for name in ("<|im_end|>", "<|endoftext|>") if name in known]

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
