"""The command; see held_out.py."""

import sys

from vise_fast.evaluate.held_out import main
from vise_fast.system import console

if __name__ == "__main__":
    sys.exit(console.run(main))
