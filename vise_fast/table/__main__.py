"""Base and adapter side by side on lmms-eval's tasks, unmerged, with paired intervals.

    python -m vise_fast.table --adapter runs/nano/adapter --out tables/nano --tasks drawn
    python -m vise_fast.table --adapter RUN/adapter --out DIR [--limit N] [--dry-run]

Tasks: paper (the eight rows of arXiv 2606.27373), drawn (scenes this package draws: nothing is
downloaded), or lmms-eval's names with commas between them. --env is the environment that lmms-eval
is installed in (build/consumers); where there is none it is made, pinned, 7 GB. --dry-run says the
commands, downloads and what is missing. Tasks that are finished in --out are not run again. Left
out: a blind control for the paper's tasks, and intervals for CIDEr, which is a figure of a whole
corpus.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("table")  # before what takes seconds to import

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import get_token

from vise_fast.config import origin
from vise_fast.config.command_line import CommandLine
from vise_fast.config.schema import Config
from vise_fast.model.load import device_of
from vise_fast.model.saved import adapter as adapters
from vise_fast.system import files
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError, EnvironmentFault
from vise_fast.table import arms, drawn, environment, lmms_eval, paired
from vise_fast.table.arms import ARMS, Job
from vise_fast.table.lmms_eval import Setting
from vise_fast.table.rows import NEEDS, Row, chosen, tasks

SYNTAX = commands.syntax("table")
PIXELS = {True: (1024, 65_536), False: (200_704, 1_605_632)}
"""(smallest, largest) images: of the embedded model, and lmms-eval's own."""
TOKENS = 64
SECONDS = 1.0
"""A guess of one answer on a GPU, for the estimate alone."""
COLUMNS = ["", "base", "adapter", "difference", "paper (2B)"]
REMEDY = "free space or give --out a writable place"


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    console = Console()
    if given.help:
        console.say(commands.page("table", words))
        return 0
    if given["adapter"] is None or given["out"] is None:
        raise ConfigError(
            "table needs an adapter and a place for the samples; write "
            f"{commands.spoken('table')} --adapter RUN/adapter --out DIR"
        )
    rows = _rows(given["tasks"] or "paper")
    config = origin.configuration(given)
    adapters.verify(given["adapter"], console.warn)
    place = Path(given["env"] or environment.HOME)
    setting = _setting(given, config)
    python = str(environment.python_of(place))
    todo = arms.jobs(python, Path(given["out"]), tasks(rows), config, setting)
    lacking = list(missing(place, todo))
    if "dry-run" in given.flags:
        if not environment.is_ready(place):
            console.say(f"to make  {place}, where lmms-eval lives: {environment.GIGABYTES:.0f} GB")
        return explain(todo, setting, lacking, console)
    if lacking:
        raise EnvironmentFault("; ".join(lacking))
    environment.complete(place, console.say)
    return table(rows, todo, given, config, setting)


def _rows(words: str) -> tuple[Row, ...]:
    try:
        return chosen(words)
    except KeyError as fault:
        raise ConfigError(
            f"--tasks {fault.args[0]} is in no table; the sets are paper and drawn; name one of "
            "them or some of their tasks"
        ) from None


def _setting(given: CommandLine, config: Config) -> Setting:
    smallest, largest = PIXELS[config.model.path == "nano"]
    device = str(device_of(config.model.device))
    return Setting(device, smallest, largest, limit=given.count("limit"))


def missing(place: Path, todo: list[Job]) -> Iterator[str]:
    """What has to be there before anything starts, a sentence each; `place`: where lmms-eval
    lives.
    """
    obstacle = environment.obstacle(place)
    if obstacle is not None:
        yield obstacle
    needs = [NEEDS[job.task] for job in todo if job.task in NEEDS and not job.finished]
    if any(need.java for need in needs) and shutil.which("java") is None:
        yield "CIDEr needs Java for its tokenizer; install a Java runtime (apt install default-jre)"
    if needs and get_token() is None:
        yield "the tasks' data need a login to the hub; log in with: hf auth login"
    wanted = sum(need.gigabytes for need in needs) / len(ARMS)
    free = shutil.disk_usage(Path.home()).free / 1e9
    if wanted > free:
        yield f"the tasks' data take about {wanted:.0f} GB, {free:.0f} are free; make room"


