"""Calibration of a reward model: temperature, expected calibration error, reliability plot.

Bradley-Terry reads a difference of scores d as the probability sigmoid(d / T) that the first is preferred. T is fitted
on pairs that are not reported (Guo et al. 2017, arXiv 1706.04599: temperature scaling), nor share a conversation or a
scenario with those that are (`halves`). A pair is judged by its confidence sigmoid(|d| / T), in [0.5, 1], and by
whether the sign of d was right (`right`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.program.files import write_whole
from model.weights.finite import NotFiniteError
from reward.learned.preference import Preference

BINS = 10
"""Number of bins, of equal width, into which confidences from 0.5 to 1 are sorted."""
COUNTING = (
    "accuracy: share of pairs in the right order; a pair of equal scores counts half, here and in the calibration "
    "error (ece). pairs: how many pairs an accuracy rests on; ties: how many of them have equal scores. pairs_fitted, "
    "pairs_ece: how many the temperature and the calibration error rest on; these two sets have no conversation and no "
    "scenario in common. Sizes of faults in ms: chunks with another action than the expert's, or a shift's distance."
)
"""What the figures of `reward.evaluate` mean, for its JSON file."""

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


def halves(pairs: Sequence[Preference]) -> NDArray[np.bool_]:
    """Which pairs fit the temperature, bool [P]; the others report the calibration error. No conversation and no
    scenario is in both halves: pairs that share one, be it through other pairs, stay together. The sets of such pairs
    are ordered by a digest, so whatever the order of pairs, and take turns. All True or all False when there are fewer
    than two sets."""
    nodes: dict[bytes, int] = {}
    ends = [
        [nodes.setdefault(key, len(nodes)) for key in (p.chosen.digest, p.rejected.digest, _named(p.scenario))]
        for p in pairs
    ]
    edges = [(a, b) for a, *others in ends for b in others]
    graph = coo_array((np.ones(len(edges)), np.array(edges, np.int64).reshape(-1, 2).T), shape=(len(nodes),) * 2)
    _, component = connected_components(graph, directed=False)
    first: dict[int, bytes] = {}  # component -> smallest key
    for key, node in nodes.items():
        first[component[node]] = min(key, first.get(component[node], key))
    fits = {c: rank % 2 == 0 for rank, c in enumerate(sorted(first, key=lambda c: blake2b(first[c]).digest()))}
    return np.array([fits[component[a]] for a, *_ in ends], np.bool_)


def _named(scenario: str) -> bytes:
    return b"scenario " + scenario.encode()


def right(difference: Array) -> Array:
    """[P]: 1 for a pair in the right order, 0 for one in the wrong order, 1/2 for equal scores, which tell nothing: as
    much as guessing would be worth. ``difference`` [P]: the chosen stretch's score minus the rejected one's. Raises
    NotFiniteError for NaN or infinities."""
    if not np.isfinite(difference).all():
        raise NotFiniteError(f"{(~np.isfinite(difference)).sum():,} of {len(difference):,} differences are not finite")
    return np.where(difference == 0, 0.5, difference > 0)


def fit_temperature(difference: Array) -> float:
    """The T > 0 with the smallest mean of -log sigmoid(d / T); ``difference`` d [P] as in `right`. Raises ValueError
    without a pair, NotFiniteError as `right` does."""
    if not len(right(difference)):
        raise ValueError("fit_temperature: no pair")

    def loss(log_t: float) -> float:
        return float(np.logaddexp(0.0, -difference / np.exp(log_t)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-6.0, 6.0), method="bounded").x))


def reliability(difference: Array, temperature: float) -> Reliability:
    """``difference`` [P] as in `right`. Raises ValueError without a pair, NotFiniteError as `right` does."""
    if not len(difference):
        raise ValueError("reliability: no pair")
    values = right(difference)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(difference) / temperature))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    held = count > 0
    means = [np.bincount(place, weights=x, minlength=BINS)[held] / count[held] for x in (confidence, values)]
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
