"""Mistakes in sharing rows over processes (`kernels.sharing`) that tests must see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

from torch import Tensor

from kernels import dispatch
from kernels.rows import Rows

_before = Rows.before


def _shifted(self: Rows, own: Tensor, most: int) -> Tensor:
    """`Rows.before`, one row too early."""
    found = _before(self, own, most + 1)
    return found[:-1] if len(found) > most else found


def _added(rows: Rows | None, gradient: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> Tensor:
    """`over_all_rows`, where each process's part is what it finds from its own rows."""
    return gradient(grad, *inputs)


@contextmanager
def mistaken(kind: str) -> Iterator[None]:
    """A block in which convolutions see the rows before a slice shifted by one (``halo``), or gradients of matrices
    are sums of the processes' own sums (``sums``); without a mistake for ""."""
    with ExitStack() as stack:
        if kind == "halo":
            stack.enter_context(patch.object(Rows, "before", _shifted))
        if kind == "sums":
            name = dispatch.backend().NAME
            for module in ("linear", "moe" if name == "cpu" else "experts"):
                stack.enter_context(patch.object(import_module(f"kernels.{name}.{module}"), "over_all_rows", _added))
        yield
