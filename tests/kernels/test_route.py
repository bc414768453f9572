"""The router on each backend: row contract, ties, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import backend as reference
from tests.kernels.backend import NATIVE, ROWS, examples, ops, small
from tests.kernels.contract import (
    SEEDS,
    assert_gradients,
    assert_row_contract,
    normal,
    relative_error,
    telling,
    uneven_sum,
)


@given(
    rows=ROWS, sizes=st.sampled_from([(8, 2, 1), (5, 5, 0), (1, 1, 2), (64, 6, 2), (33, 3, 1)]), seed=SEEDS
)  # experts, top_k, shared
@examples(12, 5)
def test_row_contract(rows: int, sizes: tuple[int, int, int], seed: int) -> None:
    experts, top_k, shared = sizes
    bias = normal(seed + 1, experts) / 10

    def both(logits: Tensor) -> Tensor:
        expert, weight = ops.route(logits, bias, top_k, shared)
        return torch.cat([expert.float(), weight], 1)

    assert_row_contract(both, (normal(seed, rows, experts + shared),), seed)


def test_control_sum_by_row_count() -> None:
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda x: torch.sigmoid(x) / uneven_sum(torch.sigmoid(x), len(x))[:, None], (telling(40, 100, 0, -18),), 0
        )


@pytest.mark.parametrize("sizes", [(8, 2, 1), (5, 5, 0), (64, 6, 2), (7, 1, 0)])
def test_float64_oracle(sizes: tuple[int, int, int]) -> None:
    """The same experts (random scores are farther apart than fp32's error) and weights within 1e-6: exp and log within
    2 ulp, J + 1 roundings of the sum; 4e-6 with a GPU's fast exp and log."""
    experts, top_k, shared = sizes
    logits, bias = normal(1, small(500, 60), experts + shared) * 4, normal(2, experts) / 10
    expert, weight = ops.route(logits, bias, top_k, shared)
    expected, oracle = reference.route(logits.double(), bias.double(), top_k, shared)
    assert torch.equal(expert, expected)
    assert relative_error(weight, oracle) <= (1e-6 if NATIVE else 4e-6)


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0], [0.0] * 6, [5.0, 1.0, 1.0, 1.0, 1.0, 9.0]])
    expert, weight = ops.route(logits, torch.zeros(5), 2, 1)
    assert expert.tolist() == [[1, 2, 5], [0, 1, 5], [0, 1, 5]]
    assert torch.equal(weight[1], torch.full((3,), 1 / 3))
    flipped, _ = ops.route(logits, torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0]), 2, 1)
    assert flipped.tolist()[0] == [1, 4, 5]


def test_listed_in_ascending_index() -> None:
    expert, _ = ops.route(normal(1, small(300, 40), 34), torch.zeros(32), 8, 2)
    assert bool((expert[:, 1:] > expert[:, :-1]).all())


def test_extremes() -> None:
    """Weights of logits of ±200 are finite and exact at the ends; no NaN is taken; no rows give no rows."""
    _, weight = ops.route(torch.tensor([[200.0, -200.0, 200.0], [-200.0, -200.0, -200.0]]), torch.zeros(2), 2, 1)
    assert weight.tolist()[0] == [0.5, 0.0, 0.5]
    assert torch.equal(weight[1], torch.full((3,), 1 / 3))
    assert ops.route(torch.zeros(0, 3), torch.zeros(2), 1, 1)[0].shape == (0, 2)


@pytest.mark.parametrize("sizes", [(8, 2, 1), (20, 17, 2)])
def test_gradients(sizes: tuple[int, int, int]) -> None:
    """Through the weights only; relative to the greatest gradient."""
    experts, top_k, shared = sizes
    bias = normal(2, experts) / 10
    assert_gradients(
        lambda x: ops.route(x, bias, top_k, shared)[1],
        lambda x: reference.route(x, bias.to(x.dtype), top_k, shared)[1],
        (normal(1, small(60, 30), experts + shared),),
        3,
        2e-6 if NATIVE else 4e-6,
    )


@pytest.mark.parametrize(
    ("logits", "bias", "top_k", "message"),
    [
        (torch.zeros(3, 9, dtype=torch.bfloat16), torch.zeros(8), 2, "route: logits is torch.bfloat16"),
        (torch.zeros(9), torch.zeros(8), 2, "route: logits"),
        (torch.zeros(9, 3).t(), torch.zeros(8), 2, "columns must be adjacent"),
        (torch.zeros(3, 9), torch.zeros(7), 2, r"bias is torch\.float32 \(7,\)"),
        (torch.zeros(3, 9), torch.zeros(8), 9, "top_k is 9; need 1 to 8"),
        (torch.zeros(3, 9), torch.zeros(8), 0, "top_k is 0"),
    ],
)
def test_bad_arguments(logits: Tensor, bias: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.route(logits, bias, top_k, 1)
