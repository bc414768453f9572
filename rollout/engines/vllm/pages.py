"""The model's state in vLLM's paged cache: the content of a page, and which rows of a step are written where.

vLLM knows a single cache layer. A block of it, SPLIT_TOKENS tokens, is a page with the keys, values and convolution
windows of all our layers. vLLM's block manager assigns pages to sequences and does not read them, so the memory is laid
out region by region (the keys of layer 0 of all pages, …), as the kernels need it.

**Convolution windows.** A page holds the windows, that is the last three inputs, as of the last row written into the
page. A sequence that continues at position p therefore reads its windows from the page of position p - 1. For the next
chunk of a session and the next part of a chunked prefill this is the page being filled; for a sequence that starts
after cached blocks (prefix cache, fork, recomputation after preemption) it is the last of these, which is full and is
not written again.

**Pages that are read in the step that fills them.** vLLM registers a page in the prefix cache when it schedules the
rows that fill it, so another sequence may start after this page in the same step. For keys and values this is no
problem, because the kernels write all of a call before any row attends. For windows each layer first writes those of
all pages that become full, then reads those of sequences that start at a page's beginning. One pass suffices: the
windows at a page's end depend only on rows that the filling sequence computes in this step and, if these are fewer than
three, on windows that it wrote into the same page in an earlier step.

Not implemented: freeing pages that no layer attends to any more. All layers share a page, so this could be done only
where global layers have a window too (`model.context`). The bits are the same; memory grows with a session up to its
context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import InklingConfig
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from kernels import ops
from kernels.layout import CONV_TAPS, SPLIT_TOKENS, PagedKV, Segments
from model import config as shapes
from model.backbone.state import LayerState

PAST = CONV_TAPS - 1


def regions(config: InklingConfig) -> Iterator[tuple[int, ...]]:
    """Shapes of what one page holds, five a layer: key, value, windows of k and v, of attention, of the MLP."""
    text = config.text_config
    for i in range(text.num_hidden_layers):
        _, kv_heads, head = shapes.heads(text, i)
        yield kv_heads, head, SPLIT_TOKENS
        yield kv_heads, SPLIT_TOKENS, head
        yield PAST, 2 * kv_heads * head
        yield PAST, text.hidden_size
        yield PAST, text.hidden_size


def page_spec(config: InklingConfig, dtype: torch.dtype) -> FullAttentionSpec:
    """A page's size in vLLM's terms: bytes per token, rounded up."""
    elements = sum(math.prod(shape) for shape in regions(config))
    each = -(-elements // SPLIT_TOKENS)
    return FullAttentionSpec(
        block_size=SPLIT_TOKENS, num_kv_heads=1, head_size=each, dtype=dtype, state_content_bytes=each * dtype.itemsize
    )


@dataclass(frozen=True)
class Pages:
    """The regions of one layer; leading axis: pages."""

    key: Tensor  # [P, H_kv, D, SPLIT_TOKENS]
    value: Tensor  # [P, H_kv, SPLIT_TOKENS, D]
    windows: tuple[Tensor, Tensor, Tensor]  # each [P, 3, C], in the order of `LayerState`

    def state(self, rows: Rows) -> LayerState:
        """This layer's state as the model reads it, for one step."""
        kv, attn, mlp = (PageWindows(window, rows) for window in self.windows)
        return LayerState(PagedKV(self.key, self.value, rows.table), kv, attn, mlp)


def view_pages(raw: Tensor, config: InklingConfig, dtype: torch.dtype) -> list[Pages]:
    """vLLM's allocation of P pages, as the regions of every layer."""
    pages = raw.shape[0]
    memory = raw.view(-1).view(torch.uint8).view(dtype)
    views, begin = [], 0
    for shape in regions(config):
        end = begin + pages * math.prod(shape)
        views.append(memory[begin:end].view(pages, *shape))
        begin = end
    layers = zip(*(views[i::5] for i in range(5)), strict=True)
    return [Pages(key, value, (kv, attn, mlp)) for key, value, kv, attn, mlp in layers]


