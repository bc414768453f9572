"""Rows of one call shared out over several processes: sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198).

Each process of a group has a contiguous slice of the packed rows, in rank order, and keeps only that for the backward
pass. What is divided is rows and columns, never a sum, so every bit is that of one process with all rows:

- an op on single rows computes its own rows, forward and backward (the row contract);
- a gradient of weights is a sum over rows, in the order of all rows. `kernels.rows.over_all_rows` gathers the rows'
  inputs and gradients and runs the very kernel of one process on them; of a matrix product each process computes a
  slice of the output columns, of a norm every process computes all. Each process has a part of the gradient
  (`kernels.rows.Rows.made`), so that it is not sent here: who adds the parts up, as for processes with other rows, has
  it;
- a short convolution computes its own rows from the three inputs before them (`kernels.rows.Rows.before`); its backward
  runs on gathered rows on every process;
- attention runs on gathered rows on every process, forward and backward, and its own rows are kept of the result and of
  what its backward needs.

Gathered rows live for the duration of one op. Knows tensors and a function that gathers them; who the processes are and
how they are reached is the caller's. Not divided: `sample` and `embedding_sum`, which raise; and there is no cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernels import dispatch
from kernels.backend import Backend
from kernels.layout import CONV_TAPS, PackedExperts, PackedLinear, PagedKV, Segments
from kernels.rows import Rows, activated

BACKENDS = ("cpu", "triton")
"""Those whose gradients of weights go through `kernels.rows.over_all_rows`."""


@contextmanager
def shared(rows: Rows) -> Iterator[None]:
    """Until the block ends every op takes and gives this process's rows of a call that has ``rows.bounds[-1]`` of them;
    `Segments` and tau are those of all rows. The backward pass may come after the block. Raises ValueError for a
    backend that cannot, and within another such block."""
    backend = dispatch.backend()
    if backend.NAME not in BACKENDS:
        raise ValueError(f"the backend {backend.NAME!r} cannot share rows over processes; choose one of {BACKENDS}")
    with activated(rows), dispatch.substituted(_Sharing(backend, rows)):
        yield


class _Sharing:
    """``backend`` on this process's rows."""

    def __init__(self, backend: Backend, rows: Rows) -> None:
        self._backend, self._rows = backend, rows
        self._near: tuple[Segments, Segments] | None = None  # of all rows, and of this process's
        self.NAME, self.DEVICE = backend.NAME, backend.DEVICE
        self.contract, self.instruction_set = backend.contract, backend.instruction_set
        self.upload, self.deferred, self.fetch = backend.upload, backend.deferred, backend.fetch
        # Each row by itself; where there are weights, `over_all_rows` sees to their gradients.
        self.linear, self.expert_linear = backend.linear, backend.expert_linear
        self.swiglu, self.gelu, self.moe_combine = backend.swiglu, backend.gelu, backend.moe_combine
        self.route, self.logprob = backend.route, backend.logprob

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = partial(self._backend.rms_norm, eps=eps)
        out: Tensor = _Recomputed.apply(self._rows, norm, norm, x, weight)
        return out

    def short_conv(
        self, x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        if state is not None:
            raise ValueError("short_conv: shared rows continue no state")
        whole = partial(self._backend.short_conv, segments=segments, state=None, addend=None)
        y: Tensor = _Recomputed.apply(self._rows, partial(self._own_conv, segments), whole, x, weight)
        return y if addend is None else addend + y

    def _own_conv(self, segments: Segments, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of this process's rows behind the inputs that they see before them; what comes of these, for
        want of theirs, is dropped."""
        rows = self._rows
        halo = rows.before(x, CONV_TAPS - 1)
        near = self._near[1] if self._near is not None and self._near[0] is segments else None
        if near is None:
            near = _part(segments, rows.start - halo.shape[0], rows.end)
            self._near = segments, near
        return self._backend.short_conv(torch.cat((halo, x)), weight, near, None, None)[halo.shape[0] :]

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rel: Tensor,
        rel_proj: Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
        first: int,
        tau: Tensor | None,
        cache: PagedKV | None,
    ) -> Tensor:
        if cache is not None:
            raise ValueError("attention: shared rows have no cache")
        rows, own = self._rows, (q, k, v, rel)
        whole = (gathered(rows, q), gathered(rows, k), gathered(rows, v), gathered(rows, rel))
        kept = {full.data_ptr(): mine.detach() for full, mine in zip(whole, own, strict=True)}

        def keep(saved: Tensor) -> tuple[bool, Tensor]:
            if saved.dim() < 2 or saved.shape[0] != rows.bounds[-1]:
                return False, saved
            mine = kept.get(saved.data_ptr())
            fits = mine is not None and mine.dtype == saved.dtype and mine.shape[1:] == saved.shape[1:]
            return True, mine if mine is not None and fits else rows.own(saved).clone()

        def give(packed: tuple[bool, Tensor]) -> Tensor:
            return rows.whole(packed[1]) if packed[0] else packed[1]

        with torch.autograd.graph.saved_tensors_hooks(keep, give):
            bias: Tensor = _Made.apply(rows, rel_proj)
            out = self._backend.attention(*whole, bias, segments, scale, window, first, tau, None)
        mine: Tensor = _Own.apply(rows, out)
        return mine

    # ---- what no pass over shared rows calls ----

    def pack_linear(self, parts: tuple[Tensor, ...]) -> PackedLinear:
        _refuse("pack_linear")

    def pack_experts(self, groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
        _refuse("pack_experts")

    def repack(self, packed: PackedLinear | PackedExperts) -> None:
        _refuse("repack")

    def embedding_sum(self, codes: Tensor, table: Tensor, bins: int) -> Tensor:
        _refuse("embedding_sum")

    def sample(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        _refuse("sample")

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        _refuse("dot")

    def adamw(self, *arguments: Any) -> None:
        _refuse("adamw")


def _refuse(op: str) -> NoReturn:
    raise ValueError(f"{op}: is not computed on rows that are shared over processes")


def _part(segments: Segments, first: int, end: int) -> Segments:
    """Rows ``first`` … ``end - 1`` as whole sequences, cut where the segments are."""
    offset = segments.offset.tolist()
    lengths = [min(b, end) - max(a, first) for a, b in pairwise(offset)]
    lengths = [n for n in lengths if n > 0]
    part = Segments.build(list(range(len(lengths))), [0] * len(lengths), lengths)
    return dispatch.backend().upload(part, (), ())[0]


class _Recomputed(torch.autograd.Function):
    """y = forward(x, weight) on this process's rows; the backward pass runs ``whole`` and its gradient on all rows,
    computed anew, which is cheap beside keeping them."""

    @staticmethod
    def forward(ctx, rows, forward, whole, x, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.whole = rows, whole
        return forward(x, weight)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, weight), rows = ctx.saved_tensors, ctx.rows
        needed = ctx.needs_input_grad[3:]
        every = [rows.whole(x.detach()), weight.detach()]
        with torch.enable_grad():
            inputs = [one.requires_grad_(need) for one, need in zip(every, needed, strict=True)]
            y = ctx.whole(*inputs)
        found = iter(torch.autograd.grad(y, [one for one in inputs if one.requires_grad], rows.whole(grad)))
        dx, dweight = (next(found) if need else None for need in needed)
        made = None if dweight is None else rows.made(dweight)
        return None, None, None, None if dx is None else rows.own(dx), made


class _Whole(torch.autograd.Function):
    """All rows from this process's; every process must compute the whole gradient, of which each keeps its rows."""

    @staticmethod
    def forward(ctx, rows, own):  # type: ignore[no-untyped-def]
        ctx.rows = rows
        return rows.whole(own)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, ctx.rows.own(grad)


class _Own(torch.autograd.Function):
    """This process's rows of all rows; the gradient is gathered."""

    @staticmethod
    def forward(ctx, rows, whole):  # type: ignore[no-untyped-def]
        ctx.rows = rows
        return rows.own(whole).clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, ctx.rows.whole(grad)


class _Made(torch.autograd.Function):
    """Weights whose gradient every process computes."""

    @staticmethod
    def forward(ctx, rows, weight):  # type: ignore[no-untyped-def]
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, ctx.rows.made(grad)


def gathered(rows: Rows, own: Tensor) -> Tensor:
    """All rows from this process's, differentiable where every process goes on with the same function of them."""
    whole: Tensor = _Whole.apply(rows, own)
    return whole
