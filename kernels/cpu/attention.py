"""Attention on the CPU: checks, the call into the native kernels, and the backward.

With a cache the native code writes keys and values into the pages and attends over them in their own type. Without one
(the learner, or whole sequences at once) it runs in fp32 on temporary pages: bf16 inputs are widened first, which is
exact, and the result rounded once, so both ways give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments

_SHARED = "pipipipipppppiiiiiiif"
_FORWARD = bind("attention_f32", _SHARED + "pp")
_CACHED = {
    torch.float32: bind("attention_cache_f32", _SHARED + "ppppiii"),
    torch.bfloat16: bind("attention_cache_bf16", _SHARED + "ppppiii"),
}
_BACKWARD = bind("attention_backward", "pipipipipppiiiiiiif" + "pppppppp")

_NO_WINDOW = 1 << 40  # farther than any position


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
    _check(q, k, v, rel, rel_proj, segments, window, tau)
    reach = _NO_WINDOW if window is None else window
    if cache is not None:
        return _attend_cache(q, k, v, rel, rel_proj, segments, scale, reach, tau, cache)
    if q.dtype != torch.float32:
        q, k, v, rel = q.float(), k.float(), v.float(), rel.float()
        return attention(q, k, v, rel, rel_proj.float(), segments, scale, window, tau, None).to(torch.bfloat16)
    rel_proj = rel_proj.float().contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, rel, rel_proj)):
        out: Tensor = _Attention.apply(q, k, v, rel, rel_proj, segments, scale, reach, tau)
        return out
    return _forward(q, k, v, rel, rel_proj, segments, scale, reach, tau, None)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    window: int | None,
    tau: Tensor | None,
) -> None:
    rows = segments.position.shape[0]
    if not segments.slot.is_cpu:
        raise ValueError(f"attention: segments are on {segments.slot.device}, not on the CPU")
    for name, x in (("q", q), ("k", k), ("v", v), ("rel", rel)):
        if x.dim() != 3 or x.shape[0] != rows:
            raise ValueError(f"attention: {name} is {tuple(x.shape)}; need [{rows}, heads, width], a row a token")
        if x.dtype != q.dtype or not x.is_cpu or x.dtype not in _CACHED:
            raise ValueError(f"attention: {name} is {x.dtype} on {x.device}; need q's float32 or bfloat16, on the CPU")
        if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
            raise ValueError(f"attention: {name} has strides {x.stride()}; a row's heads must be adjacent")
    heads, key_heads, width = q.shape[1], k.shape[1], q.shape[2]
    if k.shape != v.shape or k.shape[2] != width or key_heads == 0 or heads % key_heads != 0:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if rel.shape[1] != heads or rel_proj.dim() != 2 or rel_proj.shape[0] != rel.shape[2]:
        raise ValueError(f"attention: rel {tuple(rel.shape)} and rel_proj {tuple(rel_proj.shape)} do not fit together")
    if rel_proj.dtype not in _CACHED or rel_proj.shape[1] == 0 or not rel_proj.is_cpu:
        raise ValueError(f"attention: rel_proj is {rel_proj.dtype} {tuple(rel_proj.shape)}; need [C, extent], float")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; need >= 1, or None")
    if tau is None:
        return
    if tau.shape != (rows,) or tau.dtype != torch.float32 or not tau.is_contiguous() or not tau.is_cpu:
        raise ValueError(
            f"attention: tau is {tau.dtype} {tuple(tau.shape)} on {tau.device}; need contiguous CPU float32 [{rows}]"
        )


def _pointers(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, rel_proj: Tensor, tau: Tensor | None) -> tuple[int, ...]:
    return (
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), rel.data_ptr(), rel.stride(0),
        rel_proj.data_ptr(), 0 if tau is None else tau.data_ptr(),
    )  # fmt: skip


def _sizes(q: Tensor, k: Tensor, rel_proj: Tensor, segments: Segments) -> tuple[int, ...]:
    return (segments.start.shape[0], q.shape[1], k.shape[1], q.shape[2], rel_proj.shape[0], rel_proj.shape[1])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    reach: int,
    tau: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    out = torch.empty(q.shape)
    failed = _FORWARD(
        *_pointers(q, k, v, rel, rel_proj, tau),
        segments.slot.data_ptr(), segments.start.data_ptr(), segments.offset.data_ptr(),
        *_sizes(q, k, rel_proj, segments), reach, scale, out.data_ptr(), 0 if lse is None else lse.data_ptr(),
    )  # fmt: skip
    if failed:
        start = int(segments.start[failed - 1])
        raise ValueError(f"attention: segment {failed - 1} starts at position {start}, which needs a cache; none given")
    return out


def _attend_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    reach: int,
    tau: Tensor | None,
    cache: PagedKV,
) -> Tensor:
    key, value, table = cache.key, cache.value, cache.table
    pages, heads, width = key.numel() // max(k.shape[1] * k.shape[2] * SPLIT_TOKENS, 1), k.shape[1], k.shape[2]
    if key.shape != (pages, heads, width, SPLIT_TOKENS) or value.shape != (pages, heads, SPLIT_TOKENS, width):
        raise ValueError(
            f"attention: cache.key is {tuple(key.shape)}, cache.value {tuple(value.shape)}; need "
            f"[pages, {heads}, {width}, {SPLIT_TOKENS}] and [pages, {heads}, {SPLIT_TOKENS}, {width}]"
        )
    if not (key.is_cpu and value.is_cpu and table.is_cpu):
        raise ValueError(f"attention: cache is on {key.device}, {value.device}, {table.device}; need the CPU")
    if key.dtype != q.dtype or value.dtype != q.dtype or not key.is_contiguous() or not value.is_contiguous():
        raise ValueError(
            f"attention: cache holds {key.dtype} and {value.dtype}, q is {q.dtype}; need contiguous, equal"
        )
    if table.dim() != 2 or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(
            f"attention: cache.table is {table.dtype} {tuple(table.shape)}; need contiguous int32 [slots, pages]"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, rel, rel_proj)):
        raise ValueError("attention: there is no gradient through a cache; use torch.no_grad(), or no cache")
    out = torch.empty(q.shape, dtype=q.dtype)
    wide_proj = rel_proj.float().contiguous()
    failed = _CACHED[q.dtype](
        *_pointers(q, k, v, rel, wide_proj, tau),
        segments.slot.data_ptr(), segments.start.data_ptr(), segments.offset.data_ptr(),
        *_sizes(q, k, wide_proj, segments), reach, scale, out.data_ptr(),
        key.data_ptr(), value.data_ptr(), table.data_ptr(), *table.shape, pages,
    )  # fmt: skip
    if failed:
        segment, split = divmod(failed - 1, 1 << 32)
        slot = int(segments.slot[segment])
        raise ValueError(
            f"attention: slot {slot} (segment {segment}) sees positions {split * SPLIT_TOKENS} to "
            f"{(split + 1) * SPLIT_TOKENS - 1}, but cache.table [{table.shape[0]} slots, {table.shape[1]} pages] names "
            f"no page among 0..{pages - 1} for them; reserve pages before the call. Nothing was written"
        )
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel, rel_proj, segments, scale, reach, tau):  # type: ignore[no-untyped-def]
        lse = torch.empty(q.shape[:2])
        out = _forward(q, k, v, rel, rel_proj, segments, scale, reach, tau, lse)
        ctx.save_for_backward(q, k, v, rel, rel_proj, tau, out, lse)
        ctx.segments, ctx.scale, ctx.reach = segments, scale, reach
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, rel, rel_proj, tau, out, lse = ctx.saved_tensors
        segments, grad = ctx.segments, grad.contiguous()
        gradients = [torch.empty(x.shape) for x in (q, k, v, rel, rel_proj)]
        _BACKWARD(
            *_pointers(q, k, v, rel, rel_proj, tau), segments.offset.data_ptr(),
            *_sizes(q, k, rel_proj, segments), ctx.reach, ctx.scale,
            out.data_ptr(), lse.data_ptr(), grad.data_ptr(), *(x.data_ptr() for x in gradients),
        )  # fmt: skip
        return *gradients, None, None, None, None
