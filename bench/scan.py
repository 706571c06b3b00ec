"""Starting over very many picture files: how long, and how much memory above what the imports take?

    python bench/scan.py                     20,000 files
    python bench/scan.py --files 1000000 --write

Makes that many small PNG files, each one of its own, in folders of a thousand; opens them as a
training run does in a process of its own, first without a cache, then with what the first start
remembered, then after one file of a thousand was written anew. Left out: a cold disk (the files
were just made), and decoding (decode.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _measure as measure
import torch
from _checkout import ROOT

FOLDER = 1000
SIZES = 64
MIB = 2**20
SAID = "found "
LIMITS = {"first_s": 300, "later_s": 60, "above_imports_mib": 300}
"""What a million files may take."""


def pictures() -> list[bytes]:
    """SIZES small PNG files of different widths."""
    import io

    from PIL import Image

    made = []
    for i in range(SIZES):
        held = io.BytesIO()
        Image.new("L", (16 + i, 16)).save(held, "PNG")
        made.append(held.getvalue())
    return made


def fill(root: Path, count: int) -> None:
    """That many files below a folder."""
    contents = pictures()
    for start in range(0, count, FOLDER):
        folder = root / f"{start // FOLDER:05d}"
        folder.mkdir()
        for i in range(start, min(start + FOLDER, count)):
            with open(folder / f"{i:09d}.png", "wb") as file:
                file.write(contents[i % SIZES])


def change(root: Path, count: int) -> None:
    """Writes one of a thousand anew, with another width."""
    contents = pictures()
    for i in range(0, count, FOLDER):
        path = root / f"{i // FOLDER:05d}" / f"{i:09d}.png"
        path.write_bytes(contents[(i + 7) % SIZES])


def status(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {name}")


def start(root: str) -> None:
    """One start, in this process; says what it took as the last line."""
    from vise_fast.config.schema import load
    from vise_fast.images.sources import open_source
    from vise_fast.model import load as model
    from vise_fast.system.console import Console

    run = tempfile.mkdtemp()
    config = load(None, ["--data.dir", root, "--run.dir", run])
    multiple = model.grid_multiple(config.model.path)
    before = status("VmRSS")
    wall = time.monotonic()
    cpu = time.process_time()
    source = open_source(config, multiple, Path(run), through=Console().through)
    found = {
        "wall_s": time.monotonic() - wall,
        "cpu_s": time.process_time() - cpu,
        "images": source.identity()["images"],
        "names": source.identity()["names"],
        "above_imports_mib": (status("VmHWM") - before) / MIB,
    }
    source.sizes()
    source.batch(0, 8)
    found["with_a_batch_mib"] = (status("VmHWM") - before) / MIB
    source.close()
    print(SAID + json.dumps(found))


def started(root: Path, home: Path) -> dict:
    """One start in a process of its own, whose cache lies in `home`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    words = os.environ | {"XDG_CACHE_HOME": str(home), "PYTHONPATH": paths}
    command = [sys.executable, __file__, "--start", str(root)]
    done = subprocess.run(command, env=words, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines))
    return json.loads(last.removeprefix(SAID))


def starts(count: int, place: str | None) -> list[dict]:
    """A row per start."""
    with tempfile.TemporaryDirectory(dir=place) as made:
        root = Path(made) / "photos"
        root.mkdir()
        fill(root, count)
        time.sleep(4)  # what was written just now is not remembered
        home = Path(made) / "cache"
        rows = [{"start": "first"} | started(root, home)]
        rows.append({"start": "later"} | started(root, home))
        change(root, count)
        rows.append({"start": "later, one of a thousand changed"} | started(root, home))
        cached = sum(path.stat().st_size for path in home.rglob("*.npz"))
        rows[0]["cache_mib"] = cached / MIB
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--place", help="where the files are made; else the temporary folder")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="bench/results/scan-cpu.json")
    given = parser.parse_args()
    if given.start:
        start(given.start)
        return
    results = {
        "bench": "scan",
        "machine": measure.machine(torch.device("cpu")),
        "setting": {"files": given.files, "folders_of": FOLDER, "limits": LIMITS},
        "cases": starts(given.files, given.place),
    }
    measure.finish(results, ROOT / "bench/results/scan-cpu.json" if given.write else None)


if __name__ == "__main__":
    main()
