"""Fast paths: which of them run here, and what the others lack."""

from __future__ import annotations

import importlib.metadata
import shutil

from vise_fast.doctor.finding import Finding, ok, warn
from vise_fast.doctor.packages import absent, imported


def bitsandbytes() -> Finding:
    """Quantised bases and 8-bit optimizers need it."""
    if absent("bitsandbytes"):
        return warn(
            "bitsandbytes",
            "not installed",
            "pip install bitsandbytes for model.quant int8 / nf4 and 8-bit AdamW",
        )
    imported("bitsandbytes")
    return ok("bitsandbytes", importlib.metadata.version("bitsandbytes"))


def flash_attention() -> Finding:
    """Not needed, and importable where it is installed."""
    library = imported("vise_fast.model.attending.flash_library")
    names = dict.fromkeys(package.module.partition(".")[0] for package in library.PACKAGES)
    present = [name for name in names if not absent(name)]
    if not present:
        return ok("flash-attn", "not installed; torch's own FlashAttention serves")
    for name in present:
        imported(name)
    torch = imported("torch")
    if not torch.cuda.is_available():
        return ok("flash-attn", f"{present[0]} installed, of no use without a GPU")
    return ok("flash-attn", library.of(torch.device("cuda")).reason)


def attention() -> Finding:
    """Which attention the decoder would take here, and why."""
    torch = imported("torch")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    choice = imported("vise_fast.model.attending.flash").look(device, dtype)
    found = f"{choice.path}: {choice.reason}"
    if choice.path == "plain":
        advice = "use --model.dtype float32, where a fused kernel may run"
        return warn("attention", found, advice)
    return ok("attention", found)


def triton() -> Finding:
    """The GPU kernels need it."""
    if not absent("triton"):
        imported("triton")
        return ok("triton", importlib.metadata.version("triton"))
    if imported("torch").cuda.is_available():
        return warn("triton", "not installed", "pip install triton")
    return ok("triton", "not installed, not needed on a CPU")


def native_module() -> Finding:
    """The compiled CPU kernels are built."""
    if imported("vise_kernels.dispatch").native() is not None:
        return ok("native kernels", "built")
    advice = "install a C++ compiler, then make native"
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        advice = "python -m vise_kernels.build"
    return warn("native kernels", "not built: the plain path runs", advice)


def kernel_paths() -> Finding:
    """Which path each kernel takes here."""
    paths = imported("vise_kernels").available()
    torch = imported("torch")
    if torch.cuda.is_available():
        proofs = imported("vise_fast.model.proofs")
        device = torch.device("cuda")
        faults = proofs.remembered(device) or {}
        if faults:
            found = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
            return warn(
                "kernel paths",
                f"off on this GPU: {found}",
                f"to ask again, remove {proofs.place_of(device)}",
            )
    return ok("kernel paths", ", ".join(f"{op} {path}" for op, (path, _) in paths.items()))
