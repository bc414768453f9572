"""Random numbers that are the same on every processor: integers from a counter-based generator, added as integers."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DRAWS_PER_BATCH = 1 << 20
"""`near_normal` makes so many draws at a time, which bounds its memory for a large tensor."""


def philox(key: str) -> np.random.Philox:
    """The counter-based generator Philox (Salmon et al. 2011), keyed by a digest of ``key`` and nothing else."""
    return np.random.Philox(key=np.frombuffer(blake2b(key.encode(), digest_size=16).digest(), dtype="<u8"))


def near_normal(key: str, count: int) -> NDArray[np.float32]:
    """``count`` draws [count] of mean 0 and variance 1 that depend on ``key`` only: the sum of twelve uniform 16-bit
    words, centred (Irwin-Hall; never beyond 6).

    Not a library's normal distribution: those take logarithms, which may differ in the last bit by processor. Here
    every number is an integer until one exact division.

    >>> near_normal("example", 3).tolist()
    [0.492401123046875, 1.851043701171875, 0.7723388671875]
    """
    bits, draws = philox(key), np.empty(count, np.float32)
    for first in range(0, count, DRAWS_PER_BATCH):
        size = min(DRAWS_PER_BATCH, count - first)
        words = bits.random_raw(3 * size).astype("<u8").view("<u2").reshape(size, 12)
        draws[first : first + size] = (words.sum(axis=1, dtype=np.int32) - 6 * 0xFFFF) / 0x10000
    return draws
