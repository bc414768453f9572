"""The reference backend: short torch code that *defines* each op of `kernels.ops`. Slow; the oracle for the others.

Plain autograd differentiates it, and it works in fp32, bf16 and float64 (a float64 run is the oracle of an fp32 one).
It keeps the row contract itself: every sum is a loop over elementwise torch calls (IEEE 754 rounding of one add or one
multiply cannot depend on the neighbours), and exp and log are taken in float64 and rounded to fp32, because torch's own
fp32 exp may give another last bit in a vector's tail than in its middle. Left out on purpose: speed, and packing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import CONV_TAPS, SPLIT_TOKENS, PackedExperts, PackedLinear, PagedKV, Segments

NAME = "reference"
NUMERICS_VERSION = 1

GOLDEN = 0x9E3779B97F4A7C15
U32 = 0xFFFFFFFF


def isa() -> str:
    return "torch"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _wide(x: Tensor) -> Tensor:
    """The accumulation type: fp32, or float64 for a float64 oracle."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exp(x: Tensor) -> Tensor:
    return torch.exp(x.double()).to(x.dtype)


def _log(x: Tensor) -> Tensor:
    return torch.log(x.double()).to(x.dtype)


def _sum_last(x: Tensor) -> Tensor:
    """Sum over the last axis, one chain in ascending index."""
    total = torch.zeros_like(x[..., 0])
    for term in x.unbind(-1):
        total = total + term
    return total


def _matmul_chain(x: Tensor, w: Tensor) -> Tensor:
    """x [..., K], w [N, K] -> [..., N]: one chain over k in ascending order, in the accumulation type."""
    x, w = _wide(x), _wide(w)
    total = x.new_zeros(*x.shape[:-1], w.shape[0])
    for k in range(x.shape[-1]):
        total = total + x[..., k, None] * w[:, k]
    return total


def pack_linear(parts: tuple[Tensor, ...]) -> PackedLinear:
    _require(len(parts) > 0, "pack_linear: parts is empty; give at least one weight [N, K]")
    cols = parts[0].shape[-1]
    for i, part in enumerate(parts):
        _require(
            part.dim() == 2 and part.shape[1] == cols,
            f"pack_linear: parts[{i}] is {tuple(part.shape)}, not [N, {cols}]",
        )
        _require(part.dtype == parts[0].dtype, f"pack_linear: parts[{i}] is {part.dtype}, parts[0] {parts[0].dtype}")
    return PackedLinear(parts, sum(part.shape[0] for part in parts), cols)


