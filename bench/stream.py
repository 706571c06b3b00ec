"""Thousands of batches of a stream without training: how much does memory grow, and how long is a
place that a resumed run passes over?

    python bench/stream.py [--batches 5000] [--write]

Per kind of place (shards of tar, a table, a list), in a process of its own: batches of eight, the
resident memory after the first 500 and the most of it from there to the end; then the CPU seconds
until another process has the batch after the last one. Left out: training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import _measure as measure
import torch
from _checkout import ROOT
from PIL import Image as Pillow

BATCH = 8
WARM = 500
MIB = 2**20
LIMIT_MIB = 20
COUNT = 12_000
SAID = "found "
RESULT = ROOT / "bench" / "results" / "stream-cpu.json"


def pictures() -> list[bytes]:
    """Some JPEG files of noise and of different sizes."""
    import numpy as np

    rng = np.random.default_rng(0)
    made = []
    for i in range(24):
        pixels = rng.integers(0, 255, (12 + i % 5, 16 + i % 7, 3), np.uint8)
        held = io.BytesIO()
        Pillow.fromarray(pixels).resize((160 + i, 120), Pillow.Resampling.BICUBIC).save(
            held, "JPEG", quality=95
        )
        made.append(held.getvalue())
    return made


def shards(home: Path) -> str:
    """Eight tars, a text beside every picture."""
    contents = pictures()
    for shard in range(8):
        with tarfile.open(home / f"shard-{shard}.tar", "w") as made:
            for i in range(shard, COUNT, 8):
                for name, data in ((f"{i:06d}.json", b"{}"), (f"{i:06d}.jpg", contents[i % 24])):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    made.addfile(info, io.BytesIO(data))
    return f"{home}/shard-*.tar"


def table(home: Path) -> str:
    """A parquet file, a hundred rows in a group."""
    import pyarrow
    from pyarrow import parquet

    contents = pictures()
    column = [contents[i % 24] for i in range(COUNT)]
    parquet.write_table(pyarrow.table({"image": column}), home / "photos.parquet", 100)
    return f"{home}/photos.parquet"


def listed(home: Path) -> str:
    """A list of files."""
    (home / "photos").mkdir()
    contents = pictures()
    names = []
    for i in range(COUNT):
        names.append(f"photos/{i:06d}.jpg")
        (home / names[-1]).write_bytes(contents[i % 24])
    lines = [json.dumps({"image": name}) for name in names]
    (home / "list.jsonl").write_text("\n".join(lines))
    return f"{home}/list.jsonl"


KINDS = {"shards of tar": shards, "a table": table, "a list": listed}


def resident() -> int:
    """Bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def opened(place: str, home: str):
    from vise_fast.config.schema import load
    from vise_fast.images.sources import open_source

    words = ["--data.dir", place, "--data.stream", "true", "--data.max_pixels", "16384"]
    return open_source(load(None, [*words, "--run.dir", home]), 32)


def run(place: str, batches: int, home: str) -> dict:
    """One process: memory over that many batches."""
    source = opened(place, home)
    before = 0
    most = 0
    for step in range(batches):
        source.batch(step, BATCH)
        if step == WARM - 1:
            before = most = resident()
        if step >= WARM and step % 10 == 0:
            most = max(most, resident())
    last = [image.name for image in source.batch(batches, BATCH)]
    source.close()
    return {"after_warm_mib": before / MIB, "grows_mib": (most - before) / MIB, "last": last}


def resumed(place: str, batches: int, home: str) -> dict:
    """Another process: straight to the batch after the last one."""
    start = time.process_time()
    source = opened(place, home)
    begun = time.process_time()
    names = [image.name for image in source.batch(batches, BATCH)]
    source.close()
    return {
        "open_s": begun - start,
        "passed_over_s": time.process_time() - begun,
        "last": names,
    }


def child(what: str, place: str, batches: int, home: str) -> dict:
    """In a process of its own."""
    words = [sys.executable, __file__, "--child", what, place, str(batches), home]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1].removeprefix(SAID))


def measured(batches: int, kinds: list[str]) -> list[dict]:
    """A row per kind."""
    rows = []
    for kind in kinds:
        make = KINDS[kind]
        with tempfile.TemporaryDirectory() as made:
            place = make(Path(made))
            found = child("run", place, batches, made)
            again = child("resumed", place, batches, made)
            assert found.pop("last") == again.pop("last"), "the resumed stream shows others"
        rows.append({"place": kind, "pictures": COUNT} | found | again)
        print(rows[-1])
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=5000)
    parser.add_argument("--only", choices=KINDS, help="measure this anew, keep the other rows")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="bench/results/stream-cpu.json")
    given = parser.parse_args()
    if given.child:
        what, place, batches, home = given.child
        act = run if what == "run" else resumed
        print(SAID + json.dumps(act(place, int(batches), home)))
        return
    results = {
        "bench": "stream",
        "machine": measure.machine(torch.device("cpu")),
        "setting": {"batches": given.batches, "batch": BATCH, "limit_mib": LIMIT_MIB},
        "cases": measured(given.batches, [given.only] if given.only else list(KINDS)),
    }
    if given.only and RESULT.exists():
        old = json.loads(RESULT.read_text())["cases"]
        results["cases"] = [row for row in old if row["place"] != given.only] + results["cases"]
    measure.finish(results, RESULT if given.write else None)


if __name__ == "__main__":
    main()
