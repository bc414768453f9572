"""Credit of whole steps: what teaches nothing weighs nothing, is counted, and does not set the scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from model.voice.config import NUMBERS
from reward.source import Rewards
from rl.config import RLConfig
from rl.step.advantage import RunningScale
from rl.step.credit import Credit, token_weights
from rollout.record.episode import VOICE, Episode
from tests.support.episodes import some_episode, with_text

CONFIG = RLConfig(rollouts=3, gamma=0.9)


def rewards(timing: Sequence[float], content: Sequence[float] = (0.0, 0.0)) -> Rewards:
    return Rewards({"timing": torch.tensor(timing), "content": torch.tensor(content)})


def episodes(*families: str) -> list[Episode]:
    """A group of each family; every episode has two chunks and three tokens."""
    one = some_episode()
    one = with_text(replace(one, actions=one.actions * 2), chunk=torch.tensor([0, 0, 1]))
    return [replace(one, scenario=f"{family}/train/0") for family in families for _ in range(CONFIG.rollouts)]


def credit(given: Sequence[Rewards], *families: str, scales: dict[str, RunningScale] | None = None) -> Credit:
    return token_weights(episodes(*families), [given], [], CONFIG, scales or {})


def test_equal_rollouts_teach_nothing_and_are_counted() -> None:
    alike = [rewards([0.6, -0.8])] * 3
    result = credit(alike * 2, "timespeak", "turn_taking")
    assert not torch.cat(result.weights).any()
    assert (result.groups, result.degenerate_groups, result.terms, result.degenerate_terms) == (4, 4, 4, 4)
    assert result.scales == dict.fromkeys(result.scales, RunningScale())
    other = credit([*alike[:2], rewards([0.6, -0.7]), *alike], "timespeak", "turn_taking")  # control
    assert torch.cat(other.weights)[:9].any() and not torch.cat(other.weights)[9:].any()
    assert (other.degenerate_groups, other.degenerate_terms) == (3, 3)


def test_rounding_is_not_learned_at_full_size() -> None:
    """Two orders of adding one reward's terms: the residue counts as nothing, however small the scale was."""
    one, other = float((torch.tensor(0.1) + 0.1) + 0.5), float(torch.tensor(0.1) + (torch.tensor(0.1) + 0.5))
    assert one != other
    tiny = {"0/timespeak/timing": RunningScale(total=1e-14, weight=1.0)}
    result = credit([rewards([one, 0.0]), rewards([other, 0.0]), rewards([one, 0.0])], "timespeak", scales=tiny)
    assert not torch.cat(result.weights).any() and result.scales["0/timespeak/timing"] == tiny["0/timespeak/timing"]


def test_first_step_divides_by_its_own_root_mean_square() -> None:
    result = credit([rewards([0.0, 1.0]), rewards([0.0, 0.0]), rewards([0.0, 0.0])], "timespeak")
    # Advantages to go: 0.9, 1 of the first; -0.45, -0.5 of each other one.
    square = (0.81 + 1.0 + 2 * (0.2025 + 0.25)) / 6
    assert result.scales["0/timespeak/timing"].value == pytest.approx(square**0.5)
    assert result.weights[0].tolist() == pytest.approx([0.9 / square**0.5 / 9] * 2 + [1.0 / square**0.5 / 9])
    assert result.metrics()["credit/scale/0/timespeak/timing"] == pytest.approx(square**0.5)


def test_a_later_step_divides_by_the_running_scale() -> None:
    given = [rewards([0.0, 1.0]), rewards([0.0, 0.0]), rewards([0.0, 0.0])]
    first = credit(given, "timespeak")
    tenth = [rewards([0.0, 0.1]), rewards([0.0, 0.0]), rewards([0.0, 0.0])]
    later = credit(tenth, "timespeak", scales=first.scales)
    scale = first.scales["0/timespeak/timing"].value * ((0.9 + 0.01) / 1.9) ** 0.5
    assert later.scales["0/timespeak/timing"].value == pytest.approx(scale)
    assert float(later.weights[0][2]) == pytest.approx(0.1 / scale / 9)
    alone = credit(tenth, "timespeak")  # control: by its own scale it would be learned at full size
    assert float(alone.weights[0][2]) == pytest.approx(float(first.weights[0][2]))


def test_sound_is_weighted_by_its_own_axes() -> None:
    """Text has all axes' advantages always; a chunk's sound has them all, or those of `sound_axes`."""
    one = episodes("turn_taking")[0]
    chains = torch.zeros(1, 3, NUMBERS)  # two steps
    said = replace(one.text, **{f: torch.tensor([1]) for f in ("sampled_at", "row_class", "chunk")}, payload=chains)
    spoken = [replace(one, streams={**one.streams, VOICE: said})] * 3
    given = [rewards([0.0, 1.0], [0.0, 0.0]), rewards([0.0, 0.0], [0.0, 1.0]), rewards([0.0, 0.0])]
    everything, content, timing = (
        token_weights(spoken, [given], [], replace(CONFIG, sound_axes=axes), {})
        for axes in ((), ("content",), ("timing",))
    )
    for credit in (content, timing):
        assert all(torch.equal(a, b) for a, b in zip(credit.weights, everything.weights, strict=True))
    of = [torch.cat(credit.sound_weights) for credit in (everything, content, timing)]
    scale, numbers, tokens = content.scales["0/turn_taking/content"].value, 2 * NUMBERS, 9
    assert of[1].tolist() == pytest.approx([x / (scale * numbers * tokens) for x in (-0.5, 1.0, -0.5)])
    torch.testing.assert_close(of[1] + of[2], of[0])
    assert not torch.equal(of[1], of[2])
