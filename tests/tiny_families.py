"""Random models of every family that has a row, two layers deep, from transformers' own config
classes; no tokenizer, no files. Widths differ between tower and language model.
"""

import functools

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny import IMAGE, VOCAB
from tiny import build as build_qwen3

from vise_fast.model.families import FAMILIES

GRIDS = {"image_token_id": IMAGE, "video_token_id": 6}
EDGES = {"vision_start_token_id": 3, "vision_end_token_id": 4}
SQUARE = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
SQUARE |= {"image_size": 16, "patch_size": 4}


def text(layers=2, **more):
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    } | more


def rope(*sections, **more):
    turn = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"rope_parameters": turn | more}


def qwen2_5_vl():
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    words = text(**rope(2, 1, 1))
    return hf.Qwen2_5_VLConfig(text_config=words, vision_config=vision, **GRIDS, **EDGES)


def qwen2_vl():
    vision = {
        "depth": 2,
        "embed_dim": 24,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 4,
    }
    words = text(**rope(2, 1, 1))
    return hf.Qwen2VLConfig(text_config=words, vision_config=vision, **GRIDS, **EDGES)


def qwen3_vl_moe():
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    words = text(head_dim=16, **experts, **rope(4, 2, 2, mrope_interleaved=True))
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    }
    return hf.Qwen3VLMoeConfig(text_config=words, vision_config=vision, **GRIDS, **EDGES)


def internvl():
    vision = SQUARE | {"hidden_size": 24, "image_size": [16, 16], "patch_size": [4, 4]}
    words = text(model_type="qwen2")
    return hf.InternVLConfig(
        text_config=words, vision_config=vision, image_token_id=IMAGE, image_seq_length=4
    )


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    words = text(head_dim=8, layer_types=kinds, sliding_window=192)
    return hf.Gemma3Config(
        text_config=words,
        vision_config=SQUARE | {"hidden_size": 24, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=3,
        eoi_token_index=4,
    )


def mllama():
    vision = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 24,
        "vision_output_dim": 24,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    turn = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    words = text(3, cross_attention_layers=[1], bos_token_id=0, **turn)
    return hf.MllamaConfig(text_config=words, vision_config=vision, image_token_index=IMAGE)


def folded(kind):
    return kind(
        text_config=text(model_type="llama"),
        vision_config=SQUARE | {"hidden_size": 24},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def llava_onevision():
    siglip = {"model_type": "siglip_vision_model", "vision_use_head": False, "hidden_size": 24}
    return hf.LlavaOnevisionConfig(
        text_config=text(model_type="qwen2"),
        vision_config=SQUARE | siglip,
        image_grid_pinpoints=[[16, 16], [16, 32]],
        vision_feature_layer=-1,
        **GRIDS,
    )


CONFIGS = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "mllama": mllama,
    "smolvlm": functools.partial(folded, hf.SmolVLMConfig),
    "idefics3": functools.partial(folded, hf.Idefics3Config),
    "llava_onevision": llava_onevision,
}


def bare(family, seed=0):
    """The model without adapters; numbers as in tiny.py, so that answers differ."""
    if family == "qwen3_vl":
        return build_qwen3(adapters=False, seed=seed)
    return bare_of(CONFIGS[family](), seed)


def bare_of(config, seed=0):
    """A random model of this config."""
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            flat = p.dim() < 2
            p.copy_(torch.randn_like(p) * (0.1 if flat else 1.2 / p.shape[-1] ** 0.5) + flat)
    return model.requires_grad_(False)


def build(family, seed=0):
    """A PeftModel with non-zero LoRA where the family's row puts it."""
    model = bare(family, seed)
    row = FAMILIES[family]
    settings = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=row.targets(True),
        target_parameters=row.parameter_targets(True) or None,
    )
    model = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.2)
    return model
