"""bitsandbytes bases: which modules are quantised, how a frozen quantised product is taken forwards
and backwards, random ones for benches.

Only the linears of the language layers are quantised; vision tower, mergers, norms, embedding and
head stay 16- or 32-bit, which `check` asserts by module class. `prepare_model_for_kbit_training` is
never called: it would upcast all of those to fp32.

int8 holds weights in 8 bits. At threshold 0, the default, that is all: a product multiplies by the
weights as they are read, as nf4 does. A threshold above 0 is LLM.int8 (Dettmers et al. 2022), which
rounds the activations too. Rounding is a jump: inputs that differ by one fp32 rounding (the order
of a sum, which follows the number of rows) may land a whole int8 step apart, and every layer adds
such jumps; and a column with an outlier in *any* row of the product is taken in 16 bit for *all*
rows. So with a threshold an answer depends on its neighbours (`slices_matter`).
"""

from __future__ import annotations

import logging
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PreTrainedModel
from vise_kernels import unpack_int8, unpack_nf4
from vise_kernels.dispatch import choose
from vise_kernels.unpack import Coarse, Nibbles

from vise_fast.config.schema import Config
from vise_fast.system.errors import ConfigError, EnvironmentFault

LANGUAGE = re.compile(r"(?:model\.)?(?:language_model|text_model)\.layers\.\d+\.")
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
KEPT = [  # what transformers must leave alone
    r"model\.visual",
    "visual",
    r"model\.vision_tower",
    r"model\.vision_model",
    r"model\.multi_modal_projector",
    r"model\.connector",
    "lm_head",
]
FEW_ROWS = 4
"""Of a product: bitsandbytes' kernel for few multiplies by the packed weight (from 0.50 on, on any
card); for more it would write the weight out, and that is quicker done here."""
WHOLE = (torch.float32, torch.bfloat16, torch.float16)


def bitsandbytes() -> ModuleType:
    """The library, imported on first use. Raises EnvironmentFault where it is missing."""
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise EnvironmentFault(
            f"model.quant and the 8-bit optimizers need bitsandbytes ({error}); pip "
            "install bitsandbytes, or use model.quant none"
        ) from error
    # It warns at every int8 product that bf16 and fp32 rows are rounded to fp16 before they are
    # quantised.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


def slices_matter(config: Config) -> bool:
    """Whether the result of a step depends on how its batch is cut: LLM.int8's does."""
    return config.model.quant == "int8" and config.model.int8_threshold > 0


def settings(config: Config, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' BitsAndBytesConfig of `model.quant`, None for an unquantised base."""
    if config.model.quant == "none":
        return None
    bitsandbytes()
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


def random_model(shell: PreTrainedModel, config: Config, device: torch.device) -> PreTrainedModel:
    """`shell`, a transformers model on the meta device, with random weights: module by module, so
    that no full-precision whole ever exists.
    """
    # Names only: a list of the modules would keep what is replaced.
    for name in [name for name, _ in shell.named_modules()]:
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
    marks: Any = shell
    marks.is_loaded_in_8bit = config.model.quant == "int8"
    marks.is_loaded_in_4bit = config.model.quant == "nf4"
    return shell


def quantised(linear: nn.Linear, config: Config) -> nn.Module:
    """A bitsandbytes linear holding the weights of `linear`, on its device."""
    made = _int8(linear, config) if config.model.quant == "int8" else _nf4(linear, config)
    made.bias = linear.bias
    return made


def _int8(linear: nn.Linear, config: Config) -> nn.Module:
    library = bitsandbytes()
    made = library.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        has_fp16_weights=False,
        threshold=config.model.int8_threshold,
        device="meta",
    )
    weight = linear.weight.data
    packed = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.weight = packed.to(weight.device)
    return made


def _nf4(linear: nn.Linear, config: Config) -> nn.Module:
    library = bitsandbytes()
    weight = linear.weight.data
    form = {"compress_statistics": config.model.double_quant, "quant_type": "nf4"}
    made = library.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=weight.dtype,
        device="meta",
        **form,
    )
    packed = library.nn.Params4bit(weight, requires_grad=False, module=made, **form)
    made.weight = packed.to(weight.device)
    return made


