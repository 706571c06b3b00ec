"""The direction of imports, read from the syntax tree: a folder may import only from folders that
stand before it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "system",
    "ranks",
    "config",
    "images",
    "text",
    "model",
    "engine",
    "method",
    "profile",
    "evaluate",
    "estimate",
    "report",
    "probe",
    "run",
    "train",
)
LEAVES = {
    "__main__",
    "compare",
    "data",
    "demo",
    "doctor",
    "export",
    "infer",
    "merge",
    "lowmem",
    "nano",
    "rewards",
    "sweep",
    "table",
}
PRINTER = "system/console.py"


def modules():
    return sorted((ROOT / "vise_fast").rglob("*.py"))


def folder(path):
    """The folder of vise_fast a file lies in; for a command that is one file, its name."""
    return path.relative_to(ROOT / "vise_fast").with_suffix("").parts[0]


def imported(path):
    """Folders of vise_fast and outside packages that a file imports anywhere."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            (inside if head == "vise_fast" else outside).add(
                rest[0] if head == "vise_fast" else head
            )
    return inside - {"__version__"}, outside


def files(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@files(modules())
def test_each_folder_imports_only_what_stands_before_it(path):
    here = folder(path)
    if here in LEAVES or here == "__init__":
        return
    assert here in ORDER, f"{here} has no place in the reading order"
    for other in imported(path)[0] - {here, "nano"}:  # of nano only where it lies
        assert other in ORDER and ORDER.index(other) < ORDER.index(here), (
            f"{here} imports {other}, which stands after it"
        )


@files(modules())
def test_of_the_embedded_model_others_know_only_where_it_lies(path):
    if folder(path) != "nano":
        lines = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [line for line in lines if (line.module or "").startswith("vise_fast.nano")]


@files(sorted((ROOT / "kernels").rglob("*.py")))
def test_kernels_know_nothing_of_the_trainer(path):
    inside, outside = imported(path)
    assert not inside and not outside & {"transformers", "peft", "rich"}


@files(modules())
def test_only_the_console_prints(path):
    if path == ROOT / "vise_fast" / PRINTER:
        return
    names = [
        n.func.id
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert "print" not in names and "rich" not in imported(path)[1]


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


AMONG_RANKS = ROOT / "vise_fast" / "ranks" / "together.py"
"""Sends objects between its own processes, as torch.distributed does: docs/SCALING.md says over
what kind of network.
"""


@files(modules())
def test_nothing_loads_code_from_data(path):
    text = path.read_text()
    assert not re.search(r"(?<!safetensors\.)torch\.load\(", text)
    assert ("import pickle" in text) == (path == AMONG_RANKS)


WITHOUT_WEIGHTS = {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"}


def calls(path, *methods):
    """Calls of `something.method(...)` as ("something.method", {keyword: value as written})."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in methods:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), given


@files([*modules(), *sorted((ROOT / "bench").glob("*.py"))])
def test_no_code_is_run_that_lies_beside_a_model(path):
    """Said at every call: where it is not, transformers asks a person on a terminal."""
    for name, given in calls(path, "from_pretrained", "from_config"):
        if name == "PeftModel.from_pretrained":
            continue  # it has no such word and reads no code
        assert given.get("trust_remote_code") == "False", f"{path}: {name}"
        if name.endswith("from_pretrained") and name not in WITHOUT_WEIGHTS:
            assert given.get("use_safetensors") == "True", f"{path}: {name}"
