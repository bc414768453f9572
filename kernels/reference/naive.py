"""The baseline: the same ops by torch's own functions, called as transformers' Inkling calls them.

It keeps no row contract: the number of rows, padding and whether keys come from a cache may change bits. It exists to
be measured beside the other backends, not to train with: METRONOME_BACKEND does not select it, only
`kernels.dispatch.substituted` does, and its contract id differs from theirs.

The batch is padded to its longest sequence for `scaled_dot_product_attention` and `conv1d`, as is usual; a loop over
the experts takes their rows, sorted, and `index_add_` adds them; keys lie in the same pages as for the other backends
and are gathered for each call, which costs about as much as a cache that grows by concatenation. Digests of log-prob
rows and counter-based noise are kept, so that sessions and comparisons work; a usual program has neither.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import CONV_TAPS, SPLIT_TOKENS, PackedExperts, PackedLinear, PagedKV, Segments
from kernels.reference import backend as reference
from kernels.reference.backend import digest, gumbel
from kernels.upload import deferred as deferred
from kernels.upload import fetch as fetch
from kernels.upload import upload as upload

NAME = "naive"
DEVICE = "cpu"


def contract() -> dict[str, str | int]:
    return {"row_contract": "none", "capability": torch.backends.cpu.get_cpu_capability()}


def instruction_set() -> str:
    return "torch"


# ---- gradients and updates ----


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


adamw = reference.adamw  # torch's own has no function that takes one parameter


# ---- linear ops ----


def pack_linear(parts: tuple[Tensor, ...]) -> PackedLinear:
    packed = PackedLinear.build(parts)
    repack(packed)
    return packed


def pack_experts(groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
    packed = PackedExperts.build(groups)
    repack(packed)
    return packed


@torch.no_grad()
def repack(packed: PackedLinear | PackedExperts) -> None:
    """Stacks weights of several parts once, so that inference need not do it at every call."""
    stacks = [_stack(packed.parts, 0)] if isinstance(packed, PackedLinear) else [_stack(g, 1) for g in packed.groups]
    packed.data = {str(i): stack for i, stack in enumerate(stacks)}


def _stack(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    weight = _stack(packed.parts, 0) if torch.is_grad_enabled() else packed.data["0"]
    return F.linear(x.to(out_dtype), weight.to(out_dtype))


def expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    training = torch.is_grad_enabled()
    groups = [_stack(g, 1) for g in packed.groups] if training else list(packed.data.values())
    weights = [w for group in groups for w in group.unbind(0)]
    order = expert.argsort(stable=True)
    by_expert = x[order // fan_out].split(torch.bincount(expert, minlength=packed.experts).tolist())
    out = torch.cat([F.linear(rows, w) for rows, w in zip(by_expert, weights, strict=True) if len(rows)])
    return torch.empty_like(out).index_copy(0, order, out)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    rows, choices = weight.shape
    owner = torch.arange(rows, device=y.device).repeat_interleave(choices)
    return y.new_zeros(rows, y.shape[1]).index_add_(0, owner, (y * weight.reshape(-1, 1)).to(y.dtype))


# ---- rows and sequences ----


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _padded(segments: Segments, device: torch.device) -> tuple[Segments, Tensor, Tensor, int]:
    """The segments on ``device``, and the places of the T packed rows in a padded batch: (segment [T], row within it
    [T], length of the longest)."""
    longest, rows = int(segments.offset.diff().max()), segments.rows
    there = Segments(*(x.to(device) for x in (segments.slot, segments.start, segments.offset, segments.position)))
    length = there.offset.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(length), device=device), length)
    return there, owner, torch.arange(rows, device=device) - there.offset[:-1].long()[owner], longest


def short_conv(
    x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None = None
) -> Tensor:
    segments, owner, within, longest = _padded(segments, x.device)
    past, slot = CONV_TAPS - 1, segments.slot.long()
    padded = x.new_zeros(len(slot), past + longest, x.shape[1])
    if state is not None:
        padded[:, :past] = state[slot] * (segments.start > 0)[:, None, None]
    padded = padded.index_put((owner, within + past), x)
    taps = weight.to(x.dtype)[:, None]
    out = F.conv1d(padded.transpose(1, 2), taps, groups=x.shape[1]).transpose(1, 2)[owner, within]
    if state is not None:
        last = segments.offset.diff().long()[:, None] + torch.arange(past, device=x.device)
        state[slot] = padded[torch.arange(len(slot), device=x.device)[:, None], last]
    return x + out if addend is None else addend + (x + out)


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
    segments, owner, within, longest = _padded(segments, q.device)
    start, sequences = segments.start.long(), len(segments.start)
    groups = q.shape[1] // k.shape[1]
    if cache is None:
        key, value = (_batch(t, owner, within, sequences, longest).transpose(1, 2) for t in (k, v))  # [S, H_kv, L, D]
    else:
        key, value = _through_pages(k, v, cache, segments, owner)
    if tau is not None:
        q, rel = (t * tau[:, None, None].to(t.dtype) for t in (q, rel))
    query = _batch(q, owner, within, sequences, longest).transpose(1, 2)
    by_distance = _batch(rel, owner, within, sequences, longest) @ rel_proj  # [S, Q, H, extent]
    query_at, key_at = (torch.arange(n, device=q.device) for n in (longest, key.shape[2]))
    distance = (start[:, None] + query_at)[:, :, None] - key_at  # [S, Q, L]
    extent = rel_proj.shape[1]
    index = distance.clamp(0, extent - 1)[:, :, None].expand(-1, -1, q.shape[1], -1)
    bias = by_distance.gather(3, index).transpose(1, 2)
    bias = bias.masked_fill((distance >= extent)[:, None], 0.0)
    unseen = distance < 0
    if window is not None:
        unseen |= (distance >= window) & (key_at >= first)
    bias = bias.masked_fill(unseen[:, None], -torch.inf)
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)[owner, within]


def _batch(x: Tensor, owner: Tensor, within: Tensor, sequences: int, longest: int) -> Tensor:
    """[T, H, D] -> [S, longest, H, D], zeros where a sequence is shorter."""
    return x.new_zeros(sequences, longest, *x.shape[1:]).index_put((owner, within), x)


def _through_pages(k: Tensor, v: Tensor, cache: PagedKV, segments: Segments, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values, then gathers every sequence, padded to the longest: [S, H_kv, L, D] each."""
    position, table = segments.position.long(), cache.table.to(k.device)[segments.slot.long()].long()
    page, place = table[owner, position // SPLIT_TOKENS], position % SPLIT_TOKENS
    cache.key[page, :, :, place] = k
    cache.value[page, :, place] = v
    longest = int(position.max()) + 1
    pages = table[:, : -(-longest // SPLIT_TOKENS)].clamp(min=0)
    key = cache.key[pages].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :longest]
    value = cache.value[pages].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :longest]
    return key, value


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    experts = logits.shape[1] - shared
    chosen = torch.topk(logits[:, :experts].sigmoid() + bias, top_k, dim=1).indices
    always = torch.arange(experts, experts + shared, device=logits.device).expand(len(logits), shared)
    expert = torch.cat([chosen, always], dim=1)
    return expert.to(torch.int32), F.logsigmoid(logits.gather(1, expert)).softmax(1)


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    offset = torch.arange(codes.shape[1], device=codes.device) * bins
    return F.embedding(codes.long() + offset, table).sum(1)


# ---- log-probabilities ----


def logprob(
    logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mask = allowed[row_class]
    logp = F.log_softmax((logits / temperature).masked_fill(~mask, -torch.inf), dim=1)
    safe = logp.masked_fill(~mask, 0)
    entropy = -(safe.exp().masked_fill(~mask, 0) * safe).sum(1)
    return logp.gather(1, token[:, None])[:, 0], entropy, digest(logp)


@torch.no_grad()
def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.masked_fill(~allowed[row_class], -torch.inf)
    logp = F.log_softmax(logits / (temperature or 1.0), dim=1)
    token = (logits if temperature == 0 else logp + gumbel(key, logits.shape[1]).to(logp.dtype)).argmax(1)
    return token, logp.gather(1, token[:, None])[:, 0], digest(logp)
