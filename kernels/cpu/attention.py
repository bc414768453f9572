"""Attention on the CPU: the calls into the native kernels, and the backward.

With a cache the native code writes keys and values into the pages and attends over them in their own type. Without one
(the learner, or whole sequences at once) it runs in fp32 on temporary pages: bf16 inputs are converted first, which is
exact, and the result is rounded once, so both ways give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.sequences import check_attention, check_attention_cache, needs_cache, no_such_page
from kernels.cpu.library import bind
from kernels.layout import PagedKV, Segments

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The tensors q, k, v, rel, rel_proj of `kernels.ops.attention`."""

Sight = tuple[int, int]
"""Its window, or `_NO_WINDOW`, and its ``first``."""

_SHARED = "pipipipipppppiiiiiiiifp"
_WHOLE = bind("attention_f32", _SHARED + "p")
_CACHED = {
    torch.float32: bind("attention_cache_f32", _SHARED + "pppiii"),
    torch.bfloat16: bind("attention_cache_bf16", _SHARED + "pppiii"),
}
_BACKWARD = bind("attention_backward", "pipipipipppiiiiiiiif" + "pppppppp")

_NO_WINDOW = 1 << 40  # greater than any distance


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
    near = q.is_cpu and k.is_cpu and v.is_cpu and rel.is_cpu and rel_proj.is_cpu and (tau is None or tau.is_cpu)
    if not (near and segments.slot.is_cpu):
        places = {"q": q, "k": k, "v": v, "rel": rel, "rel_proj": rel_proj, "tau": tau, "segments": segments.slot}
        check_device("attention", "cpu", "cpu", **places)
    sight = (_NO_WINDOW, 0) if window is None else (window, first)
    if cache is not None:
        return _attend_cache(inputs, segments, scale, sight, tau, cache)
    if q.dtype is not torch.float32:
        q, k, v, rel = q.float(), k.float(), v.float(), rel.float()
        return attention(q, k, v, rel, rel_proj, segments, scale, window, first, tau, None).to(torch.bfloat16)
    inputs = q, k, v, rel, rel_proj.float().contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out: Tensor = _Attention.apply(*inputs, segments, scale, sight, tau)
        return out
    return _attend_whole(inputs, segments, scale, sight, tau, None)


def _arguments(
    inputs: Inputs, segments: Segments, scale: float, sight: Sight, tau: Tensor | None, out: Tensor
) -> tuple[float, ...]:
    """The first arguments of every native call, up to ``out``. ``inputs`` are checked, rel_proj is contiguous fp32."""
    q, k, v, rel, rel_proj = inputs
    _, heads, width = q.shape
    return (
        q.data_ptr(), q.stride()[0], k.data_ptr(), k.stride()[0], v.data_ptr(), v.stride()[0], rel.data_ptr(),
        rel.stride()[0], rel_proj.data_ptr(), 0 if tau is None else tau.data_ptr(), segments.slot.data_ptr(),
        segments.start.data_ptr(), segments.offset.data_ptr(), segments.start.shape[0], heads, k.shape[1], width,
        *rel_proj.shape, *sight, scale, out.data_ptr(),
    )  # fmt: skip


def _attend_whole(
    inputs: Inputs, segments: Segments, scale: float, sight: Sight, tau: Tensor | None, lse: Tensor | None
) -> Tensor:
    out = torch.empty(inputs[0].shape)
    failed = _WHOLE(*_arguments(inputs, segments, scale, sight, tau, out), 0 if lse is None else lse.data_ptr())
    if failed:
        raise needs_cache(segments, failed - 1)
    return out


def _attend_cache(
    inputs: Inputs, segments: Segments, scale: float, sight: Sight, tau: Tensor | None, cache: PagedKV
) -> Tensor:
    check_attention_cache(inputs, cache)
    key, value, table = cache.key, cache.value, cache.table
    if not (key.is_cpu and value.is_cpu and table.is_cpu):
        check_device("attention", "cpu", "cpu", key=key, value=value, table=table)
    q, k, v, rel, rel_proj = inputs
    out = torch.empty(q.shape, dtype=q.dtype)
    wide = q, k, v, rel, rel_proj.float().contiguous()
    failed = _CACHED[q.dtype](
        *_arguments(wide, segments, scale, sight, tau, out),
        key.data_ptr(), value.data_ptr(), table.data_ptr(), *table.shape, key.shape[0],
    )  # fmt: skip
    if failed:
        raise no_such_page(segments, *divmod(failed - 1, 1 << 32), cache)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel, rel_proj, segments, scale, sight, tau):  # type: ignore[no-untyped-def]
        lse = torch.empty(q.shape[:2])
        out = _attend_whole((q, k, v, rel, rel_proj), segments, scale, sight, tau, lse)
        ctx.save_for_backward(q, k, v, rel, rel_proj, tau, out, lse)
        ctx.segments, ctx.scale, ctx.sight = segments, scale, sight
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        *inputs, tau, out, lse = ctx.saved_tensors
        gradients, grad = [torch.empty(x.shape) for x in inputs], grad.contiguous()
        arguments = _arguments(inputs, ctx.segments, ctx.scale, ctx.sight, tau, out)
        _BACKWARD(
            *arguments[:10], *arguments[12:],  # without slot and start: every sequence starts at 0
            lse.data_ptr(), grad.data_ptr(), *(x.data_ptr() for x in gradients),
        )  # fmt: skip
        return *gradients, None, None, None, None
