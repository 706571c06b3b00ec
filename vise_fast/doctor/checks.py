"""What a machine must have, one function a fact: each looks, and says OK, WARN (runs, but slower or
with less) or FAIL with what to do.

Nothing is downloaded and no socket is opened. Heavy packages are imported inside their checks, so
that a broken one is a finding and not a traceback. Left out: which checks run, and how they are
shown (doctor.py).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vise_fast import nano

NANO = nano.DIRECTORY
TESTED_TRANSFORMERS = ((5, 17), (5, 23))


@dataclass(frozen=True)
class Check:
    """One finding: `status` OK, WARN or FAIL; `fix` says what to do unless it is OK."""

    name: str
    status: str
    found: str
    fix: str = ""


def ok(name: str, found: object) -> Check:
    return Check(name, "OK", str(found))


def warn(name: str, found: object, fix: str) -> Check:
    return Check(name, "WARN", str(found), fix)


def fail(name: str, found: object, fix: str) -> Check:
    return Check(name, "FAIL", str(found), fix)


def _version(distribution: str) -> tuple[int, ...]:
    return tuple(
        int(part)
        for part in re.findall(r"\d+", importlib.metadata.version(distribution).split("+")[0])[:3]
    )


def _absent(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def _torch() -> ModuleType:
    return importlib.import_module("torch")


# -- the interpreter and its packages --------------------------------------------------------------


def python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 11):
        return fail("python", found, "use Python 3.11 or newer")
    return ok("python", found)


def system() -> Check:
    found = f"{platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return warn("system", found, "only Linux is tested; Triton kernels need it")
    return ok("system", found)


def encoding() -> Check:
    found = f"files {sys.getfilesystemencoding()}, output {sys.stdout.encoding}"
    if "utf" not in sys.getfilesystemencoding().lower():
        return warn(
            "text encoding",
            found,
            "set LANG=C.UTF-8, or file names with accents are shown as escapes",
        )
    return ok("text encoding", found)


def virtual_environment() -> Check:
    if sys.prefix == sys.base_prefix:
        return warn(
            "environment",
            f"the system's Python ({sys.prefix})",
            "use make train, or python3 -m venv .venv, to keep versions apart",
        )
    return ok("environment", sys.prefix)


def package(distribution: str, module: str, oldest: str) -> Check:
    """Present, new enough, and importable."""
    advice = f"pip install '{distribution}>={oldest}'"
    if _absent(module):
        return fail(distribution, "not installed", advice)
    version = importlib.metadata.version(distribution)
    importlib.import_module(module)
    if _version(distribution) < tuple(int(part) for part in oldest.split(".")):
        return fail(distribution, f"{version}, older than {oldest}", advice)
    return ok(distribution, version)


def transformers_range() -> Check:
    version = _version("transformers")
    (low, high) = TESTED_TRANSFORMERS
    span = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    if not low <= version[:2] <= high:
        return warn(
            "transformers range",
            f"{'.'.join(map(str, version))}, tested are {span}",
            "install the version of constraints.txt when something is odd",
        )
    return ok("transformers range", f"within {span}")


def qwen3_vl() -> Check:
    found = importlib.import_module(
        "transformers.models.qwen3_vl.modeling_qwen3_vl"
    ).Qwen3VLForConditionalGeneration
    return ok("Qwen3-VL classes", found.__name__)


def kernels_folder() -> Check:
    """A package named kernels in the working directory would shadow the Hub's and break imports of
    transformers.
    """
    spec = importlib.util.find_spec("kernels")
    if (
        spec is not None
        and spec.origin is not None
        and Path(spec.origin) == Path.cwd() / "kernels" / "__init__.py"
    ):
        return fail(
            "kernels folder",
            spec.origin,
            "delete kernels/__init__.py: the folder must not be a package",
        )
    return ok("kernels folder", "shadows nothing")


def image_formats() -> Check:
    features = importlib.import_module("PIL.features")
    missing = [name for name in ("jpg", "zlib", "webp", "libtiff") if not features.check(name)]
    if {"jpg", "zlib"} & set(missing):
        return fail(
            "image formats",
            f"Pillow lacks {', '.join(missing)}",
            "pip install --force-reinstall pillow",
        )
    if missing:
        return warn(
            "image formats",
            f"Pillow lacks {', '.join(missing)}",
            "such files are skipped; pip install --force-reinstall pillow",
        )
    return ok("image formats", "JPEG PNG WEBP BMP GIF TIFF PPM")


def torchvision() -> Check:
    if _absent("torchvision"):
        return ok(
            "torchvision", "not installed (only AutoProcessor of a finished adapter needs it)"
        )
    importlib.import_module(
        "torchvision"
    )  # one built for another torch breaks transformers' imports as well
    return ok("torchvision", importlib.metadata.version("torchvision"))


# -- fast paths ------------------------------------------------------------------------------------


def bitsandbytes() -> Check:
    if _absent("bitsandbytes"):
        return warn(
            "bitsandbytes",
            "not installed",
            "pip install bitsandbytes for model.quant int8 / nf4 and 8-bit AdamW",
        )
    importlib.import_module("bitsandbytes")
    return ok("bitsandbytes", importlib.metadata.version("bitsandbytes"))


def flash_attention() -> Check:
    present = [
        name for name in ("flash_attn", "flash_attn_4", "flash_attn_interface") if not _absent(name)
    ]
    if not present:
        return ok("flash-attn", "not installed; torch's own FlashAttention serves")
    importlib.import_module(present[0])
    return ok(
        "flash-attn", f"{present[0]} installed, not needed: torch's own FlashAttention serves"
    )


def attention() -> Check:
    torch = _torch()
    kind = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    choice = importlib.import_module("vise_fast.model.flash").look(torch.device(kind[0]), kind[1])
    if choice.path == "plain":
        return warn(
            "attention",
            f"plain: {choice.reason}",
            "use --model.dtype float32, where a fused kernel may run",
        )
    return ok("attention", f"{choice.path}: {choice.reason}")


def triton() -> Check:
    if _absent("triton"):
        gpu = _torch().cuda.is_available()
        return (
            warn("triton", "not installed", "pip install triton")
            if gpu
            else ok("triton", "not installed, not needed on a CPU")
        )
    importlib.import_module("triton")
    return ok("triton", importlib.metadata.version("triton"))


def native_module() -> Check:
    if importlib.import_module("vise_kernels.dispatch").native() is None:
        compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        advice = (
            "python -m vise_kernels.build"
            if compiler
            else "install a C++ compiler, then make native"
        )
        return warn("native kernels", "not built: the plain path runs", advice)
    return ok("native kernels", "built")


def kernel_paths() -> Check:
    paths = importlib.import_module("vise_kernels").available()
    return ok("kernel paths", ", ".join(f"{op} {path}" for op, (path, _) in paths.items()))


# -- the accelerator -------------------------------------------------------------------------------


def accelerator() -> Check:
    torch = _torch()
    if torch.cuda.is_available():
        return ok("GPU", f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} in all)")
    return ok("GPU", "none: the CPU trains the embedded model; Qwen3-VL wants a GPU")


def driver() -> Check:
    """A card that torch cannot see is the commonest disappointment."""
    torch = _torch()
    path = Path("/proc/driver/nvidia/version")
    if torch.cuda.is_available() or not path.exists():
        return ok(
            "driver",
            f"CUDA {torch.version.cuda}"
            if torch.cuda.is_available()
            else "no NVIDIA driver, none needed",
        )
    if torch.version.cuda is None:
        return warn(
            "driver",
            "an NVIDIA driver is here, torch is a CPU build",
            "pip install a CUDA build of torch",
        )
    return warn(
        "driver",
        f"torch for CUDA {torch.version.cuda} cannot use the driver",
        "update the driver, or install torch for an older CUDA",
    )


def compute_capability() -> Check:
    torch = _torch()
    if not torch.cuda.is_available():
        return ok("compute capability", "no GPU")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return warn(
            "compute capability",
            f"{major}.{minor}",
            "FlashAttention and fast bfloat16 need 8.0 (Ampere); use --model.dtype float32",
        )
    return ok("compute capability", f"{major}.{minor}")


def bfloat16() -> Check:
    torch = _torch()
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return warn("bfloat16", "not in this GPU's hardware", "use --model.dtype float32")
    return ok(
        "bfloat16", "on the GPU" if torch.cuda.is_available() else "not used: float32 on the CPU"
    )


def gpu_memory() -> Check:
    torch = _torch()
    if not torch.cuda.is_available():
        return ok("GPU memory", "no GPU")
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
    if free < 0.8 * total:
        return warn(
            "GPU memory",
            f"{free:.1f} of {total:.1f} GB free",
            "another process holds the rest; nvidia-smi names it",
        )
    return ok("GPU memory", f"{free:.1f} of {total:.1f} GB free")


def arithmetic() -> Check:
    """A matrix product against float64: broken drivers and overclocked cards show here."""
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (
        torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    off = ((a.float().to(device) @ b.float().to(device)).cpu().double() - a @ b).abs().max().item()
    if not off < 0.1:  # 128 products in TF32 stay below 0.03
        return fail(
            "arithmetic",
            f"a matrix product on {device} is off by {off:.3g}",
            "check the card and its driver",
        )
    return ok("arithmetic", f"a matrix product on {device} is off by {off:.1e}")


# -- the machine -----------------------------------------------------------------------------------


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> Check:
    return (
        ok("cores", _usable_cores())
        if _usable_cores() > 1
        else warn("cores", 1, "the default run takes about twice as long on one core")
    )


def threads() -> Check:
    used = _torch().get_num_threads()
    if used > _usable_cores():
        return warn(
            "threads",
            f"torch uses {used} on {_usable_cores()} cores",
            f"start with OMP_NUM_THREADS={_usable_cores()}",
        )
    return ok("threads", f"torch uses {used}")


def cpu_instructions() -> Check:
    level = _torch().backends.cpu.get_cpu_capability()
    if level == "DEFAULT":
        return warn("CPU instructions", "no AVX2", "expect several times the stated run times")
    return ok("CPU instructions", level)


def memory() -> Check:
    """What is available, not what is built in."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) / 1e6
    if free < 2:
        return warn(
            "memory",
            f"{free:.1f} GB available",
            "the embedded model needs about 2 GB; close something",
        )
    return ok("memory", f"{free:.1f} GB available")


