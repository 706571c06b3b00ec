"""The model families: what the trainer has to know of each, a row of data.

A row says where LoRA goes, where the frozen tower ends, how an image becomes pixels and tokens, how
a conversation is written and in which numbers the family was trained to write boxes. What a row
names is transformers' own code and module names (5.23). An outside family is a row and `register`.
A family with a forward pass of its own says so (`fast`); all others run on the generic engine.

`lacking` says what a model directory of an unknown family lacks, `draft` the row to begin with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from torch import nn

from vise_fast.model.qwen3_vl import LANGUAGE_TARGETS, PROJECTOR_TARGETS
from vise_fast.system.errors import ConfigError
from vise_fast.text.tokens import QWEN, Template

Count = Callable[[Any], int]
"""Of a model's config."""
Pixels = Literal["patches", "square", "listed", "tiles", "anyres"]
"""How the model takes images: packed patches with a grid; (N, C, S, S); a list of one per row; one
tile of several; one base tile with its size.
"""
Boxes = Literal["1000", "pixels", "1024"]

LANGUAGE = (
    r"model\.(language_model|text_model)\.layers\.\d+\."
    r"((self|cross)_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
ATTENTION_ALONE = r"model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
BLOCKS = r"model\.(visual\.blocks|vision_tower|vision_model)\."
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """One row."""

    model_type: str
    """as config.json says"""
    projector: str
    """full match of the linears between tower and language model"""
    tower: str
    """full match, below `model`, of the frozen modules before the projector: one, or its blocks"""
    processor: str
    """transformers' processor class"""
    image_processor: str
    """its image processor without torchvision; of `patches` the pixels are this package's own"""
    pixels: Pixels
    placeholder: str
    """the image in a rendered chat template"""
    template: Template
    """the conversation, where the checkpoint brings no chat template of its own"""
    image_tokens: Count | None = None
    """image tokens of an image; None: one per square of merged patches"""
    language: str = LANGUAGE
    parameters: tuple[str, ...] = ()
    """projectors that are bare parameters: LoRA by PEFT's target_parameters, dropout 0"""
    entry: str = ""
    """the module before the tower's blocks, skipped where their outputs are known"""
    around: tuple[str, str] = ("", "")
    """texts that the processor sets around the image tokens"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of the image processor: one picture, one tile"""
    edge: tuple[str, ...] = ()
    """settings that take the tower's side as their longest edge; none: `size` as a square"""
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    types: str = ""
    """the argument that marks image tokens, where the model asks for one"""
    mrope: bool = False
    """rope positions in three parts, told by the model's get_rope_index"""
    crosses: bool = False
    """cross-attention to the image: a mask with every call, no image keys among the text's"""
    boxes: Boxes = "1000"
    """the numbers in which the family writes boxes when asked in its own format"""
    native: str = "json"
    """prompt style of its own format"""
    style: str = "native"
    """prompt style by default"""
    video: bool = False
    """its processor also asks for a video processor's settings"""
    fast: bool = False
    """has a forward pass of its own (qwen3_vl.py)"""
    checkpoints: tuple[str, ...] = ()
    """published models that the row is written for; none of them was run"""

    def targets(self, projector: bool) -> str:
        """Full match of the linears that get LoRA."""
        if not projector or not self.projector:
            return self.language
        return f"{self.language}|{self.projector}"

    def parameter_targets(self, projector: bool) -> list[str]:
        """The bare parameters that get LoRA."""
        return list(self.parameters) if projector else []

    def multiple(self, config: Any) -> int:
        """Pixels that image sides are multiples of; squares take any picture."""
        if self.pixels != "patches":
            return 1
        vision = config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    def side(self, config: Any) -> int:
        """Pixels along the square that the tower sees."""
        size = config.vision_config.image_size
        return size if isinstance(size, int) else size[0]


FAMILIES: dict[str, Family] = {}
"""By `model_type`."""


def register(row: Family) -> Family:
    """Makes a family known. Raises ConfigError for one that is known already."""
    if row.model_type in FAMILIES:
        raise ConfigError(
            f"a family {row.model_type} is known already; two rows cannot both hold; "
            "give the row another model_type"
        )
    FAMILIES[row.model_type] = row
    return row


def row_of(model: nn.Module) -> Family:
    """The row of a loaded model, with PEFT around it or without."""
    any_model: Any = model
    base = any_model.get_base_model() if hasattr(model, "get_base_model") else any_model
    return FAMILIES[base.config.model_type]


def square_tokens(config: Any) -> int:
    """Tokens of a square whose patches are all kept."""
    vision = config.vision_config
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return (side // patch) ** 2


def _shuffled(config: Any) -> int:
    """InternVL: patches fold by the square of its ratio."""
    return int(square_tokens(config) * config.downsample_ratio**2)


def _scaled(config: Any) -> int:
    """Idefics3, SmolVLM: patches fold by the square of their factor."""
    return square_tokens(config) // config.scale_factor**2


def _soft(config: Any) -> int:
    return config.mm_tokens_per_image


def _one(config: Any) -> int:
    return 1


def _with_newline(config: Any) -> int:
    return square_tokens(config) + 1


QWEN_MERGER = r"model\.visual\.merger\.mlp\.[02]"
QWEN_SYSTEM = Template(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>",
    QWEN.tail,
    QWEN.turn,
)
IDEFICS = Template("<|im_start|>User:", "", "<end_of_utterance>\nAssistant:")
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

register(
    Family(
        "qwen3_vl",
        projector=PROJECTOR_TARGETS,
        language=LANGUAGE_TARGETS,
        tower=r"visual\.blocks\.\d+",
        entry="visual.patch_embed",
        processor="Qwen3VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        pixels="patches",
        placeholder="<|image_pad|>",
        template=QWEN,
        types="mm_token_type_ids",
        mrope=True,
        style="natural",
        video=True,
        fast=True,
        checkpoints=("Qwen/Qwen3-VL-2B, -4B, -8B, -32B-Instruct",),
    )
)
register(
    Family(
        "qwen3_vl_moe",
        projector=PROJECTOR_TARGETS,
        language=ATTENTION_ALONE,  # its experts are bare parameters
        tower=r"visual\.blocks\.\d+",
        entry="visual.patch_embed",
        processor="Qwen3VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        pixels="patches",
        placeholder="<|image_pad|>",
        template=QWEN,
        types="mm_token_type_ids",
        mrope=True,
        style="natural",
        video=True,
        checkpoints=("Qwen/Qwen3-VL-30B-A3B-Instruct",),
    )
)
register(
    Family(
        "qwen2_5_vl",
        projector=QWEN_MERGER,
        tower=r"visual\.blocks\.\d+",
        entry="visual.patch_embed",
        processor="Qwen2_5_VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        pixels="patches",
        placeholder="<|image_pad|>",
        template=QWEN_SYSTEM,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        types="mm_token_type_ids",
        mrope=True,
        boxes="pixels",
        video=True,
        checkpoints=("Qwen/Qwen2.5-VL-3B, -7B, -32B-Instruct",),
    )
)
register(
    Family(
        "qwen2_vl",
        projector=QWEN_MERGER,
        tower=r"visual\.blocks\.\d+",
        entry="visual.patch_embed",
        processor="Qwen2VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        pixels="patches",
        placeholder="<|image_pad|>",
        template=QWEN_SYSTEM,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        types="mm_token_type_ids",
        mrope=True,
        native="box",
        video=True,
        checkpoints=("Qwen/Qwen2-VL-2B, -7B-Instruct",),
    )
)
register(
    Family(
        "internvl",
        projector=r"model\.multi_modal_projector\.linear_[12]",
        tower="vision_tower",
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessorPil",
        pixels="square",
        placeholder="<IMG_CONTEXT>",
        around=("<img>", "</img>"),
        template=Template("<|im_start|>user\n", "\n", "<|im_end|>\n<|im_start|>assistant\n"),
        image_tokens=_shuffled,
        settings={"crop_to_patches": False},
        native="ref",
        video=True,
        checkpoints=("OpenGVLab/InternVL3-*-hf, InternVL3_5-*-HF",),
    )
)
register(
    Family(
        "gemma3",
        projector="",
        parameters=("multi_modal_projector.mm_input_projection_weight",),
        tower="vision_tower",
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessorPil",
        pixels="square",
        placeholder="<start_of_image>",
        around=("\n\n<start_of_image>", "<end_of_image>\n\n"),
        template=Template(
            "<bos><start_of_turn>user\n", "", "<end_of_turn>\n<start_of_turn>model\n"
        ),
        image_tokens=_soft,
        settings={"do_pan_and_scan": False},
        types="token_type_ids",
        checkpoints=("google/gemma-3-4b-it, -12b-it, -27b-it",),
    )
)
register(
    Family(
        "mllama",
        projector=r"model\.multi_modal_projector",
        tower="vision_model",
        processor="MllamaProcessor",
        image_processor="MllamaImageProcessorPil",
        pixels="tiles",
        placeholder="<|image|>",
        template=Template(
            "<|begin_of_text|>" + HEADER.format("user"),
            "",
            "<|eot_id|>" + HEADER.format("assistant"),
        ),
        image_tokens=_one,
        settings={"max_image_tiles": 1},
        mean=CLIP_MEAN,
        std=CLIP_STD,
        crosses=True,
        checkpoints=("meta-llama/Llama-3.2-11B-Vision-Instruct, -90B-Vision-Instruct",),
    )
)
for name, checkpoint in (
    ("smolvlm", "HuggingFaceTB/SmolVLM2-256M, -500M-Video-Instruct, -2.2B-Instruct"),
    ("idefics3", "HuggingFaceM4/Idefics3-8B-Llama3, HuggingFaceTB/SmolVLM-Instruct"),
):
    register(
        Family(
            name,
            projector=r"model\.connector\.modality_projection\.proj",
            tower="vision_model",
            processor="SmolVLMProcessor" if name == "smolvlm" else "Idefics3Processor",
            image_processor=(
                "SmolVLMImageProcessorPil" if name == "smolvlm" else "Idefics3ImageProcessorPil"
            ),
            pixels="listed",
            placeholder="<image>",
            around=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
            template=IDEFICS,
            image_tokens=_scaled,
            settings={"do_image_splitting": False},
            edge=("size", "max_image_size"),
            video=name == "smolvlm",
            checkpoints=(checkpoint,),
        )
    )
register(
    Family(
        "llava_onevision",
        projector=r"model\.multi_modal_projector\.linear_[12]",
        tower="vision_tower",
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessorPil",
        pixels="anyres",
        placeholder="<image>",
        template=Template("<|im_start|>user ", "\n", "<|im_end|><|im_start|>assistant\n"),
        image_tokens=_with_newline,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        video=True,
        checkpoints=("llava-hf/llava-onevision-qwen2-0.5b-ov-hf, -7b-ov-hf",),
    )
)


# ---- a family that is not known ------------------------------------------------------------------


def lacking(config: Mapping[str, Any]) -> Iterator[str]:
    """What the config.json of a model of an unknown family lacks to be trained by a row."""
    if not isinstance(config.get("vision_config"), dict):
        yield "a vision_config: it takes no images"
    if not isinstance(config.get("text_config"), dict):
        yield "a text_config: its language model cannot be told from its tower"
    if not any(name in config for name in ("image_token_id", "image_token_index")):
        yield "an image_token_id: where the image goes cannot be told"


def draft(model: nn.Module) -> dict[str, str]:
    """The row to begin with for a model (shapes are enough), as field and value in Python; guesses
    from module names, to be read over.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    between = [name for name in names if re.search(r"proj(ector|ection)|connector|merger", name)]
    outside = [name for name in between if not re.search(r"layers?\.\d+|blocks\.\d+", name)]
    towers = [name for name, _ in model.named_modules() if re.fullmatch(r"model\.vi\w+", name)]
    any_model: Any = model
    language = [name for name in names if re.fullmatch(LANGUAGE, name)]
    guessed = {
        "model_type": repr(any_model.config.model_type),
        "projector": repr("|".join(re.escape(name) for name in outside)),
        "tower": repr(towers[0].removeprefix("model.") if towers else "?"),
        "language": "LANGUAGE" if language else "'?'  # no linear matches LANGUAGE",
    }
    required = [f.name for f in fields(Family) if f.default is MISSING]
    open_ = {name: "?" for name in required if name not in guessed and name != "settings"}
    return guessed | open_
