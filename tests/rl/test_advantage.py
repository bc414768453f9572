"""Advantages by hand."""

import math

import pytest
import torch

from rl.step.advantage import RunningScale, informative_groups, leave_one_out, reward_to_go


def test_reward_to_go_by_hand() -> None:
    reward = torch.tensor([[0.0, 1.0, 0.0, -2.0]])
    assert reward_to_go(reward, 0.5).tolist() == [[0.25, 0.5, -1.0, -2.0]]


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


@pytest.mark.parametrize("group", range(2, 65))
def test_equal_rollouts_get_exactly_zero(group: int) -> None:
    """Whatever the group's size."""
    reward = torch.zeros(group, 20)
    reward[:, 13], reward[:, 17] = 0.6, -0.8
    returns = reward_to_go(reward, 0.9)
    advantage = leave_one_out(returns, group)
    assert advantage.dtype == torch.float64 and not advantage.any()
    assert not informative_groups(advantage, returns, group).any()


def test_control_the_mean_of_the_others_leaves_a_residue() -> None:
    """One tenth seven times, added one after another, is not seven tenths, in fp64 either."""
    total = 0.0
    for _ in range(7):
        total += 0.1
    assert (total - 0.1) / 6 - 0.1 != 0.0


def test_returns_that_differ_by_rounding_only_are_uninformative() -> None:
    """Terms of one reward added in two orders in fp32; control: a real difference."""
    one, other = (torch.tensor(0.1) + 0.1) + 0.5, torch.tensor(0.1) + (torch.tensor(0.1) + 0.5)
    assert one != other
    returns = torch.stack([one, other, one]).double()[:, None]
    assert informative_groups(leave_one_out(returns, 3), returns, 3).tolist() == [False]
    returns[1] += 1e-4
    assert informative_groups(leave_one_out(returns, 3), returns, 3).tolist() == [True]


def test_running_scale_by_hand() -> None:
    scale = RunningScale()
    assert scale.value == 1.0
    scale = scale.updated(50.0, 2)
    assert scale.value == pytest.approx(5.0)  # the first step's own
    assert scale.updated(0.0, 0) == scale  # a step of degenerate groups only
    assert scale.updated(2.0, 2).value == pytest.approx(math.sqrt((0.9 * 25.0 + 1.0) / 1.9))


def test_running_scale_forgets_slowly() -> None:
    """A step whose advantages are tiny does not make them large: the scale's square falls by a tenth a step."""
    scale = RunningScale().updated(100.0, 1)
    for _ in range(50):
        scale = scale.updated(1.0, 1)
    small = scale.updated(1e-14, 1)
    assert small.value > 0.9 * scale.value
