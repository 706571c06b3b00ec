"""The embedded model: a Qwen3-VL of 2 M parameters, its tokenizer, and the scripts that made them.

`DIRECTORY` loads with transformers.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent
