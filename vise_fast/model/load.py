"""Load a vision-language model, freeze it, attach LoRA: one copy of the weights serves policy
(adapters on) and reference (off).

transformers owns the weights, PEFT the LoRA tensors and their format, bitsandbytes the quantised
linears; the fast forward runs over the same tensors. The image processor is never built: it needs
torchvision.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vise_kernels
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from vise_kernels.dispatch import Choice

from vise_fast import nano
from vise_fast.config import places
from vise_fast.config.schema import Config
from vise_fast.model import base as bases
from vise_fast.model import quantise
from vise_fast.model.attending.attention import attend_plain
from vise_fast.model.attending.flash import choose
from vise_fast.model.eight_bit_rows import replace_embedding
from vise_fast.model.families import BLOCKS, FAMILIES, Family, row_of
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.model.saved import adapter as adapters
from vise_fast.model.stock_modules import StockModules, image_token
from vise_fast.system import hub
from vise_fast.system.errors import ConfigError, EnvironmentFault
from vise_fast.text import styles
from vise_fast.text.prompts import Style, style_for
from vise_fast.text.tokens import Template, Tokens, written_by

DECODER = r"\.(language_model|text_model)\.layers\."


@dataclass
class Policy:
    """A loaded model with adapters: `model` is the PeftModel, `backbone` the fast forward over its
    tensors, or the stock modules of a family without one.
    """

    model: PeftModel
    tokens: Tokens
    backbone: Any
    source: str

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.backbone.device

    @property
    def attention(self) -> Choice:
        """How the decoder attends, and why."""
        if isinstance(self.backbone, StockModules):
            form = self.backbone.config._attn_implementation
            return Choice(form, "transformers' own forward")
        if self.backbone.attend is attend_plain:
            return Choice("plain", "asked for by model.attention")
        return choose(self.device, self.backbone.dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable fp32 LoRA masters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The stock modules as the frozen reference: adapters off.

        The fast engine takes `adapters=False` instead.
        """
        with self.model.disable_adapter():
            yield


def silent(text: str) -> None:
    """Says nothing."""


def resolve(path: str) -> str:
    """The directory or hub id behind a model path; 'nano' is the embedded model.

    Raises ConfigError for a directory that is not there.
    """
    if path == "nano":
        return str(nano.DIRECTORY)
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(
                f"model.path {path} has no config.json; it is not a model directory; point it at "
                "one saved by transformers"
            )
        return path
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"model.path {path} does not exist; a model is a directory or a hub id like "
            "Qwen/Qwen3-VL-2B-Instruct; check the path"
        )
    return path


