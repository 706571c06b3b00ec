"""Mutation testing: small faults are planted, one at a time, and the tests of their own file run.

    make mutants                          24 faults a file, about half an hour on one core
    make mutants ARGS="--sample 40 --seed 1 --only loss.py"

cosmic-ray makes the faults (its stock operators: another operator, a number one off, a condition
turned around, a loop that does nothing, a decorator left out). There are thousands, so a seeded
sample of *places* is drawn from each file and one fault at each. A fault that no test notices
survives: docs/MUTANTS.md says what was seen and what to think of the rest. A run that takes ten
times as long as without a fault, and at least a minute, was noticed: the fault hangs.

Left out by rule (`left_out`), before anything is drawn, is what is no fault by construction:

- annotations: nothing evaluates them;
- `strict=` of a zip: it only adds a check, and changes nothing while the lengths agree;
- the arguments of `@dataclass`: they forbid what no line does (the type checker refuses it);
- `*` and `/` in a signature: how else it may be called, not what it does;
- a `Protocol`'s body: it is never run;
- `is` or `is not` for `==` or `!=` beside a literal (and only these two faults of the place):
  equality still, as equal literals are one object in CPython; the linter refuses it (F632).

Two steps in two environments, as cosmic-ray's needs are not the trainer's: `draw` (in the
environment that `make mutants` fills) writes the faults as JSON, `run` plants them in a copy of the
tree. The libraries are imported once and a run is a fork of that, so that it costs little more than
its tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 24
METHOD = "tests/method/test_"
MICRO_BATCHES = METHOD + "learner.py::test_micro_batches_do_not_change_samples_or_result"
LEARNER = (
    "share or own or so_many or tau or kl_is or skip or micro or views_learn or schedul or round "
    "or released or optimizer or gradients_are or teaches_nothing or loaded or cosine "
    "or several or second_time"
)
SCORES = "scored or scores or released or whoever or digits_place or gone_on or micro"
CONSENSUS = "consensus"
PLUGIN = "start or blamed or registered or shipped or invented or number or ran_out"
WRONG_PLUGINS = [
    METHOD + f"plugin.py::test_what_goes_wrong_in_{where}_is_known_at_the_start"
    for where in ("a_call", "the_file")
]
GPU_WAYS = "tests/engine/test_gpu_ways.py"
OWN_TESTS = {
    "vise_fast/method/as_released.py": [METHOD + "as_released.py"],
    "vise_fast/method/consensus.py": [METHOD + "consensus.py"],
    "vise_fast/method/evidence.py": [METHOD + "evidence.py"],
    "vise_fast/method/experience.py": [METHOD + "experience.py", MICRO_BATCHES],
    "vise_fast/method/invented.py": [METHOD + "invented.py", METHOD + "plugin.py", "-k", PLUGIN],
    "vise_fast/method/learner.py": [METHOD + "learner.py", "-k", LEARNER],
    "vise_fast/method/loss.py": [METHOD + "loss.py"],
    "vise_fast/system/plugin.py": [METHOD + "plugin.py", "-k", PLUGIN],
    "vise_fast/method/rewards.py": [METHOD + "rewards.py", *WRONG_PLUGINS],
    "vise_fast/method/roles.py": [METHOD + "roles.py"],
    "vise_fast/method/step_plan.py": [METHOD + "step_plan.py"],
    "vise_fast/method/token_scores.py": [METHOD + "learner.py", "-k", SCORES],
    "vise_fast/method/toward_consensus.py": [METHOD + "learner.py", "-k", CONSENSUS],
    "vise_fast/method/verdicts.py": [METHOD + "verdicts.py", METHOD + "experience.py"],
    "vise_fast/images/geometry.py": ["tests/images/test_geometry.py"],
    "vise_fast/images/views.py": ["tests/images/test_views.py"],
    "vise_fast/engine/rollout.py": ["tests/engine/test_rollout.py", "tests/engine/test_fast.py"],
    "vise_fast/engine/fast.py": ["tests/engine/test_fast.py", GPU_WAYS, "-k", "not below"],
    "vise_fast/system/checkpoint.py": ["tests/system/test_checkpoint.py", "-k", "not kill"],
}
"""Words for pytest; each at most 20 s on one core."""
NEED_ARGUMENTS = ("core/VariableReplacer", "core/VariableInserter")


# ---- what is left out ----------------------------------------------------------------------------


class Span(NamedTuple):
    """A part of a source, as (line, column), in which no operator whose name ends so is used."""

    first: tuple[int, int]
    last: tuple[int, int]
    endings: tuple[str, ...] = ("",)

    def holds(self, place: tuple[int, int], operator: str) -> bool:
        """Whether this fault at this place is left out."""
        return self.first <= place < self.last and operator.endswith(self.endings)


def left_out(source: str) -> list[Span]:
    """Where a fault would be none; the first docstring has the kinds and the reasons."""
    kinds = (_annotations, _lengths_checked, _dataclass_arguments, _signature, _protocol, _literals)
    return [span for node in ast.walk(ast.parse(source)) for kind in kinds for span in kind(node)]


def _begin(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _annotations(node: ast.AST) -> Iterator[Span]:
    for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        if note is not None:
            yield Span(_begin(note), _end(note))


def _lengths_checked(node: ast.AST) -> Iterator[Span]:
    """`strict=` of a zip."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
        for word in node.keywords:
            yield Span(_begin(word), _end(word))


