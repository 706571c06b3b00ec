"""The taps of a truncated Gaussian, and the same taps as a short sum of cosines for the
constant-time native blur.

    taps(d) = exp(-d^2 / 2 sigma^2) / sum,  |d| <= radius
    taps(d) ~ sum_k amplitude_k cos(frequency_k d)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Two passes of the fitted kernel stay within this many grey levels of the exact one, whatever the
# image.
MOST_ERROR = 0.25
# The cosines' half period, in kernel half-widths: longer than the kernel, so that the fit need not
# be even at its ends and fewer terms do (5 instead of 9 at three sigma); too long and amplitudes
# cancel each other, which `_fit` refuses.
STRETCHES = (1.3, 1.15, 1.0)
MOST_CANCELLATION = 4.0


class Fit(NamedTuple):
    """A kernel as a sum of cosines: its radius in pixels; frequency (K,) in radians per pixel and
    amplitude (K,), float64.
    """

    radius: int
    frequency: np.ndarray
    amplitude: np.ndarray


def taps(sigma: float, radius: int) -> Tensor:
    """(2 radius + 1,) float64, summing to 1."""
    d = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(d**2) / (2 * sigma**2))
    return weights / weights.sum()


@functools.lru_cache(maxsize=4096)
def fit(sigma: float, radius: int) -> Fit:
    """The fewest terms that keep MOST_ERROR."""
    radius = min(radius, math.ceil(6 * sigma))  # beyond, taps are below 2e-8 of the largest
    target = taps(sigma, radius).numpy()
    fits = [_fit(target, radius, stretch) for stretch in STRETCHES]
    kept = [found for found in fits if found is not None]
    frequency, amplitude = min(kept, key=lambda found: len(found[0]))
    frequency.flags.writeable = False
    amplitude.flags.writeable = False
    return Fit(radius, frequency, amplitude)


def _fit(target: np.ndarray, radius: int, stretch: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Least squares with 1, 2, ... terms until the error is small; None where that takes cancelling
    amplitudes.
    """
    d = np.arange(-radius, radius + 1)
    frequency = np.pi / (stretch * (radius + 0.5)) * np.arange(radius + 1)
    for terms in range(1, radius + 2):
        basis = np.cos(np.outer(d, frequency[:terms]))
        amplitude = np.linalg.lstsq(basis, target, rcond=None)[0]
        if 2 * 255 * np.abs(target - basis @ amplitude).sum() <= MOST_ERROR:
            break
    else:
        return None
    # at stretch 1 the cosines are orthogonal, and all of them together are exact
    cancels = stretch > 1 and np.abs(amplitude).sum() > MOST_CANCELLATION * target.max()
    return None if cancels else (frequency[:terms].copy(), amplitude)
