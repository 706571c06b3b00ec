"""vise_fast: Visual Invariance Self-Evolution of vision-language models on one GPU."""

import logging

from vise_fast.system import threads

__version__ = "0.2.0"

# PEFT imports bitsandbytes, which on some CPUs warns that a kernel it could download is not there;
# nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Before torch, whose OpenMP reads it once: beside one busy process a step takes 4 to 20 times as
# long where waiting threads spin, and about twice as long where they soon sleep.
threads.wait_asleep()
