"""bitsandbytes bases: which modules are quantised, how a frozen quantised product is taken forwards
and backwards, random ones for benches.

Only the linears of the language layers are quantised; vision tower, mergers, norms, embedding and
head stay 16- or 32-bit, which `check` asserts by module class. `prepare_model_for_kbit_training` is
never called: it would upcast all of those to fp32. An int8 product with a threshold above 0 is
LLM.int8 (Dettmers et al. 2022): a column with an outlier in *any* row of the product is taken in 16
bit for *all* rows, so a row's result depends, in the last digits, on its neighbours; with threshold
0 it does not.
"""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor, nn

from vise_fast.config.schema import Config
from vise_fast.system.errors import ConfigError, EnvironmentFault

LANGUAGE = re.compile(r"(?:model\.)?language_model\.layers\.\d+\.")
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
KEPT = [r"model\.visual", "visual", "lm_head"]  # what transformers must leave alone


def bitsandbytes():
    """The library, imported on first use. Raises EnvironmentFault where it is missing."""
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise EnvironmentFault(
            f"model.quant and the 8-bit optimizers need bitsandbytes ({error}); install "
            "vise-fast[quant] or use model.quant none"
        ) from error
    # It warns at every int8 product that bf16 and fp32 rows are rounded to fp16 before they are
    # quantised.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


def settings(config: Config, dtype: torch.dtype):
    """transformers' BitsAndBytesConfig of `model.quant`, None for an unquantised base."""
    if config.model.quant == "none":
        return None
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    if config.model.quant == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=config.model.int8_threshold,
            llm_int8_skip_modules=KEPT,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT,
        bnb_4bit_use_double_quant=config.model.double_quant,
    )


def random_model(shell: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """`shell`, a transformers model on the meta device, with random weights: module by module, so
    that no full-precision whole ever exists.
    """
    for name in [
        name for name, _ in shell.named_modules()
    ]:  # names only: a list of the modules would keep what is replaced
        module = shell.get_submodule(name)
        if any(True for _ in module.children()):
            continue
        if any(x.is_meta for x in [*module.parameters(), *module.buffers()]):
            module.to_empty(device=device)
            shell._init_weights(module)
        if config.model.quant != "none" and type(module) is nn.Linear and LANGUAGE.match(name):
            parent, _, child = name.rpartition(".")
            setattr(shell.get_submodule(parent), child, quantised(module, config))
    shell.tie_weights()
    shell.is_loaded_in_8bit = config.model.quant == "int8"
    shell.is_loaded_in_4bit = config.model.quant == "nf4"
    return shell


def quantised(linear: nn.Linear, config: Config) -> nn.Module:
    """A bitsandbytes linear holding the weights of `linear`, on its device."""
    library = bitsandbytes()
    weight = linear.weight.data
    bias = linear.bias
    shape = (linear.in_features, linear.out_features, bias is not None)
    if config.model.quant == "int8":
        new = library.nn.Linear8bitLt(
            *shape, has_fp16_weights=False, threshold=config.model.int8_threshold, device="meta"
        )
        new.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(
            weight.device
        )
    else:
        new = library.nn.Linear4bit(
            *shape,
            compute_dtype=weight.dtype,
            compress_statistics=config.model.double_quant,
            quant_type="nf4",
            device="meta",
        )
        packed = library.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=config.model.double_quant,
            quant_type="nf4",
            module=new,
        )
        new.weight = packed.to(weight.device)
    new.bias = bias
    return new


def settle(model: nn.Module) -> None:
    """After loading: int8 scales where they belong, and no repacking of 4-bit weights on a CPU (the
    packed layout has no backward).
    """
    for module in model.modules():
        if type(module).__name__ == KINDS["int8"] and module.weight.CB is not None:
            module.init_8bit_state()
        if type(module).__name__ == KINDS["nf4"]:
            module.support_avx512bf16_for_cpu = False


def check(model: nn.Module, quant: str) -> int:
    """The number of quantised linears.

    Asserts by class and dtype that all language linears are `quant` and that all else is 16- or
    32-bit.
    """
    wanted = KINDS.get(quant, "Linear")
    found = 0
    for name, module in model.named_modules():
        kind = type(module).__name__
        inside = bool(LANGUAGE.match(name)) and (
            kind in KINDS.values() or type(module) is nn.Linear
        )
        if inside and kind != wanted or not inside and kind in KINDS.values():
            raise ConfigError(
                f"{name} is a {kind}; with model.quant {quant} language linears are {wanted} and "
                "nothing else is quantised; save the base unquantised"
            )
        found += inside and quant != "none"
        held = (
            []
            if inside
            else [
                x
                for x in module.parameters(recurse=False)
                if x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            ]
        )
        if held:
            raise ConfigError(
                f"{name} holds {held[0].dtype}; only language linears may be quantised; save the "
                "base unquantised"
            )
    return found


def product(base: nn.Module, x: Tensor) -> Tensor:
    """x (n, in) times the quantised weight of `base`, transposed, plus its bias: (n, out) in x's
    dtype. No gradient: see `dequantised`.
    """
    if hasattr(base, "product"):
        return base.product(x)
    if type(base).__name__ == KINDS["nf4"]:
        return bitsandbytes().matmul_4bit(
            x, base.weight, bias=base.bias, quant_state=base.weight.quant_state
        )
    state = base.state
    # The scaling below divides by the row's largest value, so the fp16 copy must exist even for
    # fp32 rows.
    rows, scale, outliers = bitsandbytes().functional.int8_vectorwise_quant(
        x.to(torch.float16), threshold=state.threshold
    )
    if state.threshold > 0:
        return torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x, rows, base.weight.data, scale, state.SCB, outliers, base.bias
        )[0]
    return torch.ops.bitsandbytes.int8_scaled_mm(
        rows, base.weight.data, scale, state.SCB, bias=base.bias, dtype=x.dtype
    )


def dequantised(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that `product` stands for: what a gradient of the input is multiplied
    by.
    """
    if hasattr(base, "dequantised"):
        return base.dequantised(dtype)
    if type(base).__name__ == KINDS["nf4"]:
        return (
            bitsandbytes()
            .functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            .to(dtype)
        )
    return base.weight.data.to(dtype) * (base.state.SCB / 127.0).to(dtype)[:, None]
