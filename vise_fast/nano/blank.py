"""The embedded model before any training: tokenizer, architecture, initial weights, and the files
of a loadable directory.

Not here: training (pretrain.py) and what the model is taught (lessons.py).
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from vise_fast.images.scenes import COLORS, SHAPES

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
TAGS = ("<query>", "</query>", "<box>", "</box>", "<visible>", "</visible>")
WORDS = ("system", "user", "assistant", "name", "an", "object", "find", "see", "yes", "no")
VOCABULARY = SPECIAL + TAGS + WORDS + tuple(COLORS) + SHAPES + tuple("0123456789,?.")
TOKEN = {token: index for index, token in enumerate(VOCABULARY)}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ "
    "part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [1],
}
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "eos_token_id": TOKEN["<|im_end|>"],
    "pad_token_id": TOKEN["<|endoftext|>"],
}
GENERATION = {
    "do_sample": False,
    "eos_token_id": TOKEN["<|im_end|>"],
    "pad_token_id": TOKEN["<|endoftext|>"],
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 1024, "longest_edge": 65536},
}
VIDEO = PREPROCESSOR | {"video_processor_type": "Qwen3VLVideoProcessor"}
VIDEO.pop("image_processor_type")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per special token, tag, word, digit and mark; white space only separates.

    Decoding puts blanks before words only.
    """
    named = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(),
        **named,
        additional_special_tokens=[token for token in SPECIAL if token not in named.values()],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _word_level() -> Tokenizer:
    """How texts become tokens and tokens texts."""
    core = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"</?[a-z]+>|[a-z]+|[0-9]|[^\s]"), behavior="removed", invert=True
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=[a-z?]|</query>)"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=<visible>) |^ "), ""),
        ]
    )
    return core


def config() -> Qwen3VLConfig:
    """2.2 M parameters: vision 4 x 128 with patches of 8 px merged 2 x 2, text 4 x 128, tied
    embeddings.
    """
    made = Qwen3VLConfig(
        vision_config=deepcopy(VISION),  # transformers writes into what it is given
        text_config=deepcopy(TEXT),
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<|vision_start|>"],
        vision_end_token_id=TOKEN["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    made.vise_prompts = "short"
    return made


def model(seed: int) -> Qwen3VLForConditionalGeneration:
    """Freshly initialised, fp32.

    The stock initialisation (0.02 everywhere) learns nothing at this size.
    """
    torch.manual_seed(seed)
    net = Qwen3VLForConditionalGeneration(config())
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.dim() >= 2:
                spread = 0.1 if "embed_tokens" in name else 1 / math.sqrt(weight[0].numel())
                weight.normal_(0, spread)
        visual = net.model.visual
        visual.pos_embed.weight.copy_(0.35 * sin_cos_table(16, 128))
        visual.deepstack_merger_list[-1].linear_fc2.weight.zero_()
    return net


def save(net: PreTrainedModel, directory: Path) -> None:
    """Everything `AutoModelForImageTextToText` and `AutoTokenizer` load from a directory, weights
    in fp32.
    """
    net.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    _write(directory / "generation_config.json", GENERATION)
    _write(directory / "preprocessor_config.json", PREPROCESSOR)
    _write(directory / "video_preprocessor_config.json", VIDEO)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def sin_cos_table(side: int, width: int) -> torch.Tensor:
    """(side * side, width): half of the channels for the row, half for the column, wavelengths from
    2 pi to 2 pi * 100.
    """
    rates = 100 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None, :].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)
