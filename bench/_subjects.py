"""What the rollout bench runs on: models (the embedded one, a directory, or random weights of
configs/models/*.json) and images.

A random model has no tokenizer, so it gets one whose words, digits and marks are one token each;
the prompts then have about as many tokens as under Qwen's. `Locked` fixes every answer's length by
banning the end tokens, and what an answer says (a random model's answers say nothing): the same
query for every image, a box of its own for every box answer. All engines under test go through the
same `Locked`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vise_fast.config.places import SHAPES
from vise_fast.config.schema import Config, load
from vise_fast.images import scenes
from vise_fast.images.image import Image
from vise_fast.model import load as model
from vise_fast.nano.blank import CHAT_TEMPLATE
from vise_fast.text.prompts import NATURAL
from vise_fast.text.tokens import Tokens

QUERY_TOKENS = 14
BOX_TOKENS = 22
VERDICT_TOKENS = 8
QUERIES = {"short": "red circle", "natural": "the brown dog on the old sofa"}
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)
PIECE = r"</|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]|\n"


class Locked:
    """A model's `Tokens` with locked answers. Also counts what it was asked to read."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.box_count = 0

    def __getattr__(self, name: str):
        return getattr(self._tokens, name)

    def banned(self) -> Tensor:
        """No answer ends before its limit."""
        mask = self._tokens.banned()
        mask[self._tokens.eos] = True
        return mask

    def text(self, ids: list[int]) -> str:
        """What an answer of this length says; boxes differ from one to the next."""
        style = self._tokens.style
        if len(ids) == QUERY_TOKENS:
            return style.write_query(QUERIES[style.name])
        if len(ids) == VERDICT_TOKENS:
            return style.write_verdict(sum(ids) % 2 == 0)
        self.box_count += 1
        left = 200 + 37 * self.box_count % 200
        top = 200 + 53 * self.box_count % 200  # so central that no view loses one
        return style.write_box((left, top, left + 300, top + 250))


@dataclass(frozen=True)
class Subject:
    """A model under test: the directory it loads from and whether its weights are made up."""

    name: str
    directory: str
    random: bool

    def config(self, preset: str, batch: int, extra: list[str]) -> Config:
        """A training configuration of this model with locked lengths; `extra`: words of it."""
        words = [
            f"--model.path={self.directory}",
            f"--reward.preset={preset}",
            f"--train.batch={batch}",
            "--reward.gate=0",
            "--train.lr=1e-6",
            f"--rollout.query_tokens={QUERY_TOKENS}",
            f"--rollout.box_tokens={BOX_TOKENS}",
            *extra,
        ]
        return load(None, words)

    @property
    def weights(self) -> str | None:
        """What `model.load` is to make of them."""
        return "random" if self.random else None


def find(name: str, random: bool, scratch: str) -> Subject:
    """The model called `name`: 'nano', a shape of configs/models, or a directory.

    `scratch` takes the files of a random one.
    """
    shape = SHAPES / f"{name}.json"
    if shape.exists():
        return Subject(name, _write(json.loads(shape.read_text()), scratch), True)
    directory = model.resolve(name)
    if not random and any(Path(directory).glob("*.safetensors")):
        return Subject(name, directory, False)
    if name != "nano":
        return Subject(name, directory, random)
    from vise_fast.nano import blank

    blank.save(blank.model(0), Path(scratch))
    return Subject("nano (random weights)", scratch, False)


def _write(shape: dict, directory: str) -> str:
    path = Path(directory)
    (path / "config.json").write_text(json.dumps(shape))
    tokenizer(shape).save_pretrained(path)
    return directory


def tokenizer(shape: dict) -> PreTrainedTokenizerFast:
    """One token per word, digit and mark of the natural prompts and their answers; special tokens
    at the ids the model's config names.
    """
    core = Tokenizer(models.WordLevel(_vocabulary(shape), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    known = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **known,
        additional_special_tokens=[name for name in SPECIAL if name not in known.values()],
        chat_template=CHAT_TEMPLATE,
    )


def _vocabulary(shape: dict) -> dict[str, int]:
    texts = [
        NATURAL.ask(),
        NATURAL.ground(QUERIES["natural"]),
        NATURAL.verify(QUERIES["natural"]),
        "system user assistant yes Yes YES no No NO\n",
    ]
    pieces = set("0123456789")
    for text in texts:
        pieces.update(re.findall(PIECE, text))
    vocabulary = {piece: index for index, piece in enumerate(sorted(pieces))}
    ids = {
        "<|vision_start|>": "vision_start_token_id",
        "<|vision_end|>": "vision_end_token_id",
        "<|image_pad|>": "image_token_id",
        "<|video_pad|>": "video_token_id",
    }
    vocabulary |= {name: shape[key] for name, key in ids.items()}
    free = [name for name in SPECIAL if name not in ids]
    return vocabulary | {name: index for index, name in enumerate(free, len(pieces))}


def folder(directory: Path, size: tuple[int, int], count: int) -> list[Image]:
    """The first images of a folder by name, resized to one size."""
    files = sorted(
        path
        for path in directory.iterdir()
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    )[:count]
    if len(files) < count:
        raise SystemExit(f"{directory} holds {len(files)} images; {count} are needed")
    height, width = size
    arrays = [
        np.array(
            Pillow.open(file).convert("RGB").resize((width, height), Pillow.Resampling.BICUBIC)
        )
        for file in files
    ]
    return [
        Image(torch.from_numpy(array), file.name, i)
        for i, (array, file) in enumerate(zip(arrays, files, strict=True))
    ]


def pictures(height: int, width: int, count: int) -> list[Image]:
    """Drawn scenes, cropped or tiled to a size."""
    side = max(height, width)
    drawn = [scenes.draw(np.random.default_rng(i), size=128).pixels for i in range(count)]
    tile = -(-side // 128)
    pixels = [
        torch.from_numpy(np.tile(image, (tile, tile, 1))[:height, :width].copy()) for image in drawn
    ]
    return [Image(image, f"scene {i}", i) for i, image in enumerate(pixels)]
