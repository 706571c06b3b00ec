"""Does it learn? Rewards x seeds on the embedded model, against an oracle and against controls, on
scenes no setting was chosen on.

    python bench/learning.py --quick                    one seed, few updates, every row without a
                                                        comma: minutes on two cores
    python bench/learning.py --steps 500 --seeds 0 1 2  the study; resumable: a finished cell is
                                                        never run again
    python bench/learning.py --split validation …       for choosing settings; the published split
                                                        is for the final table only
    python bench/learning.py --minutes 10 --seeds 0 1 2  the same at equal time: every row gets as
                                                        many updates as fit into so many CPU minutes
    python bench/learning.py --smoke                    every row, one update each, nothing kept:
                                                        does it run?
    python bench/learning.py --table                    rebuild table and curves, and the table in
                                                        docs/LEARNING.md, from the finished cells

A cell is (row, seed, updates or minutes, split), one process, one thread, one JSON file under
bench/results/learning/; its adapter stays in build/learning/, so that another split examines it
without training it again. Minutes are CPU time of that thread: a few updates are timed first, and
the schedule is laid over what fits. Left out: the method itself, which is the trainer's own
(vise_fast/method/); training sees pixels only, the oracle's truth excepted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import _checkout
import numpy as np

if TYPE_CHECKING:  # the parent of the cells' processes needs no torch
    from vise_fast.config.schema import Config
    from vise_fast.engine.fast import FastEngine
    from vise_fast.images.drawn import Scenes
    from vise_fast.model.load import Policy

ROOT = _checkout.ROOT
CELLS = ROOT / "bench" / "results" / "learning"
ADAPTERS = ROOT / "build" / "learning"
INTO: list[str] = []

BEFORE = (
    "--rollout.views 4 --rollout.view_temperature 0 --reward.w_geo 0.8 --reward.w_sem 0.2 "
    "--reward.w_area 0.7 --reward.unreadable floor --reward.shared_controls false "
    "--reward.settled 0"
)
"""The embedded model's default up to November 2026, over the one of today."""

ROWS = {
    "base": None,
    "robust": "",
    "robust, before": BEFORE,
    "robust, greedy views": "--rollout.view_temperature 0",
    "paper": "--reward.preset paper --rollout.samples 8 --rollout.views 4 --train.batch 8 "
    "--update.advantage rloo --update.tau 0.3",
    "geometric only": "--reward.w_geo 1 --reward.w_sem 0 --reward.w_area 0",
    "semantic only": "--reward.w_geo 0 --reward.w_sem 1 --reward.w_area 0 --rollout.views 1",
    "area term only": "--reward.name area_only --reward.w_area 1 --rollout.views 1",
    "random": "--reward.name random --rollout.views 1",
    "shuffled": "--reward.name shuffled",
    "oracle": "--reward.name oracle --reward.w_area 0 --rollout.views 1",
    "consensus": "--reward.preset consensus",
    "consensus, before": "--reward.preset consensus --update.beta 0.02 --update.beta_min 0.02",
    "consensus, shuffled": "--reward.preset consensus --reward.name shuffled",
    "consensus, oracle": "--reward.preset consensus --reward.name oracle --rollout.views 2",
    "likelihood": "--reward.preset consensus --update.consensus 1 --update.consensus_by likelihood",
    "likelihood, oracle": "--reward.preset consensus --update.consensus 1 "
    "--update.consensus_by likelihood --reward.name oracle --rollout.views 2",
}
"""The words of each row's configuration; the base is not trained. `consensus` and `likelihood` are
not wholly VISE's update; behind a comma their controls take another image's boxes, or the true one,
in place of the consensus. `before`: the settings up to November 2026. The likelihood of the true
box is plain supervised training. Rewards that read no view's box are spared views: the samples are
the same.
"""
TIMED = 3
"""Updates that are timed for `--minutes`, after one that is not."""

