"""The backend under test: the files that import `ops` from here are written once and run on each of them.

METRONOME_BACKEND says which: the cpu backend where nothing is said, the triton one in the processes that
`test_triton.py` starts, in Triton's interpreter or, with METRONOME_TEST_DEVICE=cuda, on a GPU. Tests speak of CPU
tensors only; what an op takes, and what it writes to, moves to the device and back.

To run one test in the interpreter: ``METRONOME_BACKEND=triton TRITON_INTERPRET=1 pytest tests/kernels/test_linear.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import isfunction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from kernels import ops as _ops
from kernels.layout import PagedKV
from kernels.tools.row_contract import same

DEVICE_VARIABLE = "METRONOME_TEST_DEVICE"
NATIVE = os.environ.get("METRONOME_BACKEND", "cpu") == "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

native_only = pytest.mark.skipif(not NATIVE, reason="of the cpu backend's own order, or too long elsewhere")

if INTERPRETED:
    from tests.kernels.interpreter import quicken

    quicken()


ROWS = st.integers(1, 1000) if NATIVE else st.one_of(st.integers(1, 20), st.integers(1, 70))


def examples(native: int, triton: int = 2) -> settings:
    """hypothesis settings: so many examples of a sweep. The interpreter is a thousand times slower."""
    return settings(max_examples=native if NATIVE else triton)


def small(native: Any, triton: Any) -> Any:
    """A size for each backend."""
    return native if NATIVE else triton


def device() -> str:
    """``cuda``, or ``cpu`` for the interpreter and the cpu backend."""
    return os.environ.get(DEVICE_VARIABLE, "cpu")


def there(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` with its CPU arguments moved to the tested device, and its results and what it wrote to moved back."""
    if device() == "cpu":
        return op

    def moved(*args: Any, **kwargs: Any) -> Any:
        written: list[tuple[torch.Tensor, torch.Tensor]] = []
        result = op(*(_to(x, written) for x in args), **{name: _to(x, written) for name, x in kwargs.items()})
        for mine, other in written:
            if not mine.requires_grad and not same(mine, other.cpu()):
                mine.copy_(other)
        return _back(result)

    return moved


def across(x: torch.Tensor) -> torch.Tensor:
    """``x`` on the device; its strides, too, which Tensor.to forgets of rows that lie apart."""
    if x.requires_grad or x.is_contiguous():
        return x.to(device())
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach,), (1,), x.storage_offset()).to(device()).as_strided(x.shape, x.stride())


def _to(x: Any, written: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    if isinstance(x, torch.Tensor) and x.is_cpu:
        other = across(x)
        written.append((x, other))
        return other
    if isinstance(x, tuple):
        return tuple(_to(part, written) for part in x)
    if isinstance(x, PagedKV):
        return PagedKV(_to(x.key, written), _to(x.value, written), _to(x.table, written))
    return x  # a number, segments, or a pack, which is on the device already


def _back(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.cpu()
    return tuple(map(_back, x)) if isinstance(x, tuple) else x


MOVES = ("upload", "deferred", "fetch")
"""Of `kernels.ops`, what moves tensors and errors and computes nothing: triton/test_deferred.py."""
OPS = tuple(
    name
    for name, value in vars(_ops).items()
    if isfunction(value) and value.__module__ == _ops.__name__ and name not in MOVES
)
COPIES = frozenset({"pack_linear", "pack_experts", "repack"})
"""Those that compute nothing."""
ops = SimpleNamespace(**{name: there(getattr(_ops, name)) for name in OPS})
