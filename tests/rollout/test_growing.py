"""Bytes that are appended come back in order, however they lie in memory."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.record.growing import FIRST_BYTES, MOST_BYTES, Growing


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 320, 2883, FIRST_BYTES, FIRST_BYTES + 1, 70_000]), max_size=40), st.data())
def test_bytes_come_back(sizes: list[int], data: st.DataObject) -> None:
    generator, grown, parts = torch.Generator().manual_seed(0), Growing(), [torch.empty(0, dtype=torch.uint8)]
    for size in sizes:
        parts.append(torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8))
        grown.append(parts[-1])
    wanted = torch.cat(parts)
    assert grown.nbytes == len(wanted) and torch.equal(grown.all(), wanted)
    count = data.draw(st.integers(0, len(wanted)))
    assert torch.equal(grown.tail(count), wanted[len(wanted) - count :])
    twin = grown.copy()
    twin.append(torch.ones(3, dtype=torch.uint8))
    assert torch.equal(grown.all(), wanted) and torch.equal(twin.tail(3), torch.ones(3, dtype=torch.uint8))


def test_pieces_stay_and_grow_to_a_limit() -> None:
    grown = Growing()
    for _ in range(5 * MOST_BYTES // 4096):
        grown.append(torch.zeros(4096, dtype=torch.uint8))
    sizes = [len(piece) for piece in grown._full]
    assert sizes[:3] == [FIRST_BYTES, FIRST_BYTES, 2 * FIRST_BYTES] and max(sizes) == MOST_BYTES
    assert len(sizes) < 15
