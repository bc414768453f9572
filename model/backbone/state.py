"""The state of sessions between forward calls: paged KV cache, convolution windows, positions.

All memory is allocated by the constructor; appending allocates nothing. A session occupies a *slot*; its tokens are
*rows*. Layers of one kind (global, sliding) share a page table, since they hold the same positions. A page holds the
rows of one attention split, so attention over a shared page gives the same bits as over a copy of it, and a fork
continues with the bits of its origin.

What a session remembers is bounded by the model's config, not by the state: a row of a sliding layer attends to a
window, one of a global layer to all before it or, where the config says so, to the first ones and a window
(`model.config.global_sight`). Pages that no later row attends to are given to other rows. So sampler and learner are
one function whatever was given away, and with a window in every layer memory does not grow with a session's length:
``max_tokens`` then bounds no more than the width of the page tables. Beyond ``max_tokens`` the state raises
`ContextFull`: dropping rows that the model would attend to would change the policy's input silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import InklingConfig, InklingTextConfig

from kernels import dispatch
from kernels.layout import CONV_TAPS, SPLIT_TOKENS, PagedKV, Segments
from model import config as shapes
from model.program.memory import check_room


class ContextFull(RuntimeError):
    """A session would need more rows than ``max_tokens``."""


Windows = Tensor | Callable[[Tensor, Tensor, Segments], Tensor]
"""The last three inputs of one short convolution for each slot, oldest first: a tensor [slots, 3, C]; or a callable
``(x, taps, segments) -> out`` that convolves and keeps the inputs in memory of its own (vLLM's pages)."""


@dataclass(frozen=True, slots=True)
class LayerState:
    """The state of one layer, for all slots."""

    kv: PagedKV
    kv_conv: Windows  # C = 2 * H_kv * D: k and v, side by side
    attn_conv: Windows  # C = width
    mlp_conv: Windows  # C = width


Kind = tuple[int | None, int]
"""How far a layer sees, `model.config.window` and `model.config.first`: layers of one kind share a page table."""


def _kinds(text: InklingTextConfig) -> list[Kind]:
    """Of each layer."""
    return [(shapes.window(text, i), shapes.first(text, i)) for i in range(text.num_hidden_layers)]


class _Pages:
    """Page table of one kind of layer: which pages each slot holds, and how many slots share each page."""

    def __init__(self, pages: int, slots: int, max_pages: int, kind: Kind) -> None:
        self.table = torch.full((slots, max_pages), -1, dtype=torch.int32)  # on the CPU, wherever the pages are
        self.rows = self.table.numpy()  # same memory; a scalar store here is ten times cheaper than through torch
        self.free = list(range(pages - 1, -1, -1))
        self.users = [0] * pages
        self.held: list[dict[int, int]] = [{} for _ in range(slots)]  # slot -> {page index: page id}, ascending
        self.window, self.first = kind
        self.freed = 0  # pages freed so far because no row attends to them any more

    def out_of_sight(self, start: int) -> range:
        """Indices of the pages that no row at position ``start`` or later attends to."""
        oldest = 0 if self.window is None else max(0, start - self.window + 1)
        return range(self.first // SPLIT_TOKENS, oldest // SPLIT_TOKENS)

    def free_unseen(self, slot: int, start: int) -> None:
        unseen = self.out_of_sight(start)
        for index in [i for i in self.held[slot] if i in unseen]:
            self._release(slot, index)
            self.freed += 1

    def reserve(self, slot: int, start: int, end: int) -> None:
        """Allocates pages for the rows start … end - 1; frees those that no row from ``start`` on attends to."""
        self.free_unseen(slot, start)
        held = self.held[slot]
        for index in range(start // SPLIT_TOKENS, (end - 1) // SPLIT_TOKENS + 1):
            if index not in held:
                self._take(slot, index)

    def fork(self, origin: int, slot: int, length: int) -> tuple[int, int] | None:
        """Shares the full pages; returns (page to copy from, to copy to) for a last, partly filled one."""
        copy = None
        for index, page in self.held[origin].items():
            if (index + 1) * SPLIT_TOKENS <= length:
                self.users[page] += 1
                self._set(slot, index, page)
            else:
                copy = page, self._take(slot, index)
        return copy

    def close(self, slot: int) -> None:
        for index in list(self.held[slot]):
            self._release(slot, index)

    def _take(self, slot: int, index: int) -> int:
        page = self.free.pop()
        self.users[page] = 1
        self._set(slot, index, page)
        return page

    def _set(self, slot: int, index: int, page: int) -> None:
        self.held[slot][index] = page
        self.rows[slot, index] = page

    def _release(self, slot: int, index: int) -> None:
        page = self.held[slot].pop(index)
        self.rows[slot, index] = -1
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.append(page)


def state_bytes(config: InklingConfig, slots: int, max_tokens: int, dtype: torch.dtype, max_rows: int = 1024) -> int:
    """What a `SessionState` of these sizes allocates."""
    return sum(state_parts(config, slots, max_tokens, dtype, max_rows))


def state_parts(
    config: InklingConfig, slots: int, max_tokens: int, dtype: torch.dtype, max_rows: int = 1024
) -> tuple[int, int]:
    """`state_bytes` as (keys and values, convolution windows)."""
    text = config.text_config
    counts = _page_counts(text, slots, max_tokens, max_rows)
    layers = [_layer_sizes(text, i, counts[kind], slots) for i, kind in enumerate(_kinds(text))]
    kv, past = (sum(math.prod(size) for layer in layers for size in layer[part]) for part in (_KV, _PAST))
    return kv * dtype.itemsize, past * dtype.itemsize


def _page_counts(text: InklingTextConfig, slots: int, max_tokens: int, max_rows: int) -> dict[Kind, int]:
    """Pages of a layer by its kind: what all slots hold between calls and, where that is less than all, what one call
    adds."""
    most = -(-max_tokens // SPLIT_TOKENS)
    call = -(-max_rows // SPLIT_TOKENS)
    return {kind: min(slots * most, pages_per_slot(kind, most) * slots + call) for kind in _kinds(text)}


class SessionState:
    """Slots for sessions of one model. ``extend`` reserves rows; the model's forward fills them."""

    def __init__(
        self,
        config: InklingConfig,
        slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        max_rows: int = 1024,
        device: torch.device | None = None,
    ) -> None:
        """``max_tokens``: rows that one session can hold. ``max_rows``: rows of one forward call, over all sessions; it
        bounds the pages that sliding layers need beyond their window during a call. A longer prefill takes several
        calls and gives the same bits. Raises ValueError for sizes below 1, MetronomeError for too little memory."""
        if slots < 1 or max_tokens < 1 or max_rows < 1:
            raise ValueError(f"SessionState: slots {slots}, max_tokens {max_tokens}, max_rows {max_rows} must be >= 1")
        text = config.text_config
        self.slots, self.max_tokens, self.max_rows = slots, max_tokens, max_rows
        max_pages = -(-max_tokens // SPLIT_TOKENS)
        counts = _page_counts(text, slots, max_tokens, max_rows)
        kinds = _kinds(text)
        sizes = [_layer_sizes(text, i, counts[kind], slots) for i, kind in enumerate(kinds)]
        device = device or dispatch.device()
        check_room(
            state_bytes(config, slots, max_tokens, dtype, max_rows),
            f"{slots} sessions of up to {max_tokens} tokens",
            "lower the number of slots (rl.groups, rl.rollouts) or of tokens (rollout.max_tokens)",
            device,
        )
        self._pages = {kind: _Pages(counts[kind], slots, max_pages, kind) for kind in dict.fromkeys(kinds)}
        self.tables = tuple(pages.table for pages in self._pages.values())  # all that a forward pass reads
        self.layers: list[LayerState] = []
        self.conv_windows: list[list[Tensor]] = []  # every layer's convolution windows
        for kind, layer in zip(kinds, sizes, strict=True):
            # zero_() because Linux commits memory at the first write: too little must show now, not in the middle of a
            # run.
            key, value, *past = (torch.empty(size, dtype=dtype, device=device).zero_() for size in layer)
            self.layers.append(LayerState(PagedKV(key, value, self._pages[kind].table), *past))
            self.conv_windows.append(past)
        self._kinds = kinds
        self._global = {kind for i, kind in enumerate(kinds) if not shapes.is_sliding(text, i)}
        self._length = [-1] * slots  # -1: closed
        self._free = list(range(slots - 1, -1, -1))
        self._grown: set[int] = set()  # slots that still hold pages which only the rows of their last call attended to
        self._decode: tuple[list[int], Tensor, Tensor] = ([], torch.empty(0), torch.empty(0))

    @property
    def global_pages_freed(self) -> int:
        """Pages of global layers' rows that were given away so far because no row attends to them any more."""
        return sum(pages.freed for kind, pages in self._pages.items() if kind in self._global)

    @property
    def open_slots(self) -> int:
        """Number of slots in use."""
        return self.slots - len(self._free)

    def open(self) -> int:
        """A free slot, now of length 0. Raises RuntimeError when none is free."""
        if not self._free:
            raise RuntimeError(f"SessionState: all {self.slots} slots are open; close one or make the state with more")
        slot = self._free.pop()
        self._length[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Frees the slot and its pages. Raises ValueError if it is not open."""
        self.length(slot)
        for pages in self._pages.values():
            pages.close(slot)
        self._length[slot] = -1
        self._free.append(slot)

    def restart(self, slot: int) -> None:
        """Empties an open slot: its next row is at position 0. Raises ValueError if it is not open."""
        self.length(slot)
        for pages in self._pages.values():
            pages.close(slot)
        self._length[slot] = 0

    def fork(self, slot: int) -> int:
        """A new slot with the same rows: full pages are shared, the last one and the convolution windows are copied.
        Raises as `open` and `length` do."""
        length = self.length(slot)
        self._free_unseen()
        twin = self.open()
        copies = {kind: pages.fork(slot, twin, length) for kind, pages in self._pages.items()}
        for kind, layer, conv_windows in zip(self._kinds, self.layers, self.conv_windows, strict=True):
            if (copy := copies[kind]) is not None:
                layer.kv.key[copy[1]] = layer.kv.key[copy[0]]
                layer.kv.value[copy[1]] = layer.kv.value[copy[0]]
            for past in conv_windows:
                past[twin] = past[slot]
        self._length[twin] = length
        return twin

    def length(self, slot: int) -> int:
        """Rows that the slot holds. Raises ValueError if it is not open."""
        if not 0 <= slot < self.slots or self._length[slot] < 0:
            raise ValueError(f"SessionState: slot {slot} is not open (slots 0..{self.slots - 1})")
        return self._length[slot]

    def extend(self, slots: list[int], lengths: list[int]) -> Segments:
        """Reserves ``lengths[i]`` further rows for ``slots[i]``, for each i; pass the result to the model's forward.

        Raises, before anything changes, ContextFull beyond ``max_tokens`` and ValueError for a closed or repeated slot,
        a length below 1 or more rows than ``max_rows``."""
        starts = [self.length(slot) for slot in slots]
        if len(set(slots)) != len(slots) or len(slots) != len(lengths):
            raise ValueError(f"SessionState.extend: slots {slots} come twice or do not pair with lengths {lengths}")
        if (rows := sum(lengths)) > self.max_rows:
            raise ValueError(f"SessionState.extend: {rows} rows in one call, limit {self.max_rows}; use several calls")
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            if start + length > self.max_tokens:
                raise ContextFull(
                    f"session in slot {slot} holds {start} rows; {length} more would pass its limit of "
                    f"{self.max_tokens}. Make the SessionState with more max_tokens, or end the session"
                )
            if length < 1:
                raise ValueError(f"SessionState.extend: slot {slot} is to grow by {length} rows; need at least 1")
        self._free_unseen()
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            end = start + length
            if length > SPLIT_TOKENS:
                self._grown.add(slot)
            if start % SPLIT_TOKENS == 0 or (start - 1) // SPLIT_TOKENS != (end - 1) // SPLIT_TOKENS:
                for pages in self._pages.values():
                    pages.reserve(slot, start, end)
            self._length[slot] = end
        if rows == len(slots):
            return self._one_row_each(slots, starts)
        return Segments.build(slots, starts, lengths)

    def _free_unseen(self) -> None:
        """Frees pages that a long call needed and no row to come attends to, so that what slots hold between calls is
        at most `pages_per_slot`."""
        for slot in self._grown:
            if self._length[slot] >= 0:
                for pages in self._pages.values():
                    pages.free_unseen(slot, self._length[slot])
        self._grown.clear()

    def _one_row_each(self, slots: list[int], starts: list[int]) -> Segments:
        """`Segments.build` for decoding: only the positions change from call to call, the rest is cached."""
        if self._decode[0] != slots:
            offset = torch.arange(len(slots) + 1, dtype=torch.int32)
            self._decode = (list(slots), torch.tensor(slots, dtype=torch.int32), offset)
        start = torch.tensor(starts, dtype=torch.int32)
        return Segments(self._decode[1], start, self._decode[2], start)


_KV, _PAST = slice(0, 2), slice(2, None)
"""Of the shapes that `_layer_sizes` returns: those of keys and values, and those of the convolution windows."""


def _layer_sizes(text: InklingTextConfig, layer: int, pages: int, slots: int) -> list[tuple[int, ...]]:
    """Shapes of a layer's keys, values and three convolution windows."""
    _, kv_heads, head = shapes.heads(text, layer)
    past = [(slots, CONV_TAPS - 1, columns) for columns in (2 * kv_heads * head, text.hidden_size, text.hidden_size)]
    return [(pages, kv_heads, head, SPLIT_TOKENS), (pages, kv_heads, SPLIT_TOKENS, head), *past]


def pages_per_slot(kind: Kind, max_pages: int) -> int:
    """Pages that one session holds in a layer between calls: all, or the first and those that a window overlaps."""
    window, first = kind
    return max_pages if window is None else min(max_pages, first // SPLIT_TOKENS + -(-(window - 1) // SPLIT_TOKENS) + 2)


def session_bytes(config: InklingConfig, max_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one session with room for ``max_tokens`` rows, in bytes."""
    text = config.text_config
    elements = 0
    for i, kind in enumerate(_kinds(text)):
        _, kv_heads, head = shapes.heads(text, i)
        pages = pages_per_slot(kind, -(-max_tokens // SPLIT_TOKENS))
        elements += pages * 2 * kv_heads * head * SPLIT_TOKENS
        elements += (CONV_TAPS - 1) * 2 * (kv_heads * head + text.hidden_size)
    return elements * dtype.itemsize
