"""Slots, pages and limits of `SessionState`; that memory is taken once; errors that name slot, length and limit."""

from __future__ import annotations

import pytest
import torch
from transformers import InklingConfig

from kernels.layout import SPLIT_TOKENS
from model.backbone.state import ContextFull, SessionState, pages_per_slot, session_bytes, state_bytes
from model.config import preset
from model.context import ContextConfig, give
from tests.model.cases import ROWS, in_pieces, random_rows, twins

TINY = preset("tiny")
WINDOW = TINY.text_config.sliding_window_size
WINDOWED = give(preset("tiny"), ContextConfig("window", first=128, window=256))


def state_of(slots: int = 2, max_tokens: int = 1024, max_rows: int = 256) -> SessionState:
    return SessionState(TINY, slots, max_tokens, torch.float32, max_rows)


def held(state: SessionState, layer: int, slot: int) -> list[int]:
    return [page for page in state.layers[layer].kv.table[slot].tolist() if page >= 0]


def test_sliding_layers_recycle_their_pages() -> None:
    state = state_of(slots=3)
    slot = state.open()
    most = 0
    for _ in range(1024):
        state.extend([slot], [1])
        most = max(most, len(held(state, 0, slot)))
    assert most <= pages_per_slot((WINDOW, 0), 10**9) < 1024 // SPLIT_TOKENS
    assert len(held(state, 3, slot)) == 1024 // SPLIT_TOKENS


def test_every_slot_can_be_full_at_once_and_in_any_cut() -> None:
    """The pools suffice in the worst case: all slots at every offset, with calls of max_rows."""
    state = state_of(slots=4, max_tokens=2048, max_rows=256)
    slots = [state.open() for _ in range(4)]
    for i, slot in enumerate(slots):
        state.extend([slot], [1 + 21 * i])
    while all(state.max_tokens - state.length(slot) >= 64 for slot in slots):
        state.extend(slots, [64] * 4)
    for slot in slots:
        state.close(slot)
    assert not any(held(state, layer, slot) for layer in range(4) for slot in range(4))
    slot = state.open()
    for _ in range(8):
        state.extend([slot], [256])
    assert state.max_tokens - state.length(slot) == 0


def test_global_layers_keep_the_first_pages_and_a_window() -> None:
    """Under a window a session of any length holds a bounded number of pages; `max_tokens` is the table's width."""
    state = SessionState(WINDOWED, 2, 10**6, torch.float32, max_rows=256)
    assert state_bytes(WINDOWED, 2, 10**6, torch.float32, 256) == state_bytes(WINDOWED, 2, 10**5, torch.float32, 256)
    assert state_bytes(TINY, 2, 10**6, torch.float32, 256) > 50 * state_bytes(WINDOWED, 2, 10**6, torch.float32, 256)
    slot, most = state.open(), 0
    for _ in range(1500):
        state.extend([slot], [1])
        most = max(most, len(held(state, 3, slot)))
    assert most <= pages_per_slot((256, 128), 10**9) == 8
    table = state.layers[3].kv.table[slot]
    first = (1499 - 256 + 1) // SPLIT_TOKENS  # page of the first key in sight
    assert (table[:24] >= 0).nonzero()[:, 0].tolist() == [0, 1, *range(first, 24)]
    assert state.global_pages_freed == first - 2


def test_long_calls_leave_pages_for_other_slots() -> None:
    """What only the rows of a long call attended to is free for the next call of any slot, and for a fork."""
    state = SessionState(WINDOWED, 4, 4096, torch.float32, max_rows=1024)
    slots = [state.open() for _ in range(3)]
    for _ in range(4):
        for slot in slots:
            state.extend([slot], [1024])
    twin = state.fork(slots[0])
    assert held(state, 3, twin)[:2] == held(state, 3, slots[0])[:2]  # the first ones are shared
    assert len(held(state, 3, twin)) <= pages_per_slot((256, 128), 10**9)


