"""The frozen base as files: its config, its weights, its tokenizer. They are taken for damaged or
hostile.

Safetensors and JSON only: nothing is unpickled, and no code that lies beside the weights is run.
What libraries raise over a broken file becomes one line that names it; a tensor that is missing or
not finite is refused, because a run on it would train to nothing. Left out: adapters (adapter.py),
what is made of the weights (load.py).
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from vise_fast.system import files, hub
from vise_fast.system.errors import ConfigError, EnvironmentFault, NumericFault, UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
AGAIN = "copy or download the model again"
TEXTS = (".json", ".jinja", ".txt")


@contextlib.contextmanager
def believed(what: str, advice: str = AGAIN) -> Iterator[None]:
    """Whatever a library raises inside, over files that are not what they should be, becomes the
    one line about `what`; EnvironmentFault. Running out of memory stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as fault:  # tokenizers and safetensors raise bare ones
        raise EnvironmentFault(f"{what} cannot be used: {first_line(fault)}; {advice}") from fault


def first_line(fault: BaseException) -> str:
    """The first line of a message, or the name of a fault that says nothing; shortened."""
    lines = str(fault).strip().splitlines() or [""]
    text = " ".join(lines[0].split()) or type(fault).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---- config --------------------------------------------------------------------------------------


def read_config(source: str, path: str, families: Collection[str]) -> PreTrainedConfig:
    """The transformers config of a model directory or hub id; `path` is how the user called it.

    Raises ConfigError for a hub id that cannot be had and for an unknown family, EnvironmentFault
    for a damaged file.
    """
    family = _content(source, path).get("model_type")
    if family not in families:
        known = ", ".join(families)
        raise ConfigError(
            f"model.path {path} is of family {str(family)[:80]}; this trainer knows {known}; "
            "choose a model of those, or see what a row for it would be with: python -m "
            "vise_fast.doctor --model DIR"
        )
    with believed(f"config.json of {path}"), quiet():
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _content(source: str, path: str) -> dict[str, Any]:
    """config.json as it is written."""
    if Path(source).is_dir():
        refuse_special(Path(source), "the model")
        with believed(f"config.json of {path}"):
            return read_json(Path(source) / "config.json")
    hub.reach(source, path)
    try:
        content, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as fault:
        raise ConfigError(
            f"model.path {path} cannot be loaded; {first_line(fault)}; give a local directory or "
            "download the model first"
        ) from fault
    return content


