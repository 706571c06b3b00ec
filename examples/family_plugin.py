"""A model family of your own: LLaVA-1.5 as one row.

    python -m vise_fast.train --run.plugins examples/family_plugin.py --model.path llava-1.5-7b-hf

`python -m vise_fast.doctor --model DIR` prints the row to begin with. docs/BACKBONES.md says what
each field means, and what has to be true of a family for the generic engine to be exact.
"""

from vise_fast.model.families import CLIP_MEAN, CLIP_STD, Family, register, square_tokens
from vise_fast.text.tokens import Template

register(
    Family(
        "llava",
        projector=r"model\.multi_modal_projector\.linear_[12]",
        tower="vision_tower",
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessorPil",
        settings={"do_center_crop": False},
        pixels="square",
        placeholder="<image>",
        template=Template("USER: ", "\n", " ASSISTANT:"),
        image_tokens=square_tokens,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
)
