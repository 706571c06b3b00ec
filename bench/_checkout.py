"""Puts the checkout's packages on the path: a bench runs from a plain checkout, nothing installed.

A bench imports it before them. Left out: everything else.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
