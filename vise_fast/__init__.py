"""vise_fast: Visual Invariance Self-Evolution of vision-language models on one GPU."""

import logging

__version__ = "0.2.0"

# PEFT imports bitsandbytes, which on some CPUs warns that a kernel it could download is not there;
# nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
