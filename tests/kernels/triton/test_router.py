"""The Triton router: row contract, ties, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.triton import router
from tests.kernels.contract import SEEDS, assert_gradients, assert_row_contract, normal, relative_error, uneven_sum
from tests.kernels.triton.device import there

route = there(router.route)


@given(rows=st.integers(1, 24), sizes=st.sampled_from([(8, 2, 1), (5, 5, 0), (1, 1, 2), (33, 3, 1)]), seed=SEEDS)
@settings(max_examples=6)
def test_row_contract(rows: int, sizes: tuple[int, int, int], seed: int) -> None:
    experts, top_k, shared = sizes
    bias = normal(seed + 1, experts) / 10

    def both(logits: Tensor) -> Tensor:
        expert, weight = route(logits, bias, top_k, shared)
        return torch.cat([expert.float(), weight], 1)

    assert_row_contract(both, (normal(seed, rows, experts + shared),), seed)


def test_control_sum_by_row_count() -> None:
    """Weights over a sum whose pieces follow the row count."""
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda x: torch.sigmoid(x) / uneven_sum(torch.sigmoid(x), len(x))[:, None], (normal(1, 40, 100),), 0
        )


@pytest.mark.parametrize("sizes", [(8, 2, 1), (5, 5, 0), (64, 6, 2), (7, 1, 0)])
def test_float64_oracle(sizes: tuple[int, int, int]) -> None:
    """The same experts and weights within 1e-6, as on the CPU; 4e-6 would be a GPU's fast exp and log."""
    experts, top_k, shared = sizes
    logits, bias = normal(1, 60, experts + shared) * 4, normal(2, experts) / 10
    expert, weight = route(logits, bias, top_k, shared)
    expected, oracle = reference.route(logits.double(), bias.double(), top_k, shared)
    assert torch.equal(expert, expected)
    assert relative_error(weight, oracle) <= 4e-6


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0], [0.0] * 6, [5.0, 1.0, 1.0, 1.0, 1.0, 9.0]])
    expert, weight = route(logits, torch.zeros(5), 2, 1)
    assert expert.tolist() == [[1, 2, 5], [0, 1, 5], [0, 1, 5]]
    assert torch.equal(weight[1], torch.full((3,), 1 / 3))
    flipped, _ = route(logits, torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0]), 2, 1)
    assert flipped.tolist()[0] == [1, 4, 5]


def test_listed_in_ascending_index() -> None:
    expert, _ = route(normal(1, 40, 34), torch.zeros(32), 8, 2)
    assert bool((expert[:, 1:] > expert[:, :-1]).all())


def test_extremes() -> None:
    """Weights of logits of ±200 are finite and exact at the ends; a NaN is taken last; no rows give no rows."""
    _, weight = route(torch.tensor([[200.0, -200.0, 200.0], [-200.0, -200.0, -200.0]]), torch.zeros(2), 2, 1)
    assert weight.tolist()[0] == [0.5, 0.0, 0.5]
    assert torch.equal(weight[1], torch.full((3,), 1 / 3))
    expert, _ = route(torch.tensor([[torch.nan, -5.0, -9.0, 0.0]]), torch.zeros(3), 2, 1)
    assert expert.tolist() == [[1, 2, 3]]
    assert route(torch.zeros(0, 3), torch.zeros(2), 1, 1)[0].shape == (0, 2)


@pytest.mark.parametrize("sizes", [(8, 2, 1), (20, 17, 2)])
def test_gradients(sizes: tuple[int, int, int]) -> None:
    """Through the weights only; relative to the greatest gradient."""
    experts, top_k, shared = sizes
    bias = normal(2, experts) / 10
    assert_gradients(
        lambda x: route(x, bias, top_k, shared)[1],
        lambda x: reference.route(x, bias.to(x.dtype), top_k, shared)[1],
        (normal(1, 30, experts + shared),),
        3,
        4e-6,
    )


@pytest.mark.parametrize(
    ("logits", "bias", "top_k", "message"),
    [
        (torch.zeros(3, 9, dtype=torch.bfloat16), torch.zeros(8), 2, "route: logits is torch.bfloat16"),
        (torch.zeros(9), torch.zeros(8), 2, "route: logits"),
        (torch.zeros(9, 3).t(), torch.zeros(8), 2, "columns must be adjacent"),
        (torch.zeros(3, 9), torch.zeros(7), 2, r"bias is \(7,\)"),
        (torch.zeros(3, 9), torch.zeros(8), 9, "top_k is 9; need 1 to 8"),
        (torch.zeros(3, 9), torch.zeros(8), 0, "top_k is 0"),
    ],
)
def test_bad_arguments(logits: Tensor, bias: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, bias, top_k, 1)