FIGURES = {
    "greedy_iou": "greedy IoU",
    "sampled_iou": "sampled IoU",
    "greedy_iou_50": "greedy IoU@0.5",
    "sampled_iou_50": "sampled IoU@0.5",
    "greedy_iou_rescaled": "greedy IoU, best rescale",
    "sampled_iou_rescaled": "sampled IoU, best rescale",
    "greedy_centre_inside": "centre inside",
    "greedy_centre_error": "centre error",
    "greedy_area_ratio": "area ratio, greedy",
    "sampled_area_ratio": "area ratio, sampled",
    "visible_accuracy": "visibility accuracy",
    "greedy_parse_rate": "parse rate",
    "attention_share": "attention share",
}
BESIDE = {
    "invariance": "agreement across views",
    "own_TU": "its own boxes hide what it asked for",
    "pope_accuracy": "POPE accuracy",
    "pope_yes_rate": "POPE yes rate",
    "free_length": "tokens of a description",
}
"""Figures of which a cell keeps the mean alone: seeds are compared, not scenes."""
RESCALED = "base, rescaled"
MARK = "<!-- bench/learning.py --table -->"
SPLIT_SEED = {"validation": 70_001, "reported": 110_003, "fresh": 150_011}
"""`reported` was looked at on 2026-11-21, before the views were boxed by chance; `fresh` on
2026-11-26, once, when the settings of today were fixed.
"""
PUBLISHED = "fresh"
"""The split of the page's table."""
SCENES = {"validation": 256, "reported": 512, "fresh": 512}
CURVE = (
    "reward",
    "geometric",
    "semantic",
    "area",
    "parse_rate",
    "kl",
    "beta",
    "grad_norm",
    "scored",
    "TU",
    "SB",
    "IG",
    "ID",
)


@dataclass(frozen=True)
class Length:
    """How long a row is trained: so many updates, or as many as fit into so many CPU minutes."""

    steps: int
    minutes: int = 0

    @property
    def name(self) -> str:
        """For file names."""
        return f"m{self.minutes}" if self.minutes else f"u{self.steps}"

    def holds(self, cell: dict) -> bool:
        """Whether a finished cell has this length; the base has all."""
        if cell["row"] == "base":
            return True
        if self.minutes:
            return cell.get("minutes", 0) == self.minutes
        return cell.get("minutes", 0) == 0 and cell["steps"] == self.steps


def cell_path(row: str, seed: int, length: Length, split: str) -> Path:
    """Where a cell lies; the base has neither seed nor length."""
    plain = row.replace(",", "").replace(" ", "-")
    name = f"{plain}-s{seed}-{length.name}" if row != "base" else "base"
    return CELLS / f"{split}-{name}.json"


def _short(x):
    """The same with floats of five decimals."""
    if isinstance(x, dict):
        return {name: _short(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_short(value) for value in x]
    return round(x, 5) if isinstance(x, float) else x


@dataclass(frozen=True)
class Study:
    """A model, its scenes, and the configuration it is trained and examined by."""

    policy: Policy
    engine: FastEngine
    source: Scenes
    config: Config

    @classmethod
    def of(cls, words: list[str]) -> Study:
        """Loaded, untrained. `words` of the trainer's command line."""
        from vise_fast.config import schema as configuration
        from vise_fast.engine.fast import FastEngine
        from vise_fast.images.drawn import Scenes
        from vise_fast.model import load as model

        config = configuration.load(None, words)
        policy = model.load(config)
        return cls(policy, FastEngine(policy.backbone, policy.tokens), Scenes(config), config)


def run_cell(row: str, seed: int, length: Length, split: str, extra: list[str]) -> dict:
    """Train one row with one seed, unless its adapter lies there from another split, and examine
    it; the base is examined untrained.
    """
    import torch

    from vise_fast.evaluate import held_out as evaluate

    torch.set_num_threads(1)
    path = ADAPTERS / cell_path(row, seed, length, "trained").stem
    words = _words(row, seed, split, extra)
    trains = ROWS[row] is not None
    steps = length.steps
    if trains and length.minutes:
        steps = affordable(words, length.minutes, path.with_suffix(".json"))
    study = Study.of([*words, "--train.steps", str(steps)])
    history = {"curve": [], "seconds": 0.0, "cpu_seconds": 0.0}
    if trains:
        history = trained(study, path)
    figures = evaluate.examine(study.engine, study.source, study.config, (trains,))[0].json()
    marks = {name: figures["marks"][name] for name in FIGURES if name in figures["marks"]}
    return {
        "row": row,
        "seed": seed,
        "steps": steps,
        "minutes": length.minutes,
        "split": split,
        "extra": extra,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "config": study.config.model_dump(mode="json"),
        "values": figures["values"],
        "marks": marks,
        "layers": figures["layers"],
        "n": figures["n"],
        **history,
    }


def _words(row: str, seed: int, split: str, extra: list[str]) -> list[str]:
    """Of the trainer's command line, for one cell; the number of updates is not among them."""
    own = (ROWS[row] or "").split()
    examined = ["--eval.seed", str(SPLIT_SEED[split]), "--eval.scenes", str(SCENES[split])]
    return ["--train.seed", str(seed), *examined, *own, *extra]


def trained(study: Study, path: Path) -> dict:
    """Leaves the policy trained: {"curve", "seconds"}. `path`: where adapter and history of the
    same training configuration may lie.
    """
    import torch
    from safetensors.torch import load_file, save_file

    adapter = path.with_suffix(".safetensors")
    about = path.with_suffix(".json")
    same = study.config.model_dump(mode="json", exclude={"eval"})
    parameters = study.policy.parameters()
    if about.exists() and (history := json.loads(about.read_text()))["config"] == same:
        with torch.no_grad():
            for name, tensor in load_file(adapter).items():
                parameters[name].copy_(tensor)
        study.policy.backbone.refresh()
    else:
        history = {"config": same} | train(study)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().clone() for name, p in parameters.items()}, adapter)
        about.write_text(json.dumps(history) + "\n")
    return {name: history.get(name, 0.0) for name in ("curve", "seconds", "cpu_seconds")}