def refuse_special(home: Path, what: str, advice: str = AGAIN) -> None:
    """Libraries would wait at a pipe and read a device without end. Raises EnvironmentFault where a
    text in a directory is no regular file, or one without end.
    """
    for path in sorted(home.iterdir()):
        if path.suffix not in TEXTS or not path.exists() or path.is_dir():
            continue
        regular = path.is_file()
        if not regular or path.stat().st_size > files.LARGEST_JSON:
            why = "larger than any such file" if regular else "no regular file"
            raise EnvironmentFault(f"{what} {home} cannot be used: {path.name} is {why}; {advice}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, ValueError, RecursionError."""
    content = json.loads(files.read(path))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


# ---- weights -------------------------------------------------------------------------------------


def read_weights(
    source: str, path: str, model_config: PreTrainedConfig, **settings: Any
) -> PreTrainedModel:
    """The whole model with the weights of a directory or hub id; `settings` are from_pretrained's.

    Raises ConfigError where there are no safetensors, EnvironmentFault where a file is damaged or
    lacks a tensor, NumericFault where a weight is not finite.
    """
    if Path(source).is_dir():
        _check_files(Path(source), path, model_config)
    with believed(f"the weights of {path}"), quiet():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    model, found = loaded
    _check_whole(found, path)
    if settings.get("quantization_config") is None:
        check_finite(model.state_dict(), f"model.path {path}")
    else:  # a quantised number tells nothing of the one it was made from
        _check_files_finite(source, path)
    return model


def _check_files(home: Path, path: str, model_config: PreTrainedConfig) -> None:
    """Every weight file of a directory is one; raises before any of them is read as a whole."""
    if (home / "adapter_config.json").exists():
        raise ConfigError(
            f"model.path {path} holds an adapter; transformers would load it as part of the base; "
            "give the base as model.path and the adapter as --adapter or --lora.init_from"
        )
    tensors = 0
    for file in weight_files(home, path):
        with believed(f"{file}"), safe_open(file, "pt") as opened:
            tensors += len(opened.keys())
    layers = model_config.text_config.num_hidden_layers
    layers += getattr(model_config.vision_config, "depth", 0)
    if layers > tensors:
        raise EnvironmentFault(
            f"the weights of {path} cannot be used: config.json promises {layers} layers, the "
            f"files hold {tensors} tensors; {AGAIN}"
        )


def weight_files(home: Path, path: str) -> list[Path]:
    """The safetensors files that transformers will read."""
    if (home / WEIGHTS).is_file():
        return [home / WEIGHTS]
    if not (home / INDEX).is_file():
        pickled = next((name for name in PICKLES if (home / name).exists()), None)
        why = f"; {pickled} is a pickle, which may run code and is not read" if pickled else ""
        raise ConfigError(
            f"model.path {path} has no {WEIGHTS}{why}; give a model saved as safetensors "
            "(save_pretrained writes them)"
        )
    with believed(f"{home / INDEX}"):
        names = sorted(set(read_json(home / INDEX)["weight_map"].values()))
        missing = [name for name in names if not (home / name).is_file()]
    if missing or not names:
        raise EnvironmentFault(
            f"the weights of {path} are incomplete: {missing[0] if missing else 'a file'} is "
            f"missing; {AGAIN}"
        )
    return [home / name for name in names]


def _check_whole(found: dict[str, Any], path: str) -> None:
    """transformers would draw what the files lack at random. Raises EnvironmentFault."""
    missing = sorted(found["missing_keys"])
    if missing:
        named = ", ".join(missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EnvironmentFault(f"the weights of {path} lack {named}{more}; {AGAIN}")


def _check_files_finite(source: str, path: str) -> None:
    """`check_finite` of what the files hold, a tensor at a time."""
    home = Path(source)
    if not home.is_dir():
        home = Path(snapshot_download(source, local_files_only=True))
    for file in weight_files(home, path):
        with safe_open(file, "pt") as opened:
            stored = opened.keys()
            for name in stored:
                check_finite({name: opened.get_tensor(name)}, f"model.path {path}")


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Every number is finite: one sum per tensor, one pass over the weights, one host sync.

    Raises NumericFault with the first tensor's name.
    """
    floating = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    suspects = [name for name, good in _sums_are_finite(floating) if not good]
    for name in suspects:  # a sum may overflow where no number does
        if not bool(floating[name].isfinite().all()):
            raise NumericFault(
                f"{what} has numbers that are not finite in {name}; nothing can be computed with "
                "it; copy or download it again"
            )


def _sums_are_finite(tensors: dict[str, Tensor]) -> Iterable[tuple[str, bool]]:
    sums = [x.detach().sum(dtype=torch.float32) for x in tensors.values()]
    good = torch.stack(sums).isfinite().tolist() if sums else []
    return zip(tensors, good, strict=True)


# ---- tokenizer -----------------------------------------------------------------------------------


def read_tokenizer(source: str, path: str, vocabulary: int, **settings: Any):
    """The tokenizer of a model whose head has `vocabulary` rows; `settings` are from_pretrained's.

    Raises EnvironmentFault for damaged files, and for ids that the model has no row for.
    """
    with believed(f"the tokenizer of {path}"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **settings)
        largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise EnvironmentFault(
            f"the tokenizer of {path} cannot be used: it knows id {largest}, the model has "
            f"{vocabulary} rows; they belong to different models; {AGAIN}"
        )
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What transformers and PEFT say of files is left unsaid: what matters of it is raised."""
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
