"""Tokens, codes and patches stay together however rows are cut and packed, and rows that were torn apart are
refused."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.layout import Segments
from model.inputs import Inputs
from tests.model.cases import ROWS, SENSES, random_rows, random_video, twins


def rows_of(inputs: Inputs) -> list[tuple[int, tuple[int, ...]]]:
    """Each row's token, and its codes or a digest of its patch where it has some."""
    more = dict(zip(inputs.audio_rows.tolist(), map(tuple, inputs.codes.tolist()), strict=True))
    shown = [tuple(digest.tolist()) for digest in inputs.patches.digests()]
    more |= dict(zip(inputs.image_rows.tolist(), shown, strict=True))
    return [(token, more.get(row, ())) for row, token in enumerate(inputs.tokens.tolist())]


def test_parts_hold_the_rows_asked_for() -> None:
    sequences = [random_video(0, SENSES.patch), random_rows(1, 60), random_video(2, SENSES.patch, 33)]
    counts = [len(one.tokens) for one in sequences]
    alone = [rows_of(Inputs.cat([one], SENSES)) for one in sequences]
    together = Inputs.cat(sequences, SENSES)
    assert rows_of(together) == alone[0] + alone[1] + alone[2]
    assert together.starts == [0, counts[0], counts[0] + 60] and counts[0] > ROWS
    draw = random.Random(0)
    for _ in range(50):
        spans = []
        for s in draw.sample(range(3), draw.randint(1, 3)):
            first = draw.randrange(counts[s])
            spans.append((s, first, draw.randint(first + 1, counts[s])))
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
    together = Inputs.cat([random_rows(1, 60), random_rows(2, 33)], ours.senses)
    every, first = ours(together), ours(together.cut([40, 33]))
    assert torch.equal(first[:40], every[:40]) and torch.equal(first[40:], every[60:])


def test_what_does_not_fit_together_is_refused() -> None:
    one = random_rows(0, 20)
    inputs = Inputs.cat([one], SENSES)
    with pytest.raises(ValueError, match="tokens has 19 rows, segments 20"):
        Inputs.of(one.tokens[1:], one.codes, inputs.patches, inputs.segments, SENSES)
    with pytest.raises(ValueError, match="audio tokens, but codes has"):
        Inputs.of(one.tokens, one.codes[1:], inputs.patches, inputs.segments, SENSES)
    with pytest.raises(ValueError, match="holds 1 image tokens, but there are 0 patches"):
        tokens = one.tokens.clone()
        tokens[tokens != SENSES.audio] = torch.where(torch.arange(int((tokens != SENSES.audio).sum())) == 0, 5, 9)
        Inputs.of(tokens, one.codes, one.frames.patches(4), inputs.segments, SENSES)
    with pytest.raises(ValueError, match="the spans have 4 rows, segments 20"):
        inputs.part([(0, 2, 6)], inputs.segments)
