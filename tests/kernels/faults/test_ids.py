"""Ids and counts that are not there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.layout import PagedKV, Segments
from tests.kernels.contract import normal
from tests.kernels.faults.cases import CASES, attend, call, paged_inputs, state_conv_inputs

WRONG_IDS = st.sampled_from([-1, -(2**31), 2**31 - 1, 10**6])


@given(wrong=WRONG_IDS, row=st.integers(0, 39), rows=st.sampled_from([40, 400]))
@settings(max_examples=20)
def test_wrong_ids(wrong: int, row: int, rows: int) -> None:
    """An expert, code, class, token, slot or page that is not there is named; none is read or written."""
    for name, key in (
        ("expert_linear", "expert"),
        ("embedding_sum", "codes"),
        ("logprob", "row_class"),
        ("logprob", "token"),
        ("sample", "row_class"),
    ):
        inputs = CASES[name].make(1, rows, 13, torch.float32)
        inputs[key][row] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            call(name, inputs)
    cached = paged_inputs(1, rows, 13, torch.float32)
    cached["table"][0, 0] = wrong
    with pytest.raises(ValueError, match="names no page"):
        attend(cached)
    assert bool(cached["key"].isnan().all())
    x = state_conv_inputs(1, rows, 13, torch.float32)
    before = x["state"].clone()
    far = Segments.build([0], [0], [rows])
    far.slot[0] = wrong
    with pytest.raises(ValueError, match=r"segment 0 has slot"):
        ops.short_conv(x["x"], x["weight"], far, x["state"])
    assert torch.equal(x["state"], before)
    with pytest.raises(ValueError, match="names no page"):
        heads = (cached[key] for key in ("q", "k", "v", "rel", "rel_proj"))
        pages = PagedKV(cached["key"], cached["value"], cached["table"].clamp(0, 1))
        ops.attention(*heads, far, scale=0.2, cache=pages)


@pytest.mark.parametrize(("top_k", "shared"), [(-1, 1), (0, 1), (14, 1), (2, -1), (2, 99)])
def test_wrong_counts_of_experts(top_k: int, shared: int) -> None:
    with pytest.raises(ValueError, match="route"):
        ops.route(normal(1, 9, 14), torch.zeros(max(14 - shared, 0)), top_k, shared)