def device_of(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises EnvironmentFault where the GPU asked for is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentFault(
            f"model.device {name}: torch sees no GPU here; use --model.device cpu or install a "
            "CUDA build of torch"
        )
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU, fp32 on a CPU; else the one of that name."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def read_config(path: str) -> PreTrainedConfig:
    """The model's transformers config.

    Raises ConfigError for a hub id that cannot be had and for an unknown family, EnvironmentFault
    for a damaged file.
    """
    return bases.read_config(resolve(path), path, FAMILIES)


def at_hand(path: str) -> bool:
    """Whether the model can be loaded without a download."""
    source = resolve(path)
    return Path(source).is_dir() or hub.is_cached(source)


def known_shapes(path: str) -> PreTrainedConfig:
    """The model's transformers config; for the published sizes from configs/models, where the model
    itself is not at hand.
    """
    file = places.SHAPES / f"{path.rsplit('/', 1)[-1].lower().removesuffix('-instruct')}.json"
    if file.is_file() and not at_hand(path):
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    return read_config(path)


def grid_multiple(path: str) -> int:
    """Pixels per image token side: images are resized to multiples of it."""
    shapes = known_shapes(path)
    return FAMILIES[shapes.model_type].multiple(shapes)


def load(
    config: Config,
    adapter: str | None = None,
    weights: str | None = None,
    say: Callable[[str], None] = silent,
) -> Policy:
    """The policy of a run. `adapter`: LoRA directory to start from; `weights='random'`: shapes
    only, for benches; `say` takes what a person should know of the files.

    Raises ConfigError for files that cannot be meant, EnvironmentFault for damaged ones and for a
    device that is not there, NumericFault for weights that are not finite.
    """
    disable_progress_bar()
    adapter = adapter or config.lora.init_from
    if adapter is not None:
        adapters.verify(adapter, say)
    model_config = read_config(config.model.path)
    device = device_of(config.model.device)
    base = _load_base(config, model_config, device, weights)
    base.requires_grad_(False).eval()
    quantise.settle(base)
    if config.model.int8_embedding:
        replace_embedding(base, config.model.path)
    quantise.check(base, config.model.quant)
    model = attach(base, config, adapter)
    check_targets(model)
    tokens = _tokens(config, model_config, base)
    backbone = backbone_of(model, resolve(config.model.path))
    if config.model.attention == "plain" and isinstance(backbone, Qwen3VL):
        backbone.attend = attend_plain
    vise_kernels.prefer("plain" if config.model.kernels == "plain" else None)
    return Policy(model, tokens, backbone, resolve(config.model.path))


def backbone_of(model: PeftModel, source: str | None = None) -> Any:
    """The fast forward where the family has one, else the stock modules."""
    return Qwen3VL(model) if row_of(model).fast else StockModules(model, source)


def _tokens(config: Config, model_config: PreTrainedConfig, base: PreTrainedModel) -> Tokens:
    """Raises EnvironmentFault where tokenizer and config do not fit the model's rows."""
    path = config.model.path
    head: Any = base.lm_head
    embedding: Any = base.get_input_embeddings()
    known = embedding.num_embeddings  # mllama embeds its image token and has no head row for it
    tokenizer = bases.read_tokenizer(resolve(path), path, known)
    image = image_token(model_config)
    if not 0 <= image < known:
        raise EnvironmentFault(
            f"config.json of {path} cannot be used: image_token_id {image} is none of the "
            f"model's {known} rows; {bases.AGAIN}"
        )
    return tokens_of(config, model_config, tokenizer, head.weight.shape[0])


def tokens_of(
    config: Config, model_config: PreTrainedConfig, tokenizer: Any, vocabulary: int
) -> Tokens:
    """How this run speaks to its model, whose head has so many rows. Raises ConfigError."""
    row = FAMILIES[model_config.model_type]
    style = style_of(config, model_config)
    template = template_of(tokenizer, row, style.system)
    return Tokens(tokenizer, style, vocabulary, image_token(model_config), template)


def style_of(config: Config, model_config: PreTrainedConfig) -> Style:
    """The prompt style of this run: what `prompts` asks for, else the model's own, else its
    family's. Raises ConfigError.
    """
    row = FAMILIES[model_config.model_type]
    default = row.style
    if hasattr(model_config, "vise_prompts"):
        default = style_for(model_config).name
    return styles.chosen(config.prompts, styles.Manner(default, row.native, row.boxes))


def template_of(tokenizer: Any, row: Family, system: str = "") -> Template:
    """The conversation around an image: the checkpoint's chat template, or the row's; what the
    processor would set around the image tokens is in it. Families with a forward of their own keep
    the row's.

    Raises ConfigError for a system turn that the row's cannot hold.
    """
    found = None if row.fast else written_by(tokenizer, row.placeholder, system)
    if found is None:
        found = row.template.with_system(system)
    before, after = row.around
    return Template(found.head + before, after + found.tail, found.turn)


def _load_base(
    config: Config, model_config: PreTrainedConfig, device: torch.device, weights: str | None
) -> PreTrainedModel:
    """The whole model, frozen or not, on its device; quantised where asked for."""
    dtype = dtype_of(config.model.dtype, device)
    if weights == "random":
        with torch.device("meta"):
            shell = AutoModelForImageTextToText.from_config(
                model_config, dtype=dtype, trust_remote_code=False
            )
        return quantise.random_model(shell, config, device)
    settings: dict[str, Any] = {"dtype": dtype}
    bits = quantise.settings(config, dtype)
    if bits is not None:
        settings["quantization_config"] = bits
    if bits is not None or device.type != "cpu":
        settings["device_map"] = {"": device}
    path = config.model.path
    return bases.read_weights(resolve(path), path, model_config, **settings)


def attach(base: PreTrainedModel, config: Config, adapter: str | None = None) -> PeftModel:
    """LoRA on the anchored targets, fp32 masters; seeded, so that two runs start from the same
    adapter.
    """
    if adapter is not None:
        return _fp32_adapters(adapters.load(base, adapter).eval())
    row = row_of(base)
    bare = row.parameter_targets(config.lora.projector)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=float(config.lora.alpha),  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=0.0 if bare else config.lora.dropout,  # of a bare parameter PEFT knows none
        target_modules=row.targets(config.lora.projector),
        target_parameters=bare or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Between PEFT and transformers; nothing a user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(config.train.seed)
        return _fp32_adapters(get_peft_model(base, lora).eval())


def _fp32_adapters(model: PeftModel) -> PeftModel:
    """LoRA tensors as fp32 masters, in place."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def processor_of(model: PeftModel) -> str:
    """The name of the processor class of the model's family."""
    return row_of(model).processor


def check_targets(model: PeftModel) -> int:
    """The number of LoRA tensors; asserts that none lies inside the vision blocks and that the
    decoder carries some.
    """
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    inside = [name for name in names if re.search(BLOCKS, name)]
    if inside or not any(re.search(DECODER, name) for name in names):
        raise ConfigError(
            f"LoRA landed on {len(inside)} tensors of the vision tower; the targets must not; "
            "check the model family"
        )
    return len(names)