def affordable(words: list[str], minutes: int, about: Path) -> int:
    """Updates of this configuration that fit into so many CPU minutes, timed here; those of the
    training whose history lies at `about`, where there is one.
    """
    if about.exists():
        return json.loads(about.read_text())["config"]["train"]["steps"]
    study = Study.of([*words, "--train.steps", str(1 + TIMED)])
    train(study, 1)
    seconds = train(study, TIMED)["cpu_seconds"] / TIMED
    return max(1, int(60 * minutes / seconds))


def train(study: Study, updates: int | None = None) -> dict:
    """A training as the trainer runs it, or its first updates: its curve, and the seconds and CPU
    seconds it took.
    """
    from vise_fast.method.experience import play_batch
    from vise_fast.method.learner import Learner

    config = study.config
    learner = Learner(study.policy, study.engine, config)
    truth = study.source.truth if config.reward.name == "oracle" else None
    curve = []
    start = time.monotonic()
    worked = time.process_time()
    for step in range(config.train.steps if updates is None else updates):
        images = study.source.batch(step, config.train.batch)
        played = play_batch(study.engine, images, config, step, truth)
        metrics = learner.learn(played, step)
        curve.append({name: round(float(metrics[name]), 5) for name in CURVE if name in metrics})
    return {
        "curve": curve,
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
    }


def spawn(
    cells: list[tuple[str, int]], length: Length, split: str, workers: int, extra: list[str]
) -> None:
    """Run what is not finished, `workers` processes at a time. A finished cell that other settings
    trained ends the program: its row would not be what its name says.
    """
    todo = []
    for row, seed in cells:
        path = cell_path(row, seed, length, split)
        if not path.exists():
            todo.append((row, seed))
        elif others := differences(json.loads(path.read_text()), extra):
            sys.exit(
                f"{path} was trained with other settings ({', '.join(others)}); move it away to "
                "train it again, or give today's settings a row of their own"
            )
    print(f"{len(cells) - len(todo)} cells finished, {len(todo)} to do")

    def one(cell: tuple[str, int]) -> int:
        row, seed = cell
        words = ["--cell", row, "--seeds", str(seed), "--split", split]
        words += ["--steps", str(length.steps), "--minutes", str(length.minutes)]
        return _run(f"{row} seed {seed}", [*words, *INTO, "--", *extra])

    with ThreadPoolExecutor(workers) as pool:
        if any(list(pool.map(one, todo))):
            sys.exit("a cell failed; see above; finished cells are kept")


