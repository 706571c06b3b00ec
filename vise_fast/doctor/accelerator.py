"""The accelerator: the GPU, its driver, memory and arithmetic; on a machine without one, the CPU's
arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from vise_fast.doctor.finding import Finding, fail, ok, warn
from vise_fast.doctor.packages import imported


def accelerator() -> Finding:
    """Which GPU torch sees."""
    torch = imported("torch")
    if torch.cuda.is_available():
        return ok("GPU", f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} in all)")
    return ok("GPU", "none: the CPU trains the embedded model; Qwen3-VL wants a GPU")


def driver() -> Finding:
    """A card that torch cannot see is the commonest disappointment."""
    torch = imported("torch")
    if torch.cuda.is_available():
        return ok("driver", f"CUDA {torch.version.cuda}")
    if not Path("/proc/driver/nvidia/version").exists():
        return ok("driver", "no NVIDIA driver, none needed")
    if torch.version.cuda is None:
        found = "an NVIDIA driver is here, torch is a CPU build"
        return warn("driver", found, "pip install a CUDA build of torch")
    found = f"torch for CUDA {torch.version.cuda} cannot use the driver"
    return warn("driver", found, "update the driver, or install torch for an older CUDA")


def compute_capability() -> Finding:
    """New enough for FlashAttention and bfloat16."""
    torch = imported("torch")
    if not torch.cuda.is_available():
        return ok("compute capability", "no GPU")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        advice = "FlashAttention and fast bfloat16 need 8.0 (Ampere); use --model.dtype float32"
        return warn("compute capability", f"{major}.{minor}", advice)
    return ok("compute capability", f"{major}.{minor}")


def bfloat16() -> Finding:
    """In the GPU's hardware, not emulated."""
    torch = imported("torch")
    if not torch.cuda.is_available():
        return ok("bfloat16", "not used: float32 on the CPU")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return warn("bfloat16", "not in this GPU's hardware", "use --model.dtype float32")
    return ok("bfloat16", "on the GPU")


def gpu_memory() -> Finding:
    """Free for us, not held by another process."""
    torch = imported("torch")
    if not torch.cuda.is_available():
        return ok("GPU memory", "no GPU")
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
    found = f"{free:.1f} of {total:.1f} GB free"
    if free < 0.8 * total:
        return warn("GPU memory", found, "another process holds the rest; nvidia-smi names it")
    return ok("GPU memory", found)


def arithmetic() -> Finding:
    """A matrix product against float64: broken drivers and overclocked cards show here."""
    torch = imported("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = _matrix(torch, 0)
    b = _matrix(torch, 1)
    product = (a.float().to(device) @ b.float().to(device)).cpu().double()
    off = (product - a @ b).abs().max().item()
    if not off < 0.1:  # 128 products in TF32 stay below 0.03
        found = f"a matrix product on {device} is off by {off:.3g}"
        return fail("arithmetic", found, "check the card and its driver")
    return ok("arithmetic", f"a matrix product on {device} is off by {off:.1e}")


def _matrix(torch: ModuleType, seed: int) -> Any:
    """float64 (128, 128), standard normal."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(128, 128, dtype=torch.float64, generator=draw)
