"""The best-of-n estimator against the definition: the mean over all subsets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from model.weights.finite import NotFiniteError
from reward.study.bestofn import best_of, curve, mean
from reward.study.pictures import best_of_n
from rl.bestofn import table


@pytest.mark.parametrize("n", range(1, 8))
def test_estimator_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(0)
    values, by = rng.normal(size=7), rng.normal(size=7)
    picks = [max(subset, key=lambda i: by[i]) for subset in itertools.combinations(range(7), n)]
    assert best_of(n, values, by) == pytest.approx(np.mean(values[picks]))


def test_ties_are_broken_evenly() -> None:
    values, by = np.array([0.0, 1.0, 5.0]), np.array([1.0, 1.0, 0.0])
    assert best_of(3, values, by) == pytest.approx(0.5)
    assert best_of(2, values, by) == pytest.approx(0.5)  # in every pair one of the two that tie, or both
    assert best_of(2, values[::-1], by[::-1]) == best_of(2, values, by)
    assert best_of(2, values, np.zeros(3)) == pytest.approx(2.0)


def test_n_must_be_among_the_samples() -> None:
    with pytest.raises(ValueError, match="n = 4 of 3"):
        best_of(4, np.zeros(3), np.zeros(3))


def test_of_one_scenario_there_is_no_standard_error() -> None:
    """By hand: picks of 0 and 1 have the error 0.5 of their mean 0.5; of one pick there is none, nor of a mean with
    it."""
    rule = np.array([[0.0, 0.0], [1.0, 1.0]])
    two, one = curve("two", rule, rule), curve("one", rule[:1], rule[:1])
    assert [p.rule_error for p in two] == pytest.approx([0.5, 0.5]) and [p.rule_error for p in one] == [None, None]
    assert [p.rule_error for p in mean([two, two])] == pytest.approx([0.5 / 2**0.5] * 2)
    assert [p.rule_error for p in mean([two, one])] == [None, None]
    same = curve("same", np.ones((2, 2)), np.ones((2, 2)))
    assert [p.rule_error for p in same] == [0.0, 0.0]  # the control: no spread over two scenarios is an error of 0
    cells = list(table([*two, *one]).columns[2].cells)
    assert cells == ["50.0% ± 50.0%", "50.0% ± 50.0%", "0.0% ± ?", "0.0% ± ?"]
    assert best_of_n([mean([two, one]), two, one]).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no scenario"):
        curve("none", np.zeros((0, 2)), np.zeros((0, 2)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_rank_nowhere(value: float, which: int) -> None:
    both = [np.arange(3.0), np.arange(3.0)]
    assert best_of(3, *both) == 2.0
    both[which][1] = value
    with pytest.raises(NotFiniteError, match="is not finite, and ranks nowhere"):
        best_of(3, *both)


def test_a_good_proxy_climbs_and_a_bad_one_falls() -> None:
    rule = np.random.default_rng(1).uniform(size=(5, 16))
    good, bad = curve("f", rule, rule), curve("f", rule, -rule)
    assert [p.n for p in good] == [1, 2, 4, 8, 16]
    assert all(a.rule < b.rule for a, b in itertools.pairwise(good))
    assert all(a.rule > b.rule for a, b in itertools.pairwise(bad))
    assert [p.rule for p in good] == [p.oracle for p in good] == [p.oracle for p in bad]
    assert good[0].rule == pytest.approx(rule.mean()) and good[0].kl == 0.0
    assert good[-1].rule == pytest.approx(rule.max(1).mean())
    both = mean([good, bad])
    assert both[2].rule == pytest.approx((good[2].rule + bad[2].rule) / 2) and both[2].n == 4
    assert best_of_n([both, good, bad]).startswith(b"\x89PNG")
