"""Several ranks on this machine's cores (gloo, one thread each): is the result the same, what does
it survive, how does it scale, and what would that mean on GPUs?

    python bench/ranks.py same --write       1, 2, 3 and 4 ranks, 20 updates of the embedded model
    python bench/ranks.py kills --write      a random rank killed again and again, torchrun restarts
    python bench/ranks.py resume --write     4 ranks, then 1, then 2, against 1 throughout
    python bench/ranks.py speed --write      images per second of 1 and 2 ranks, taking turns
    python bench/ranks.py forecast --write   8 cards of 24 GB, and 64 cards: a model, no measurement

Each writes its section of bench/results/ranks-cpu.json. Times mean something on an idle machine
only. Left out: NCCL, which needs two GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _checkout
import _measure as measure
import torch
from safetensors.torch import load_file

from vise_fast.config import schema
from vise_fast.estimate import planner
from vise_fast.method import invented
from vise_fast.system.console import read_lines

RESULT = _checkout.ROOT / "bench" / "results" / "ranks-cpu.json"
DRIVER = _checkout.ROOT / "bench" / "_rank_run.py"
COMMON = {
    "eval.scenes": 0,
    "run.report": "false",
    "train.schedule": "constant",
    "train.warmup": 0,
}
HELD = ("reward", "kl", "area", "parse_rate")
BOUND = 1e-4


def words(run: Path, **settings: Any) -> list[str]:
    """Settings with __ for the dot."""
    said = COMMON | {"run.dir": run} | {k.replace("__", "."): v for k, v in settings.items()}
    return [f"--{key}={value}" for key, value in said.items()]


def start(
    ranks: int, texts: Path | None, said: list[str], log: Path, restarts: int = 0
) -> subprocess.Popen:
    """A training on so many ranks, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    place = "-" if texts is None else str(texts)
    if texts is not None:
        texts.mkdir(exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [*launcher, str(DRIVER), place, *said],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def train(ranks: int, texts: Path | None, said: list[str], log: Path) -> None:
    """One that must end well."""
    if start(ranks, texts, said, log).wait():
        raise SystemExit(f"{ranks} ranks failed:\n{log.read_text(errors='replace')[-3000:]}")


def adapter(run: Path) -> torch.Tensor:
    """All its numbers, float64."""
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    return torch.cat([stored[name].flatten().double() for name in sorted(stored)])


def written(texts: Path) -> dict[int, dict[str, list[str]]]:
    """{step: {kind: what the ranks wrote, in the order of the batch}}."""
    steps: dict[int, dict[str, list[str]]] = {}
    files = sorted(texts.iterdir(), key=lambda file: int(file.stem.split("_")[1]))
    for file in files:
        for line in read_lines(file):
            known = steps.setdefault(line.pop("step"), {})
            for kind, some in line.items():
                known.setdefault(kind, []).extend(some)
    return steps


def distance(run: Path, truth: Path) -> dict[str, float]:
    """Of two runs: adapters by their norm, and the largest difference of each held figure."""
    wanted = adapter(truth)
    found = {"adapter": float((adapter(run) - wanted).norm() / wanted.norm())}
    lines = (read_lines(place / "metrics.jsonl") for place in (run, truth))
    pairs = list(zip(*lines, strict=True))
    for name in HELD:
        found[name] = max(abs(a[name] - b[name]) for a, b in pairs)
    found["steps"] = len(pairs)
    return found


def same(home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """1, 2, 3, 4 ranks over the same updates."""
    found: dict[str, Any] = {"updates": args.updates, "batch": args.batch, "bound": BOUND}
    settings = {"train__steps": args.updates, "train__batch": args.batch}
    for ranks in args.ranks:
        run = home / f"{ranks}"
        train(ranks, home / f"texts {ranks}", words(run, **settings), home / "log")
        if ranks == args.ranks[0]:
            continue
        first = args.ranks[0]
        row = distance(run, home / f"{first}")
        truth = written(home / f"texts {first}")
        there = written(home / f"texts {ranks}")
        row["texts"] = sum(len(texts) for step in truth.values() for texts in step.values())
        row["steps_with_other_texts"] = sum(there[step] != truth[step] for step in truth)
        found[f"{ranks} ranks against {first}"] = row
        print(ranks, row, flush=True)
    return found


def resume(home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """4 ranks, then 1, then 2, each for a third, against 1 rank throughout."""
    third = max(args.updates // 3, 1)
    settings = {"train__batch": args.batch}
    whole = home / "whole"
    train(1, None, words(whole, train__steps=3 * third, **settings), home / "log")
    parts = home / "parts"
    for number, ranks in enumerate((4, 1, 2), 1):
        said = words(parts, train__steps=number * third, train__resume="auto", **settings)
        train(ranks, None, said, home / "log")
    return {"ranks": [4, 1, 2], "updates_each": third, **distance(parts, whole)}


def kills(home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A random rank, killed at a random time, so many times; torchrun restarts all."""
    ranks = args.ranks[-1]
    settings = {"train__steps": args.updates, "train__batch": args.batch}
    settings |= {"run__checkpoint_every": 2, "train__deterministic": "true"}
    truth = home / "truth"
    train(ranks, None, words(truth, **settings), home / "log")
    run = home / "killed"
    process = start(ranks, None, words(run, train__resume="auto", **settings), home / "log", 1000)
    rng = random.Random(args.seed)
    tally: dict[str, Any] = {"kills": 0, "ranks_killed": [0] * ranks, "at_updates": []}
    while tally["kills"] < args.kills and process.poll() is None:
        _kill_one(run, rng, tally, process)
        print(tally, flush=True)
    code = process.wait()
    equal = code == 0 and bool(torch.equal(adapter(run), adapter(truth)))
    tally |= {"ranks": ranks, "seed": args.seed, "updates": args.updates, "code": code}
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    return tally | {
        "bitwise_equal_adapter": equal,
        "all_steps_told_once": steps == sorted(set(steps)),
    }


def _kill_one(run: Path, rng: random.Random, tally: dict, process: subprocess.Popen) -> None:
    """Waits for a life that has made an update, and ends one of its ranks."""
    known = _places(run)
    while _places(run) == known and tally["kills"] > 0 and process.poll() is None:
        time.sleep(0.05)
    before = _steps(run)
    while _steps(run) <= before and process.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.6))
    rank = rng.randrange(len(tally["ranks_killed"]))
    places = _places(run)
    if process.poll() is not None or not places:
        return
    os.kill(int(places[rank].rpartition(":")[2]), signal.SIGKILL)
    tally["kills"] += 1
    tally["ranks_killed"][rank] += 1
    tally["at_updates"].append(_steps(run))


def _places(run: Path) -> list[str]:
    file = run / "env.json"
    return json.loads(file.read_text())["rank_places"] if file.exists() else []


def _steps(run: Path) -> int:
    lines = read_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def speed(home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Strong scaling: one batch on 1 and 2 ranks. Weak scaling: as many images per rank."""
    ways = {
        "1 rank": (1, args.batch),
        "2 ranks, strong": (2, args.batch),
        "2 ranks, weak": (2, 2 * args.batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    figures: dict[str, Any] = {}
    for repeat in range(args.repeats):
        for name, (ranks, batch) in ways.items():
            run = home / f"{name} {repeat}"
            settings = {"train__steps": args.updates, "train__batch": batch}
            train(ranks, None, words(run, **settings), home / "log")
            steps = read_lines(run / "metrics.jsonl")[2:]  # the first ones warm up
            rates[name].append(statistics.median(s["images_per_s"] for s in steps))
            figures[name] = _communication(steps)
            print(name, rates[name][-1], flush=True)
    found: dict[str, Any] = {name: {"images_per_s": rates[name]} | figures[name] for name in ways}
    for name in list(ways)[1:]:
        ratios = [a / b for a, b in zip(rates[name], rates["1 rank"], strict=True)]
        found[f"{name} over 1 rank"] = {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
    return found | {"load_average": os.getloadavg()[0], "batch": args.batch}


def _communication(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes, and the share of a step."""
    if "communication_bytes" not in steps[-1]:
        return {}
    shares = [step["communication_share"] for step in steps]
    return {
        "gradient_bytes": steps[-1]["gradient_bytes"],
        "sent_bytes_per_rank": steps[-1]["communication_bytes"],
        "communication_share": statistics.median(shares),
    }


# ---- forecast --------------------------------------------------------------------------------


NETWORKS = {
    "8 x 24 GB, PCIe 4.0 without peer access": (8, 10e9, 20e-6),
    "8 cards, NVLink": (8, 200e9, 10e-6),
    "64 cards in 8 nodes, 100 Gbit/s": (64, 11e9, 30e-6),
    "64 cards in 8 nodes, 10 Gbit/s": (64, 1.1e9, 60e-6),
}
"""Cards, bytes per second through the narrowest link of a ring, seconds per message: stated, not
measured. Messages go around the ring too.
"""


def forecast(home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step in communication: a ring's bytes over stated bandwidths, and latencies."""
    config = schema.load("qwen3-vl-2b", [f"--train.batch={args.images_per_card}"])
    held = planner.Planner(config, dtype=torch.bfloat16).rehearse(config).phases["optimizer"]
    size = held["LoRA masters"]  # fp32, as its gradients
    made = invented.evidence(config.reward, truth=False)
    told_per_box = len(pickle.dumps(made)) / len(made.readable)
    rows = {}
    for name, (cards, bandwidth, latency) in NETWORKS.items():
        ring = 2 * size * (cards - 1) / cards / bandwidth + 2 * (cards - 1) * latency
        boxes = config.rollout.samples * args.images_per_card * cards
        told = told_per_box * boxes * (cards - 1) / cards / bandwidth
        messages = 8 * (cards - 1) * latency
        seconds = ring + told + messages
        rows[name] = {
            "gradients_s": round(ring, 5),
            "messages_s": round(told + messages, 5),
            "share_of_a_step": round(seconds / (seconds + args.step_s), 5),
        }
    return {
        "forecast": "computed from bytes and stated bandwidths; no such machine was used",
        "gradient_bytes": size,
        "evidence_bytes_per_box": round(told_per_box),
        "images_per_card": args.images_per_card,
        "step_s_assumed": args.step_s,
        "networks": rows,
    }


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "same": same,
    "resume": resume,
    "kills": kills,
    "speed": speed,
    "forecast": forecast,
}


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images-per-card", type=int, default=8)
    parser.add_argument("--step-s", type=float, default=10.0, help="forecast: of a step's own work")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="two ranks, few updates")
    args = parser.parse_args(given)
    if args.smoke:
        args.ranks = [1, 2]
        args.updates = 3
        args.batch = 2
        args.kills = 1
        args.repeats = 1
    return args


def main(given: list[str]) -> None:
    args = parse(given)
    begun = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        found = PARTS[args.part](home, args)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    found["seconds"] = round(time.monotonic() - begun)
    document = json.loads(RESULT.read_text()) if RESULT.exists() else {"bench": "ranks"}
    made = measure.machine(torch.device("cpu"))
    name = f"{args.part} {args.seed}" if args.part == "kills" else args.part
    document |= {"cores": os.cpu_count(), name: {**found, "commit": made["commit"]}}
    document |= {key: made[key] for key in ("device", "python", "versions", "date")}
    measure.finish(document, RESULT if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
