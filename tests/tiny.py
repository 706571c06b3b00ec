"""Random Qwen3-VL-architecture models of odd shapes for tests: no tokenizer, no files."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vise_fast.model.qwen3_vl import LORA_TARGETS

IMAGE, PAD, EOS, VOCAB = 5, 0, 1, 67

SHAPES = {
    "gqa2": {
        "hidden": 48,
        "layers": 3,
        "heads": 4,
        "kv": 2,
        "head_dim": 16,
        "deep": (0,),
        "depth": 2,
        "vision": 32,
        "vision_heads": 2,
        "tie": True,
    },
    "mha_untied": {
        "hidden": 40,
        "layers": 3,
        "heads": 3,
        "kv": 3,
        "head_dim": 16,
        "deep": (0, 1),
        "depth": 3,
        "vision": 24,
        "vision_heads": 2,
        "tie": False,
    },
    "gqa5_deep3": {
        "hidden": 32,
        "layers": 4,
        "heads": 5,
        "kv": 1,
        "head_dim": 16,
        "deep": (0, 2, 3),
        "depth": 4,
        "vision": 16,
        "vision_heads": 2,
        "tie": False,
    },
}


def build(shape="gqa2", seed=0, adapters=True, dtype=torch.float32):
    """A tiny model (a PeftModel with non-zero LoRA when `adapters`)."""
    s = SHAPES[shape]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": s["hidden"],
            "intermediate_size": 2 * s["hidden"] + 8,
            "num_hidden_layers": s["layers"],
            "num_attention_heads": s["heads"],
            "num_key_value_heads": s["kv"],
            "head_dim": s["head_dim"],
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": s["depth"],
            "hidden_size": s["vision"],
            "intermediate_size": 2 * s["vision"],
            "num_heads": s["vision_heads"],
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": s["hidden"],
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": list(s["deep"]),
        },
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=s["tie"],
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn_like(p) * (0.1 if p.dim() == 1 else 1.2 / p.shape[-1] ** 0.5)
                + (1.0 if p.dim() == 1 else 0.0) * (p.dim() == 1)
            )
    model.requires_grad_(False).to(dtype)
    if not adapters:
        return model
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=LORA_TARGETS)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape) * 0.2
    return model


class TinyTokens:
    """The part of `tokens.Tokens` the engine uses, for the tiny vocabulary."""

    head, tail, eos, pad, image_token, vocabulary = [2, 3], [4], [EOS], PAD, IMAGE, VOCAB

    def banned(self):
        mask = torch.zeros(VOCAB, dtype=torch.bool)
        mask[[2, 3, 4, 5, 6]] = True
        return mask


def images(sizes, seed=1):
    torch.manual_seed(seed)
    return [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in sizes]
