"""Calibration on differences whose true probabilities are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reward.learned.calibrate import fit_temperature, plot, reliability


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
    assert reliability(np.zeros(4), 1.0).error == 0.0


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot(tmp_path / "plot.png", {"timing": reliability(synthetic(1.0, 500), 1.0)})
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
