"""Ops whose rows several processes share out give each its part of one process's results and gradients, to the bit."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.rows import Rows, activated
from kernels.sharing import shared
from model.program import teams
from tests.support.settings import run


def differing(settings: dict[str, str]) -> dict[str, str]:
    """Mistake -> ops that differ."""
    done = run(["-m", "tests.kernels.sharing_of_ranks"], settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)


WANTED = {"none": "", "halo": "short_conv", "sums": "expert_linear, linear, linear, two columns"}
"""Both mistakes must be seen, each in its ops alone."""


def test_three_processes() -> None:
    assert differing({}) == WANTED


@pytest.mark.slow
def test_three_processes_in_tritons_interpreter() -> None:
    assert differing({"METRONOME_BACKEND": "triton", "TRITON_INTERPRET": "1"}) == WANTED


def test_slices() -> None:
    def counts(rows: int, ranks: int) -> list[int]:
        return Rows.even(rows, ranks, 0, teams).counts

    assert counts(12, 4) == [3, 3, 3, 3] and counts(11, 4) == [3, 3, 3, 2]
    assert counts(9, 4) == [2, 2, 2, 3] and counts(5, 4) == [1, 1, 1, 2] and counts(2, 3) == [0, 1, 1]


def test_what_cannot_be_shared_is_refused() -> None:
    rows = Rows((0, 2), 0, teams)
    with shared(rows):
        with pytest.raises(ValueError, match="embedding_sum: is not computed on rows"):
            dispatch.backend().embedding_sum(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1), 1)
        with pytest.raises(ValueError, match="already"), activated(rows):
            pass
    dispatch.use_backend("reference")
    try:
        with pytest.raises(ValueError, match="'reference' cannot share rows"), shared(rows):
            pass
    finally:
        dispatch.use_backend("cpu")