def differences(cell: dict, extra: list[str]) -> list[str]:
    """What a finished cell was trained with other than its row says today; settings that came since
    count as equal, and nobody trained the base.
    """
    from vise_fast.config import schema as configuration

    if ROWS[cell["row"]] is None:
        return []
    words = _words(cell["row"], cell["seed"], cell["split"], extra)
    words += ["--train.steps", str(cell["steps"])]
    today = _short(configuration.load(None, words).model_dump(mode="json"))
    found = []
    for section, settings in _short(cell["config"]).items():
        for name, value in settings.items():
            now = today.get(section, {}).get(name, value)
            if section != "eval" and now != value:
                found.append(f"{section}.{name} {value}, not {now}")
    return found


def _run(name: str, words: list[str]) -> int:
    """One cell in a process of its own: its exit status."""
    begun = time.monotonic()
    command = [sys.executable, str(Path(__file__)), *words]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{name}: exit {done.returncode} after {time.monotonic() - begun:.0f} s", flush=True)
    return done.returncode


def load_cells(length: Length, split: str) -> dict[str, list[dict]]:
    """The finished cells of one length, by row; the base, and the base rescaled, first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(CELLS.glob(f"{split}-*.json")):
        cell = json.loads(path.read_text())
        if length.holds(cell):
            found.setdefault(cell["row"], []).append(cell)
    if "base" in found:
        found[RESCALED] = [rescaled(found["base"][0])]
    return {row: found[row] for row in ("base", RESCALED, *ROWS) if row in found}


def rescaled(base: dict) -> dict:
    """The base's own boxes times the constant factor that suits them best on other scenes: what
    mere tightening or loosening gives.
    """
    marks = {
        name.removesuffix("_rescaled"): mark
        for name, mark in base["marks"].items()
        if name.endswith("_rescaled")
    }
    return base | {"row": RESCALED, "marks": marks, "values": {}, "curve": [], "seconds": 0.0}


def summarise(cells: dict[str, list[dict]]) -> dict[str, dict]:
    """Per row and figure: mean over seeds, s.e. over seeds, paired gain over the base with a 95 %
    interval, share of the oracle's gain.

    The interval resamples scenes (paired with the base) and seeds together.
    """
    base = cells["base"][0]
    table = {row: _estimates(base, group) for row, group in cells.items()}
    for row in table.values():
        for name, entry in row.items():
            oracle = table.get("oracle", {}).get(name)
            entry["of_oracle"] = (
                entry["gain"] / oracle["gain"] if oracle and oracle["gain"] > 0 else None
            )
    return table


def _estimates(base: dict, group: list[dict]) -> dict[str, dict]:
    found = {}
    for name in FIGURES:
        if name in group[0]["marks"]:
            values = [_ratio(cell["marks"][name]) for cell in group]
            low, high = _interval(name, base, group)
            gained = _gained(values, _ratio(base["marks"][name]))
            found[name] = gained | {"low": low, "high": high}
    for name in BESIDE:
        if name in group[0].get("values", {}):
            values = [cell["values"][name] for cell in group]
            found[name] = _gained(values, base["values"][name])
    return found


def _gained(values: list[float], before: float) -> dict:
    """Mean over seeds, its s.e., and what it gains over the base's."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    mean = float(np.mean(values))
    return {"mean": mean, "se": error, "gain": mean - before, "seeds": len(values)}


def _interval(
    name: str, base: dict, group: list[dict], resamples: int = 2000
) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    before = _arrays(base["marks"][name])
    after = [_arrays(cell["marks"][name]) for cell in group]
    n = len(before.top)
    gains = []
    for _ in range(resamples):
        weights = rng.multinomial(n, np.full(n, 1 / n))
        picked = rng.integers(len(after), size=len(after))
        now = np.mean([_weighted(after[i], weights) for i in picked])
        gains.append(now - _weighted(before, weights))
    return float(np.quantile(gains, 0.025)), float(np.quantile(gains, 0.975))


class _Mark(NamedTuple):
    """A figure as a ratio of sums over scenes."""

    top: np.ndarray
    bottom: np.ndarray


