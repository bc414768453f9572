"""Checks of the ops' arguments: one set for every backend, with one wording of each refusal.

Each ``check_<op>`` raises ValueError, naming the op and the argument, unless shapes, types and strides are what its
docstring says; so a kernel is given an address only after that. The device of tensors is a backend's own matter: it
looks itself and calls `check_device` for the error. What only a kernel can notice (an id in a tensor that names
nothing) is worded in these modules too, by functions that return the error.

A decode step makes hundreds of calls of a few microseconds, so the checks are written for speed: reading an attribute
of a tensor costs 0.1 µs (``stride(n)`` twice as much as ``stride()``), so a check reads each once and returns those
that the call needs too.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import Tensor

KERNELS = Path(__file__).resolve().parents[1]

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of an op's first argument, as its check has read them."""


def check_device(op: str, backend: str, kind: str, **tensors: Tensor | None) -> None:
    """Raises ValueError for the first of ``tensors`` that is not on a device of type ``kind`` ("cpu", "cuda")."""
    for name, x in tensors.items():
        if x is not None and x.device.type != kind:
            raise ValueError(
                f"{op}: {name} is on {x.device}; the {backend} backend needs it on {kind} ({program_line()})"
            )


def program_line() -> str:
    """The line that called the op, of all that are running the innermost outside our kernels and torch:
    ``model/backbone/moe.py:109 in forward``."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if KERNELS in path.parents or "torch" in path.parts or frame.filename.startswith("<"):
            continue
        shown = path.relative_to(KERNELS.parent) if path.is_relative_to(KERNELS.parent) else path
        return f"{shown}:{frame.lineno} in {frame.name}"
    return "no line of the program"
