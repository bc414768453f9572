"""The convolution windows in vLLM's pages, where sequences meet in one step."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.layout import CONV_TAPS, SPLIT_TOKENS, Segments

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from rollout.engines.vllm.pages import PAST, PageWindows, Rows, plan  # noqa: E402

CHANNELS, TAIL = 5, 10


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """A whole sequence at once."""
    return ops.short_conv(x, taps, Segments.build([0], [0], [len(x)]), None)


class Sequences:
    """Three sequences of one stem, two pages long, on shared pages: the second begins behind the first one's page 0,
    the third behind the second one's page 1."""

    def __init__(self, held: int) -> None:
        """``held``: rows of the first sequence that are in its page already."""
        self.taps, stem = normal(0, CHANNELS, CONV_TAPS), normal(1, 2 * SPLIT_TOKENS, CHANNELS)
        self.whole = [torch.cat((stem, normal(2 + n, TAIL, CHANNELS))) for n in range(3)]
        self.table = torch.tensor([[0, 2, 3], [0, 1, 4], [0, 1, 5]], dtype=torch.int32)
        self.windows = torch.full((6, PAST, CHANNELS), torch.nan)
        self.done = [held, SPLIT_TOKENS, 2 * SPLIT_TOKENS]
        if held:
            self.run([0], [0], [held], plan)

    def run(self, which: list[int], starts: list[int], lengths: list[int], planned: object) -> list[Tensor]:
        """One step of the sequences ``which``, in this order."""
        segments = Segments.build(which, starts, lengths)
        rows = planned(starts, segments.offset.tolist(), self.table[which])  # type: ignore[operator]
        own = rows.segments(segments.position)
        x = [self.whole[s][start : start + n] for s, start, n in zip(which, starts, lengths, strict=True)]
        return list(PageWindows(self.windows, rows)(torch.cat(x), self.taps, own).split(lengths))

    def equal(self, order: tuple[int, ...], lengths: list[int], planned: object = plan) -> bool:
        """Goes on by ``lengths``, one a sequence; whether the rows are those of the sequences alone."""
        starts = [self.done[s] for s in order]
        counts = [lengths[s] for s in order]
        outputs = self.run(list(order), starts, counts, planned)
        for s in range(3):
            self.done[s] += lengths[s]
        return all(
            torch.equal(rows, convolved(self.whole[s], self.taps)[start : start + n])
            for s, start, n, rows in zip(order, starts, counts, outputs, strict=True)
        )


@pytest.mark.parametrize("beyond", [0, 1, 2, 70])
@pytest.mark.parametrize("held", [0, 1, 61, 62, 63])
def test_a_step_reads_the_windows_that_it_writes(held: int, beyond: int) -> None:
    """The pages' ends are filled from 64, 63, 3, 2 and 1 rows of the step, and lie ``beyond`` rows before its end."""
    lengths = [SPLIT_TOKENS - held + beyond, SPLIT_TOKENS + min(beyond, 2), 1]
    for order in permutations(range(3)):
        sequences = Sequences(held)
        assert sequences.equal(order, lengths)
        assert sequences.equal(order, [1, 2, 4])  # what they left behind
        assert not Sequences(held).equal(order, lengths, early)


def early(*step: object) -> Rows:
    """The negative control: windows are read before the step writes any."""
    rows = plan(*step)  # type: ignore[arg-type]
    return replace(rows, behind=rows.behind[:0])
