"""Attention of the reference backend: `kernels.ops.attention` defined by loops over keys and splits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.reference.arithmetic import bounds, exp, matmul_chain, require, sum_last, widen


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
    rows = segments.rows
    for name, tensor in (("q", q), ("k", k), ("v", v), ("rel", rel)):
        require(
            tensor.dim() == 3 and tensor.shape[0] == rows,
            f"attention: {name} is {tuple(tensor.shape)}, not [{rows}, H, D]",
        )
    require(q.shape[1] % k.shape[1] == 0, f"attention: {q.shape[1]} query heads over {k.shape[1]} key heads")
    out = []
    if cache is not None:
        for slot, start, begin, end in bounds(segments):
            _write_pages(k[begin:end], v[begin:end], cache, slot, start)
    for slot, start, begin, end in bounds(segments):
        require(start == 0 or cache is not None, f"attention: segment starts at {start}, but there is no cache")
        own_rows = slice(begin, end)
        if cache is None:
            key, value = (F.pad(t[own_rows], (0, 0, 0, 0, 0, -(end - begin) % SPLIT_TOKENS)) for t in (k, v))
        else:
            key, value = _read_pages(cache, slot, start + end - begin)
        row_tau = None if tau is None else tau[own_rows]
        out.append(_attend(q[own_rows], key, value, rel[own_rows], rel_proj, start, scale, window, first, row_tau))
    return torch.cat([q.new_zeros(0, *q.shape[1:]), *out])


def _write_pages(k: Tensor, v: Tensor, cache: PagedKV, slot: int, start: int) -> None:
    """Writes one segment's keys and values into the pages that the table names. All segments are written before any row
    attends, because two sequences may share a page that this call fills."""
    for row, position in enumerate(range(start, start + k.shape[0])):
        page = int(cache.table[slot, position // SPLIT_TOKENS])
        require(page >= 0, f"attention: cache.table holds no page for slot {slot}, position {position}")
        cache.key[page, :, :, position % SPLIT_TOKENS] = k[row]
        cache.value[page, :, position % SPLIT_TOKENS] = v[row]


def _read_pages(cache: PagedKV, slot: int, length: int) -> tuple[Tensor, Tensor]:
    """(keys, values) of the whole sequence, each [splits * SPLIT_TOKENS, H_kv, D], zeros where no page is held."""
    splits = -(-length // SPLIT_TOKENS)
    _, heads, width, _ = cache.key.shape
    key, value = (pages.new_zeros(splits, SPLIT_TOKENS, heads, width) for pages in (cache.key, cache.value))
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
    first: int,
    tau: Tensor | None,
) -> Tensor:
    """One sequence: queries at start, start + 1, … over keys at 0 … splits * SPLIT_TOKENS - 1.

    With m_s, l_s, a_s a split's max, sum and weighted values and M the max of all m_s: out = (sum_s e^(m_s - M) a_s) /
    (sum_s e^(m_s - M) l_s), both sums from left to right (Milakov & Gimelshein 2018)."""
    rows, heads, keys = q.shape[0], q.shape[1], k.shape[0]
    k, v = (widen(t).repeat_interleave(heads // k.shape[1], dim=1).transpose(0, 1) for t in (k, v))  # [H, keys, D]
    wide_q, extent = widen(q), rel_proj.shape[1]
    dot = wide_q.new_zeros(rows, heads, keys)
    for d in range(q.shape[2]):
        dot = dot + wide_q[:, :, d, None] * k[:, :, d]
    distance = torch.arange(start, start + rows)[:, None] - torch.arange(keys)  # [rows, keys]
    by_distance = matmul_chain(rel, rel_proj.t())  # [rows, H, extent]
    index = distance.clamp(0, extent - 1)[:, None].expand(rows, heads, keys)
    near = ((distance >= 0) & (distance < extent))[:, None]
    bias = torch.where(near, by_distance.gather(2, index), torch.zeros_like(dot))
    score = scale * dot + bias
    if tau is not None:
        score = tau[:, None, None] * score
    visible = distance >= 0
    if window is not None:
        visible &= (distance < window) | (torch.arange(keys) < first)
    score = score.masked_fill(~visible[:, None], -torch.inf).unflatten(2, (-1, SPLIT_TOKENS))  # [rows, H, splits, 64]
    value = v.unflatten(1, (-1, SPLIT_TOKENS))  # [H, splits, 64, D]

    split_max = score.detach().amax(-1)
    whole_max = split_max.amax(-1)
    # A split out of sight has max -inf; 0 in its stead makes all its weights exp(-inf) = 0 instead of NaN.
    weight = exp(score - split_max.masked_fill(split_max == -torch.inf, 0)[..., None])
    split_sum = sum_last(weight)
    split_out = wide_q.new_zeros(*split_max.shape, v.shape[2])
    for j in range(SPLIT_TOKENS):
        split_out = split_out + weight[..., j, None] * value[:, :, j]
    rescale = exp(split_max - whole_max[..., None])
    total, out = torch.zeros_like(whole_max), torch.zeros_like(split_out[:, :, 0])
    for s in range(split_max.shape[2]):
        total = total + rescale[:, :, s] * split_sum[:, :, s]
        out = out + rescale[:, :, s, None] * split_out[:, :, s]
    return (out / total[..., None]).to(q.dtype)
