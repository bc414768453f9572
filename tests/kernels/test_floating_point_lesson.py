"""Why the row contract is worth having, in two well-known demonstrations: He et al. 2025, "Defeating Nondeterminism in
LLM Inference". The order of a sum changes its bits; a library lets the number of rows change the order; ours does not.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from kernels import ops
from tests.kernels.contract import threads

EIGHT = [1e-10, 1e-5, 1e-2, 1.0, -1e-10, -1e-5, -1e-2, -1.0]  # sum: 0


def every_order(dtype: torch.dtype) -> Tensor:
    """The eight numbers in all 8! = 40,320 orders, [40320, 8]."""
    return torch.tensor(EIGHT, dtype=dtype)[torch.tensor(list(itertools.permutations(range(8))))]


def one_by_one(rows: Tensor) -> Tensor:
    total = torch.zeros(len(rows), dtype=rows.dtype)
    for column in rows.unbind(1):
        total = total + column
    return total


def test_the_sum_of_eight_numbers() -> None:
    """The demonstration is often told with "102 results in fp32". Tried in every order and summed one by one, there
    are exactly 137 in fp32 and 275 in float64, whose sum Python's `sum` takes. 102 is what one sees of the 137 in some
    hundreds of shuffles, 2,000 at most."""
    results = one_by_one(every_order(torch.float32))
    seen = Counter(results.tolist())
    assert len(seen) == 137
    assert len(set(one_by_one(every_order(torch.float64)).tolist())) == 275
    # None is a matter of -0.0: that and 0.0 would count as one.
    assert len(set(results.view(torch.int32).tolist())) == 137
    chances = [count / len(results) for count in seen.values()]

    def expected(shuffles: int) -> float:
        return sum(1 - (1 - chance) ** shuffles for chance in chances)

    assert expected(300) < 102 < expected(2000)
    assert 127 < expected(10_000) < 137


def test_the_sum_of_eight_numbers_is_the_order_of_k() -> None:
    """`ops.linear` sums in the order in which the inputs come, and in no other, however many rows there are: over every
    order the same 137 results, each where the plain loop has it."""
    rows = every_order(torch.float32)
    packed = ops.pack_linear(torch.ones(1, 8))
    for count in (1, 2):
        with threads(count):
            assert torch.equal(ops.linear(rows, packed)[:, 0], one_by_one(rows))
    some = rows[12345:12346]
    assert torch.equal(ops.linear(some, packed)[:, 0], one_by_one(some))


@pytest.mark.slow
def test_one_row_of_a_product_in_fp32() -> None:
    """The first row of a [2048, 4096] × [4096, 4096] product, computed alone and with the other 2047.

    Summed in two orders, as a library sums one row and many, it has entries more than 100 apart (of the order of 10^8;
    torch.mm's two answers were 1,252 apart on one machine, and what they are follows the machine); ours is one, in
    every bit."""
    a = torch.linspace(-1000, 1000, 2048 * 4096).reshape(2048, 4096)
    b = torch.linspace(-1000, 1000, 4096 * 4096).reshape(4096, 4096)
    halves = [one_by_one((a[0, k, None] * b[k]).T) for k in (slice(0, 2048), slice(2048, 4096))]
    whole = one_by_one((a[0, :, None] * b).T)
    assert float((whole - (halves[0] + halves[1])).abs().max()) > 100
    packed = ops.pack_linear(b.T.contiguous())
    ours = ops.linear(a, packed)
    for rows in (1, 2, 7, 100):
        assert torch.equal(ops.linear(a[:rows], packed), ours[:rows])
    # It is the same product: within a chain's bound of the float64 one, for this first row.
    exact = a[:1].double() @ b.double()
    bound = 1.01 * 4096 * 2.0**-24 * (a[:1].double().abs() @ b.double().abs())
    assert bool(((ours[:1].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_of_a_smaller_product(dtype: torch.dtype) -> None:
    """The same with fewer rows and columns and in both types: ours equal. Whether torch.mm happens to be equal in bf16
    follows the machine's library (most of an fp32 difference is rounded away), so nothing is said of it."""
    a = torch.linspace(-1000, 1000, 64 * 4096).reshape(64, 4096).to(dtype)
    w = torch.linspace(-1000, 1000, 4096 * 96).reshape(4096, 96).T.contiguous().to(dtype)
    packed = ops.pack_linear(w)
    ours = ops.linear(a, packed)
    for rows in (1, 3, 17, 64):
        for first in (0, 64 - rows):
            assert torch.equal(ops.linear(a[first : first + rows], packed), ours[first : first + rows])