def _arrays(mark: dict) -> _Mark:
    return _Mark(np.array(mark["top"]), np.array(mark["bottom"]))


def _weighted(mark: _Mark, weights: np.ndarray) -> float:
    return float(weights @ mark.top / max(weights @ mark.bottom, 1e-12))


def _ratio(mark: dict) -> float:
    top, bottom = _arrays(mark)
    return float(top.sum() / max(bottom.sum(), 1e-12))


SHARES = "of the oracle's gain (sampled, greedy)"
PANELS = {
    "Where it points": ("sampled_iou", "greedy_iou", "sampled_iou_50", "greedy_iou_50", SHARES),
    "Not by size": (
        "sampled_iou_rescaled",
        "greedy_iou_rescaled",
        "greedy_centre_error",
        "greedy_centre_inside",
        "sampled_area_ratio",
        "greedy_area_ratio",
    ),
    "And nothing lost": ("visible_accuracy", "greedy_parse_rate", "attention_share"),
    "Beside it": tuple(BESIDE),
}
TITLES = FIGURES | BESIDE


def show(table: dict[str, dict], cells: dict[str, list[dict]]) -> str:
    """The table as Markdown, in panels: value ± s.e. over seeds (paired gain's 95 % interval)."""
    return "\n\n".join(_panel(title, names, table, cells) for title, names in PANELS.items())


