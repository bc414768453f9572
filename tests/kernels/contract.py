"""What the tests of the row contract share: it is stated in `kernels.ops`, checked here for any op over rows.

`assert_row_contract` calls an op on the same rows in many company: all together, permuted, a part of them, one alone,
among strangers, from strided memory, on 1 and 2 threads; every row must come out equal in every bit. A test of the
contract stands beside a control: an op that breaks it, for which `assert_row_contract` must raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
ROWS = st.integers(1, 1000)
SEEDS = st.integers(0, 2**31)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Equal in every bit, and a NaN nowhere."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    if not torch.equal(got, expected):
        rows = (got != expected).flatten(1).any(1).nonzero()[:, 0].tolist()
        raise AssertionError(f"{what}: {len(rows)} of {len(got)} rows differ, the first is {rows[0]}")


def strided(x: Tensor) -> Tensor:
    """Equal values, in rows that lie apart in memory."""
    wide = x.new_zeros(x.shape[0], *x.shape[1:-1], x.shape[-1] + 7)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def assert_row_contract(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int, strides: bool = True) -> None:
    """``op(*inputs)`` -> [R, …] or [R * n, …], row i (or rows i * n …) from row i of every input.

    Raises AssertionError at the first bit that depends on anything else."""
    rng = generator(seed)
    rows = inputs[0].shape[0]
    order = torch.randperm(rows, generator=rng)
    with torch.no_grad():
        with threads(2):
            whole = op(*inputs)
        assert not torch.isnan(whole).any()
        whole = whole.view(rows, -1)

        def check(what: str, kept: Tensor, *changed: Tensor) -> None:
            got = op(*changed)
            assert_same(got.view(changed[0].shape[0], -1)[: len(kept)], whole[kept], what)

        with threads(1):
            check("one thread", torch.arange(rows), *inputs)
        check("permuted", order, *(x[order] for x in inputs))
        part = order[: int(torch.randint(1, rows + 1, (1,), generator=rng))]
        check(f"{len(part)} of {rows} rows", part, *(x[part] for x in inputs))
        check("a row alone", part[:1], *(x[part[:1]] for x in inputs))
        cut = int(torch.randint(0, rows, (1,), generator=rng))
        check("from a cut on", torch.arange(cut, rows), *(x[cut:] for x in inputs))
        # The kept row comes first, then rows of other content: values, hence also experts, codes and so on, mixed up.
        strangers = torch.randint(0, rows, (rows,), generator=rng)
        mixed = [torch.cat([x[part[:1]], x[strangers] * 2 if x.is_floating_point() else x[strangers]]) for x in inputs]
        check("among strangers", part[:1], *mixed)
        if strides:
            check("strided", order, *(strided(x[order]) if x.is_floating_point() else x[order] for x in inputs))


# ---- ops that break the contract on every machine, for controls: nothing is left to what a library does there ----


def uneven_sum(terms: Tensor, rows: int) -> Tensor:
    """Sums the last axis in one chain where there is one row, by two halves where there are more: what the contract
    forbids. Additions of single elements only, which IEEE 754 rounds alike everywhere."""

    def chain(part: Tensor) -> Tensor:
        total = torch.zeros_like(part[..., 0])
        for term in part.unbind(-1):
            total = total + term
        return total

    first, second = terms.tensor_split(2, dim=-1)
    return chain(terms) if rows == 1 else chain(first) + chain(second)


def telling(rows: int, width: int, first: float = 1.0, rest: float = 2.0**-24) -> Tensor:
    """fp32 [rows, width], ``first`` and then only ``rest``. With the values given here one chain of a row is 1, since
    each 2^-24 is rounded away, and the sum by halves is 1 + (width // 2) 2^-24."""
    x = torch.full((rows, width), rest, dtype=torch.float32)
    x[:, 0] = first
    return x


FEW_ROWS = 8


def uneven(op: Callable[..., Tensor], few: int = FEW_ROWS) -> Callable[..., Tensor]:
    """``op`` whose results for ``few`` rows or more are an ulp or two off: in place of a library's product, which may
    sum many rows in another order than few, and may not."""

    @functools.wraps(op)
    def variant(x: Tensor, *rest: Any) -> Tensor:
        out = op(x, *rest)
        return out * (1 + torch.finfo(out.dtype).eps) if len(x) >= few else out

    return variant


# ---- against an oracle ----


def relative_error(got: Tensor, oracle: Tensor) -> float:
    """Greatest difference over the greatest magnitude."""
    return float((got.double() - oracle.double()).abs().max() / oracle.double().abs().max().clamp_min(1e-30))


def gradients(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Gradients of the floating inputs for a random upstream gradient, the same for every op and dtype."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = op(*leaves)
    out.backward(normal(seed, *out.shape).to(out.dtype))
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.is_floating_point()]


def assert_gradients(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int, bound: float
) -> None:
    """Gradients of ``op`` against the float64 autograd of ``reference``, and the same bits when run again, on 1 and 2
    threads."""
    with threads(2):
        first = gradients(op, inputs, seed)
    with threads(1):
        second = gradients(op, inputs, seed)
    oracle = gradients(reference, tuple(x.double() if x.is_floating_point() else x for x in inputs), seed)
    for got, again, expected in zip(first, second, oracle, strict=True):
        assert torch.equal(got, again)
        assert relative_error(got, expected) <= bound
