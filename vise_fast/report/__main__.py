"""The command; see page.py."""

import sys

from vise_fast.report.page import main
from vise_fast.system import console

if __name__ == "__main__":
    sys.exit(console.run(main))