def explain(todo: list[Job], setting: Setting, lacking: list[str], console: Console) -> int:
    """--dry-run: commands, downloads, disk, time, and what is missing."""
    for job in todo:
        state = "finished" if job.finished else "to run"
        console.say(f"{state:8} {job.task} on the {job.arm}: {shlex.join(job.words)}")
    remote = dict.fromkeys(job.task for job in todo if not job.finished and job.task in NEEDS)
    size = sum(NEEDS[task].gigabytes for task in remote)
    asked = [min(NEEDS[task].questions, setting.limit or 10**9) for task in remote]
    console.say(f"download {size:.1f} GB of data, roughly; the hub's cache keeps them")
    hours = len(ARMS) * SECONDS * sum(asked) / 3600
    console.say(f"time     {hours:.1f} hours, if an answer takes {SECONDS:g} s (a guess)")
    for line in lacking:
        console.warn(line)
    return EnvironmentFault.code if lacking else 0


def table(
    rows: tuple[Row, ...], todo: list[Job], given: CommandLine, config: Config, setting: Setting
) -> int:
    """Runs what is left, prints the table and writes it beside the samples."""
    console = Console()
    out = Path(str(given["out"]))
    with files.refused(out, REMEDY):
        arms.prepare(config, Path(str(given["adapter"])), out, console)
        done = list(arms.run(todo, out, console))
    samples: dict[str, dict[str, list[dict]]] = {}
    for job in done:
        samples.setdefault(job.task, {})[job.arm] = _samples(job, out)
    for task, both in samples.items():
        paired.check_paired(both, task)
    lines = [_line(row, samples[row.task], done) for row in rows]
    for task in tasks(tuple(row for row in rows if row.caption)):
        lines += _lengths(task, samples[task])
    told = list(_told(setting, samples))
    console.table("base and adapter, the adapter unmerged", COLUMNS, lines)
    for line in told:
        console.say(line)
    content = {"columns": COLUMNS, "rows": lines, "setting": told}
    files.write(out / "table.json", json.dumps(content, indent=1, ensure_ascii=False), REMEDY)
    return 0


def _samples(job: Job, out: Path) -> list[dict]:
    """What was logged; of drawn tasks with the scene that a question is about."""
    logged = lmms_eval.samples(job.out, job.task)
    if job.local:
        scenes = drawn.scene_of(out / "tasks", job.task)
        for sample in logged:
            sample["scene"] = scenes[int(sample["doc_id"])]
    return logged


def _line(row: Row, samples: dict[str, list[dict]], done: list[Job]) -> list[str]:
    """A row's cells."""
    places = {job.arm: job.out for job in done if job.task == row.task}
    totals = {arm: paired.total(places[arm], row.task, row.figure) for arm in ARMS}
    return paired.cells(row, samples, totals)


def _lengths(task: str, samples: dict[str, list[dict]]) -> Iterator[list[str]]:
    """Lines about the length of captions: CIDEr punishes it."""
    means = [f"{paired.words(samples[arm]):.1f}" for arm in ARMS]
    yield [f"{task}: words in an answer", *means, "", ""]
    shares = [paired.cut(samples[arm], TOKENS) for arm in ARMS]
    shown = ["-" if share is None else f"{share:.1%}" for share in shares]
    yield [f"{task}: cut at {TOKENS} tokens", *shown, "", ""]


def _told(setting: Setting, samples: dict[str, dict[str, list[dict]]]) -> Iterator[str]:
    """How it was asked."""
    limit = "all questions" if setting.limit is None else f"the first {setting.limit} questions"
    yield (
        f"setting  bfloat16 (lmms-eval's own choice), adapter unmerged, {limit} of each task, "
        f"images of {setting.min_pixels} to {setting.max_pixels} pixels, system prompt "
        f"'{setting.system_prompt}'"
    )
    for task, both in samples.items():
        yield f"prompt   {task}: {_prompt(both['base'][0])}"


def _prompt(sample: dict) -> str:
    asked = sample.get("input", "")
    return str(asked)[:200]


if __name__ == "__main__":
    sys.exit(run(main))
