"""Which backend runs the ops, chosen once at start, and the contract id that stamps what it produced.

``METRONOME_BACKEND``, or a recipe's ``placement.device``, picks ``cpu`` (default), ``triton`` (GPUs) or ``reference``.
An unknown name, a missing native library, or a machine without the needed instructions or GPU raises; there is no
silent fallback.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels.backend import Backend
from kernels.layout import CONV_TAPS, SPLIT_TOKENS

BACKENDS = ("cpu", "reference", "triton")

_active: Backend | None = None


def backend() -> Backend:
    """The active backend; loads the default one on first use."""
    global _active
    if _active is None:
        _active = _load(os.environ.get("METRONOME_BACKEND", "cpu"))
    return _active


def use_backend(name: str) -> None:
    """Switches the backend. Weights packed before must be packed anew: packs of another backend raise."""
    global _active
    _active = _load(name)


@contextmanager
def substituted(other: Backend) -> Iterator[None]:
    """Runs the ops through ``other`` until the block ends, also when it ends by an exception: for an observer, or for a
    backend that is only measured. Weights packed by another backend must be packed anew."""
    global _active
    before, _active = backend(), other
    try:
        yield
    finally:
        _active = before


def _load(name: str) -> Backend:
    """Imports one backend: its libraries need not be there for the others. mypy compares each with `Backend` here."""
    if name == "cpu":
        from kernels.cpu import backend as cpu

        return cpu
    if name == "reference":
        from kernels.reference import backend as reference

        return reference
    if name == "triton":
        from kernels.triton import library

        library.check()
        from kernels.triton import backend as triton

        return triton
    raise ValueError(f"METRONOME_BACKEND={name!r} is not a backend; choose one of {list(BACKENDS)}")


def device() -> torch.device:
    """Where the active backend's tensors lie: weights, activations, caches. What the host decides by is on the CPU."""
    return torch.device(backend().DEVICE)


def contract() -> dict[str, str | int]:
    """Everything that decides bits, as plain values: split and tap sizes and torch's version, and what the backend adds
    by its own `contract`: the version of its numerics, tiles, number formats, and the kind of GPU.

    What does not decide bits is not in it: the CPU backend's instruction sets give equal bits and so share an id
    (`instruction_set` says which is in use), and a build of torch for a GPU computes nothing here that its CPU build
    does not."""
    active = backend()
    return {
        "backend": active.NAME,
        **active.contract(),
        "split_tokens": SPLIT_TOKENS,
        "conv_taps": CONV_TAPS,
        "torch": torch.__version__.partition("+")[0],
    }


def instruction_set() -> str:
    """What the backend's kernels run on: ``avx2``, ``avx512``, ``sm_90``, ``interpreter`` … Not in the id."""
    return backend().instruction_set()


def contract_id() -> str:
    """16 hexadecimal digits: equal ids mean that equal weights and inputs give equal bits."""
    return hashlib.sha256(json.dumps(contract(), sort_keys=True).encode()).hexdigest()[:16]
