"""What the row contract of `kernels.ops` demands, checked for any op on any device, by comparing bits.

Each function returns the differences that it found, as short texts; an empty list means that the contract holds. What
the ops are called with is in `kernels.tools.device_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernels import ops
from kernels.layout import CONV_TAPS, SPLIT_TOKENS, PagedKV, Segments

COUNTS = (1, 2, 3, 7, 16, 17, 63, 64, 65, 128, 400, 999, 1000)
"""Numbers of rows that are compared with one call of all rows: around the sizes of tiles, and the largest."""

FEW_COUNTS = (1, 3, 17, 64, 65, 300)
"""The same for gradients, which cost more."""

RowOp = Callable[..., Tensor | tuple[Tensor, ...]]
"""From tensors of T rows each to one or more tensors of T rows."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether type, shape and all bits are equal: -0 is not +0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def strided(x: Tensor) -> Tensor:
    """Equal values in rows that do not adjoin in memory."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 7)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def random_order(rows: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of the rows, int64 [rows]."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(device)


def row_differences(
    op: RowOp, inputs: Sequence[Tensor], counts: Sequence[int] = COUNTS, strides: bool = False
) -> list[str]:
    """``op`` on all rows of ``inputs`` beside the same rows in parts of ``counts`` rows, in another order, among other
    rows and, with ``strides``, in rows that do not adjoin."""
    rows, device = inputs[0].shape[0], inputs[0].device

    def results(*x: Tensor) -> tuple[Tensor, ...]:
        out = op(*x)
        return tuple(y.reshape(x[0].shape[0], -1) for y in (out if isinstance(out, tuple) else (out,)))

    whole = results(*inputs)

    def equal(kept: Tensor | slice, *changed: Tensor) -> bool:
        got = results(*changed)
        return all(same(g[: len(w[kept])], w[kept]) for g, w in zip(got, whole, strict=True))

    found = []
    for count, first in parts(rows, counts):
        if not equal(slice(first, first + count), *(x[first : first + count] for x in inputs)):
            found.append(f"{count} rows from {first}")
    order = random_order(rows, 1, device)
    if not equal(order, *(x[order] for x in inputs)):
        found.append("another order")
    some, others = order[: max(1, rows // 3)], random_order(rows, 2, device)
    mixed = [torch.cat([x[some], x[others] * 2 if x.is_floating_point() else x[others]]) for x in inputs]
    if not equal(some, *mixed):
        found.append("among other rows")
    if strides and not equal(slice(None), *(strided(x) if x.is_floating_point() else x for x in inputs)):
        found.append("rows that do not adjoin")
    return found


def parts(rows: int, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(number of rows, first row): at the start, inside and at the end."""
    for count in counts:
        if count <= rows:
            for first in sorted({0, (rows - count) // 3, rows - count}):
                yield count, first


def gradient_differences(
    op: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    counts: Sequence[int] = FEW_COUNTS,
) -> list[str]:
    """``op(*inputs, *weights)``: a row's gradient with all rows beside that with a part of them; the weights'
    gradients, which are sums over rows, when computed twice."""
    rows = inputs[0].shape[0]
    with torch.no_grad():
        shape = op(*inputs, *weights)
    upstream = torch.randn(shape.shape, generator=torch.Generator().manual_seed(3)).to(shape)

    def gradient(first: int, count: int) -> tuple[Tensor, ...]:
        leaves = [x[first : first + count].clone().requires_grad_() for x in inputs]
        shared = [w.clone().requires_grad_() for w in weights]
        out = op(*leaves, *shared)
        up = upstream.view(rows, -1)[first : first + count].reshape(out.shape)
        return torch.autograd.grad(out, [*leaves, *shared], up)

    whole, found = gradient(0, rows), []
    if not all(map(same, gradient(0, rows), whole)):
        found.append("computed twice")
    for count, first in parts(rows, counts):
        got = gradient(first, count)[: len(inputs)]
        if not all(same(g, w[first : first + count]) for g, w in zip(got, whole, strict=False)):
            found.append(f"{count} rows from {first}")
    return found


def attention_differences(
    inputs: Sequence[Tensor],
    rel_proj: Tensor,
    scale: float,
    window: int | None,
    cuts: Sequence[Sequence[int]],
    first: int = 0,
) -> list[str]:
    """One sequence's ``inputs`` q, k, v, rel [T, …]: in one call without a cache, beside calls of ``cuts`` rows with a
    cache whose pages lie in any order and with another sequence in every call; the learner's forward; each row's
    gradient alone and beside another sequence."""
    rows, device, dtype = inputs[1].shape[0], inputs[1].device, inputs[1].dtype

    def attend(x: Sequence[Tensor], segments: Segments, cache: PagedKV | None = None) -> Tensor:
        q, k, v, rel = x
        return ops.attention(q, k, v, rel, rel_proj, segments, scale=scale, window=window, first=first, cache=cache)

    alone = Segments.build([0], [0], [rows])
    with torch.no_grad():
        whole = attend(inputs, alone)
    found = []
    pages = -(-rows // SPLIT_TOKENS)
    for cut in cuts:
        heads, width = inputs[1].shape[1:]
        cache = PagedKV(
            torch.zeros(2 * pages, heads, width, SPLIT_TOKENS, dtype=dtype, device=device),
            torch.zeros(2 * pages, heads, SPLIT_TOKENS, width, dtype=dtype, device=device),
            random_order(2 * pages, len(cut), device).int().view(2, pages),
        )
        at = 0
        while at < rows:
            count = min(cut[at % len(cut)], rows - at)
            both = [torch.cat([x[at : at + count], 2 * x[at : at + count]]) for x in inputs]
            with torch.no_grad():
                got = attend(both, Segments.build([1, 0], [at, at], [count, count]), cache)
            if not same(got[:count], whole[at : at + count]):
                found.append(f"cache, {count} rows from {at}")
                break
            at += count

    def learned(x: Sequence[Tensor], segments: Segments) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [part.clone().requires_grad_() for part in x]
        out = attend(leaves, segments)
        return out.detach(), torch.autograd.grad(out[:rows].float().square().sum(), leaves)

    out, gradients = learned(inputs, alone)
    if not same(out, whole):
        found.append("the learner's forward")
    beside = [torch.cat([x, 2 * x[: rows // 2]]) for x in inputs]
    _, others = learned(beside, Segments.build([0, 1], [0, 0], [rows, rows // 2]))
    if not all(same(g, o[:rows]) for g, o in zip(gradients, others, strict=True)):
        found.append("gradients beside another sequence")
    return found


def convolution_differences(x: Tensor, weight: Tensor, cut: Sequence[int]) -> list[str]:
    """One sequence x [T, C] in one call beside calls of ``cut`` rows with a state, each with another sequence in it."""
    rows = x.shape[0]
    with torch.no_grad():
        whole = ops.short_conv(x, weight, Segments.build([0], [0], [rows]))
        state = torch.zeros(3, CONV_TAPS - 1, x.shape[1], dtype=x.dtype, device=x.device)
        at, found = 0, []
        for count in cut:
            part = x[at : at + count]
            both = torch.cat([part, 2 * part])
            got = ops.short_conv(both, weight, Segments.build([2, 1], [at, at], [count, count]), state)
            if not same(got[:count], whole[at : at + count]):
                found.append(f"state, {count} rows from {at}")
            at += count
    return found
