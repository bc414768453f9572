"""What the backends ask of an op's arguments: one set of checks, and one wording of each refusal.

Shapes, types and layouts are every backend's alike and are checked here before a kernel is handed an address. Where
tensors lie is a backend's own matter: it looks itself and calls `misplaced` for the words. What only a kernel finds out
(an id in a tensor that names nothing) is worded here too, as a function that returns the error.

A decode step makes hundreds of calls of a few microseconds, so the checks are written for speed: an attribute of a
tensor costs 0.1 µs (its stride(n) twice as much as stride()), so each is read once and, where the call needs it too,
given back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.errors import StaleWeightsError
from kernels.layout import CONV_TAPS, FLOATS, SPLIT_TOKENS, PackedExperts, PackedLinear, PagedKV, Segments

Known = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of an op's first argument, as its check has read them."""

CODES = (torch.uint8, torch.int16, torch.int32, torch.int64)
"""What `embedding_sum` takes as codes."""


def misplaced(op: str, backend: str, kind: str, **tensors: Tensor | None) -> None:
    """Raises for the first of ``tensors`` that is not on a device of ``kind`` ("cpu", "cuda")."""
    for name, x in tensors.items():
        if x is not None and x.device.type != kind:
            raise ValueError(f"{op}: {name} is on {x.device}; the {backend} backend needs it on {kind}")


# ---- gradients and updates ----


