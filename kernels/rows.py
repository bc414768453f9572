"""Rows of one call shared out over several processes: who has which, and gradients that are sums over all of them.

Knows tensors and a function that gathers them; who the processes are and how they are reached is the caller's.
`kernels.sharing` has what an op does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

Gather = Callable[[Tensor, Sequence[int]], Tensor]
"""(own rows, contiguous, [counts[rank], …]; each rank's number of rows) -> all rows [sum(counts), …], rank by rank.
Every process of the group calls it, for the same things in the same order."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which of the rows of a call are this process's.

    >>> Rows((0, 3, 5), 1, lambda own, counts: own).own(torch.arange(5)).tolist()
    [3, 4]
    """

    bounds: tuple[int, ...]  # [ranks + 1]: rank r has rows bounds[r] … bounds[r + 1] - 1
    rank: int
    gather: Gather

    @staticmethod
    def even(count: int, ranks: int, rank: int, gather: Gather) -> Rows:
        """``count`` rows in slices of equal size, but for one row."""
        return Rows(tuple(r * count // ranks for r in range(ranks + 1)), rank, gather)

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def end(self) -> int:
        return self.bounds[self.rank + 1]

    @property
    def counts(self) -> list[int]:
        """Each rank's number of rows."""
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    def own(self, whole: Tensor) -> Tensor:
        """Of all rows [T, …] this process's, as a view."""
        return whole[self.start : self.end]

    def whole(self, own: Tensor) -> Tensor:
        """All rows, from this process's [t * n, …], where every row comes as n rows of the tensor (as a row's experts
        do)."""
        rows = self.end - self.start
        each = own.shape[0] // rows if rows else 1
        return self.gather(own.contiguous(), [n * each for n in self.counts])

    def before(self, own: Tensor, most: int) -> Tensor:
        """The rows before this process's, at most so many: [h, …]."""
        tails = [min(n, most) for n in self.counts]
        gathered = self.gather(own[own.shape[0] - tails[self.rank] :].contiguous(), tails)
        return gathered[: sum(tails[: self.rank])][-min(most, self.start) :] if self.start else gathered[:0]


_active: Rows | None = None


def active() -> Rows | None:
    """How the rows of the ops' calls are shared out; None where this process has them all. An op that is differentiable
    asks in its forward pass and remembers the answer for its backward pass."""
    return _active


@contextmanager
def activated(rows: Rows) -> Iterator[None]:
    """A block in which `active` gives ``rows``. Raises ValueError within another."""
    global _active
    if _active is not None:
        raise ValueError("rows are shared over processes already")
    _active = rows
    try:
        yield
    finally:
        _active = None


def over_all_rows(rows: Rows | None, gradient: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> Tensor:
    """A gradient of weights, ``gradient(grad, *inputs)``, from this process's rows: of all rows, on every process.

    ``grad`` [R, N] -> ``gradient`` gives [..., N, K], whose row n depends on column n of ``grad`` alone. Each process
    computes a slice of these rows."""
    if rows is None:
        return gradient(grad, *inputs)
    columns = Rows.even(grad.shape[1], len(rows.counts), rows.rank, rows.gather)
    grad, *inputs = rows.whole(grad), *(rows.whole(x) for x in inputs)  # type: ignore[assignment]
    slices = grad[:, columns.start : columns.end].contiguous()
    return columns.whole(gradient(slices, *inputs).movedim(-2, 0)).movedim(0, -2).contiguous()
