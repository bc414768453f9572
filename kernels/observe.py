"""Lets an audit see every op that a model calls: which function ran, on what, with what result.

Nothing is added to the ops themselves: for the time of a block an observer stands in the active backend's place and
calls it. What to keep of a call is decided by the audit, which knows what the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from kernels import dispatch
from kernels.backend import Backend

Arguments = ParamSpec("Arguments")
Results = TypeVar("Results", bound=Tensor | tuple[Tensor, ...])


@dataclass(frozen=True)
class Call:
    """One call of one op. Tensors are those of the computation itself, not copies."""

    op: str  # its name in `kernels.ops`
    function: str  # what ran, as module.name
    arguments: tuple[Any, ...]
    results: tuple[Tensor, ...]


@contextmanager
def observed(see: Callable[[Call], None]) -> Iterator[None]:
    """Until the block ends ``see`` is called after every op that returns tensors (packing and `adamw` return none)."""
    with dispatch.substituted(_Observer(dispatch.backend(), see)):
        yield


class _Observer:
    """The backend ``backend``, but ``see`` is called with the results of every op."""

    def __init__(self, backend: Backend, see: Callable[[Call], None]) -> None:
        self.NAME, self.DEVICE = backend.NAME, backend.DEVICE
        self.contract, self.instruction_set = backend.contract, backend.instruction_set
        self.pack_linear, self.pack_experts, self.repack = backend.pack_linear, backend.pack_experts, backend.repack
        self.adamw = backend.adamw
        self.upload, self.deferred, self.fetch = backend.upload, backend.deferred, backend.fetch

        def shown(op: str, function: Callable[Arguments, Results]) -> Callable[Arguments, Results]:
            def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Results:
                out = function(*arguments, **named)
                results = out if isinstance(out, tuple) else (out,)
                see(Call(op, f"{function.__module__}.{function.__name__}", arguments, results))
                return out

            return run

        self.linear = shown("linear", backend.linear)
        self.expert_linear = shown("expert_linear", backend.expert_linear)
        self.swiglu = shown("swiglu", backend.swiglu)
        self.gelu = shown("gelu", backend.gelu)
        self.moe_combine = shown("moe_combine", backend.moe_combine)
        self.rms_norm = shown("rms_norm", backend.rms_norm)
        self.embedding_sum = shown("embedding_sum", backend.embedding_sum)
        self.short_conv = shown("short_conv", backend.short_conv)
        self.attention = shown("attention", backend.attention)
        self.route = shown("route", backend.route)
        self.logprob = shown("logprob", backend.logprob)
        self.sample = shown("sample", backend.sample)
        self.dot = shown("dot", backend.dot)