def open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ok("open files", soft) if soft >= 256 else warn("open files", soft, "ulimit -n 1024")


def _existing(path: Path) -> Path:
    """The nearest folder that is already there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def disk(run_dir: Path) -> Check:
    free = shutil.disk_usage(_existing(run_dir)).free / 1e9
    if free < 0.2:
        return fail(
            "disk",
            f"{free:.2f} GB free for {run_dir}",
            "free space, or give --run.dir another disk",
        )
    if free < 5:
        return warn(
            "disk",
            f"{free:.1f} GB free for {run_dir}",
            "enough for the embedded model; adapters of large models take about 1 GB a checkpoint",
        )
    return ok("disk", f"{free:.0f} GB free for {run_dir}")


def writable(run_dir: Path) -> Check:
    """Writes, syncs and renames, as a checkpoint does; leaves nothing."""
    try:
        with tempfile.TemporaryDirectory(dir=_existing(run_dir)) as folder:
            with open(Path(folder) / "a", "wb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
            os.rename(Path(folder) / "a", Path(folder) / "b")
    except OSError as fault:
        return fail(
            "run directory",
            f"{run_dir} cannot be written: {fault.strerror}",
            "give --run.dir a place of your own",
        )
    return ok("run directory", f"{run_dir} can be written")


# -- the embedded model and the hub ----------------------------------------------------------------


def nano_files() -> Check:
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in wanted if not (NANO / name).is_file()]
    if missing:
        return fail(
            "embedded model",
            f"lacks {', '.join(missing)}",
            "reinstall vise_fast, or check out vise_fast/nano again",
        )
    return ok(
        "embedded model",
        f"{sum(path.stat().st_size for path in NANO.iterdir() if path.is_file()) / 1e6:.1f} MB",
    )


def nano_weights() -> Check:
    """The weights against SHA256SUMS beside them, and every number finite."""
    safetensors = importlib.import_module("safetensors.torch")
    torch = _torch()
    data = (NANO / "model.safetensors").read_bytes()
    sums = NANO / "SHA256SUMS"
    if not sums.exists():
        return warn(
            "embedded weights",
            "no SHA256SUMS beside them",
            "in vise_fast/nano: sha256sum model.safetensors > SHA256SUMS",
        )
    if (
        f"{hashlib.sha256(data).hexdigest()}  model.safetensors"
        not in sums.read_text().splitlines()
    ):
        return fail(
            "embedded weights",
            "differ from SHA256SUMS",
            "reinstall vise_fast, or check out vise_fast/nano again",
        )
    tensors = safetensors.load(data)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return fail(
            "embedded weights",
            "hold numbers that are not finite",
            "reinstall vise_fast, or check out vise_fast/nano again",
        )
    return ok(
        "embedded weights",
        (
            f"{sum(tensor.numel() for tensor in tensors.values()) / 1e6:.2f} M numbers, sha256 as "
            "shipped"
        ),
    )


def nano_tokenizer() -> Check:
    content = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    words = {
        *content["model"]["vocab"],
        *(token["content"] for token in content.get("added_tokens", [])),
    }
    if "<box>" not in words:
        return fail(
            "embedded tokenizer",
            "has no <box>",
            "reinstall vise_fast, or check out vise_fast/nano again",
        )
    return ok("embedded tokenizer", f"{len(words)} tokens")


def hub_cache() -> Check:
    folder = Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    if not os.access(_existing(folder), os.W_OK):
        return warn(
            "hub cache",
            f"{folder} cannot be written",
            "set HF_HOME to a place of your own, or give --model.path a directory",
        )
    models = sorted(
        path.name.removeprefix("models--").replace("--", "/")
        for path in folder.glob("models--*Qwen3-VL*")
    )
    return ok("hub cache", f"{folder}: {', '.join(models) or 'no Qwen3-VL yet'}")


def offline() -> Check:
    state = importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE
    return ok(
        "hub access",
        "offline (HF_HUB_OFFLINE): models from disk only"
        if state
        else "online, and only when model.path is a hub id",
    )


def telemetry() -> Check:
    """Ours is none; the hub's own client counts downloads unless told not to."""
    state = importlib.import_module("huggingface_hub.constants").HF_HUB_DISABLE_TELEMETRY
    return ok(
        "telemetry",
        "none of ours; the hub client's is "
        + ("off" if state else "on for downloads (HF_HUB_DISABLE_TELEMETRY=1 ends it)"),
    )
