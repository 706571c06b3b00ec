"""vise_fast: Visual Invariance Self-Evolution of vision-language models on one GPU."""

import logging

from vise_fast.system import threads

__version__ = "0.2.0"

# PEFT imports bitsandbytes, which on some CPUs warns that a kernel it could download is not there;
# nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Before torch, whose OpenMP reads it once: threads that spin while they wait make a step beside one
# busy process take 7 to 20 times as long, and those that sleep 1.3 to 2 times.
threads.wait_asleep()
