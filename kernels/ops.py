"""The batch-invariant ops: what each computes, and the row contract that every backend must keep.

**Row contract.** Row i of an output depends, bit for bit, only on row i of the inputs, on the weights and, for
`short_conv` and `attention`, on the same sequence's rows at smaller positions; never on how many other rows there
are, what they hold, their order, the thread count, chunk boundaries, whether earlier keys come from a cache or from
this call, or where pages lie. One output element is reduced by one worker in one fixed order. Where a docstring
below states an order, it holds for every backend; otherwise each backend chooses its own, states it in its module
(`kernels.cpu.backend`, `kernels.triton.tiles`) and is identified by the contract id. So bits are compared within one
backend, never between two.

Activations are fp32 or bf16 (accumulation is always fp32; one rounding at the end). Under autograd every op but
`sample` is differentiable. Elementwise single-rounding arithmetic (add, multiply, divide) needs no op of ours: torch's
is row-invariant by IEEE 754. Anything with exp, log or a sum does.

Axes: see `kernels.layout`. Every op raises ValueError on a wrong shape, dtype, device or stride, naming the argument;
ops with packed weights raise StaleWeightsError when the weights have been changed since they were packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks.weights import check_held
from kernels.layout import AdamWStep, PackedExperts, PackedLinear, PagedKV, Segments
from kernels.rows import active


def upload(segments: Segments, page_tables: Sequence[Tensor], *parts: Tensor) -> tuple[Segments, tuple[Tensor, ...]]:
    """Brings what the host knows before a forward pass beside the kernels, in one copy for which it does not wait:
    ``parts``, tensors of any types, and what the backend makes of the segments and of the ``page_tables`` that the pass
    will read (`PagedKV.table`, on the CPU; none for whole sequences). Returns the segments to give to the pass's ops,
    and the parts. Where there is no other device both are what was given.

    What the page tables say now counts for the whole pass."""
    return dispatch.backend().upload(segments, page_tables, parts)


def deferred() -> AbstractContextManager[None]:
    """A block in which an op need not wait for the device to tell of a bad value in a tensor: an expert, a code, a row
    of logits that no token can be sampled from. Such an error, a ValueError as outside, is raised by the next `fetch`,
    at the latest at the block's end, and what was computed since is worthless then. Wrong shapes, types and devices,
    and pages that are not there, raise at once as ever. A backend may ignore it."""
    return dispatch.backend().deferred()


def fetch(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors as the host can read them, by one copy, for which it waits. In a `deferred` block raises what an op
    noticed since the last fetch."""
    return dispatch.backend().fetch(parts)


def pack_linear(*parts: Tensor) -> PackedLinear:
    """Packs weights [N_i, K], stacked along N, for `linear`. Call `repack` after the weights change."""
    return dispatch.backend().pack_linear(parts)


def pack_experts(*groups: tuple[Tensor, ...]) -> PackedExperts:
    """Packs expert weights for `expert_linear`; see `PackedExperts`. Call `repack` after the weights change."""
    return dispatch.backend().pack_experts(groups)


def repack(packed: PackedLinear | PackedExperts) -> None:
    """Copies the current values of the weights into the packed copy, in place. Raises ValueError when another backend
    packed them; they then stay stale. Raises MetronomeError when the weights were not kept."""
    check_held("repack", packed)
    before, packed.made = packed.made, packed.weights.now
    try:
        dispatch.backend().repack(packed)
    except BaseException:
        packed.made = before
        raise


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
    """y[t, n] = sum_k x[t, k] * w[n, k]. x [T, K] (rows may be strided, columns may not) -> [T, N] of ``out_dtype``
    (default x.dtype)."""
    return dispatch.backend().linear(x, packed, out_dtype or x.dtype)


def expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int = 1) -> Tensor:
    """y[r] = x[r // fan_out] @ w[expert[r]].T. x [T, K], expert int32 [R] with R = T * fan_out -> [R, N]. Raises
    ValueError for an expert outside [0, E).

    Few rows are computed by gather + GEMV, many by grouped GEMM. Both reduce every row in the same order, so the choice
    cannot change a bit."""
    return dispatch.backend().expert_linear(x, packed, expert, fan_out)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, silu(g) = g / (1 + exp(-g)) (Shazeer 2020, arXiv 2002.05202); computed in fp32.

    gate_up [T, 2I], the gate being the first I columns -> [T, I] of the same dtype."""
    return dispatch.backend().swiglu(gate_up)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, the exact GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415); computed in
    fp32.

    x [T, N] (rows may be strided, columns may not) -> [T, N] of the same dtype. Within 2 units in the last place of
    fp32, before the rounding to x.dtype, also where x is far below 0. As in torch -inf gives NaN."""
    return dispatch.backend().gelu(x)


def moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    """The experts' weighted sum: out[t] = sum_j weight[t, j] * y[t * J + j], in ascending j.

    y [T * J, D], weight fp32 [T, J] -> [T, D] of y.dtype."""
    return dispatch.backend().moe_combine(y, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), the mean over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    x [T, D] or [T, H, D] (columns must be adjacent), weight [D] of x.dtype -> x's shape. As in Inkling the normed value
    is rounded to x.dtype before the weight is applied."""
    return dispatch.backend().rms_norm(x, weight, eps)


def short_conv(
    x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    """Causal depthwise convolution with a residual: y[t, c] = x[t, c] + sum_i w[c, i] * x[t - 3 + i, c], i = 0 … 3 in
    ascending order; inputs before position 0 count as 0. Computed in fp32.

    x [T, C] (rows may be strided), weight [C, 4] fp32 -> [T, C] of x.dtype. ``state`` [slots, 3, C] of x.dtype holds
    each slot's last three inputs (oldest first); it is read for segments with start > 0 and overwritten in place.
    Without ``state`` every segment must start at 0; with it there is no gradient, and asking for one raises
    ValueError. ``addend`` [T, C] of x.dtype: what the rounded result is added to (the residual stream), rounded again:
    addend + y, as torch adds."""
    return dispatch.backend().short_conv(x, weight, segments, state, addend)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    first: int = 0,
    tau: Tensor | None = None,
    cache: PagedKV | None = None,
) -> Tensor:
    """Causal attention with Inkling's learned relative bias, keys reduced in left-aligned ranges of fixed size.

    score(i, j) = tau_i * (scale * q_i . k_j + b_i(i - j)), b_i(d) = sum_c rel[i, c] * rel_proj[c, d] for d < extent,
    else 0 (transformers.models.inkling). Query i sees key j when j <= i and (i - j < window or j < first); window None
    is no window, and then ``first`` changes nothing. ``first`` is a multiple of SPLIT_TOKENS: the keys before it, which
    are seen for ever, are attention sinks (Xiao et al. 2023, arXiv 2309.17453). Softmax and weighted sum are computed a
    range of keys at a time (maximum, sum of exp, weighted values) and the ranges combined from left to right (Milakov &
    Gimelshein 2018, arXiv 1805.02867). Ranges are aligned to absolute positions: splits of SPLIT_TOKENS, or equal parts
    of them where the backend says so. A range that the query cannot see changes nothing and is not computed, so the
    cost of a row is bounded by first + window, wherever it stands.

    q [T, H, D], k and v [T, H_kv, D] (rows may be strided), rel [T, H, C] (rows may be strided), rel_proj [C, extent],
    tau fp32 [T] or None (1) -> [T, H, D]. With ``cache`` the call first writes its keys and values into the pages, then
    attends over the pages; a position without a page raises ValueError, and so does asking for a gradient. Without
    ``cache`` every segment must start at 0."""
    return dispatch.backend().attention(q, k, v, rel, rel_proj, segments, scale, window, first, tau, cache)


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    """The router of a mixture of experts, as in transformers.models.inkling. logits fp32 [T, E + shared], bias fp32 [E]
    -> (expert int32 [T, J], weight fp32 [T, J]) with J = top_k + shared.

    A row's experts are the top_k of sigmoid(logit) + bias, of equal ones the lower index first, listed in ascending
    index; then the shared ones E … E + shared - 1. Its weights are sigmoid(logit) divided by their sum over the J
    experts, computed as softmax(logsigmoid(logit)). Gradients flow to logits through the weights only."""
    return dispatch.backend().route(logits, bias, top_k, shared)


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    """dMel embedding: out[t] = sum_c table[codes[t, c] + c * bins] in ascending channel c, computed in fp32.

    codes uint8 or int16/32/64 [T, C], table [C * bins, D] -> [T, D]. Raises ValueError for a code outside [0, bins)."""
    return dispatch.backend().embedding_sum(codes, table, bins)


def logprob(
    logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of ``token`` under softmax(logits / temperature) over the tokens its row's class allows.

    logits fp32 [T, V], token int64 [T], allowed bool [classes, V], row_class int64 [T] -> (logprob fp32 [T], entropy
    fp32 [T] in nats, digest int64 [T]). The digest is a 64-bit hash of the bits of the whole log-prob row (-inf where
    not allowed): sum over v of splitmix64((v << 32) | bits(logp[v])) modulo 2^64 (splitmix64: Steele, Lea & Flood
    2014), so equal digests mean equal distributions, but for a chance of 2^-64. Gradients flow to logits from logprob
    and from entropy. Raises ValueError when a token is not allowed in its row, or a row's allowed logits hold a NaN or
    +inf."""
    return dispatch.backend().logprob(logits, token, temperature, allowed, row_class)


