"""Calibration of a reward model: temperature, expected calibration error, reliability plot.

Bradley-Terry reads a difference of scores d as the probability sigmoid(d / T) that the first is preferred. T is fitted
on pairs that are not reported (Guo et al. 2017, arXiv 1706.04599: temperature scaling). A pair is judged by its
confidence sigmoid(|d| / T), in [0.5, 1], and by whether the sign of d was right.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from model.program.files import write_whole

BINS = 10
"""Number of bins, of equal width, into which confidences from 0.5 to 1 are sorted."""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reliability:
    """How confidence and accuracy agree, bin by bin; bins without a pair are left out."""

    confidence: Array  # [bins] mean confidence
    accuracy: Array  # [bins] share of pairs in the right order
    count: NDArray[np.int64]  # [bins] pairs

    @property
    def error(self) -> float:
        """Expected calibration error: sum over bins of the share of pairs times |accuracy - confidence|."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def fit_temperature(difference: Array) -> float:
    """The T > 0 with the smallest mean of -log sigmoid(d / T); ``difference`` d [P]: the chosen stretch's score minus
    the rejected one's."""

    def loss(log_t: float) -> float:
        return float(np.logaddexp(0.0, -difference / np.exp(log_t)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-6.0, 6.0), method="bounded").x))


def reliability(difference: Array, temperature: float) -> Reliability:
    """``difference`` [P]: the chosen stretch's score minus the rejected one's; 0 counts as half right."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(difference) / temperature))
    right = np.where(difference == 0, 0.5, difference > 0)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    held = count > 0
    means = [np.bincount(place, weights=x, minlength=BINS)[held] / count[held] for x in (confidence, right)]
    return Reliability(means[0], means[1], count[held])


def plot(path: Path, curves: dict[str, Reliability]) -> None:
    """One PNG: accuracy over confidence for each axis, with the number of pairs in every bin below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(curves), figsize=(4.6 * len(curves), 5.6), squeeze=False, sharex=True, height_ratios=(3, 1)
    )
    for (name, curve), (upper, lower) in zip(curves.items(), panels.T, strict=True):
        upper.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1, label="perfect")
        upper.plot(curve.confidence, curve.accuracy, marker="o", label=f"ECE {curve.error:.3f}")
        upper.set(title=f"{name} reward model", ylabel="pairs in the right order", xlim=(0.48, 1.02), ylim=(0, 1.05))
        upper.legend(loc="lower right")
        lower.bar(curve.confidence, curve.count, width=0.03)
        lower.set(xlabel="confidence after temperature fit", ylabel="pairs", yscale="log")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    write_whole(path, buffer.getvalue())
