"""Packages: here, new enough, importable; and what inside them this trainer needs.

Heavy packages are imported inside their checks, so that a broken one is a finding and not a
traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from vise_fast.doctor.finding import Finding, fail, ok, warn

TESTED_TRANSFORMERS = ((5, 17), (5, 23))


def imported(module: str) -> ModuleType:
    """The module, imported now; what it raises is a finding of the check that asked for it."""
    return importlib.import_module(module)


def absent(module: str) -> bool:
    """Whether a top-level module is not installed; nothing is imported."""
    return importlib.util.find_spec(module) is None


def version_of(distribution: str) -> tuple[int, ...]:
    """The first three numbers of an installed version: '2.13.0+cpu' -> (2, 13, 0)."""
    released = importlib.metadata.version(distribution).split("+")[0]
    return tuple(int(part) for part in re.findall(r"\d+", released)[:3])


def package(distribution: str, module: str, oldest: str) -> Finding:
    """Present, new enough, and importable."""
    advice = f"pip install '{distribution}>={oldest}'"
    if absent(module):
        return fail(distribution, "not installed", advice)
    version = importlib.metadata.version(distribution)
    imported(module)
    if version_of(distribution) < tuple(int(part) for part in oldest.split(".")):
        return fail(distribution, f"{version}, older than {oldest}", advice)
    return ok(distribution, version)


def transformers_range() -> Finding:
    """Within the versions that are tested."""
    version = version_of("transformers")
    low, high = TESTED_TRANSFORMERS
    span = f"{_dotted(low)} to {_dotted(high)}"
    if not low <= version[:2] <= high:
        return warn(
            "transformers range",
            f"{_dotted(version)}, tested are {span}",
            "install the version of constraints.txt when something is odd",
        )
    return ok("transformers range", f"within {span}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def qwen3_vl() -> Finding:
    """transformers knows the model family."""
    family = imported("transformers.models.qwen3_vl.modeling_qwen3_vl")
    return ok("Qwen3-VL classes", family.Qwen3VLForConditionalGeneration.__name__)


def kernels_folder() -> Finding:
    """A package named kernels in the working directory would shadow the Hub's and break imports of
    transformers.
    """
    spec = importlib.util.find_spec("kernels")
    origin = spec.origin if spec is not None else None
    if origin is not None and Path(origin) == Path.cwd() / "kernels" / "__init__.py":
        advice = "delete kernels/__init__.py: the folder must not be a package"
        return fail("kernels folder", origin, advice)
    return ok("kernels folder", "shadows nothing")


def image_formats() -> Finding:
    """Pillow reads the formats that images come in."""
    features = imported("PIL.features")
    missing = [name for name in ("jpg", "zlib", "webp", "libtiff") if not features.check(name)]
    if not missing:
        return ok("image formats", "JPEG PNG WEBP BMP GIF TIFF PPM")
    found = f"Pillow lacks {', '.join(missing)}"
    advice = "pip install --force-reinstall pillow"
    if {"jpg", "zlib"} & set(missing):
        return fail("image formats", found, advice)
    return warn("image formats", found, f"such files are skipped; {advice}")


def torchvision() -> Finding:
    """Importable where it is installed; it need not be."""
    if absent("torchvision"):
        found = "not installed (only AutoProcessor of a finished adapter needs it)"
        return ok("torchvision", found)
    imported("torchvision")  # one built for another torch breaks transformers' imports as well
    return ok("torchvision", importlib.metadata.version("torchvision"))
