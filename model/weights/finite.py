"""Weights that are not finite are no result: they are neither saved nor loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.errors import MetronomeError

VALUES_PER_PIECE = 1 << 22


class NotFiniteError(MetronomeError):
    """NaN or infinity where there must be numbers."""


def check_finite(what: str, tensors: Iterable[tuple[str, Tensor]], remedy: str) -> None:
    """Raises NotFiniteError for the first of the named ``tensors`` with a value that is not finite. ``what`` has them,
    such as "checkpoint runs/a/model"; ``remedy``: what to do."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and (count := _not_finite(tensor)):
            raise NotFiniteError(f"{what}: {count:,} of {tensor.numel():,} values of {name} are not finite: {remedy}")


def _not_finite(tensor: Tensor) -> int:
    """How many values are not finite. By pieces, since `torch.isfinite` takes as much memory as what it is given."""
    pieces = tensor.detach().flatten().split(VALUES_PER_PIECE)
    return sum(int(torch.count_nonzero(~torch.isfinite(p))) for p in pieces if not bool(torch.isfinite(p).all()))