def _dataclass_arguments(node: ast.AST) -> Iterator[Span]:
    for call in getattr(node, "decorator_list", []):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "dataclass":
            for word in call.keywords:
                yield Span(_begin(word), _end(word))


def _signature(node: ast.AST) -> Iterator[Span]:
    """All but the defaults: names, annotations, `*` and `/`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        start = _begin(node)
        defaults = [value for value in node.args.defaults + node.args.kw_defaults if value]
        for default in sorted(defaults, key=_begin):
            yield Span(start, _begin(default))
            start = _end(default)
        yield Span(start, _begin(node.body[0]))


def _protocol(node: ast.AST) -> Iterator[Span]:
    if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
        yield Span(_begin(node), _end(node))


def _literals(node: ast.AST) -> Iterator[Span]:
    """`is` beside a word or a number."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for left, right in itertools.pairwise(sides):
            if isinstance(left, ast.Constant) or isinstance(right, ast.Constant):
                yield Span(_end(left), _begin(right), ("_Eq_Is", "_NotEq_IsNot"))


# ---- draw ----------------------------------------------------------------------------------------


def draw(path: str, count: int, seed: int) -> dict:
    """{"places": how many the file has, "faults": [{"line", "what", "code"}, ...]}."""
    source = (ROOT / path).read_text(encoding="utf-8")
    places = list(_faults_by_place(source).items())
    rng = random.Random(f"{seed}:{path}")
    chosen = sorted(rng.sample(places, min(count, len(places))))
    faults = [_made(source, at, rng) for _, at in chosen]
    return {"places": len(places), "faults": [fault for fault in faults if fault]}


