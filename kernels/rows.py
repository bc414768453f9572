"""Rows of one call shared out over several processes: who has which, and gradients that are sums over all of them.

Knows tensors and what brings them together (`Team`); who the processes are and how they are reached is the caller's.
`kernels.sharing` has what an op does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class Team(Protocol):
    """What sends tensors between the processes. All must call it, for the same things in the same order. ``counts``:
    each rank's number of rows."""

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows [counts[rank], …], contiguous -> all rows [sum(counts), …], rank by rank."""

    def swap_rows(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """parts[r] [counts[rank], n_r] of this rank's rows goes to rank r -> what comes from all: [sum(counts),
        n_rank]."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which of the rows of a call are this process's.

    Example: ``Rows((0, 3, 5), 1, team).own(x)`` is ``x[3:5]``.
    """

    bounds: tuple[int, ...]  # [ranks + 1]: rank r has rows bounds[r] … bounds[r + 1] - 1
    rank: int
    team: Team

    @staticmethod
    def even(count: int, ranks: int, rank: int, team: Team) -> Rows:
        """``count`` rows in slices of one size but for the last one, unless that would leave a rank without any."""
        size = -(-count // ranks)
        full = size * (ranks - 1) < count
        bounds = (r * size if full else r * count // ranks for r in range(ranks))
        return Rows((*bounds, count), rank, team)

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def end(self) -> int:
        return self.bounds[self.rank + 1]

    @property
    def counts(self) -> list[int]:
        """Each rank's number of rows."""
        return [b - a for a, b in pairwise(self.bounds)]

    def own(self, whole: Tensor) -> Tensor:
        """Of all rows [T, …] this process's, as a view."""
        return whole[self.start : self.end]

    def whole(self, own: Tensor) -> Tensor:
        """All rows, from this process's [t * n, …], where every row comes as n rows of the tensor (as a row's experts
        do)."""
        return self.team.gather_rows(own.contiguous(), self._counts(own))

    def columns(self, own: Tensor) -> tuple[Tensor, Rows]:
        """(of all rows a slice of the columns [T * n, c], from this process's rows [t * n, C]; which slice)."""
        columns = Rows.even(own.shape[1], len(self.counts), self.rank, self.team)
        parts = [own[:, a:b] for a, b in pairwise(columns.bounds)]
        return self.team.swap_rows(parts, self._counts(own)), columns

    def made(self, gradient: Tensor) -> Tensor:
        """This process's part of a gradient of weights that every process computed. The parts of all processes, added
        in any order, are the gradient: each element is one process's, and the others give -0.0, the number that changes
        no other by being added, not even +0 or -0."""
        return gradient if self.rank == 0 else torch.full_like(gradient, -0.0)

    def _counts(self, own: Tensor) -> list[int]:
        rows = self.end - self.start
        each = own.shape[0] // rows if rows else 1
        return [n * each for n in self.counts]

    def before(self, own: Tensor, most: int) -> Tensor:
        """The rows before this process's, at most so many: [h, …]."""
        tails = [min(n, most) for n in self.counts]
        gathered = self.team.gather_rows(own[own.shape[0] - tails[self.rank] :].contiguous(), tails)
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
    """A gradient of weights, ``gradient(grad, *inputs)``, of which each process makes its part (`Rows.made`).

    ``grad`` [R, N] -> ``gradient`` gives [..., N, K], whose row n depends on column n of ``grad`` alone: each process
    computes a slice of these rows, from all rows of the call."""
    if rows is None:
        return gradient(grad, *inputs)
    part, columns = rows.columns(grad)
    own = gradient(part, *(rows.whole(x) for x in inputs))
    whole = own.new_full((*own.shape[:-2], grad.shape[1], own.shape[-1]), -0.0)
    whole[..., columns.start : columns.end, :] = own
    return whole
