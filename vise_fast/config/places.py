"""Where the shipped presets and the published shapes lie, and the file that `--config` names.

A wheel carries the folder inside the package; a checkout has it at its root. Left out: what the
files say (schema.py reads presets, model/load.py shapes).
"""

from __future__ import annotations

from difflib import get_close_matches
from os.path import isfile  # of names that no file can have, too; Path.is_file raises
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PACKED = PACKAGE / "configs"
CONFIGS = PACKED if PACKED.is_dir() else PACKAGE.parent / "configs"
SHAPES = CONFIGS / "models"
"""One transformers config.json per published size: qwen3-vl-2b.json, …"""


def config_file(typed: str | Path) -> Path:
    """The file behind `--config`: the one that is there, else the shipped preset of that name.

    A preset may be written `qwen3-vl-2b`, `qwen3-vl-2b.yaml` or `configs/qwen3-vl-2b.yaml`, in any
    directory. What names neither a file nor a preset comes back as it was typed.
    """
    path = Path(typed)
    preset = CONFIGS / f"{path.name.removesuffix('.yaml')}.yaml"
    named_so = path.parent in (Path("."), Path("configs"))
    return preset if named_so and not isfile(path) and isfile(preset) else path


def advice(typed: str | Path) -> str:
    """What to do about a `--config` that names neither a file nor a preset."""
    shipped = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]
    close = get_close_matches(Path(typed).name.removesuffix(".yaml").lower(), shipped, n=1)
    if close:
        return f"did you mean --config {close[0]}?"
    return "give --config an existing YAML file or a shipped preset (train --help lists them)"