@dataclass(frozen=True)
class Rows:
    """The rows of one step of S sequences; segment s belongs to the sequence of ``table[s]``."""

    table: Tensor  # int32 [S, max pages a sequence], ids of pages
    slot: Tensor  # int32 [S], 0 … S - 1
    start: Tensor  # int32 [S]
    offset: Tensor  # int32 [S + 1]
    before: Tensor  # int64 [S], page that holds the windows before the segment's first row (any page if start is 0)
    after: Tensor  # int64 [S], page of its last row
    filled: Tensor  # int64 [F], pages whose last row a segment writes
    source: Tensor  # int64 [3 F], the windows at these pages' ends, as indices into (3 S rows of windows, T inputs)
    behind: Tensor  # int64 [B], segments that start at a page's beginning; this step may fill the page before

    def segments(self, positions: Tensor) -> Segments:
        """``positions`` [T]: absolute position of every row."""
        return Segments(self.slot, self.start, self.offset, positions.to(torch.int32))


def plan(starts: list[int], offsets: list[int], table: Tensor) -> Rows:
    """The `Rows` of a step: starts [S] and offsets [S + 1] as in `Segments`, table as in `Rows`."""
    ends = [start + offsets[s + 1] - offsets[s] for s, start in enumerate(starts)]
    owner, place, source = [], [], []
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for page in range(start // SPLIT_TOKENS, end // SPLIT_TOKENS):
            owner.append(s)
            place.append(page)
            first = (page + 1) * SPLIT_TOKENS - PAST - start  # of the three rows, counted from the segment's first
            inputs = len(starts) * PAST + offsets[s]
            source += [inputs + row if row >= 0 else s * PAST + PAST + row for row in range(first, first + PAST)]
    device = table.device

    def pages(sequence: list[int], index: list[int]) -> Tensor:
        return table[torch.tensor(sequence, device=device), torch.tensor(index, device=device)].long()

    every = list(range(len(starts)))
    behind = [s for s, start in enumerate(starts) if start and start % SPLIT_TOKENS == 0]
    return Rows(
        table=table,
        slot=torch.arange(len(starts), dtype=torch.int32, device=device),
        start=torch.tensor(starts, dtype=torch.int32, device=device),
        offset=torch.tensor(offsets, dtype=torch.int32, device=device),
        before=pages(every, [max(0, start - 1) // SPLIT_TOKENS for start in starts]),
        after=pages(every, [(end - 1) // SPLIT_TOKENS for end in ends]),
        filled=pages(owner, place) if owner else torch.empty(0, dtype=torch.long, device=device),
        source=torch.tensor(source, dtype=torch.long, device=device),
        behind=torch.tensor(behind, dtype=torch.long, device=device),
    )


class PageWindows:
    """One convolution's windows [P, 3, C] in the pages; called as `model.backbone.state.Windows`."""

    def __init__(self, windows: Tensor, rows: Rows) -> None:
        self.windows, self.rows = windows, rows

    def __call__(self, x: Tensor, taps: Tensor, segments: Segments) -> Tensor:
        rows = self.rows
        past = self.windows[rows.before]  # a copy [S, 3, C]
        if rows.filled.numel():
            inputs = torch.cat((past.flatten(0, 1), x))
            self.windows[rows.filled] = inputs[rows.source].view(-1, PAST, x.shape[1])
            if rows.behind.numel():
                past[rows.behind] = self.windows[rows.before[rows.behind]]  # as they are now, after the fills
        out = ops.short_conv(x, taps, segments, past)
        self.windows[rows.after] = past  # now the windows behind each segment's last row
        return out


class RowsBuilder(AttentionMetadataBuilder[Rows]):
    """Converts vLLM's description of a step to `Rows`."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Rows:
        step = common_attn_metadata
        offset = step.query_start_loc_cpu[: step.num_reqs + 1].numpy()
        start = step.seq_lens[: step.num_reqs].cpu().numpy() - np.diff(offset)
        return plan(start.tolist(), offset.tolist(), step.block_table_tensor[: step.num_reqs].contiguous())


class PageBackend(AttentionBackend):
    """Gives vLLM the metadata builder. There is no attention implementation: the model computes it."""

    @staticmethod
    def get_name() -> str:
        return "METRONOME"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("Metronome's model attends by itself")

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        return RowsBuilder
