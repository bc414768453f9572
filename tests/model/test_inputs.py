"""Tokens and codes stay together however rows are cut and packed, and rows that were torn apart are refused."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.layout import Segments
from model.inputs import Inputs
from tests.model.cases import AUDIO, ROWS, random_rows, twins

COUNTS = (ROWS, 60, 33)


def rows_of(inputs: Inputs) -> list[tuple[int, tuple[int, ...]]]:
    """Each row's token, and its codes where it has some."""
    frames = dict(zip(inputs.audio_rows.tolist(), map(tuple, inputs.codes.tolist()), strict=True))
    return [(token, frames.get(row, ())) for row, token in enumerate(inputs.tokens.tolist())]


def test_parts_hold_the_rows_asked_for() -> None:
    sequences = [random_rows(seed, count) for seed, count in enumerate(COUNTS)]
    alone = [rows_of(Inputs.cat([one], AUDIO)) for one in sequences]
    together = Inputs.cat(sequences, AUDIO)
    assert rows_of(together) == alone[0] + alone[1] + alone[2]
    assert together.starts == [0, ROWS, ROWS + 60]
    draw = random.Random(0)
    for _ in range(50):
        spans = []
        for s in draw.sample(range(3), draw.randint(1, 3)):
            first = draw.randrange(COUNTS[s])
            spans.append((s, first, draw.randint(first + 1, COUNTS[s])))
        lengths = [end - first for _, first, end in spans]
        segments = Segments.build([s for s, _, _ in spans], [first for _, first, _ in spans], lengths)
        wanted = [row for s, first, end in spans for row in alone[s][first:end]]
        assert rows_of(together.part(spans, segments)) == wanted
        shifted = [(s, first - 1, end - 1) if first else (s, first, end) for s, first, end in spans]
        if shifted != spans and all(first for _, first, _ in spans):
            assert rows_of(together.part(shifted, segments)) != wanted  # the control: one row earlier
    cut = together.cut([5, 60, 7])
    assert rows_of(cut) == alone[0][:5] + alone[1] + alone[2][:7]
    assert torch.equal(cut.segments.position, torch.cat([torch.arange(n, dtype=torch.int32) for n in (5, 60, 7)]))


@torch.no_grad()
def test_a_cut_changes_no_row_before_it() -> None:
    ours, _ = twins(7)
    together = Inputs.cat([random_rows(1, 60), random_rows(2, 33)], AUDIO)
    every, first = ours(together), ours(together.cut([40, 33]))
    assert torch.equal(first[:40], every[:40]) and torch.equal(first[40:], every[60:])


def test_what_does_not_fit_together_is_refused() -> None:
    one = random_rows(0, 20)
    inputs = Inputs.cat([one], AUDIO)
    with pytest.raises(ValueError, match="tokens has 19 rows, segments 20"):
        Inputs.of(one.tokens[1:], one.codes, inputs.segments, AUDIO)
    with pytest.raises(ValueError, match="audio tokens, but codes has"):
        Inputs.of(one.tokens, one.codes[1:], inputs.segments, AUDIO)
    with pytest.raises(ValueError, match="the spans have 4 rows, segments 20"):
        inputs.part([(0, 2, 6)], inputs.segments)
