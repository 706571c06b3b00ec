"""The command; see planner.py."""

import sys

from vise_fast.estimate.planner import main
from vise_fast.system import console

if __name__ == "__main__":
    sys.exit(console.run(main))
