"""Images per second of training on a busy machine: alone, beside a neighbour that takes a core, and
two runs at once.

    python bench/busy.py --write                  the embedded model on two threads, ten repeats
    python bench/busy.py --old DIR                times another checkout in the same repeats
    python bench/busy.py --smoke                  one repeat of one step: does it run?

Every contender is one training in a process of its own that stands still (SIGSTOP) until it is its
turn, so repeats are interleaved and nothing is started anew. A training looks at its start who else
is at work, so each is started as it will run: alone, beside the neighbour, or one while the other
runs; "one that came later" meets a training that was started alone. A turn lasts a number of whole
steps; the step it begins in, half of which was done before, does not count. Another checkout meets
ours twice: as either is shipped, and with ours doing the work that was the default before ("as
before": `robust, before` of learning.py), which is that of a checkout from then: the same images,
boxes and verdicts. The neighbour is a
Python loop without end, on whichever core the system gives it. What else the machine did meanwhile
is counted ("others", in cores): a figure with much of it says little. All processes end with the
bench. Wall time; left out: GPUs, and what a neighbour does to memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import _checkout
import _measure as measure
import torch
from learning import BEFORE

from vise_fast.system.console import read_lines
from vise_fast.system.machine.threads import HASTY, HOW_TO_WAIT, PATIENT, said

POLL_S = 0.1
GOALS = {
    "beside / alone": 0.45,
    "two at once / alone": 0.8,
    "alone / old alone": 0.97,
    "alone, as before / old alone": 0.97,
}
LOOP = "while True: pass"
WITHOUT_END = ("--train.steps", "1000000", "--eval.scenes", "0", "--run.checkpoint_every", "0")


class Held:
    """A process that stands still but for its turns."""

    def __init__(self, words: Sequence[str], **settings) -> None:
        self.process = subprocess.Popen(words, **settings)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def hold(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def cpu_s(self) -> float:
        """CPU seconds it has taken so far, on all its threads."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()  # reaches a process that stands still, too
        self.process.wait()


