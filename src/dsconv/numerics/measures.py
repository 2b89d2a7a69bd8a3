"""Measures of the difference between values and their quantized form."""

import math


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal-to-quantization-noise ratio ``10 log10(signal / noise)`` in dB; infinite without noise.

    >>> sqnr_db(signal=5.0, noise=0.25)
    13.010299956639813
    """
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf
