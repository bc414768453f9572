"""Checks of the ops that read earlier rows of a sequence: `short_conv` and `attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import Layout
from kernels.layout import CONV_TAPS, FLOATS, SPLIT_TOKENS, PagedKV, Segments


def check_short_conv(
    x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None = None
) -> Layout:
    """x [T, C], weight fp32 [C, CONV_TAPS], state None or [slots, CONV_TAPS - 1, C] of x.dtype, addend None or [T, C]
    of x.dtype with adjacent columns."""
    shape, stride, dtype = x.shape, x.stride(), x.dtype
    if len(shape) != 2 or shape[0] != segments.rows:
        raise ValueError(f"short_conv: x is {tuple(shape)}, not [{segments.rows}, C]")
    width = shape[1]
    if dtype not in FLOATS or (width > 1 and stride[1] != 1):
        raise ValueError(f"short_conv: x is {dtype}, strides {stride}; need float32 or bfloat16 with adjacent columns")
    if weight.shape != (width, CONV_TAPS) or weight.dtype is not torch.float32 or not weight.is_contiguous():
        raise ValueError(
            f"short_conv: weight is {weight.dtype} {tuple(weight.shape)}, not contiguous float32 [{width}, {CONV_TAPS}]"
        )
    if addend is not None and (addend.shape != shape or addend.dtype is not dtype):
        raise ValueError(f"short_conv: addend is {addend.dtype} {tuple(addend.shape)}, not {dtype} {list(shape)}")
    if state is None:
        return shape, stride, dtype
    fits = state.dim() == 3 and state.shape[1:] == (CONV_TAPS - 1, width) and state.dtype is dtype
    if not fits or not state.is_contiguous():
        raise ValueError(
            f"short_conv: state is {state.dtype} {tuple(state.shape)}, not contiguous {dtype} "
            f"[slots, {CONV_TAPS - 1}, {width}]"
        )
    return shape, stride, dtype


def no_such_state(segments: Segments, segment: int, state: Tensor | None) -> ValueError:
    """The error for a segment that starts beyond 0 without a state, or whose slot the state lacks."""
    slot, start = int(segments.slot[segment]), int(segments.start[segment])
    why = f"starts at {start}, but there is no state" if state is None else f"has slot {slot} of {state.shape[0]}"
    return ValueError(f"short_conv: segment {segment} {why}")


def no_gradient_with_state() -> ValueError:
    """The error for a call under autograd that would write to a state."""
    return ValueError("short_conv: with state there is no gradient; call it under torch.no_grad()")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    window: int | None,
    first: int,
    tau: Tensor | None,
) -> None:
    """q [T, H, D], k and v [T, H_kv, D], rel [T, H, C], rel_proj [C, extent], tau None or fp32 [T]. Of q, k, v and rel
    rows may be strided; the heads of a row must be adjacent."""
    count, dtype = segments.rows, q.dtype
    for name, x in (("q", q), ("k", k), ("v", v), ("rel", rel)):
        shape, stride = x.shape, x.stride()
        if len(shape) != 3 or shape[0] != count:
            raise ValueError(f"attention: {name} is {tuple(shape)}; need [{count}, heads, width], a row a token")
        if x.dtype is not dtype or dtype not in FLOATS:
            raise ValueError(f"attention: {name} is {x.dtype}, q {dtype}; need one type, float32 or bfloat16")
        if stride[2] != 1 or stride[1] != shape[2]:
            raise ValueError(f"attention: {name} has strides {stride}; a row's heads must be adjacent")
    heads, key_heads, width = q.shape[1], k.shape[1], q.shape[2]
    if k.shape != v.shape or k.shape[2] != width or key_heads == 0 or heads % key_heads != 0:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    shape = rel_proj.shape
    if rel.shape[1] != heads or len(shape) != 2 or shape[0] != rel.shape[2]:
        raise ValueError(f"attention: rel {tuple(rel.shape)} and rel_proj {tuple(shape)} do not fit together")
    if rel_proj.dtype not in FLOATS or shape[1] == 0:
        raise ValueError(
            f"attention: rel_proj is {rel_proj.dtype} {tuple(shape)}; need [C, extent] with an extent >= 1, float32 or "
            "bfloat16"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; need >= 1, or None")
    if first < 0 or first % SPLIT_TOKENS:
        raise ValueError(f"attention: first is {first}; need 0 or a multiple of {SPLIT_TOKENS}, the keys of a split")
    if tau is not None and (tau.shape != (count,) or tau.dtype is not torch.float32 or not tau.is_contiguous()):
        raise ValueError(f"attention: tau is {tau.dtype} {tuple(tau.shape)}; need contiguous float32 [{count}]")


def check_attention_cache(inputs: tuple[Tensor, ...], cache: PagedKV) -> None:
    """``inputs`` are q, k, v, rel, rel_proj, which `check_attention` has passed."""
    q, k = inputs[:2]
    key, value, table = cache.key, cache.value, cache.table
    pages, heads, width = key.shape[0] if key.dim() else 0, k.shape[1], k.shape[2]
    if key.shape != (pages, heads, width, SPLIT_TOKENS) or value.shape != (pages, heads, SPLIT_TOKENS, width):
        raise ValueError(
            f"attention: cache.key is {tuple(key.shape)}, cache.value {tuple(value.shape)}; need "
            f"[pages, {heads}, {width}, {SPLIT_TOKENS}] and [pages, {heads}, {SPLIT_TOKENS}, {width}]"
        )
    if key.dtype != q.dtype or value.dtype != q.dtype or not key.is_contiguous() or not value.is_contiguous():
        raise ValueError(
            f"attention: cache holds {key.dtype} and {value.dtype}, q is {q.dtype}; need contiguous, equal"
        )
    if table.dim() != 2 or table.dtype is not torch.int32 or not table.is_contiguous():
        raise ValueError(
            f"attention: cache.table is {table.dtype} {tuple(table.shape)}; need contiguous int32 [slots, pages]"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError("attention: there is no gradient through a cache; use torch.no_grad(), or no cache")


def needs_cache(segments: Segments, segment: int) -> ValueError:
    """The error for a segment that starts beyond position 0 in a call without a cache."""
    start = int(segments.start[segment])
    return ValueError(f"attention: segment {segment} starts at position {start}, which needs a cache; none given")


def no_such_page(segments: Segments, segment: int, split: int, cache: PagedKV) -> ValueError:
    """The error for a split of keys that a segment's queries see and for which the page table names no page."""
    slots, width = cache.table.shape
    return ValueError(
        f"attention: slot {int(segments.slot[segment])} (segment {segment}) sees positions {split * SPLIT_TOKENS} to "
        f"{(split + 1) * SPLIT_TOKENS - 1}, but cache.table [{slots} slots, {width} pages] names no page among "
        f"0..{cache.key.shape[0] - 1} for them; reserve pages before the call. Nothing was written"
    )
