"""The comparison itself: it must see a single ulp, a single digest, and other weights."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from rl.step.identity import Mismatch, NotComparableError, check_comparable, compare, unequal_bits
from tests.support.episodes import some_episode


def test_compare_counts_one_ulp() -> None:
    a = torch.tensor([-0.5, -1.0, -2.0])
    b = a.clone()
    b[1] = torch.nextafter(b[1], torch.tensor(0.0))
    same = compare(a, a.clone(), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]))
    other = compare(a, b, torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    assert (same.num_unequal, same.rows_unequal, same.max_abs) == (0, 0, 0.0)
    assert (other.num_tokens, other.num_unequal, other.rows_unequal) == (3, 1, 1)
    assert other.max_abs == pytest.approx(2.0**-24)


def test_opposite_errors_do_not_cancel() -> None:
    a = torch.tensor([-1.0, -1.0])
    b = torch.tensor([-1.25, -0.75])
    mismatch = compare(a, b, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert mismatch.metrics()["mismatch/k1"] == 0.0
    assert mismatch.num_unequal == 2
    assert mismatch.metrics()["mismatch/k3"] > 0.0


def test_k1_and_k3_by_hand() -> None:
    mismatch = compare(torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([0]), torch.tensor([1]))
    assert mismatch.metrics()["mismatch/k1"] == pytest.approx(0.5)
    assert mismatch.metrics()["mismatch/k3"] == pytest.approx(2.718281828**-0.5 - 1 + 0.5, rel=1e-6)


def test_unequal_bits_sees_signed_zero() -> None:
    assert unequal_bits(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])).tolist() == [True, False]


def test_total_adds_counts_and_keeps_the_largest_gap() -> None:
    parts = [Mismatch(2, 1, 0, 0.5, 0.1, 0.3), Mismatch(3, 0, 2, -0.5, 0.0, 0.1)]
    assert Mismatch.total(parts) == Mismatch(5, 1, 2, 0.0, 0.1, 0.3)


def test_other_contract_or_weights_are_not_comparable() -> None:
    check_comparable([some_episode()], "c0", "w0")
    with pytest.raises(NotComparableError, match="contract c0"):
        check_comparable([some_episode()], "c1", "w0")
    with pytest.raises(NotComparableError, match="weights w0"):
        check_comparable([dataclasses.replace(some_episode(), contract_id="c1")], "c1", "w1")


def test_a_stream_that_the_learner_does_not_score_is_not_comparable() -> None:
    one = some_episode()
    check_comparable([one], "c0", "w0")
    with pytest.raises(NotComparableError, match="sampled in other beside text"):
        check_comparable([dataclasses.replace(one, streams={**one.streams, "other": one.text})], "c0", "w0")


@pytest.mark.parametrize(("module", "uses"), [("rl.step.loop", False), ("rl.run", True)])
def test_the_loop_knows_no_audit(module: str, uses: bool) -> None:
    """Its caller does (the control)."""
    code = f"import sys, {module}; print(any(name.startswith('rl.audit') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(uses)
