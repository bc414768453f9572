"""Ops whose rows three processes share out, each compared with the op on all rows in one process; run by
`test_sharing`, on the backend of METRONOME_BACKEND.

    python -m tests.kernels.sharing_of_ranks

Says for each mistake of `tests.support.wrong_sharing`, and for none, the ops of which a bit differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kernels import ops
from kernels.layout import Segments
from kernels.rows import Rows
from kernels.sharing import shared
from model.program import ranks, teams
from tests.kernels.backend import small
from tests.kernels.contract import normal
from tests.support.forks import forked
from tests.support.wrong_sharing import mistaken

PROCESSES = 3
ROWS = small(157, 23)
BOUNDS = (0, ROWS // 3, ROWS // 3 + 1, ROWS)
"""The second process has a single row."""
LENGTHS = [ROWS // 3 - 2, 5, ROWS - ROWS // 3 - 4, 1]
"""Of segments; two of them lie across a bound, near enough for convolutions."""


@dataclass
class Case:
    """An op, called with ``rows``, [T * n, …] each, then ``weights``. ``constants`` are rows without a gradient."""

    op: Callable[..., Tensor]
    rows: list[Tensor]
    weights: list[Tensor]
    constants: list[Tensor] = field(default_factory=list)


def cases(dtype: torch.dtype) -> dict[str, Case]:
    def leaf(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape, dtype=dtype).requires_grad_()

    wide, few = [leaf(1, 9, 20), leaf(2, 6, 20)], [leaf(1, 2, 20)]
    groups = (leaf(1, 3, 12, 20),), (leaf(2, 1, 5, 20), leaf(3, 1, 7, 20))
    linear, narrow, experts = ops.pack_linear(*wide), ops.pack_linear(*few), ops.pack_experts(*groups)
    chosen = torch.arange(2 * ROWS, dtype=torch.int32) * 7 % 4
    segments = Segments.build([0, 1, 2, 3], [0] * 4, LENGTHS)
    attend = partial(_attend, segments, 1 + normal(5, ROWS).abs())
    heads = [leaf(0, ROWS, 2, 16), leaf(1, ROWS, 1, 16), leaf(2, ROWS, 1, 16), leaf(3, ROWS, 2, 4)]
    return {
        "linear": Case(lambda x, *_: ops.linear(x, linear, torch.float32), [leaf(0, ROWS, 20)], wide),
        "linear, two columns": Case(lambda x, *_: ops.linear(x, narrow), [leaf(0, ROWS, 20)], few),
        "expert_linear": Case(
            lambda x, expert, *_: ops.expert_linear(x, experts, expert, 2),
            [leaf(0, ROWS, 20)],
            [part for group in groups for part in group],
            [chosen],
        ),
        "rms_norm": Case(partial(ops.rms_norm, eps=1e-6), [leaf(0, ROWS, 3, 20)], [leaf(1, 20)]),
        "scale": Case(ops.scale, [leaf(0, ROWS, 20)], [leaf(1, 1)]),
        "short_conv": Case(
            lambda x, addend, taps: ops.short_conv(x, taps, segments, None, addend),
            [leaf(0, ROWS, 20), leaf(6, ROWS, 20)],
            [leaf(1, 20, 4).detach().float().requires_grad_()],
        ),
        "attention": Case(attend, heads, [leaf(4, 4, 12)]),
    }


def _attend(segments: Segments, tau: Tensor, *inputs: Tensor) -> Tensor:
    return ops.attention(*inputs, segments, scale=0.25, window=9, tau=tau)


def differs(case: Case) -> bool:
    """Whether a bit of this process's rows, or of all processes' gradient of weights, is not one process's."""
    rows = Rows(BOUNDS, ranks.rank(), teams)

    def own(x: Tensor) -> Tensor:
        each = x.shape[0] // ROWS
        return x.detach()[rows.start * each : rows.end * each].requires_grad_(x.requires_grad)

    y = case.op(*case.rows, *case.constants, *case.weights)
    grad = normal(9, *y.shape).to(y.dtype)
    *wanted, whole = *torch.autograd.grad(y, [*case.rows, *case.weights], grad), y
    mine = [own(x) for x in case.rows]
    with shared(rows):
        part = case.op(*mine, *(own(x) for x in case.constants), *case.weights)
    found = torch.autograd.grad(part, [*mine, *case.weights], own(grad))
    made = [ranks.sum_in_order(x.flatten()).view(x.shape) for x in found[len(mine) :]]
    got = [part, *found[: len(mine)], *made]
    expected = [own(whole), *(own(x) for x in wanted[: len(mine)]), *wanted[len(mine) :]]
    return not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def work() -> None:
    teams.form(PROCESSES)
    for mistake in ("", "halo", "sums"):
        bad = set()
        for dtype in (torch.float32, torch.bfloat16):
            for name, case in cases(dtype).items():
                with mistaken(mistake):
                    if any(ranks.gather(differs(case))):
                        bad.add(name)
        if ranks.rank() == 0:
            print(f"{mistake or 'none'}: {', '.join(sorted(bad))}")


if __name__ == "__main__":
    forked(PROCESSES, work)