def _faults_by_place(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """{(line, column): [(operator, which of its occurrences), ...]}."""
    from cosmic_ray import ast as trees
    from cosmic_ray import plugins

    found = defaultdict(list)
    spans = left_out(source)
    nodes = list(trees.ast_nodes(trees.get_ast(source)))
    for name in plugins.operator_names():
        if name in NEED_ARGUMENTS:
            continue
        operator = plugins.get_operator(name)()
        count = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not any(span.holds(start, name) for span in spans):
                    found[start].append((name, count))
                count += 1
    return found


def _made(source: str, at: list[tuple[str, int]], rng: random.Random) -> dict | None:
    """One of the faults that can be planted at a place; None where all of them are no Python (the
    `*` in a list of parameters is no product).
    """
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    for name, occurrence in rng.sample(at, len(at)):
        code = mutate_code(source, plugins.get_operator(name)(), occurrence)
        with contextlib.suppress(SyntaxError):
            ast.parse(code)
            return _shown(source, code) | {"what": name.removeprefix("core/"), "code": code}
    return None


def _shown(source: str, code: str) -> dict:
    """The lines in which they differ, first line's number first."""
    before = source.splitlines()
    after = code.splitlines()
    first = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    changes = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    gone = " ".join(line[2:].strip() for line in changes if line[0] == "-")
    made = " ".join(line[2:].strip() for line in changes if line[0] == "+")
    return {"line": first + 1, "before": gone, "after": made}


# ---- run -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def copied_tree():
    """Yields a copy of the working tree, and stands in it meanwhile."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    native = [str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/vise_kernels/_native*")]
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        for name in [*names.split(), *native]:
            if (ROOT / name).is_file():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, home / name)
        with contextlib.chdir(home):
            yield home


def tested(tests: list[str], limit_s: float) -> tuple[bool, float]:
    """(whether all tests passed, seconds), in a fork of this process."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(_pytest(tests))
    code = None
    while code is None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - start > limit_s:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -signal.SIGKILL
        else:
            time.sleep(0.02)
    return code == 0, time.monotonic() - start


def _pytest(tests: list[str]) -> int:
    import pytest

    with open("log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    words = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
    order = ShortFirst()
    try:
        code = int(pytest.main(words, plugins=[order]))
    except BaseException:  # a fault may end the process in any way: it was noticed
        code = 1
    if os.environ.get("LEAVE_MODULES"):
        names = [name for name in sys.modules if name.split(".")[0] not in OURS]
        Path("modules").write_text("\n".join(names))
        order.seconds_file.write_text(json.dumps(order.seconds))
    return code


class ShortFirst:
    """A pytest plugin: the tests that took least come first, so that a fault is noticed early."""

    seconds_file = Path("seconds")

    def __init__(self) -> None:
        there = self.seconds_file.is_file()
        self.seconds = json.loads(self.seconds_file.read_text()) if there else {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        """By the seconds of the run without a fault; unknown ones keep their place in front."""
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report) -> None:
        """Set-up, call and tear-down add up."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


OURS = {"vise_fast", "vise_kernels", "__main__", "conftest"} | {
    path.stem for path in (ROOT / "tests").rglob("*.py")
}


def warm(tests: list[str]) -> float:
    """Seconds the tests take without a fault; everything else they import is imported here from
    then on, and the short ones come first.
    """
    Path("seconds").unlink(missing_ok=True)
    os.environ["LEAVE_MODULES"] = "1"
    passed, _ = tested(tests, 600)
    del os.environ["LEAVE_MODULES"]
    if not passed:
        sys.exit(f"{' '.join(tests)} fail without a fault:\n{Path('log').read_text()}")
    for name in Path("modules").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    passed, seconds = tested(tests, 600)
    if not passed:
        sys.exit(f"{' '.join(tests)} fail in another order:\n{Path('log').read_text()}")
    return seconds


def freeze_bytecode(mutated: Path) -> None:
    """What the runs without a fault compiled is used again, but for the file that will change: a
    stale copy of that would hide the next fault.
    """
    for compiled in mutated.parent.glob(f"__pycache__/{mutated.stem}.*.pyc"):
        compiled.unlink()
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def plant(path: str, drawn: dict) -> dict:
    """Every fault of one file: what was noticed and what was not."""
    tests = OWN_TESTS[path]
    usual = warm(tests)
    freeze_bytecode(Path(path))
    honest = Path(path).read_text(encoding="utf-8")
    survived = []
    for fault in drawn["faults"]:
        Path(path).write_text(fault["code"], encoding="utf-8")
        passed, _ = tested(tests, max(60.0, 10 * usual))
        if passed:
            survived.append({key: value for key, value in fault.items() if key != "code"})
    Path(path).write_text(honest, encoding="utf-8")
    count = len(drawn["faults"])
    row = {"file": path, "places": drawn["places"], "planted": count}
    row |= {"noticed": count - len(survived), "survived": survived, "tests_s": round(usual, 1)}
    print(f"{path}: {row['noticed']} of {count}, {usual:.1f} s a run", flush=True)
    for fault in survived:
        print(f"  {fault['line']}: {fault['before']}  ->  {fault['after']}", flush=True)
    return row


def run(faults: dict) -> list[dict]:
    """Each file in a process of its own, so that one's imports are not another's."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # until `freeze_bytecode`
    rows = []
    with copied_tree() as home:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(home), str(home / "kernels")])
        for path, drawn in faults.items():
            Path("drawn").write_text(json.dumps({"files": {path: drawn}}))
            words = [sys.executable, str(ROOT / "tests" / "mutants.py"), "file", "drawn"]
            subprocess.run(words, check=True)
            rows.append(json.loads(Path("row").read_text()))
    return rows


def main() -> None:
    """`draw FILE` writes the faults, `run FILE` plants them; the last line is one JSON document."""
    parser = argparse.ArgumentParser(description="faults planted, faults noticed")
    parser.add_argument("step", choices=("draw", "run", "file"))
    parser.add_argument("faults", type=Path)
    parser.add_argument("--sample", type=int, default=SAMPLE, help="places per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path ends so")
    given = parser.parse_args()
    if given.step == "draw":
        files = [path for path in OWN_TESTS if path.endswith(given.only)]
        drawn = {path: draw(path, given.sample, given.seed) for path in files}
        whole = {"sample": given.sample, "seed": given.seed, "files": drawn}
        given.faults.write_text(json.dumps(whole))
        return
    whole = json.loads(given.faults.read_text())
    if given.step == "file":
        ((path, drawn),) = whole["files"].items()
        Path("row").write_text(json.dumps(plant(path, drawn)))
        return
    rows = run(whole["files"])
    planted = sum(row["planted"] for row in rows)
    noticed = sum(row["noticed"] for row in rows)
    places = sum(row["places"] for row in rows)
    print(f"{noticed} of {planted} noticed ({noticed / planted:.1%}), drawn from {places} places")
    print(json.dumps(whole | {"files": rows}))


if __name__ == "__main__":
    main()
