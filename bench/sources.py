"""One run over the same photographs from each kind of place: are they the same run?

    python bench/sources.py [--pictures 200] [--steps 3] [--write]

Crops of scikit-image's photographs lie in a folder, a list, a zip, a tar, a table, in that order;
then the same as streams. The embedded model trains on each; metrics and held-out figures are
compared with those of the first kind that has the same order, figure by figure, times aside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import _measure as measure
import pyarrow
import torch
from _checkout import ROOT
from PIL import Image as Pillow
from pyarrow import parquet
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "tests"))

from small_runs import CHANGING, SMALL, go, lines  # noqa: E402  (found by the line above)

NAMES = ("astronaut", "coffee", "chelsea", "rocket", "cat", "immunohistochemistry")
STREAMED = " as a stream"


def crops(folder: Path, count: int) -> list[Path]:
    """JPEG files named as the rows of a table."""
    folder.mkdir()
    for i in range(count):
        whole = Pillow.fromarray(getattr(photographs, NAMES[i % len(NAMES)])())
        share = i / (2 * count)
        left = int(share * whole.width)
        top = int(share * whole.height / 2)
        box = (left, top, left + whole.width // 2, top + 2 * whole.height // 3)
        whole.crop(box).save(folder / f"{i:09d}", "JPEG", quality=90)
    return sorted(folder.iterdir())


def places(home: Path, count: int) -> dict[str, str]:
    """{kind: place} of the same pictures."""
    files = crops(home / "photos", count)
    (home / "photos" / "list.txt").write_text("\n".join(file.name for file in files))
    with zipfile.ZipFile(home / "photos.zip", "w") as packed:
        for file in files:
            packed.write(file, file.name)
    with tarfile.open(home / "photos.tar", "w") as taped:
        for file in files:
            taped.add(file, file.name)
    table = pyarrow.table({"image": [file.read_bytes() for file in files]})
    parquet.write_table(table, home / "photos.parquet", 50)
    listed = {
        "folder": f"{home}/photos",
        "list": f"{home}/photos/list.txt",
        "zip": f"{home}/photos.zip",
        "tar": f"{home}/photos.tar",
        "table": f"{home}/photos.parquet",
    }
    streams = {f"{kind}{STREAMED}": listed[kind] for kind in ("list", "zip", "tar", "table")}
    return listed | streams


def figures(directory: Path) -> dict[str, Any]:
    """What a run says of itself, times aside."""
    metrics = [
        {name: value for name, value in record.items() if name not in CHANGING}
        for record in lines(directory / "metrics.jsonl")
    ]
    evaluation = json.loads((directory / "evaluation.json").read_text())
    return {"metrics": metrics, "evaluation": evaluation}


def digest(content: Any) -> str:
    """Of all figures."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def trained(home: Path, kind: str, place: str, steps: int) -> dict[str, Any]:
    """One run."""
    directory = home / f"run of {kind}"
    words = [*SMALL, "--run.dir", directory, "--data.dir", place, "--train.steps", steps]
    words += ["--data.max_pixels", 16384, "--run.report", "false"]
    if kind.endswith(STREAMED):
        words += ["--data.stream", "true", "--data.buffer", 50]
    code = go(*words)
    if code:
        raise SystemExit(f"the run of {kind} ended with {code}")
    found = figures(directory)
    last = found["metrics"][-1]
    return {
        "place": kind,
        "reward_mean": last["reward_mean"],
        "grad_norm": last["grad_norm"],
        "figures": digest(found),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="bench/results/sources-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        for kind, place in places(home, given.pictures).items():
            row = trained(home, kind, place, given.steps)
            streams = kind.endswith(STREAMED)
            alike = [one for one in rows if one["place"].endswith(STREAMED) == streams]
            row["same_as_first"] = not alike or row["figures"] == alike[0]["figures"]
            rows.append(row)
    results = {
        "bench": "sources",
        "machine": measure.machine(torch.device("cpu")),
        "setting": {"pictures": given.pictures, "steps": given.steps, "model": "nano"},
        "cases": rows,
    }
    measure.finish(results, ROOT / "bench/results/sources-cpu.json" if given.write else None)


if __name__ == "__main__":
    main()