def test_appending_allocates_no_memory() -> None:
    state = state_of()
    tensors = [t for layer in state.layers for t in (layer.kv.key, layer.kv.value, layer.kv.table, layer.kv_conv)]
    before = [t.data_ptr() for t in tensors]
    slot = state.open()
    for length in (5, 200, 1, 1, 64):
        state.extend([slot], [length])
    assert [t.data_ptr() for t in tensors] == before


def test_fork_shares_full_pages_and_copies_the_last() -> None:
    state = state_of()
    origin = state.open()
    state.extend([origin], [150])
    twin = state.fork(origin)
    assert held(state, 3, twin)[:2] == held(state, 3, origin)[:2]
    assert held(state, 3, twin)[2] != held(state, 3, origin)[2]
    state.close(origin)
    third = state.open()
    state.extend([third], [150])
    assert not set(held(state, 3, third)) & set(held(state, 3, twin)), "a page still in use was given away"


def test_segments_name_slot_and_positions() -> None:
    state = state_of()
    a, b = state.open(), state.open()
    state.extend([b], [7])
    segments = state.extend([b, a], [1, 3])
    assert segments.slot.tolist() == [b, a]
    assert segments.position.tolist() == [7, 0, 1, 2]
    segments = state.extend([a, b], [1, 1])
    assert (segments.position.tolist(), segments.offset.tolist()) == ([3, 8], [0, 1, 2])
    segments = state.extend([b, a], [1, 1])
    assert (segments.slot.tolist(), segments.position.tolist()) == ([b, a], [9, 4])


def test_a_reused_slot_remembers_nothing() -> None:
    model, _ = twins(1)
    state = SessionState(model.config, 1, 256, torch.float32)
    first = state.open()
    alone = in_pieces(model, random_rows(1), [ROWS], state, first)
    state.close(first)
    second = state.open()
    in_pieces(model, random_rows(2), [3] * (ROWS // 3), state, second)
    state.close(second)
    assert torch.equal(in_pieces(model, random_rows(1), [ROWS], state, state.open()), alone)


def test_the_context_limit_names_slot_length_and_limit_and_changes_nothing() -> None:
    state = state_of(max_tokens=100)
    a, b = state.open(), state.open()
    state.extend([a, b], [98, 10])
    with pytest.raises(ContextFull, match=f"slot {a} holds 98 rows; 5 more would pass its limit of 100"):
        state.extend([b, a], [5, 5])
    assert (state.length(a), state.length(b)) == (98, 10)
    state.extend([b, a], [5, 2])
    assert state.max_tokens - state.length(a) == 0


def test_misuse_is_named() -> None:
    state = state_of(slots=1)
    slot = state.open()
    with pytest.raises(RuntimeError, match="all 1 slots are open"):
        state.open()
    with pytest.raises(RuntimeError, match="all 1 slots are open"):
        state.fork(slot)
    with pytest.raises(ValueError, match="257 rows in one call, limit 256"):
        state.extend([slot], [257])
    with pytest.raises(ValueError, match="come twice"):
        state.extend([slot, slot], [1, 1])
    with pytest.raises(ValueError, match="at least 1"):
        state.extend([slot], [0])
    state.close(slot)
    for call in (lambda: state.close(slot), lambda: state.extend([slot], [1]), lambda: state.length(7)):
        with pytest.raises(ValueError, match="is not open"):
            call()


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["all", "window"])
def test_session_bytes_is_what_a_slot_adds(config: InklingConfig) -> None:
    def size(slots: int) -> int:
        state = SessionState(config, slots, 1024, torch.float32, max_rows=64)
        parts = [(x.kv.key, x.kv.value, x.kv_conv, x.attn_conv, x.mlp_conv) for x in state.layers]
        return sum(t.numel() * t.element_size() for layer in parts for t in layer)

    assert size(9) - size(8) == session_bytes(config, 1024, torch.float32)
