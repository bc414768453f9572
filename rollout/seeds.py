"""All randomness of rollouts: keys of sampled tokens, random generators by name, and the numbering of scenarios.

Tokens are sampled with counter-based keys: there is no generator state. A token's key is a pure function of (run seed,
scenario id, rollout index, chunk, position, stream), so an episode comes out the same whatever else is sampled beside
it, in whatever order or process, and a killed rollout is simply rolled out again. The noise per vocabulary entry is
made from the key inside `kernels.ops.sample`.

Whatever else is random has a `generator` of its own, named by its purpose; so have initial weights
(`model.weights.draws`). Scenario seeds are disjoint: RL counts from 0, demonstrations (warm start) from
`FIRST_DEMONSTRATION_SEED`, data for reward models from `FIRST_PREFERENCE_SEED`.
"""

from __future__ import annotations

import hashlib

import numpy as np

from model.weights.draws import philox

FIRST_DEMONSTRATION_SEED, FIRST_PREFERENCE_SEED = 1_000_000_000, 2_000_000_000
SEEDS_PER_RUN = 10_000_000
"""Size of the block of scenario seeds that each run seed has among demonstrations, and among preference data."""

_MASK64 = (1 << 64) - 1

TEXT_STREAM = 0
"""Number of the stream of mode and text tokens in `token_key`."""
VOICE_STREAM = 1
"""That of chunks of sound, whose position is that of the row after the micro-turn's last."""


def splitmix64(x: int) -> int:
    """One output of the SplitMix64 generator (Steele, Lea & Flood 2014) for the state ``x``; a bijection on 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def session_key(seed: int, scenario: str, rollout: int) -> int:
    """The 64-bit key of one episode: blake2b of the run seed, the scenario id and the rollout index."""
    digest = hashlib.blake2b(f"{seed}\x1f{scenario}\x1f{rollout}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def token_key(key: int, chunk: int, position: int, stream: int = TEXT_STREAM) -> int:
    """Key of the token at absolute ``position``, sampled in ``chunk``, as the signed int64 that tensors hold."""
    mixed = splitmix64(splitmix64(splitmix64(key ^ chunk) ^ position) ^ stream)
    return mixed - (1 << 64) if mixed >> 63 else mixed


def generator(*key: str | int) -> np.random.Generator:
    """A random generator that depends on ``key`` only: the same in every process, in any order of creation."""
    return np.random.Generator(philox("/".join(map(str, key))))


def mistakes_generator(seed: int, index: int) -> np.random.Generator:
    """The generator that decides which mistakes demonstration ``index`` of run seed ``seed`` contains."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def demonstration_seed(seed: int, index: int) -> int:
    """Scenario seed of demonstration ``index`` in a run of seed ``seed``."""
    return FIRST_DEMONSTRATION_SEED + seed * SEEDS_PER_RUN + index


def preference_seed(seed: int, index: int) -> int:
    """Scenario seed number ``index`` of the reward models' data, made with run seed ``seed``."""
    return FIRST_PREFERENCE_SEED + seed * SEEDS_PER_RUN + index
