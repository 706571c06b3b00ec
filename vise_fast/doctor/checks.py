"""Which facts of a machine are looked at, in the order in which a person would mend them.

A check is a function without arguments that returns one Finding; they stand in interpreter.py,
packages.py, fast_paths.py, accelerator.py, resources.py and models.py. Nothing is downloaded and no
socket is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vise_fast.doctor import accelerator, fast_paths, interpreter, models, packages, resources
from vise_fast.doctor.finding import Finding, fail

# distribution, module, oldest version
NEEDED = (
    ("torch", "torch", "2.10"),
    ("transformers", "transformers", "5.0"),
    ("peft", "peft", "0.18"),
    ("safetensors", "safetensors", "0.4"),
    ("tokenizers", "tokenizers", "0.20"),
    ("huggingface_hub", "huggingface_hub", "1.0"),
    ("numpy", "numpy", "1.26"),
    ("pillow", "PIL", "12.3"),
    ("pydantic", "pydantic", "2.5"),
    ("pyyaml", "yaml", "6.0"),
    ("rich", "rich", "13.0"),
    ("matplotlib", "matplotlib", "3.8"),
)
MACHINE = (
    interpreter.python,
    interpreter.system,
    interpreter.encoding,
    interpreter.virtual_environment,
)
LIBRARIES = (
    packages.transformers_range,
    packages.qwen3_vl,
    packages.kernels_folder,
    packages.image_formats,
    packages.torchvision,
)
FAST_PATHS = (
    fast_paths.bitsandbytes,
    fast_paths.flash_attention,
    fast_paths.attention,
    fast_paths.triton,
    fast_paths.native_module,
    fast_paths.kernel_paths,
)
ACCELERATOR = (
    accelerator.accelerator,
    accelerator.driver,
    accelerator.compute_capability,
    accelerator.bfloat16,
    accelerator.gpu_memory,
    accelerator.arithmetic,
)
RESOURCES = (
    resources.cores,
    resources.threads,
    resources.cpu_instructions,
    resources.memory,
    resources.open_files,
    resources.ranks,
)
EMBEDDED = (models.nano_files, models.nano_weights, models.nano_tokenizer)
HUB = (models.hub_cache, models.offline, models.telemetry)
FAULTS = (ImportError, OSError, RuntimeError, AttributeError, ValueError, KeyError, TypeError)


def examine(run_dir: Path) -> Iterator[Finding]:
    """Every finding, in the order a person would mend them."""
    yield from map(guarded, MACHINE)
    for distribution, module, oldest in NEEDED:
        yield guarded(partial(packages.package, distribution, module, oldest), distribution)
    yield from map(guarded, (*LIBRARIES, *FAST_PATHS, *ACCELERATOR, *RESOURCES))
    yield guarded(partial(resources.disk, run_dir), "disk")
    yield guarded(partial(resources.writable, run_dir), "run directory")
    yield from map(guarded, (*EMBEDDED, *HUB))


def guarded(check: Callable[[], Finding], name: str = "") -> Finding:
    """A check that breaks is a finding too: what it looked at is broken."""
    try:
        return check()
    except FAULTS as fault:
        said = " ".join(str(fault).split())[:160]
        return fail(
            name or getattr(check, "__name__", "check").replace("_", " "),
            f"{type(fault).__name__}: {said}",
            "reinstall it: pip install -e . -c constraints.txt, or make train",
        )
