"""The modules of bench/ for tests that use what the benches use."""

import importlib
import sys
from pathlib import Path

BENCH = str(Path(__file__).parents[1] / "bench")


def module(name):
    """`bench/<name>.py`; it finds its neighbours."""
    if BENCH not in sys.path:
        sys.path.insert(0, BENCH)
    return importlib.import_module(name)