def settle(model: nn.Module) -> None:
    """After loading: int8 scales where they belong, and no repacking of 4-bit weights on a CPU (the
    packed layout has no backward).
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ == KINDS["int8"] and module.weight.CB is not None:
            module.init_8bit_state()
        if type(module).__name__ == KINDS["nf4"]:
            module.support_avx512bf16_for_cpu = False


def check(model: nn.Module, quant: str) -> int:
    """The number of quantised linears.

    Raises ConfigError unless, by class and dtype, all language linears are `quant` and all else is
    16- or 32-bit.
    """
    wanted = KINDS.get(quant, "Linear")
    found = 0
    for name, module in model.named_modules():
        kind = type(module).__name__
        quantises = kind in KINDS.values()
        inside = bool(LANGUAGE.match(name)) and (quantises or type(module) is nn.Linear)
        if (kind != wanted) if inside else quantises:
            raise ConfigError(
                f"{name} is a {kind}; with model.quant {quant} language linears are {wanted} and "
                "nothing else is quantised; save the base unquantised"
            )
        if not inside:
            _check_whole(name, module)
        found += inside and quant != "none"
    return found


def _check_whole(name: str, module: nn.Module) -> None:
    """Raises ConfigError for parameters of the module's own that are not 16- or 32-bit."""
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in WHOLE:
            raise ConfigError(
                f"{name} holds {parameter.dtype}; only language linears may be quantised; save the "
                "base unquantised"
            )


def product(base: Any, x: Tensor) -> Tensor:
    """x (n, in) times the quantised weight of `base`, transposed, plus its bias: (n, out) in x's
    dtype. No gradient: see `dequantised`.
    """
    if hasattr(base, "product"):
        return base.product(x)
    if type(base).__name__ == KINDS["nf4"]:
        if writes_out(base, x):
            return F.linear(x, dequantised(base, x.dtype), base.bias)
        state = base.weight.quant_state
        return bitsandbytes().matmul_4bit(x, base.weight, bias=base.bias, quant_state=state)
    state = base.state
    if state.threshold == 0:
        return F.linear(x, dequantised(base, x.dtype), base.bias)
    # The scaling below divides by the row's largest value, so the fp16 copy must exist even for
    # fp32 rows.
    rows, scale, outliers = bitsandbytes().functional.int8_vectorwise_quant(
        x.to(torch.float16), threshold=state.threshold
    )
    multiply = torch.ops.bitsandbytes.int8_mixed_scaled_mm
    return multiply(x, rows, base.weight.data, scale, state.SCB, outliers, base.bias)[0]


def product_into(place: Tensor, base: Any, x: Tensor) -> None:
    """`product` into `place` (n, out), columns of a wider matrix; in place where a card can."""
    whole = not writes_out(base, x) or base.bias is not None
    if whole or (torch.is_grad_enabled() and x.requires_grad):
        place.copy_(product(base, x))
        return
    if hasattr(base, "product"):
        base.scratch(x)
        return
    # cuBLAS takes rows that lie apart: no copy
    torch.mm(x, dequantised(base, x.dtype).T, out=place)


def writes_out(base: Any, x: Tensor) -> bool:
    """Whether a product with x (n, in) writes the weight out in one launch, on a card."""
    if hasattr(base, "product"):
        return base.writes_out(x)
    if not _in_one_launch(base, x.device):
        return False
    if type(base).__name__ == KINDS["nf4"]:
        return len(x) > FEW_ROWS
    return base.state.threshold == 0


def dequantised(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that `product` stands for: what a gradient of the input is multiplied
    by.
    """
    if hasattr(base, "dequantised"):
        return base.dequantised(dtype)
    weight = base.weight.data
    if type(base).__name__ != KINDS["nf4"]:
        return unpack_int8(weight, base.state.SCB, dtype)
    state = base.weight.quant_state
    if _in_one_launch(base, weight.device):
        return unpack_nf4(_nibbles(weight, state), tuple(state.shape), dtype)
    return bitsandbytes().functional.dequantize_4bit(weight, state).to(dtype)


def _in_one_launch(base: Any, device: torch.device) -> bool:
    kind = "nf4" if type(base).__name__ == KINDS["nf4"] else "int8"
    return choose(f"unpack_{kind}", device).path == "triton"


def _nibbles(weight: Tensor, state: Any) -> Nibbles:
    """What the library holds, by our names."""
    coarse = None
    if state.nested:
        wide = state.state2
        coarse = Coarse(wide.code, wide.absmax, state.offset, wide.blocksize)
    return Nibbles(weight, state.code, state.absmax, state.blocksize, coarse)
