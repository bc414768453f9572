"""Counter-based sampling keys: which 64-bit key draws which token.

There is no generator state. A token's key is a pure function of (run seed, scenario id, rollout index, chunk, position,
stream), so an episode comes out the same whatever else is sampled beside it, in whatever order or process, and a killed
rollout is simply rolled out again. The noise per vocabulary entry is made from the key inside `kernels.ops.sample`.
"""

from __future__ import annotations

import hashlib

MASK = (1 << 64) - 1

TEXT_STREAM = 0
"""Stream of mode and text tokens. Other streams (a voice head's noise, say) get their own number."""


def splitmix64(x: int) -> int:
    """One output of the SplitMix64 generator (Steele, Lea & Flood 2014) for the state ``x``; a bijection on 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def session_key(seed: int, scenario: str, rollout: int) -> int:
    """The 64-bit key of one episode: blake2b of the run seed, the scenario id and the rollout index."""
    digest = hashlib.blake2b(f"{seed}\x1f{scenario}\x1f{rollout}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def token_key(key: int, chunk: int, position: int, stream: int = TEXT_STREAM) -> int:
    """Key of the token at absolute ``position``, sampled in ``chunk``, as the signed int64 that tensors hold."""
    mixed = splitmix64(splitmix64(splitmix64(key ^ chunk) ^ position) ^ stream)
    return mixed - (1 << 64) if mixed >> 63 else mixed
