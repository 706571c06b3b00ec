"""The direction of imports, read from the syntax tree: each module may import only what stands before it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"errors", "randomness", "flash", "allocator"},
    {"settings", "geometry", "attention", "glossary"},
    {"config"},
    {"prompts", "decode", "scenes", "as_released", "signals", "alarms", "words", "quantise"},
    {"console", "loggers", "checkpoint", "perf", "work", "live", "images", "views", "tokens", "backbones", "rewards", "loss"},
    {"engine", "model"},
    {"graphs"},
    {"stock", "roles", "attention_meter", "figures"},
    {"experience", "exam", "record"},
    {"learner", "evaluate", "diagnosis", "plots", "cards", "rehearsal"},
    {"report", "adapter", "estimate"},
    {"survive", "lowmem"},
    {"run", "dry_run"},
    {"train"},
]
LEAVES = {"doctor", "checks", "infer", "merge", "nano"}
FREE = {"vise_kernels"}
PRINTERS = {"console"}


def modules():
    return sorted(path for path in (ROOT / "vise_fast").rglob("*.py"))


def noun(path):
    parts = path.relative_to(ROOT / "vise_fast").with_suffix("").parts
    return parts[0]


def imported(path):
    """Names of vise_fast modules and of outside packages that a file imports anywhere."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            (inside if head == "vise_fast" else outside).add(rest[0] if head == "vise_fast" and rest else head)
    return inside - {"vise_fast", "__version__"}, outside


def layer(name):
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_module_imports_only_what_stands_before_it(path):
    name = noun(path)
    if name in LEAVES or name == "__init__":
        return
    assert layer(name) is not None, f"{name} has no place in the reading order"
    for other in imported(path)[0] - {name}:
        assert layer(other) is not None and layer(other) < layer(name), f"{name} imports {other}, which stands after it"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_the_trainer(path):
    inside, outside = imported(path)
    assert not inside and not outside & {"transformers", "peft", "rich"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_console_prints(path):
    if noun(path) in PRINTERS:
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not calls and "rich" not in imported(path)[1]


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_loads_code_from_data(path):
    text = path.read_text()
    assert not re.search(r"import pickle|(?<!safetensors\.)torch\.load\(|trust_remote_code", text)
