"""The reference backend: short torch code that *defines* each op of `kernels.ops`; slow, the oracle for the others.

torch's autograd differentiates it, and it runs in fp32, bf16 and float64 (a float64 run is the oracle of an fp32 one).
It keeps the row contract (`kernels.reference.arithmetic` says how). Its order of reduction is a chain in ascending
index; attention's is by whole splits. Left out on purpose: speed, and packing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks.updates import check_adamw, check_dot
from kernels.checks.weights import stale_weights
from kernels.layout import CONV_TAPS, FLOATS, AdamWStep, PackedExperts, PackedLinear, Segments
from kernels.reference.arithmetic import (
    bounds,
    exp,
    joined_lanes,
    log,
    matmul_chain,
    product_lanes,
    require,
    sum_last,
    widen,
)
from kernels.reference.attention import attention as attention  # an op of this backend
from kernels.upload import deferred as deferred
from kernels.upload import fetch as fetch
from kernels.upload import upload as upload

NAME = "reference"
DEVICE = "cpu"
NUMERICS_VERSION = 2

_OTHERS = "packed: made by another backend; pack again after use_backend('reference')"

GOLDEN = 0x9E3779B97F4A7C15
U32 = 0xFFFFFFFF

_FLOATS = (*FLOATS, torch.float64)


def contract() -> dict[str, str | int]:
    # exp, log and erfc are torch's in float64, rounded to fp32: nearly always, but not provably, the same on every
    # processor.
    return {"numerics": NUMERICS_VERSION, "bf16": "exact", "capability": torch.backends.cpu.get_cpu_capability()}


def instruction_set() -> str:
    return "torch"


def dot(a: Tensor, b: Tensor) -> Tensor:
    check_dot(a, b)
    return joined_lanes(product_lanes(a, b))


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep) -> None:
    check_adamw(parameter, gradient, first, second)
    # numpy's arrays: its square root of fp32 is the processor's, rounded correctly; torch's is a library's.
    p, g, m, v = (x.detach().numpy() for x in (parameter, gradient, first, second))
    keep, new1, old2, new2, rate, root, eps = (
        np.float32(x) for x in (step.keep, step.new1, step.old2, step.new2, step.rate, step.root, step.eps)
    )
    m[...] = (m + (g - m) * new1) + np.float32(0)
    v[...] = v * old2 + (g * g) * new2
    p[...] = p * keep - m / (np.sqrt(v) / root + eps) * rate


def pack_linear(parts: tuple[Tensor, ...]) -> PackedLinear:
    return PackedLinear.build(parts, _FLOATS)


def pack_experts(groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
    return PackedExperts.build(groups, _FLOATS)


def repack(packed: PackedLinear | PackedExperts) -> None:
    """Nothing to refresh: this backend reads the parts at every call."""
    require(not packed.data, _OTHERS)


def _check_packed(packed: PackedLinear | PackedExperts) -> None:
    if packed.made != packed.weights.now:
        raise stale_weights("packed")
    require(not packed.data, _OTHERS)


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    _check_packed(packed)
    require(x.dim() == 2 and x.shape[1] == packed.cols, f"linear: x is {tuple(x.shape)}, not [T, {packed.cols}]")
    require(x.dtype == packed.parts[0].dtype, f"linear: x is {x.dtype}, the weights {packed.parts[0].dtype}")
    return matmul_chain(x, torch.cat(packed.parts)).to(out_dtype)


def expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    _check_packed(packed)
    require(x.dim() == 2 and x.shape[1] == packed.cols, f"expert_linear: x is {tuple(x.shape)}, not [T, {packed.cols}]")
    rows = x.shape[0] * fan_out
    require(expert.shape == (rows,), f"expert_linear: expert is {tuple(expert.shape)}, not [{rows}]")
    weights = [w for group in packed.groups for w in torch.cat(group, dim=1).unbind(0)]
    order = torch.argsort(expert, stable=True)
    blocks = []
    for e in expert.unique(sorted=True).tolist():
        require(0 <= e < packed.experts, f"expert_linear: expert {e} is outside 0..{packed.experts - 1}")
        rows_of_expert = (expert == e).nonzero()[:, 0]
        blocks.append(matmul_chain(x[rows_of_expert // fan_out], weights[e]).to(x.dtype))
    empty = x.new_zeros(0, packed.rows)
    return torch.cat([empty, *blocks])[torch.argsort(order)]


def swiglu(gate_up: Tensor) -> Tensor:
    require(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"swiglu: gate_up is {tuple(gate_up.shape)}, not [T, 2I]")
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (gate / (1 + exp(-gate)) * up).to(gate_up.dtype)


def gelu(x: Tensor) -> Tensor:
    require(x.dim() == 2, f"gelu: x is {tuple(x.shape)}, not [T, N]")
    wide = x.double()  # erfc keeps its relative precision where 1 + erf has lost it
    return (wide * (0.5 * torch.special.erfc(-(0.5**0.5) * wide))).to(x.dtype)


def moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    rows, choices = weight.shape
    require(y.shape[0] == rows * choices, f"moe_combine: y has {y.shape[0]} rows, weight asks for {rows} * {choices}")
    y_wide = widen(y).view(rows, choices, y.shape[1])
    total = y_wide.new_zeros(rows, y.shape[1])
    for j in range(choices):
        total = total + weight[:, j, None] * y_wide[:, j]
    return total.to(y.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    require(weight.shape == x.shape[-1:], f"rms_norm: weight is {tuple(weight.shape)}, x {tuple(x.shape)}")
    wide = widen(x)
    mean_square = sum_last(wide * wide) / x.shape[-1]
    return weight * (wide / torch.sqrt(mean_square + eps)[..., None]).to(x.dtype)


def short_conv(
    x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None = None
) -> Tensor:
    past = CONV_TAPS - 1
    require(weight.shape == (x.shape[1], CONV_TAPS), f"short_conv: weight is {tuple(weight.shape)}, x {tuple(x.shape)}")
    require(x.shape[0] == segments.rows, f"short_conv: x has {x.shape[0]} rows, segments {segments.rows}")
    out = []
    for slot, start, first, end in bounds(segments):
        require(start == 0 or state is not None, f"short_conv: segment starts at {start}, but there is no state")
        before = x.new_zeros(past, x.shape[1]) if start == 0 or state is None else state[slot]
        taps = torch.cat([before, x[first:end]])
        wide = widen(taps)
        total = weight[:, 0] * wide[: end - first]
        for i in range(1, CONV_TAPS):
            total = total + weight[:, i] * wide[i : i + end - first]
        out.append((wide[past:] + total).to(x.dtype))
        if state is not None:
            state[slot] = taps[-past:]
    y = torch.cat([x.new_zeros(0, x.shape[1]), *out])
    require(addend is None or (addend.shape == y.shape and addend.dtype == y.dtype), "short_conv: addend is not like x")
    return y if addend is None else addend + y


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    experts = logits.shape[1] - shared
    require(
        bias.shape == (experts,), f"route: bias is {tuple(bias.shape)}, logits {tuple(logits.shape)}, shared {shared}"
    )
    require(0 < top_k <= experts, f"route: top_k is {top_k} of {experts} experts")
    score = 1 / (1 + exp(-logits[:, :experts])) + bias
    ranked = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = ranked.sort(dim=1).values
    always = torch.arange(experts, experts + shared).expand(logits.shape[0], shared)
    expert = torch.cat([chosen, always], dim=1)
    picked = logits.gather(1, expert)
    log_sigmoid = F.logsigmoid(picked.double()).to(picked.dtype)
    weight = exp(log_sigmoid - log_sigmoid.detach().amax(1, keepdim=True))
    return expert.to(torch.int32), weight / sum_last(weight)[:, None]


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    channels = table.shape[0] // bins
    require(
        codes.dim() == 2 and codes.shape[1] == channels,
        f"embedding_sum: codes is {tuple(codes.shape)}, not [T, {channels}]",
    )
    inside = codes.numel() == 0 or (int(codes.min()) >= 0 and int(codes.max()) < bins)
    require(inside, f"embedding_sum: a code lies outside 0..{bins - 1}")
    total = widen(table).new_zeros(codes.shape[0], table.shape[1])
    for c in range(channels):
        total = total + widen(F.embedding(codes[:, c].long() + c * bins, table))
    return total.to(table.dtype)


def _log_softmax(logits: Tensor, temperature: float, allowed: Tensor, row_class: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs [T, V] with -inf where not allowed, the rows' mask [T, V])."""
    require(temperature > 0, f"temperature is {temperature}; it must be > 0")
    require(
        allowed.dim() == 2 and allowed.shape[1] == logits.shape[1],
        f"allowed is {tuple(allowed.shape)}, logits {tuple(logits.shape)}",
    )
    mask = allowed[row_class]
    bad = (mask & (torch.isnan(logits) | (logits == torch.inf))).any(1)
    if bool(bad.any()):
        raise ValueError(f"logits: row {int(bad.int().argmax())} holds a NaN or +inf on an allowed token")
    scaled = (logits / temperature).masked_fill(~mask, -torch.inf)
    peak = scaled.detach().amax(1, keepdim=True)
    require(bool(torch.isfinite(peak).all()), "logits: a row has no finite logit on an allowed token")
    shifted = scaled - peak
    return shifted - log(sum_last(exp(shifted)))[:, None], mask


