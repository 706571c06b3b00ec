"""The command; see planner.py."""

import sys

from vise_fast.config import commands
from vise_fast.system import console

if __name__ == "__main__":
    commands.begin("estimate")  # before what takes seconds to import

from vise_fast.estimate.planner import main

if __name__ == "__main__":
    sys.exit(console.run(main))