def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples by the Gumbel-max trick (Gumbel 1954) with counter-based noise: argmax_v logp[v] - ln E, E = -ln u, of
    equal values the lower id. u in (0, 1) comes from h = splitmix64(key + (v + 1) * 0x9E3779B97F4A7C15): with m = the
    lower 63 bits of h, made odd, and x = fp32(m) / 2^64, rounded once, u = 1 - x where the top bit of h is 0, else u =
    x.

    x has fp32's relative precision at both ends of (0, 1), so the noise lies in [-3.8, 44.4] and an improbable token is
    drawn as often as it should be; with 24 bits for u, none less probable than p_max e^-20.2 would ever be drawn.

    logits fp32 [T, V], key int64 [T] (bits of a uint64) -> (token int64 [T], logprob fp32 [T], digest int64 [T]), the
    last two bit for bit what `logprob` gives for that token. Temperature 0 is greedy: the argmax of the logits,
    of equal ones the lower id, with its log-prob at temperature 1."""
    return dispatch.backend().sample(logits, temperature, key, allowed, row_class)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, of x.dtype. x [T, N], factor [1] of x.dtype -> [T, N].

    The multiplication alone would need no op. The gradient of ``factor`` does: it is a sum over all elements of x,
    taken by `dot`, because torch's own sum is split by the number of threads."""
    if torch.is_grad_enabled() and (x.requires_grad or factor.requires_grad):
        out: Tensor = _Scale.apply(x, factor)
        return out
    return x * factor


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, factor)
        ctx.rows = active()
        return x * factor

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, factor = ctx.saved_tensors
        rows = ctx.rows
        every, dy = (x, grad) if rows is None else (rows.whole(x), rows.whole(grad))
        total = dot(every.float().contiguous(), dy.float().contiguous()).to(factor.dtype).view(factor.shape)
        return grad * factor, total if rows is None else rows.made(total)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i * b_i over all elements in fp64 and one order; the same bits on every backend, for any thread count.

    a, b fp32, contiguous, equally many elements -> fp64 []. Products are exact. Blocks of 4,096 elements: in each, lane
    l of 8 adds elements l, l + 8, …; lanes l and l + 4 are joined, then l + 2, then l + 1; then the blocks in order."""
    return dispatch.backend().dot(a, b)


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep) -> None:
    """One AdamW update (Loshchilov & Hutter 2019, arXiv 1711.05101) of ``parameter`` and its moments ``first`` and
    ``second``, in place; all fp32, contiguous, of equally many elements. With p, g, m, v for these tensors and the
    numbers of ``step`` rounded to fp32:

        p = p * keep;  m = m + (g - m) * new1 + 0;  v = v * old2 + (g * g) * new2;
        p = p - (m / (sqrt(v) / root + eps)) * rate

    Every operation is rounded once and none fused, so the bits are the same on every backend and processor. The row
    contract holds trivially: an element's update depends on that element alone."""
    dispatch.backend().adamw(parameter, gradient, first, second, step)
