"""What the tests of the noises share: hash words, Gumbel noise by decimal arithmetic, and that of 24 bits, which once
was the sampler's and cannot draw improbable tokens."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from kernels.reference.backend import GOLDEN, _mix

MASK64 = 2**64 - 1

ULPS = 4
"""Bound of an fp32 noise's error, in 2^-24 of the greater of it and 1: a rounding of x, two logs, a quotient and a
product."""


def words() -> Tensor:
    """int64 words: the ends of both halves of (0, 1), and every power of two with its neighbours, where x or 1 - x
    rounds to even, up or down; then some of no pattern."""
    ends = [0, 1, 2, 3, 2**63 - 1, 2**63 - 2]
    near = [2**n + d for n in range(2, 63) for d in (-1, 0, 1)]
    ties = [
        (2**24 + odd << n) + d for n in range(1, 39) for odd in (0, 1) for d in (2 ** (n - 1) - 1, 2 ** (n - 1) + 1)
    ]
    mixed = _mix(torch.arange(300)).tolist()
    high = [*ends, *near, *ties]
    return torch.tensor([*high, *(word - 2**63 for word in high), *mixed])


def normal_words() -> Tensor:
    """int64 words of normal noise: those above, and the neighbours of where AS 241 changes its ratio: |q| = 0.425 and
    p = e^-25; then 6,000 in each tail, a third of them where p < e^-25."""
    edges = [round(0.425 * 2**64) + (d << 10) for d in range(-40, 41)]
    edges += [2**63 - round(math.exp(-25) * 2**64) + (d << 10) for d in range(-40, 41)]
    bits = _mix(torch.arange(4_000)) & (2**63 - 1)
    upper = torch.cat([torch.tensor(edges), 2**63 - 1 - bits // 8, 2**63 - 1 - (bits[::2] >> 36)])
    return torch.cat([words(), upper, ~upper])


def exact_noise(word: int) -> float:
    """-ln(-ln u) of an int64 word by 60 decimal digits; only the rounding of x to 24 bits is fp32's."""
    m = to_24_bits(word & (2**63 - 1) | 1)
    with localcontext() as context:
        context.prec = 60
        x = Decimal(m) / Decimal(2**64)
        return float(-(-(x if word < 0 else 1 - x).ln()).ln())


def to_24_bits(number: int) -> int:
    """Rounded once as fp32 rounds: to nearest, ties to even."""
    spare = max(abs(number).bit_length() - 24, 0)
    kept, rest = divmod(abs(number), 2**spare)
    kept += 2 * rest > 2**spare or (2 * rest == 2**spare and kept % 2 == 1)
    return (kept << spare) * (1 if number > 0 else -1)


def key_of(word: int, token: int) -> int:
    """The int64 key from which `ops.sample` hashes ``token`` to ``word``: splitmix64 is one-to-one."""

    def unshift(x: int, by: int) -> int:
        y = x
        for _ in range(64 // by):
            y = x ^ (y >> by)
        return y

    x = unshift(word & MASK64, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK64
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK64
    key = (unshift(x, 30) - GOLDEN * (token + 2)) & MASK64
    return key - 2**64 if key >= 2**63 else key


def noise_of_24_bits(key: Tensor, token: Tensor) -> Tensor:
    """float64 of broadcast int64 keys and tokens: u = (n + 0.5) / 2^24, n the word's upper 24 bits."""
    upper = (_mix(key + (token + 1) * (GOLDEN - 2**64)) >> 40) & (2**24 - 1)
    return -torch.log(-torch.log((upper.double() + 0.5) / 2**24))