def pack_experts(groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
    _require(
        len(groups) > 0 and len(groups[0]) > 0, "pack_experts: groups is empty; give at least one weight [E, N, K]"
    )
    rows, cols = sum(part.shape[1] for part in groups[0]), groups[0][0].shape[2]
    for g, group in enumerate(groups):
        shapes = [tuple(part.shape) for part in group]
        same = len({shape[0] for shape in shapes}) == 1 and all(shape[2] == cols for shape in shapes)
        _require(
            same and sum(s[1] for s in shapes) == rows,
            f"pack_experts: groups[{g}] is {shapes}, not [E, {rows}, {cols}]",
        )
    return PackedExperts(groups, sum(group[0].shape[0] for group in groups), rows, cols)


def repack(packed: PackedLinear | PackedExperts) -> None:
    """Nothing to refresh: this backend reads the parts at every call."""
    _own(packed)


def _own(packed: PackedLinear | PackedExperts) -> None:
    _require(not packed.data, "packed: made by another backend; pack again after use_backend('reference')")


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    _own(packed)
    _require(x.dim() == 2 and x.shape[1] == packed.cols, f"linear: x is {tuple(x.shape)}, not [T, {packed.cols}]")
    _require(x.dtype == packed.parts[0].dtype, f"linear: x is {x.dtype}, the weights {packed.parts[0].dtype}")
    return _matmul_chain(x, torch.cat(packed.parts)).to(out_dtype)


def expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    _own(packed)
    _require(
        x.dim() == 2 and x.shape[1] == packed.cols, f"expert_linear: x is {tuple(x.shape)}, not [T, {packed.cols}]"
    )
    rows = x.shape[0] * fan_out
    _require(expert.shape == (rows,), f"expert_linear: expert is {tuple(expert.shape)}, not [{rows}]")
    weights = [w for group in packed.groups for w in torch.cat(group, dim=1).unbind(0)]
    order = torch.argsort(expert, stable=True)
    blocks = []
    for e in expert.unique(sorted=True).tolist():
        _require(0 <= e < packed.experts, f"expert_linear: expert {e} is outside 0..{packed.experts - 1}")
        mine = (expert == e).nonzero()[:, 0]
        blocks.append(_matmul_chain(x[mine // fan_out], weights[e]).to(x.dtype))
    empty = x.new_zeros(0, packed.rows)
    return torch.cat([empty, *blocks])[torch.argsort(order)]


def swiglu(gate_up: Tensor) -> Tensor:
    _require(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"swiglu: gate_up is {tuple(gate_up.shape)}, not [T, 2I]"
    )
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (gate / (1 + _exp(-gate)) * up).to(gate_up.dtype)


def moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    rows, choices = weight.shape
    _require(y.shape[0] == rows * choices, f"moe_combine: y has {y.shape[0]} rows, weight asks for {rows} * {choices}")
    y_wide = _wide(y).view(rows, choices, y.shape[1])
    total = y_wide.new_zeros(rows, y.shape[1])
    for j in range(choices):
        total = total + weight[:, j, None] * y_wide[:, j]
    return total.to(y.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _require(weight.shape == x.shape[-1:], f"rms_norm: weight is {tuple(weight.shape)}, x {tuple(x.shape)}")
    wide = _wide(x)
    mean_square = _sum_last(wide * wide) / x.shape[-1]
    return weight * (wide / torch.sqrt(mean_square + eps)[..., None]).to(x.dtype)


def _bounds(segments: Segments) -> list[tuple[int, int, int, int]]:
    """(slot, start, first row, past-the-last row) of each segment."""
    offset = segments.offset.tolist()
    return list(zip(segments.slot.tolist(), segments.start.tolist(), offset[:-1], offset[1:], strict=True))


def short_conv(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None) -> Tensor:
    past = CONV_TAPS - 1
    _require(
        weight.shape == (x.shape[1], CONV_TAPS), f"short_conv: weight is {tuple(weight.shape)}, x {tuple(x.shape)}"
    )
    _require(x.shape[0] == segments.rows, f"short_conv: x has {x.shape[0]} rows, segments {segments.rows}")
    out = []
    for slot, start, first, end in _bounds(segments):
        _require(start == 0 or state is not None, f"short_conv: segment starts at {start}, but there is no state")
        before = x.new_zeros(past, x.shape[1]) if start == 0 or state is None else state[slot]
        taps = torch.cat([before, x[first:end]])
        wide = _wide(taps)
        total = weight[:, 0] * wide[: end - first]
        for i in range(1, CONV_TAPS):
            total = total + weight[:, i] * wide[i : i + end - first]
        out.append((wide[past:] + total).to(x.dtype))
        if state is not None:
            state[slot] = taps[-past:]
    return torch.cat([x.new_zeros(0, x.shape[1]), *out])


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
    rows = segments.rows
    for name, tensor in (("q", q), ("k", k), ("v", v), ("rel", rel)):
        _require(
            tensor.dim() == 3 and tensor.shape[0] == rows,
            f"attention: {name} is {tuple(tensor.shape)}, not [{rows}, H, D]",
        )
    _require(q.shape[1] % k.shape[1] == 0, f"attention: {q.shape[1]} query heads over {k.shape[1]} key heads")
    out = []
    for slot, start, first, end in _bounds(segments):
        _require(start == 0 or cache is not None, f"attention: segment starts at {start}, but there is no cache")
        mine = slice(first, end)
        if cache is None:
            key, value = (F.pad(t[mine], (0, 0, 0, 0, 0, -(end - first) % SPLIT_TOKENS)) for t in (k, v))
        else:
            key, value = _through_pages(k[mine], v[mine], cache, slot, start)
        row_tau = None if tau is None else tau[mine]
        out.append(_attend(q[mine], key, value, rel[mine], rel_proj, start, scale, window, row_tau))
    return torch.cat([q.new_zeros(0, *q.shape[1:]), *out])


def _through_pages(k: Tensor, v: Tensor, cache: PagedKV, slot: int, start: int) -> tuple[Tensor, Tensor]:
    """Writes the segment's keys and values, then reads the whole sequence: [splits * SPLIT_TOKENS, H_kv, D] each, zeros
    where nothing is held."""
    length = start + k.shape[0]
    for row, position in enumerate(range(start, length)):
        page = int(cache.table[slot, position // SPLIT_TOKENS])
        _require(page >= 0, f"attention: cache.table holds no page for slot {slot}, position {position}")
        cache.key[page, :, :, position % SPLIT_TOKENS] = k[row]
        cache.value[page, :, position % SPLIT_TOKENS] = v[row]
    splits = -(-length // SPLIT_TOKENS)
    key, value = k.new_zeros(splits, SPLIT_TOKENS, *k.shape[1:]), v.new_zeros(splits, SPLIT_TOKENS, *v.shape[1:])
    for p in range(splits):
        page = int(cache.table[slot, p])
        held = min(SPLIT_TOKENS, length - p * SPLIT_TOKENS) if page >= 0 else 0
        key[p, :held] = cache.key[page].permute(2, 0, 1)[:held]
        value[p, :held] = cache.value[page].permute(1, 0, 2)[:held]
    return key.flatten(0, 1), value.flatten(0, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    start: int,
    scale: float,
    window: int | None,
    tau: Tensor | None,
) -> Tensor:
    """One sequence: queries at start, start + 1, … over keys at 0 … splits * SPLIT_TOKENS - 1.

    With m_s, l_s, a_s a split's max, sum and weighted values and M the max of all m_s:
    out = (sum_s e^(m_s - M) a_s) / (sum_s e^(m_s - M) l_s), both left to right (Milakov & Gimelshein 2018)."""
    rows, heads, keys = q.shape[0], q.shape[1], k.shape[0]
    k, v = (_wide(t).repeat_interleave(heads // k.shape[1], dim=1).transpose(0, 1) for t in (k, v))  # [H, keys, D]
    wide_q, extent = _wide(q), rel_proj.shape[1]
    dot = wide_q.new_zeros(rows, heads, keys)
    for d in range(q.shape[2]):
        dot = dot + wide_q[:, :, d, None] * k[:, :, d]
    distance = torch.arange(start, start + rows)[:, None] - torch.arange(keys)  # [rows, keys]
    by_distance = _matmul_chain(rel, rel_proj.t())  # [rows, H, extent]
    index = distance.clamp(0, extent - 1)[:, None].expand(rows, heads, keys)
    near = ((distance >= 0) & (distance < extent))[:, None]
    bias = torch.where(near, by_distance.gather(2, index), torch.zeros_like(dot))
    score = scale * dot + bias
    if tau is not None:
        score = tau[:, None, None] * score
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    score = score.masked_fill(~visible[:, None], -torch.inf).unflatten(2, (-1, SPLIT_TOKENS))  # [rows, H, splits, 64]
    value = v.unflatten(1, (-1, SPLIT_TOKENS))  # [H, splits, 64, D]

    split_max = score.detach().amax(-1)
    whole_max = split_max.amax(-1)
    # A split out of sight has max -inf; 0 in its stead makes all its weights exp(-inf) = 0 instead of NaN.
    weight = _exp(score - split_max.masked_fill(split_max == -torch.inf, 0)[..., None])
    split_sum = _sum_last(weight)
    split_out = wide_q.new_zeros(*split_max.shape, v.shape[2])
    for j in range(SPLIT_TOKENS):
        split_out = split_out + weight[..., j, None] * value[:, :, j]
    rescale = _exp(split_max - whole_max[..., None])
    total, out = torch.zeros_like(whole_max), torch.zeros_like(split_out[:, :, 0])
    for s in range(split_max.shape[2]):
        total = total + rescale[:, :, s] * split_sum[:, :, s]
        out = out + rescale[:, :, s, None] * split_out[:, :, s]
    return (out / total[..., None]).to(q.dtype)


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    experts = logits.shape[1] - shared
    _require(
        bias.shape == (experts,), f"route: bias is {tuple(bias.shape)}, logits {tuple(logits.shape)}, shared {shared}"
    )
    _require(0 < top_k <= experts, f"route: top_k is {top_k} of {experts} experts")
    score = 1 / (1 + _exp(-logits[:, :experts])) + bias
    ranked = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = ranked.sort(dim=1).values
    always = torch.arange(experts, experts + shared).expand(logits.shape[0], shared)
    expert = torch.cat([chosen, always], dim=1)
    picked = logits.gather(1, expert)
    log_sigmoid = F.logsigmoid(picked.double()).to(picked.dtype)
    weight = _exp(log_sigmoid - log_sigmoid.detach().amax(1, keepdim=True))
    return expert.to(torch.int32), weight / _sum_last(weight)[:, None]


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    channels = table.shape[0] // bins
    _require(
        codes.dim() == 2 and codes.shape[1] == channels,
        f"embedding_sum: codes is {tuple(codes.shape)}, not [T, {channels}]",
    )
    inside = codes.numel() == 0 or (int(codes.min()) >= 0 and int(codes.max()) < bins)
    _require(inside, f"embedding_sum: a code lies outside 0..{bins - 1}")
    total = _wide(table).new_zeros(codes.shape[0], table.shape[1])
    for c in range(channels):
        total = total + _wide(F.embedding(codes[:, c].long() + c * bins, table))
    return total.to(table.dtype)


def _log_softmax(logits: Tensor, temperature: float, allowed: Tensor, row_class: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs [T, V] with -inf where not allowed, the rows' mask [T, V])."""
    _require(temperature > 0, f"temperature is {temperature}; it must be > 0")
    _require(
        allowed.dim() == 2 and allowed.shape[1] == logits.shape[1],
        f"allowed is {tuple(allowed.shape)}, logits {tuple(logits.shape)}",
    )
    mask = allowed[row_class]
    bad = (mask & (torch.isnan(logits) | (logits == torch.inf))).any(1)
    if bool(bad.any()):
        raise ValueError(f"logits: row {int(bad.int().argmax())} holds a NaN or +inf on an allowed token")
    scaled = (logits / temperature).masked_fill(~mask, -torch.inf)
    peak = scaled.detach().amax(1, keepdim=True)
    _require(bool(torch.isfinite(peak).all()), "logits: a row has no finite logit on an allowed token")
    shifted = scaled - peak
    return shifted - _log(_sum_last(_exp(shifted)))[:, None], mask


def _mix(x: Tensor) -> Tensor:
    """splitmix64 of int64 bits (Vigna's next() from state x); int64 wraps modulo 2^64, >> needs its sign cleared."""
    x = x + (GOLDEN - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def _digest(logp: Tensor) -> Tensor:
    bits = logp.detach().float().view(torch.int32).long() & U32
    return _mix((torch.arange(logp.shape[1]) << 32) | bits).sum(1)


def logprob(
    logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logp, mask = _log_softmax(logits, temperature, allowed, row_class)
    mine = mask.gather(1, token[:, None])[:, 0]
    if not bool(mine.all()):
        row = int((~mine).int().argmax())
        raise ValueError(f"token: row {row} has token {int(token[row])}, which its class {int(row_class[row])} forbids")
    safe = logp.masked_fill(~mask, 0)  # 0 * -inf would be NaN, in the sum and in its gradient
    entropy = -_sum_last(_exp(safe).masked_fill(~mask, 0) * safe)
    return logp.gather(1, token[:, None])[:, 0], entropy, _digest(logp)


@torch.no_grad()
def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logp, mask = _log_softmax(logits, temperature or 1.0, allowed, row_class)
    if temperature == 0:
        score = logits.masked_fill(~mask, -torch.inf)
    else:
        counter = torch.arange(1, logits.shape[1] + 1) * (GOLDEN - 2**64)
        upper = (_mix(key[:, None] + counter) >> 40) & (2**24 - 1)
        # float64: n + 0.5 for n >= 2^23 has no fp32 form, and rounding up to u = 1 would make infinite noise.
        score = logp - torch.log(-torch.log((upper.double() + 0.5) / 2**24)).to(logp.dtype)
    token = (score == score.amax(1, keepdim=True)).int().argmax(1)  # of equal scores the lowest id
    return token, logp.gather(1, token[:, None])[:, 0], _digest(logp)
