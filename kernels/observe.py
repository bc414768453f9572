"""Lets an audit see every op that a model calls: which function ran, on what, with what result.

Nothing is added to the ops themselves: for the time of a block an observer stands in the active backend's place and
calls it. What to keep of a call is the audit's affair, which knows what the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from kernels import dispatch


@dataclass(frozen=True)
class Call:
    """One call of one op. Tensors are those of the computation itself, not copies."""

    op: str  # its name in `kernels.ops`
    function: str  # what ran, as module.name
    arguments: tuple[Any, ...]
    results: tuple[Tensor, ...]


@contextmanager
def observed(see: Callable[[Call], None]) -> Iterator[None]:
    """Until the block ends ``see`` is told of every op that has results (packing has none)."""
    with dispatch.substituted(_Observer(dispatch.backend(), see)):
        yield


class _Observer(ModuleType):
    def __init__(self, backend: ModuleType, see: Callable[[Call], None]) -> None:
        super().__init__(backend.__name__)
        self._backend, self._see = backend, see

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        if not callable(value):
            return value

        def run(*arguments: Any) -> Any:
            out = value(*arguments)
            results = out if isinstance(out, tuple) else (out,)
            if isinstance(results[0], Tensor):
                self._see(Call(name, f"{value.__module__}.{value.__name__}", arguments, results))
            return out

        return run
