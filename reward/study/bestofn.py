"""Best of n: the rules' score of the sample that a learned reward ranks first among n.

Choosing the best of n optimises a reward without training, and moves the policy by a known KL. The curve over n shows
how far a learned reward can be optimised before the rules' score falls. `rl.bestofn` is the command.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from model.weights.finite import NotFiniteError


@dataclass(frozen=True)
class Pick:
    """Best of n in one family, or in all of them (family "mean"): means over scenarios."""

    family: str
    n: int
    kl: float  # nats: log n - (n - 1) / n, an upper bound on the KL between best-of-n and the policy
    rule: float  # the rules' score of the learned models' pick
    rule_error: float | None  # its standard error over scenarios; None where it is undefined: of a single scenario
    proxy: float  # the learned reward of that pick
    oracle: float  # the rules' score of the rules' own pick


def best_of(n: int, values: NDArray[np.float64], by: NDArray[np.float64]) -> float:
    """Expected value of the sample with the highest ``by`` among n drawn without replacement from the N given, both
    [N]: the unbiased estimator sum_i C(i - 1, n - 1) / C(N, n) v_i, v sorted by ``by``, i from 1 (Nakano et al. 2021,
    arXiv 2112.09332, appendix I). Samples with equal ``by`` are equally likely to be picked. Raises ValueError unless
    1 <= n <= N, and NotFiniteError for values that are not finite."""
    if not 1 <= n <= len(values):
        raise ValueError(f"best_of: n = {n} of {len(values)} samples")
    if not (np.isfinite(values).all() and np.isfinite(by).all()):
        raise NotFiniteError("best of n: a score or a learned reward is not finite, and ranks nowhere")
    _, place = np.unique(by, return_inverse=True)
    evened = np.bincount(place, values) / np.bincount(place)
    weights = [math.comb(i, n - 1) / math.comb(len(values), n) for i in range(len(values))]
    return float(np.dot(weights, evened[np.sort(place)]))


def curve(family: str, rule: NDArray[np.float64], proxy: NDArray[np.float64]) -> list[Pick]:
    """A `Pick` for each n = 1, 2, 4, … up to N; ``rule`` and ``proxy`` fp64 [scenarios, N]: both rewards of each
    sample. Raises ValueError without a scenario."""
    if not len(rule):
        raise ValueError(f"best of n of {family}: no scenario")
    out = []
    n = 1
    while n <= rule.shape[1]:
        picked = np.array([best_of(n, r, p) for r, p in zip(rule, proxy, strict=True)])
        error = float(picked.std(ddof=1) / math.sqrt(len(picked))) if len(picked) > 1 else None
        liked = float(np.mean([best_of(n, p, p) for p in proxy]))
        oracle = float(np.mean([best_of(n, r, r) for r in rule]))
        out.append(Pick(family, n, math.log(n) - (n - 1) / n, float(picked.mean()), error, liked, oracle))
        n *= 2
    return out


def mean(curves: Sequence[Sequence[Pick]]) -> list[Pick]:
    """The families' mean at each n; its standard error is undefined where one family's is."""
    return [
        Pick(
            family="mean",
            n=row[0].n,
            kl=row[0].kl,
            rule=fmean(p.rule for p in row),
            rule_error=_error_of_mean([p.rule_error for p in row]),
            proxy=fmean(p.proxy for p in row),
            oracle=fmean(p.oracle for p in row),
        )
        for row in zip(*curves, strict=True)
    ]


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent figures with these standard errors; None when one is undefined."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None