def _mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea & Flood 2014; Vigna's ``next()`` from state x) of uint64 bits held as int64: sums and
    products wrap modulo 2^64, and after >> the copies of the sign are masked away."""
    x = x + (GOLDEN - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def digest(logp: Tensor) -> Tensor:
    """logp [T, V] -> int64 [T], the digest of each row's bits that `kernels.ops.logprob` defines."""
    bits = logp.detach().float().view(torch.int32).long() & U32
    return _mix((torch.arange(logp.shape[1], device=logp.device) << 32) | bits).sum(1)


def logprob(
    logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logp, mask = _log_softmax(logits, temperature, allowed, row_class)
    permitted = mask.gather(1, token[:, None])[:, 0]
    if not bool(permitted.all()):
        row = int((~permitted).int().argmax())
        raise ValueError(f"token: row {row} has token {int(token[row])}, which its class {int(row_class[row])} forbids")
    safe = logp.masked_fill(~mask, 0)  # 0 * -inf would be NaN, in the sum and in its gradient
    entropy = -sum_last(exp(safe).masked_fill(~mask, 0) * safe)
    return logp.gather(1, token[:, None])[:, 0], entropy, digest(logp)


def gumbel_of(word: Tensor) -> Tensor:
    """The noise -ln E, E = -ln u, float64, of words given as int64 (the bits of a uint64); `kernels.ops.sample` defines
    u."""
    odd = (word & (2**63 - 1)) | 1
    x = odd.float().double() * 2.0**-64  # one rounding, to fp32
    return -torch.log(torch.where(word < 0, -torch.log(x), -torch.log1p(-x)))


def gumbel(key: Tensor, vocab: int) -> Tensor:
    """key int64 [T] -> float64 [T, V], V = ``vocab``: the noise that `kernels.ops.sample` adds."""
    counter = torch.arange(1, vocab + 1, device=key.device) * (GOLDEN - 2**64)
    return gumbel_of(_mix(key[:, None] + counter))


@torch.no_grad()
def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logp, mask = _log_softmax(logits, temperature or 1.0, allowed, row_class)
    if temperature == 0:
        score = logits.masked_fill(~mask, -torch.inf)
    else:
        score = logp + gumbel(key, logits.shape[1]).to(logp.dtype)
    token = (score == score.amax(1, keepdim=True)).int().argmax(1)  # of equal scores the lowest id
    return token, logp.gather(1, token[:, None])[:, 0], digest(logp)
