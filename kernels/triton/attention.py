"""Attention over pages with relative bias and sliding window, in Triton: the op and its checks.

The kernels are in `attention_forward` and `attention_backward`, what they share in `attention_parts`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.checks.sequences import check_attention, check_attention_cache, needs_cache
from kernels.layout import PagedKV, Segments
from kernels.triton.attention_backward import differentiate
from kernels.triton.attention_forward import attend_whole, forward
from kernels.triton.attention_parts import NO_WINDOW
from kernels.triton.launch import check_place, plain
from kernels.triton.tables import page_rows, tables_of


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    first: int,
    tau: Tensor | None,
    cache: PagedKV | None,
) -> Tensor:
    inputs = q, k, v, rel, rel_proj
    check_attention(*inputs, segments, window, first, tau)
    check_place("attention", q=q, k=k, v=v, rel=rel, rel_proj=rel_proj, tau=tau)
    sight = (NO_WINDOW, 0) if window is None else (window, min(first, NO_WINDOW))
    if cache is not None:
        check_attention_cache(inputs, cache)
        here = None if cache.table.device.type == "cpu" else cache.table  # the host may keep it, and sends what is read
        check_place("attention", q=q, key=cache.key, value=cache.value, table=here)
        rows = page_rows(segments, cache, *sight)
        return forward(q, k, v, rel, rel_proj, segments, scale, sight, tau, replace(cache, table=rows))[0]
    late = tables_of(segments, q.device).host.start > 0
    if late.any():
        raise needs_cache(segments, int(late.argmax()))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        result: Tensor = _Attention.apply(q, k, v, rel, rel_proj, segments, scale, sight, tau)
        return result
    return attend_whole(q, k, v, rel, rel_proj, segments, scale, sight, tau)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel, rel_proj, segments, scale, sight, tau):  # type: ignore[no-untyped-def]
        q, k, v, rel, rel_proj = (plain(x) for x in (q, k, v, rel, rel_proj))
        out, lse = attend_whole(q, k, v, rel, rel_proj, segments, scale, sight, tau)
        ctx.save_for_backward(q, k, v, rel, rel_proj, tau, out, lse)
        ctx.segments, ctx.scale, ctx.sight = segments, scale, sight
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, rel, rel_proj, tau, out, lse = ctx.saved_tensors
        how = ctx.segments, ctx.scale, ctx.sight
        gradients = differentiate(q, k, v, rel, rel_proj, tau, out, lse, plain(dout), *how)
        return *gradients, None, None, None, None