def dot(a: Tensor, b: Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype is not torch.float32 or not x.is_contiguous():
            raise ValueError(f"dot: {name} is {x.dtype}, strides {x.stride()}; need contiguous float32")
    if a.numel() != b.numel():
        raise ValueError(f"dot: a has {a.numel()} elements, b {b.numel()}")


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> None:
    parts = (("parameter", parameter), ("gradient", gradient), ("first", first), ("second", second))
    for name, x in parts:
        if x.dtype is not torch.float32 or not x.is_contiguous() or x.numel() != parameter.numel():
            raise ValueError(
                f"adamw: {name} is {x.dtype}, {x.numel()} elements, strides {x.stride()}; need contiguous float32 of "
                f"{parameter.numel()} elements"
            )


# ---- linear layers ----


def stale(op: str) -> StaleWeightsError:
    return StaleWeightsError(
        f"{op}: the weights were changed after they were packed, so that this would multiply with old ones; call "
        "repack() on the model after each update"
    )


def buffer(op: str, packed: PackedLinear | PackedExperts, name: str, backend: str) -> Tensor:
    """The backend's copy of the weights. Raises StaleWeightsError for one made before their last update."""
    if packed.made != packed.weights.now:
        raise stale(op)
    try:
        return packed.data[name]
    except KeyError:
        raise ValueError(
            f"{op}: packed was made by another backend; pack the weights anew after use_backend('{backend}')"
        ) from None


def rows(op: str, x: Tensor, cols: int, dtype: torch.dtype) -> Known:
    """x [T, cols] of the weights' dtype, rows anywhere."""
    shape, stride = x.shape, x.stride()
    if len(shape) != 2 or shape[1] != cols:
        raise ValueError(f"{op}: x is {tuple(shape)}, not [T, {cols}]")
    if x.dtype is not dtype:
        raise ValueError(f"{op}: x is {x.dtype}, the weights {dtype}")
    if stride[1] != 1 and cols > 1:
        raise ValueError(f"{op}: x must have adjacent columns; its strides are {stride}")
    return shape, stride, dtype


def out_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{op}: out_dtype is {dtype}; choose float32 or bfloat16")


def experts_of_rows(x: Tensor, expert: Tensor, fan_out: int) -> int:
    """R of ``expert_linear``."""
    count = x.shape[0] * fan_out
    if fan_out < 1 or expert.dtype is not torch.int32 or expert.shape != (count,) or not expert.is_contiguous():
        raise ValueError(
            f"expert_linear: expert is {expert.dtype} {tuple(expert.shape)}, not contiguous int32 [{count}] "
            f"(= {x.shape[0]} rows * fan_out {fan_out})"
        )
    return count


def no_such_expert(expert: Tensor, row: int, experts: int) -> ValueError:
    return ValueError(f"expert_linear: expert[{row}] is {int(expert[row])}, outside 0..{experts - 1}")


# ---- rows alone ----


def swiglu(gate_up: Tensor) -> Known:
    shape, stride, dtype = gate_up.shape, gate_up.stride(), gate_up.dtype
    if len(shape) != 2 or shape[1] % 2:
        raise ValueError(f"swiglu: gate_up is {tuple(shape)}, not [T, 2I]")
    if dtype not in FLOATS or stride[1] != 1:
        raise ValueError(
            f"swiglu: gate_up is {dtype}, strides {stride}; need float32 or bfloat16 with adjacent columns"
        )
    return shape, stride, dtype


def moe_combine(y: Tensor, weight: Tensor) -> None:
    shape = weight.shape
    if len(shape) != 2 or weight.dtype is not torch.float32 or not weight.is_contiguous():
        raise ValueError(f"moe_combine: weight is {weight.dtype} {tuple(shape)}, not contiguous float32 [T, J]")
    if y.dim() != 2 or y.shape[0] != shape[0] * shape[1]:
        raise ValueError(f"moe_combine: y is {tuple(y.shape)}, not [{shape[0]} * {shape[1]}, D]")
    if y.dtype not in FLOATS or not y.is_contiguous():
        raise ValueError(f"moe_combine: y is {y.dtype}, strides {y.stride()}; need contiguous, float32 or bfloat16")


def rms_norm(x: Tensor, weight: Tensor) -> Known:
    shape, stride, dtype = x.shape, x.stride(), x.dtype
    n = shape[-1] if shape else 0
    if len(shape) not in (2, 3) or n == 0 or weight.shape != (n,):
        raise ValueError(f"rms_norm: x is {tuple(shape)}, weight {tuple(weight.shape)}; need [T, D] or [T, H, D], [D]")
    if dtype not in FLOATS or weight.dtype is not dtype or not weight.is_contiguous():
        raise ValueError(
            f"rms_norm: x is {dtype}, weight {weight.dtype}, strides {weight.stride()}; need one type, float32 or "
            "bfloat16, and a contiguous weight"
        )
    if n > 1 and stride[-1] != 1:
        raise ValueError(f"rms_norm: x must have adjacent columns; its strides are {stride}")
    return shape, stride, dtype


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> None:
    shape, taken = table.shape, codes.shape
    if len(shape) != 2 or bins < 1 or shape[0] % bins or not table.is_contiguous():
        raise ValueError(f"embedding_sum: table is {tuple(shape)}, not contiguous [C * {bins}, D]")
    if len(taken) != 2 or taken[1] * bins != shape[0]:
        raise ValueError(f"embedding_sum: codes is {tuple(taken)}, not [T, {shape[0] // bins}]")
    if codes.dtype not in CODES or table.dtype not in FLOATS:
        raise ValueError(
            f"embedding_sum: codes is {codes.dtype}, table {table.dtype}; codes must be uint8, int16, int32 or int64, "
            "table float32 or bfloat16"
        )


def no_such_code(codes: Tensor, index: int, bins: int) -> ValueError:
    """``index`` into the flattened codes."""
    row, channel = divmod(index, codes.shape[1])
    return ValueError(f"embedding_sum: codes[{row}, {channel}] is {int(codes[row, channel])}, outside 0..{bins - 1}")


# ---- sequences ----


def short_conv(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None) -> Known:
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
    """Of a segment that starts beyond 0 where there is no state, or names a slot that the state lacks."""
    slot, start = int(segments.slot[segment]), int(segments.start[segment])
    why = f"starts at {start}, but there is no state" if state is None else f"has slot {slot} of {state.shape[0]}"
    return ValueError(f"short_conv: segment {segment} {why}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    window: int | None,
    tau: Tensor | None,
) -> None:
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
    if tau is not None and (tau.shape != (count,) or tau.dtype is not torch.float32 or not tau.is_contiguous()):
        raise ValueError(f"attention: tau is {tau.dtype} {tuple(tau.shape)}; need contiguous float32 [{count}]")


def attention_cache(inputs: tuple[Tensor, ...], cache: PagedKV) -> None:
    """``inputs`` q, k, v, rel, rel_proj, checked already."""
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
    start = int(segments.start[segment])
    return ValueError(f"attention: segment {segment} starts at position {start}, which needs a cache; none given")


def no_such_page(segments: Segments, segment: int, split: int, cache: PagedKV) -> ValueError:
    slots, width = cache.table.shape
    return ValueError(
        f"attention: slot {int(segments.slot[segment])} (segment {segment}) sees positions {split * SPLIT_TOKENS} to "
        f"{(split + 1) * SPLIT_TOKENS - 1}, but cache.table [{slots} slots, {width} pages] names no page among "
        f"0..{cache.key.shape[0] - 1} for them; reserve pages before the call. Nothing was written"
    )


# ---- rows of logits ----


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> None:
    _logits("route", logits)
    experts = logits.shape[1] - shared
    if shared < 0:
        raise ValueError(f"route: shared is {shared}; need >= 0")
    if bias.shape != (experts,) or bias.dtype is not torch.float32 or not bias.is_contiguous():
        raise ValueError(
            f"route: bias is {bias.dtype} {tuple(bias.shape)}; logits {tuple(logits.shape)} with {shared} shared need "
            f"contiguous float32 [{experts}]"
        )
    if not 0 < top_k <= experts:
        raise ValueError(f"route: top_k is {top_k}; need 1 to {experts}, the number of routed experts")


def logprob(logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor) -> None:
    _logits("logprob", logits)
    _classes("logprob", logits, allowed, row_class)
    _integers("logprob", "token", token, logits.shape[0])
    if not 0 < temperature < math.inf:
        raise ValueError(f"logprob: temperature is {temperature}; need a number > 0 (score greedy tokens at 1)")


def sample(logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor) -> None:
    _logits("sample", logits)
    _classes("sample", logits, allowed, row_class)
    _integers("sample", "key", key, logits.shape[0])
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature is {temperature}; need a number >= 0 (0 is greedy)")


def _logits(op: str, logits: Tensor) -> None:
    shape = logits.shape
    if len(shape) != 2 or logits.dtype is not torch.float32:
        raise ValueError(f"{op}: logits is {logits.dtype} {tuple(shape)}; need float32 [T, V]")
    stride = logits.stride()
    if shape[1] == 0 or stride[1] != 1:
        raise ValueError(f"{op}: logits is {tuple(shape)}, strides {stride}; columns must be adjacent")


def _classes(op: str, logits: Tensor, allowed: Tensor, row_class: Tensor) -> None:
    count, vocab = logits.shape
    shape = allowed.shape
    if len(shape) != 2 or shape[1] != vocab or allowed.dtype is not torch.bool or not allowed.is_contiguous():
        raise ValueError(f"{op}: allowed is {allowed.dtype} {tuple(shape)}; need contiguous bool [classes, {vocab}]")
    _integers(op, "row_class", row_class, count)


def _integers(op: str, name: str, x: Tensor, count: int) -> None:
    if x.shape != (count,) or x.dtype is not torch.int64 or not x.is_contiguous():
        raise ValueError(f"{op}: {name} is {x.dtype} {tuple(x.shape)}; need contiguous int64 [{count}]")


FINE, BAD_LOGIT, NO_TOKEN, NOT_ALLOWED, BAD_CLASS, BAD_TOKEN = range(6)
"""What the kernels of `logprob` and `sample` say of a row; the numbers are also in cpu/native/sampling.cpp."""


def no_such_score(
    op: str, row: int, reason: int, logits: Tensor, allowed: Tensor, row_class: Tensor, token: Tensor | None
) -> ValueError:
    """Of a row that is not FINE; ``token`` may be None where the op draws it."""
    kind = int(row_class[row])
    if reason == BAD_CLASS:
        return ValueError(f"{op}: row {row} has class {kind}; allowed has classes 0 to {allowed.shape[0] - 1}")
    if reason == BAD_LOGIT:
        bad = allowed[kind] & ~(logits[row] < torch.inf)
        where = f"token {int(bad.int().argmax())}" if bool(bad.any()) else "a logit that overflows at this temperature"
        return ValueError(f"{op}: row {row} (class {kind}) holds a NaN or +inf among its allowed logits: {where}")
    if reason == NO_TOKEN:
        return ValueError(f"{op}: row {row} (class {kind}) has no finite logit among the tokens that its class allows")
    assert token is not None
    if reason == BAD_TOKEN:
        return ValueError(f"{op}: row {row} has token {int(token[row])}, outside 0 to {logits.shape[1] - 1}")
    return ValueError(f"{op}: row {row} has token {int(token[row])}, which its class {kind} does not allow")
