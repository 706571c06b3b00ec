"""Counter-based randomness: every draw is named by (seed, step, purpose, index), so a retry or a
skip shifts nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, step: int, purpose: str, index: int = 0) -> int:
    """A 63-bit integer that depends on all four parts and on nothing else."""
    name = f"{seed}/{step}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def generator(seed: int, step: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A numpy generator (Philox) for one named draw."""
    return np.random.Generator(np.random.Philox(key(seed, step, purpose, index)))
