"""Where the tests of this folder run their kernels: see conftest.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

DEVICE_VARIABLE = "METRONOME_TEST_DEVICE"


def inside() -> bool:
    """Whether this is a process that conftest.py started, and not the one that collects."""
    return os.environ.get("TRITON_INTERPRET") == "1" or DEVICE_VARIABLE in os.environ


def device() -> str:
    """``cuda``, or ``cpu`` for the interpreter."""
    return os.environ.get(DEVICE_VARIABLE, "cpu")


def there(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` with its tensor arguments moved to the tested device and its results moved back, so that a test may speak
    of CPU tensors only. In the interpreter nothing moves."""

    def moved(*args: Any, **kwargs: Any) -> Any:
        result = op(*(_to(x, device()) for x in args), **{name: _to(x, device()) for name, x in kwargs.items()})
        return _to(result, "cpu")

    return moved


def _to(x: Any, where: str) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(where)
    if isinstance(x, tuple):
        return tuple(_to(part, where) for part in x)
    return x  # a number, or a container that the test has placed itself
