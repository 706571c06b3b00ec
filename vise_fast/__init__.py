"""vise_fast: Visual Invariance Self-Evolution of vision-language models on one GPU."""

import logging
import sys

if sys.version_info < (3, 11):  # noqa: UP036  # a checkout runs under any Python
    sys.stderr.write(
        f"error: Python {sys.version.split()[0]} is too old ({sys.executable}); vise_fast needs "
        "3.11 or newer; say make PYTHON=/path/to/python3.11, or use that one\n"
    )
    sys.exit(4)

from vise_fast.system.machine import threads

__version__ = "0.2.0"

# PEFT imports bitsandbytes, which on some CPUs warns that a kernel it could download is not there;
# nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Before torch, whose OpenMP reads it once: beside one busy process a step takes 4 to 20 times as
# long where waiting threads spin, and about twice as long where they soon sleep.
threads.wait_asleep()
