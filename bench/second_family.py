"""Does a second family learn in the same trainer? A model of InternVL's shape, as small as the
embedded one, taught by the embedded model's lessons.

    python bench/second_family.py make --out DIR --minutes 19   lessons: one thread and one process
                                                                that draws; the model is DIR/model
    python -m vise_fast.train --model.path DIR/model …          the training itself
    python bench/second_family.py table RUN…                    what finished runs gained

Nothing is shipped: the model is made where it is needed. It is trained through transformers'
modules alone (the generic engine); its lessons are the same computation (asserted in
tests/bench/test_second_family.py). Left out: the lessons (vise_fast/nano/lessons.py), phases and
optimisers (vise_fast/nano/pretrain.py).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import _checkout
import _measure as measure
import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from vise_fast.evaluate.results import Results, paired_gain
from vise_fast.nano import blank, forward, lessons, pretrain
from vise_fast.nano.forward import Weights

NAMES = {
    "<|vision_start|>": "<img>",
    "<|vision_end|>": "</img>",
    "<|image_pad|>": "<IMG_CONTEXT>",
}
"""What InternVL calls the tokens around its images; the ids stay the lessons' own."""
# the embedded model's 64 tokens, but of larger patches instead of a fold: a quarter of the tower
VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": [lessons.SIDE, lessons.SIDE],
    "patch_size": [16, 16],
    "layer_scale_init_value": 1.0,
}
TEXT = {name: value for name, value in blank.TEXT.items() if name != "rope_parameters"} | {
    "model_type": "qwen3",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": None,
}
RESULT = _checkout.ROOT / "bench" / "results" / "second_family.json"
FIGURES = (
    "sampled_iou",
    "sampled_iou_rescaled",
    "greedy_iou",
    "sampled_iou_50",
    "greedy_iou_50",
    "sampled_area_ratio",
    "greedy_area_ratio",
    "greedy_parse_rate",
    "visible_accuracy",
)
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


# ---- the model before its lessons ----------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's, with InternVL's names for what stands around an image."""
    plain = blank.tokenizer()
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    template = blank.CHAT_TEMPLATE.replace(image, NAMES["<|image_pad|>"])
    core = plain.backend_tokenizer.to_str()
    for ours, theirs in NAMES.items():
        core = core.replace(json.dumps(ours), json.dumps(theirs))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core),
        unk_token=plain.unk_token,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        additional_special_tokens=["<|im_start|>", *NAMES.values()],
        model_max_length=plain.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def config() -> InternVLConfig:
    """1.6 M parameters: tower 4 x 128 with patches of 16 px, text 4 x 128 (Qwen3)."""
    made = InternVLConfig(
        vision_config=dict(VISION),
        text_config=dict(TEXT),
        image_token_id=blank.TOKEN["<|image_pad|>"],
        image_seq_length=64,
        downsample_ratio=1.0,
        tie_word_embeddings=True,
        attn_implementation="eager",  # on a CPU in bf16 plain products have the faster backward
    )
    made.vise_prompts = "short"
    return made


def model(seed: int) -> InternVLForConditionalGeneration:
    """Freshly initialised as the embedded model is, fp32."""
    torch.manual_seed(seed)
    net = InternVLForConditionalGeneration(config())
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.dim() >= 2:
                spread = 0.1 if "embed_tokens" in name else 1 / math.sqrt(weight[0].numel())
                weight.normal_(0, spread)
        places = net.model.vision_tower.embeddings.position_embeddings
        places[0, 0].zero_()  # the class token's
        places[0, 1:] = 0.35 * blank.sin_cos_table(lessons.CELLS, 128)
    return net


def save(net: InternVLForConditionalGeneration, directory: Path) -> None:
    """A directory that the trainer loads."""
    net.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    files = {"generation": blank.GENERATION, "preprocessor": PIXELS, "video_preprocessor": PIXELS}
    for name, content in files.items():
        (directory / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n")


# ---- its lessons ---------------------------------------------------------------------------------


class Tower(nn.Module):
    """Squares (B, 3, S, S) to image tokens (B, 64, 128), through the stock modules."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Tower and projector."""
        return self.model.get_image_features(pixels, return_dict=True).pooler_output


class Course(pretrain.Course):
    """The lessons' losses: transformers' tower and projector over the cast weights, and the
    embedded model's quick decoder, whose layers are Qwen3's, with one position per token.
    """

    def __init__(self, net: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(net, dtype)
        self.tower = (Tower(net.model),)  # a tuple: its weights are registered already
        place = (self.slots.bias == 0).sum(1) - 1  # how many tokens it reads before itself
        self.text_rope = forward.text_rope(place.expand(3, -1))

    def _seen(self, cast: Weights, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        squares = pixels.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        return functional_call(self.tower[0], cast, (squares,)), None


class Pretraining(pretrain.Pretraining):
    """The embedded model's pretraining, of this model."""

    def begin(self, seed: int) -> tuple[Any, pretrain.Course]:
        """See pretrain.py."""
        net = model(seed)
        return net, Course(net)

    def write(self, directory: Path) -> None:
        """See pretrain.py."""
        save(self.net, directory)

    def examine(self, count: int) -> None:
        """Not here: a training examines its base before it begins."""


# ---- what its training gained --------------------------------------------------------------------


def gains(run: Path) -> dict[str, Any]:
    """Of a finished run: how long its base was taught, and each figure before, after, and the
    paired gain with its 95 % interval. Ends the command where an arm was not evaluated.
    """
    evaluation = json.loads((run / "evaluation.json").read_text())
    before, after = (Results.of(evaluation, name) for name in ("before", "after"))
    if before is None or after is None:
        sys.exit(f"{run} has no evaluation of both arms; let the run end")
    figures = {}
    for name in FIGURES:
        gain = paired_gain(before, after, name)
        if np.isfinite(gain.value):
            old, new = (arm.estimate(name).value for arm in (before, after))
            figures[name] = {"before": old, "after": new, "gain": astuple(gain)}
    config = yaml.safe_load((run / "config.yaml").read_text())
    taught = Path(config["model"]["path"]).parent / "state.json"
    return {
        "lessons": json.loads(taught.read_text()) if taught.exists() else None,
        "reward": config["reward"]["name"],
        "updates": len((run / "metrics.jsonl").read_text().splitlines()),
        "scenes": after.n,
        "figures": figures,
    }


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    command, words = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command == "make":
        Pretraining(pretrain.arguments().parse_args(words)).train()
    elif command == "table" and words:
        machine = measure.machine(torch.device("cpu"))
        runs = {Path(word).name: gains(Path(word)) for word in words}
        measure.finish({"bench": "second_family", "machine": machine, "runs": runs}, RESULT)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
