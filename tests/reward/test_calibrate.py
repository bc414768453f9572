"""Calibration on differences whose true probabilities are known."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from model.weights.finite import NotFiniteError
from reward.evaluate import accuracies
from reward.learned.calibrate import fit_temperature, halves, plot, reliability, right
from reward.learned.preference import Preference, Stretch


def synthetic(temperature: float, count: int = 20_000) -> np.ndarray:
    """Differences d, turned so that P(d > 0 | |d|) = sigmoid(|d| / T)."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 3 * temperature, count))
    return np.where(rng.random(count) < 1 / (1 + np.exp(-size / temperature)), size, -size)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_true_temperature_is_found(temperature: float) -> None:
    d = synthetic(temperature)
    assert fit_temperature(d) == pytest.approx(temperature, rel=0.05)
    assert reliability(d, temperature).error < 0.01
    assert reliability(d, temperature / 5).error > 0.05  # the control: overconfident


def test_expected_calibration_error_by_hand() -> None:
    # confidences 0.75 (three pairs, two right) and nearly 1 (one pair, wrong)
    d = np.array([np.log(3), np.log(3), -np.log(3), -50.0])
    result = reliability(d, 1.0)
    assert result.count.tolist() == [3, 1]
    assert result.error == pytest.approx((3 * (0.75 - 2 / 3) + 1.0) / 4)


def test_no_difference_is_half_right() -> None:
    """In the calibration error and in accuracy alike, by hand: two right, one wrong, one tie."""
    assert reliability(np.zeros(4), 1.0).error == 0.0
    d = np.array([2.0, 1.0, -1.0, 0.0])
    assert right(d).tolist() == [1.0, 1.0, 0.0, 0.5]
    pairs = [pair(i, i + 10, source=source) for i, source in enumerate(["shift", "shift", "swap", "swap"])]
    found = accuracies(pairs, d)
    assert (found["accuracy"], found["pairs"], found["ties"]) == (2.5 / 4, 4, 1)
    assert (found["accuracy/source/swap"], found["pairs/source/swap"], found["ties/source/swap"]) == (0.25, 2, 1)
    assert found["accuracy/source/shift"] == 1.0 and "ties/source/shift" not in found
    assert accuracies(pairs[:2], d[:2])["ties"] == 0
    assert "accuracy/source/omit" not in found  # no pair, no figure
    assert accuracies([], np.zeros(0)) == {}
    whole = reliability(d, 1.0)
    assert (whole.count * whole.accuracy).sum() / whole.count.sum() == found["accuracy"]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_order(wrong: float) -> None:
    for figure in (right, fit_temperature, lambda d: reliability(d, 1.0), lambda d: accuracies([pair(0, 1)] * 2, d)):
        with pytest.raises(NotFiniteError, match="1 of 2 differences"):
            figure(np.array([1.0, wrong]))


def test_nothing_has_no_calibration() -> None:
    for figure in (fit_temperature, lambda d: reliability(d, 1.0)):
        with pytest.raises(ValueError, match="no pair"):
            figure(np.zeros(0))


def talk(mark: int) -> Stretch:
    return Stretch(torch.tensor([mark]), torch.zeros(1, 80, dtype=torch.uint8), 0, 1)


def pair(chosen: int, rejected: int, scenario: str | None = None, source: str = "rollouts") -> Preference:
    name = f"s{chosen}" if scenario is None else scenario
    return Preference(talk(chosen), talk(rejected), "timing", source, 0, "timespeak", name, 0.5)


def shared(pairs: list[Preference], fits: np.ndarray) -> int:
    """How many conversations are in both halves."""
    held = [{s.digest for p, f in zip(pairs, fits, strict=True) if f == half for s in (p.chosen, p.rejected)}
            for half in (True, False)]  # fmt: skip
    return len(held[0] & held[1])


def test_halves_share_no_conversation() -> None:
    """Of 60 groups of 5 conversations compared at random, under the names of 3 scenarios each. The control: a hash of
    the chosen one's scenario, which decided before, puts conversations into both halves."""
    rng = np.random.default_rng(0)
    pairs = []
    for group in range(60):
        for _ in range(8):
            a, b = (int(i) for i in rng.choice(5, 2, replace=False) + 5 * group)
            pairs.append(pair(a, b, f"{group}/{a % 3}"))
    fits = halves(pairs)
    assert shared(pairs, fits) == 0 and 150 < fits.sum() < 330
    of_scenario = np.array([blake2b(p.scenario.encode(), digest_size=1).digest()[0] % 2 == 0 for p in pairs])
    assert shared(pairs, of_scenario) > 50
    order = rng.permutation(len(pairs))
    assert np.array_equal(halves([pairs[int(i)] for i in order]), fits[order])  # whatever the order of pairs


def test_halves_follow_chains() -> None:
    """0 - 1 - 2 by conversations, 2 and 7 by their scenario; 8 - 9 apart."""
    chain = [pair(0, 1, "a"), pair(2, 1, "b"), pair(7, 6, "b"), pair(9, 8, "c")]
    fits = halves(chain)
    assert fits[0] == fits[1] == fits[2] != fits[3]
    whole = halves(chain[:3])
    assert whole.all() or not whole.any()
    assert len(halves([])) == 0


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot(tmp_path / "plot.png", {"timing": reliability(synthetic(1.0, 500), 1.0)})
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