class Training(Held):
    """A training of the code in `checkout`, which takes its own choice of how threads wait."""

    def __init__(
        self, checkout: Path, directory: Path, threads: int, batch: int, extra: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.batch = batch
        self.said = directory.with_suffix(".txt")
        words = [sys.executable, "-m", "vise_fast.train", "--run.dir", str(directory)]
        environment = {name: text for name, text in os.environ.items() if name not in HOW_TO_WAIT}
        environment["OMP_NUM_THREADS"] = str(threads)
        environment["PYTHONPATH"] = f"{checkout}:{checkout / 'kernels'}"
        with self.said.open("w") as said:
            super().__init__(
                [*words, "--train.batch", str(batch), *WITHOUT_END, *extra],
                cwd=checkout,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def steps(self) -> int:
        """How many are done. RuntimeError, with what it said, where the training has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"a training has ended: {self.said.read_text()[-2000:]}")
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for(self, steps: int) -> None:
        """Returns when so many steps are done, counted from the start."""
        while self.steps() < steps:
            time.sleep(POLL_S)

    def images_per_s(self, first: int) -> float:
        """Over the steps after the first so many."""
        records = read_lines(self.directory / "metrics.jsonl")[first:]
        return self.batch * len(records) / sum(record["seconds"] for record in records)


@dataclass
class Contest:
    """Who trains, who only takes a core, for how many whole steps, and what came of it."""

    trainings: list[Training]
    neighbours: list[Held]
    steps: int
    images_per_s: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Cores that other processes took, turn by turn."""

    def turn(self) -> None:
        """Everybody runs together until the slowest has done its steps; notes the sum of their
        rates.
        """
        taking_part = [*self.trainings, *self.neighbours]
        begun = [training.steps() + 1 for training in self.trainings]
        clock = time.monotonic()
        foreign_s = _foreign_s(taking_part)
        for one in taking_part:
            one.go_on()
        for training, first in zip(self.trainings, begun, strict=True):
            training.wait_for(first + self.steps)
        for one in taking_part:
            one.hold()
        foreign_s = _foreign_s(taking_part) - foreign_s
        self.others.append(max(0.0, foreign_s) / (time.monotonic() - clock))
        rates = [t.images_per_s(first) for t, first in zip(self.trainings, begun, strict=True)]
        self.images_per_s.append(sum(rates))

    def summary(self) -> dict[str, float]:
        """Median, least and most images per second, all trainings together."""
        rates = self.images_per_s
        return {
            "median": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "repeats": len(rates),
            "others_median": statistics.median(self.others),
            "others_most": max(self.others),
        }


def _foreign_s(known: Sequence[Held]) -> float:
    """CPU seconds since the machine's start that were not taken by `known` or the bench itself;
    those that a hypervisor kept for itself included.
    """
    user, nice, system, _, _, *interrupts_and_steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    busy = user + nice + system + sum(interrupts_and_steal)
    own_s = time.process_time() + sum(process.cpu_s() for process in known)
    return busy / os.sysconf("SC_CLK_TCK") - own_s


@contextlib.contextmanager
def contests(args: argparse.Namespace) -> Iterator[dict[str, Contest]]:
    """Every contest by its name, its trainings warm and standing still; ends all processes."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def training(
            name: str, checkout: Path, beside: Held | None = None, extra: Sequence[str] = ()
        ) -> Training:
            if beside is not None:
                beside.go_on()
            made = Training(checkout, scratch / name, args.threads, args.batch, extra)
            stack.callback(made.end)
            made.wait_for(args.warmup)
            made.hold()
            if beside is not None:
                beside.hold()
            return made

        loop = Held([sys.executable, "-c", LOOP])
        stack.callback(loop.end)
        loop.hold()
        first = training("first", _checkout.ROOT)  # has done the same steps as `old` at every turn
        later = training("later", _checkout.ROOT)
        second = training("second", _checkout.ROOT, loop)
        third = training("third", _checkout.ROOT)
        fourth = training("fourth", _checkout.ROOT, third)
        found = {
            "alone": Contest([first], [], args.steps),
            "beside": Contest([second], [loop], args.steps),
            "beside one that came later": Contest([later], [loop], args.steps),
            "two at once": Contest([third, fourth], [], args.steps),
        }
        if args.old is not None:
            before = training("before", _checkout.ROOT, extra=BEFORE.split())
            found["alone, as before"] = Contest([before], [], args.steps)
            old = training("old", args.old.resolve())
            found["old alone"] = Contest([old], [], args.steps)
            found["old beside"] = Contest([old], [loop], 1)
        yield found


def run(found: dict[str, Contest], repeats: int) -> None:
    """Every contest once per repeat, A B C A B C ...; the old code beside a neighbour, whose steps
    take up to half a minute, in the last repeat only.
    """
    for repeat in range(repeats):
        for name, contest in found.items():
            if name != "old beside" or repeat == repeats - 1:
                contest.turn()


def ratios(found: dict[str, Contest]) -> dict[str, dict[str, float]]:
    """Repeat by repeat, so that what slows a whole repeat cancels: {"beside / alone": {...}}."""
    alone = found["alone"].images_per_s
    pairs = {
        "beside / alone": (found["beside"].images_per_s, alone),
        "beside one that came later / alone": (
            found["beside one that came later"].images_per_s,
            alone,
        ),
        "two at once / alone": (found["two at once"].images_per_s, alone),
    }
    if "old alone" in found:
        old = found["old alone"].images_per_s
        pairs["alone / old alone"] = (alone, old)
        before = found["alone, as before"].images_per_s
        pairs["alone, as before / old alone"] = (before, old)
        pairs["old beside / old alone"] = (found["old beside"].images_per_s, old[-1:])
    return {name: _ratio(*pair) for name, pair in pairs.items()}


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def commit(checkout: Path | None) -> str | None:
    """The commit a checkout stands at, None where there is no checkout."""
    if checkout is None:
        return None
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def tell(summaries: dict[str, dict], compared: dict[str, dict]) -> None:
    """The table a person reads."""
    for name, s in summaries.items():
        print(
            f"  {name:34s} {s['median']:6.2f} images/s  ({s['least']:.2f}-{s['most']:.2f}, "
            f"{s['repeats']} repeats; others {s['others_median']:.2f} cores, at most "
            f"{s['others_most']:.2f})"
        )
    for name, r in compared.items():
        goal = f"  goal {GOALS[name]:.2f}" if name in GOALS else ""
        print(f"  {name:34s} {r['median']:6.3f}  ({r['least']:.3f}-{r['most']:.3f}){goal}")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="another checkout, timed in the same repeats")
    parser.add_argument("--threads", type=int, default=2, help="of every training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="whole steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--write", action="store_true", help="bench/results/busy-cpu.json")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.batch = 1
        args.repeats = 1
        args.steps = 1
        args.warmup = 1
    return args


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(words: list[str]) -> None:
    args = parse(words)
    signal.signal(signal.SIGTERM, _leave)  # so that the processes end here, too
    usable = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(f"{args.threads} threads a training on {usable} cores; load before the start {load:.1f}")
    with contests(args) as found:
        run(found, args.repeats)
    summaries = {name: contest.summary() for name, contest in found.items()}
    compared = ratios(found)
    tell(summaries, compared)
    machine = measure.machine(torch.device("cpu"))
    machine |= {"cores": usable, "threads": args.threads, "clock": "wall", "load_before": load}
    machine["waiting"] = {"alone": said(PATIENT), "beside": said(HASTY)}
    setting = {key: getattr(args, key) for key in ("threads", "batch", "repeats", "steps")}
    document = {"bench": "busy", "machine": machine, "setting": setting, "goals": GOALS}
    document |= {"old_commit": commit(args.old), "images_per_s": summaries, "ratios": compared}
    place = _checkout.ROOT / "bench" / "results" / "busy-cpu.json" if args.write else None
    measure.finish(document, place)


if __name__ == "__main__":
    main(sys.argv[1:])
