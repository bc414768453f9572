"""Advantages by hand."""

import pytest
import torch

from rl.advantage import leave_one_out, reward_to_go, scaled


def test_reward_to_go_by_hand() -> None:
    reward = torch.tensor([[0.0, 1.0, 0.0, -2.0]])
    assert torch.equal(reward_to_go(reward, 0.5), torch.tensor([[0.25, 0.5, -1.0, -2.0]]))


def test_reward_to_go_does_not_look_back() -> None:
    reward = torch.tensor([5.0, 0.0, 0.0])
    assert reward_to_go(reward, 0.9)[1:].tolist() == [0.0, 0.0]


def test_leave_one_out_by_hand() -> None:
    returns = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 6.0]])
    assert leave_one_out(returns, 3).tolist() == [[3.0, -3.0], [-1.5, -3.0], [-1.5, 6.0]]


def test_leave_one_out_keeps_groups_apart() -> None:
    returns = torch.tensor([[1.0], [3.0], [100.0], [100.0]])
    assert leave_one_out(returns, 2).tolist() == [[-2.0], [2.0], [0.0], [0.0]]


@pytest.mark.parametrize(("rows", "group"), [(3, 2), (4, 1)])
def test_leave_one_out_refuses_bad_groups(rows: int, group: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        leave_one_out(torch.zeros(rows, 1), group)


def test_scaled_divides_by_root_mean_square_and_keeps_zero() -> None:
    assert scaled(torch.tensor([3.0, -4.0]), 50.0, 2).tolist() == pytest.approx([0.6, -0.8])
    assert scaled(torch.zeros(2), 0.0, 2).tolist() == [0.0, 0.0]
