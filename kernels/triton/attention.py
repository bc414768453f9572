"""Attention over pages with relative bias and sliding window, in Triton: the op and its checks.

The kernels are in `attention_forward` and `attention_backward`, what they share in `attention_parts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.sequences import check_attention, check_attention_cache, needs_cache, no_such_page
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.triton.attention_backward import differentiate
from kernels.triton.attention_forward import attend_whole, forward
from kernels.triton.attention_parts import NO_WINDOW
from kernels.triton.launch import check_place, plain


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    tau: Tensor | None,
    cache: PagedKV | None,
) -> Tensor:
    inputs = q, k, v, rel, rel_proj
    check_attention(*inputs, segments, window, tau)
    check_place("attention", q=q, k=k, v=v, rel=rel, rel_proj=rel_proj, tau=tau)
    reach = NO_WINDOW if window is None else window
    if cache is not None:
        check_attention_cache(inputs, cache)
        check_place("attention", q=q, key=cache.key, value=cache.value, table=cache.table)
        _check_pages(segments, reach, cache)
        return forward(q, k, v, rel, rel_proj, segments, segments.slot, scale, reach, tau, cache)[0]
    for n, start in enumerate(segments.start.tolist()):
        if start != 0:
            raise needs_cache(segments, n)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        result: Tensor = _Attention.apply(q, k, v, rel, rel_proj, segments, scale, reach, tau)
        return result
    return attend_whole(q, k, v, rel, rel_proj, segments, scale, reach, tau)[0]


def _check_pages(segments: Segments, reach: int, cache: PagedKV) -> None:
    """Raises ValueError for a split of keys without a page, before anything is written. Reads the page table, for which
    it waits for the device once a call. ``reach`` is the window, or NO_WINDOW."""
    pages, table = cache.key.shape[0], cache.table
    start, slot = segments.start.long().cpu(), segments.slot.long().cpu()
    first = (start - (reach - 1)).clamp_min(0) // SPLIT_TOKENS
    count = (start + segments.offset.long().cpu().diff() - 1) // SPLIT_TOKENS - first + 1
    which = torch.repeat_interleave(torch.arange(len(start)), count)
    split = first[which] + torch.arange(len(which)) - (torch.cumsum(count, 0) - count)[which]
    held = (slot[which] >= 0) & (slot[which] < table.shape[0]) & (split < table.shape[1])
    page = table[torch.where(held, slot[which], 0).to(table.device), torch.where(held, split, 0).to(table.device)].cpu()
    bad = (~held | (page < 0) | (page >= pages)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise no_such_page(segments, int(which[at]), int(split[at]), cache)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel, rel_proj, segments, scale, reach, tau):  # type: ignore[no-untyped-def]
        q, k, v, rel, rel_proj = (plain(x) for x in (q, k, v, rel, rel_proj))
        out, lse = attend_whole(q, k, v, rel, rel_proj, segments, scale, reach, tau)
        ctx.save_for_backward(q, k, v, rel, rel_proj, tau, out, lse)
        ctx.segments, ctx.scale, ctx.reach = segments, scale, reach
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, rel, rel_proj, tau, out, lse = ctx.saved_tensors
        how = ctx.segments, ctx.scale, ctx.reach
        gradients = differentiate(q, k, v, rel, rel_proj, tau, out, lse, plain(dout), *how)
        return *gradients, None, None, None, None