def _panel(
    title: str, names: tuple[str, ...], table: dict[str, dict], cells: dict[str, list[dict]]
) -> str:
    kept = [name for name in names if name in table["base"] or name == SHARES]
    heading = [title, "seeds", *(TITLES.get(name, name) for name in kept)]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row, entries in table.items():
        told = [_told(name, row, entries) for name in kept]
        if any(x != "-" for x in told):
            lines.append(f"| {row} | {len(cells[row])} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def _told(name: str, row: str, entries: dict[str, dict]) -> str:
    if name == SHARES:
        return _shares(row, entries)
    return _cell(entries[name], row) if name in entries else "-"


def _shares(row: str, entries: dict[str, dict]) -> str:
    shares = [entries.get(n, {}).get("of_oracle") for n in ("sampled_iou", "greedy_iou")]
    if row in ("base", RESCALED) or None in shares:
        return "-"
    return ", ".join(f"{share:.0%}" for share in shares)


def _cell(entry: dict, row: str) -> str:
    error = "" if entry["se"] is None else f" ± {entry['se']:.3f}"
    gain = ""
    if row != "base" and "low" in entry:
        gain = f" ({entry['low']:+.3f}, {entry['high']:+.3f})"
    return f"{entry['mean']:.3f}{error}{gain}"


def plot(cells: dict[str, list[dict]], path: Path) -> None:
    """Curves of the training figures, one line per row (mean over seeds, moving average)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = ("reward", "area", "kl", "parse_rate")
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4), constrained_layout=True)
    for axis, name in zip(axes, panels, strict=True):
        for row, group in cells.items():
            if group[0]["curve"]:
                axis.plot(*_smoothed(name, group), label=row, lw=1.4)
        axis.set(title=name, xlabel="update", yscale="log" if name in ("area", "kl") else "linear")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(cells), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smoothed(name: str, group: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Updates, and a figure's mean over seeds and a twentieth of the updates before."""
    curves = [_curve(name, cell) for cell in group]
    mean = np.array(curves).mean(0)
    width = max(1, len(mean) // 20)
    smooth = np.convolve(mean, np.ones(width) / width, "valid")
    return np.arange(len(smooth)) + width, smooth


def _curve(name: str, cell: dict) -> list[float]:
    return [point.get(name, np.nan) for point in cell["curve"]]


def write_table(length: Length, split: str) -> None:
    """results/learning.json, the curves, and the table on screen; the last line is the JSON."""
    cells = load_cells(length, split)
    if "base" not in cells:
        sys.exit("the base has not been examined yet; run the study first")
    table = summarise(cells)
    kind = "" if split == PUBLISHED else f"-{split}"
    kind += f"-{length.name}" if length.minutes else ""
    target = CELLS.parent / f"learning{kind}.json"
    target.write_text(json.dumps(_document(cells, table, length, split), indent=1) + "\n")
    plot(cells, target.with_suffix(".png"))
    if not kind:
        publish(show(table, cells), ROOT / "docs" / "LEARNING.md")
    print(show(table, cells))
    print(json.dumps({"learning": {row: _means(entries) for row, entries in table.items()}}))


def _document(
    cells: dict[str, list[dict]], table: dict[str, dict], length: Length, split: str
) -> dict:
    any_cell = next(iter(cells.values()))[0]
    long = f"--minutes {length.minutes}" if length.minutes else f"--steps {length.steps}"
    return {
        "command": f"python bench/learning.py {long} --split {split}",
        "seeds": _of_cells("seed", cells),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "device": "CPU, one thread per cell",
        "torch": any_cell["torch"],
        "split": split,
        "scenes": any_cell["n"],
        "updates": _of_cells("steps", cells),
        "table": table,
        "seconds": _of_cells("seconds", cells),
        "cpu_seconds": _of_cells("cpu_seconds", cells),
    }


def _of_cells(key: str, cells: dict[str, list[dict]]) -> dict[str, list]:
    """One entry of each cell, by row."""
    found: dict[str, list] = {}
    for row, group in cells.items():
        found[row] = [cell.get(key) for cell in group]
    return found


def _means(entries: dict[str, dict]) -> dict[str, float]:
    return {name: round(entry["mean"], 4) for name, entry in entries.items()}


def publish(text: str, page: Path) -> None:
    """Put the table between the page's two marks."""
    before, after = page.read_text().split(MARK)[::2]
    page.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def of_scenes(text: str | None) -> argparse.ArgumentParser:
    """A parser of what benches over drawn scenes take."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="one small batch")
    return parser


def parted(words: list[str]) -> tuple[list[str], list[str]]:
    """A bench's own words, and behind -- those of the trainer."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=500)
    add("--minutes", type=int, default=0, help="CPU minutes of each training, instead of --steps")
    add("--split", choices=list(SPLIT_SEED), default=PUBLISHED)
    add("--workers", type=int, default=2)
    add("--quick", action="store_true", help="one seed, 60 updates, the validation split")
    add("--smoke", action="store_true", help="every row, one small update, in a temporary folder")
    add("--into", type=Path, help="where the cells lie; their adapters then lie beside them")
    add("--table", action="store_true", help="only rebuild the table")
    add("--cell", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.quick:
        args.rows = [row for row in args.rows if "," not in row]
        args.seeds = [0]
        args.steps = 60
        args.split = "validation"
    return args


def smoke() -> int:
    """The whole study with one small update, in a folder that goes with it: its exit status."""
    small = ["--eval.scenes", "4", "--train.batch", "2", "--rollout.samples", "2"]
    with tempfile.TemporaryDirectory() as scratch:
        words = ["--seeds", "0", "--steps", "1", "--split", "validation"]
        words += ["--into", f"{scratch}/cells", "--", *small]
        return subprocess.run([sys.executable, __file__, *words]).returncode


def keep_in(folder: Path) -> None:
    """Cells and adapters lie in `folder` from here on, in the processes of cells too."""
    global CELLS, ADAPTERS, INTO
    CELLS = folder
    ADAPTERS = folder / "adapters"
    INTO = ["--into", str(folder)]


def main() -> None:
    """One cell, or what is missing of the study and the table."""
    own, extra = parted(sys.argv[1:])
    args = parse(own)
    if args.into is not None:
        keep_in(args.into)
    if args.smoke:
        sys.exit(smoke())
    length = Length(args.steps, args.minutes)
    if args.cell:
        result = run_cell(args.cell, args.seeds[0], length, args.split, extra)
        CELLS.mkdir(parents=True, exist_ok=True)
        place = cell_path(args.cell, args.seeds[0], length, args.split)
        kept = _short(result) | {"config": result["config"]}
        place.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
        return
    if not args.table:
        rows = [row for row in args.rows if row != "base"]
        cells = [("base", 0)]
        cells += [(row, seed) for seed, row in itertools.product(args.seeds, rows)]
        spawn(cells, length, args.split, args.workers, extra)
    write_table(length, args.split)


if __name__ == "__main__":
    main()
