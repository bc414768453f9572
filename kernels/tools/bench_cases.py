"""What `kernels.tools.bench` times: for each op and shape one call of ours and one of torch's that do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import InklingTextConfig
from transformers.models.inkling.modeling_inkling import InklingExperts

from kernels import ops
from kernels.layout import SPLIT_TOKENS, PackedExperts, PagedKV, Segments

Call = Callable[[], object]
Op = Callable[[], Tensor]

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
LINEAR = ((128, 320), (256, 128), (512, 1536), (1024, 4096), (2048, 8192))  # K, N; the first two are the tiny preset's
NORM = (128, 512, 2048)
GELU = (320, 1216)
VOCABULARY = (256, 16384)
HEADS = ((4, 2, 32), (8, 2, 64), (32, 8, 128))  # query heads, key heads, width: presets tiny, base, inkling_small
EXPERTS = ((8, 2, 128, 128), (16, 4, 512, 256), (16, 2, 1024, 1024))  # experts, top-k, D, inner width
TORCH_EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' names
MOST_GATHERED = 1 << 30  # bytes; batched_mm copies each row's expert weights, 25 GB for 1,024 rows of the largest shape
DECODE_KEYS = 4096
FIRST_KEYS, FAR = 64, 1 << 17  # of a session that keeps its first keys and a window; its position
REL_CHANNELS, REL_EXTENT = 16, 1024


@dataclass(frozen=True)
class Case:
    """Two callables that do the same work, ours and torch's, and how much work that is."""

    op: str
    dtype: torch.dtype
    shape: str
    rows: int
    direction: str  # forward or backward
    ours: Call
    torch: Call
    flops: float
    bytes: float


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, dtype=dtype).requires_grad_()


def _both_ways(
    op: str, shape: str, rows: int, ours: Op, theirs: Op, leaves: list[Tensor], flops: float, traffic: float,
    fewer: list[Tensor] | None = None,
) -> Iterator[Case]:  # fmt: skip
    """A forward and a backward case. The backward is counted as twice the flops and three times the traffic. ``fewer``:
    the leaves of torch's function, when it lacks some of ours."""
    dtype = leaves[0].dtype
    yield Case(op, dtype, shape, rows, "forward", torch.no_grad()(ours), torch.no_grad()(theirs), flops, traffic)
    calls = (_backward(ours(), leaves), _backward(theirs(), fewer or leaves))
    yield Case(op, dtype, shape, rows, "backward", *calls, 2 * flops, 3 * traffic)


def _backward(out: Tensor, leaves: list[Tensor]) -> Call:
    """The backward alone; it can be called repeatedly on one graph."""
    return partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)


def linear_cases(rows: tuple[int, ...]) -> Iterator[Case]:
    for dtype, (k, n) in product(DTYPES, LINEAR):
        w = (random(n, k, dtype=dtype) / k**0.5).requires_grad_()
        packed = ops.pack_linear(w)
        for t in rows:
            x = _leaf(t, k, dtype=dtype)
            ours, theirs = partial(ops.linear, x, packed), partial(F.linear, x, w)
            traffic = float(dtype.itemsize * (n * k + t * k + t * n))
            yield from _both_ways("linear", f"{k}x{n}", t, ours, theirs, [x, w], 2.0 * t * k * n, traffic)


def norm_cases(rows: tuple[int, ...]) -> Iterator[Case]:
    for dtype, d, t in product(DTYPES, NORM, rows):
        x, w = _leaf(t, d, dtype=dtype), _leaf(d, dtype=dtype)
        ours, theirs = partial(ops.rms_norm, x, w, 1e-6), partial(F.rms_norm, x, (d,), w, 1e-6)
        yield from _both_ways("rms_norm", str(d), t, ours, theirs, [x, w], 4.0 * t * d, 2.0 * dtype.itemsize * t * d)


def gelu_cases(rows: tuple[int, ...]) -> Iterator[Case]:
    for dtype, n, t in product(DTYPES, GELU, rows):
        x = _leaf(t, n, dtype=dtype)
        ours, theirs = partial(ops.gelu, x), partial(F.gelu, x)
        yield from _both_ways("gelu", str(n), t, ours, theirs, [x], 45.0 * t * n, 2.0 * dtype.itemsize * t * n)


def logprob_cases(rows: tuple[int, ...]) -> Iterator[Case]:
    for v, t in product(VOCABULARY, rows):
        x, token = _leaf(t, v), torch.randint(v, (t,))
        allowed, row_class = torch.ones(1, v, dtype=torch.bool), torch.zeros(t, dtype=torch.int64)
        ours, theirs = partial(_logprob, x, token, allowed, row_class), partial(_torch_logprob, x, token)
        yield from _both_ways("logprob", str(v), t, ours, theirs, [x], 8.0 * t * v, 4.0 * t * v)


def _logprob(x: Tensor, token: Tensor, allowed: Tensor, row_class: Tensor) -> Tensor:
    return ops.logprob(x, token, 1.0, allowed, row_class)[0]


def _torch_logprob(x: Tensor, token: Tensor) -> Tensor:
    return F.log_softmax(x, -1).gather(1, token[:, None])


def decode_cases(sequences: tuple[int, ...], far: bool = False) -> Iterator[Case]:
    """One new token for each of some sequences that hold DECODE_KEYS keys already; ``far``: of sequences at position
    FAR that see FIRST_KEYS keys and then a window, together as many."""
    for dtype, (heads, kv, d), t in product(DTYPES, HEADS, sequences):
        if t * kv * d > 4096:
            continue  # hundreds of MB of keys
        q, k, v = (random(t, h, d, dtype=dtype) for h in (heads, kv, kv))
        rel = random(t, heads, REL_CHANNELS, dtype=dtype)
        proj = 0.02 * random(REL_CHANNELS, REL_EXTENT, dtype=dtype)
        pages, at = DECODE_KEYS // SPLIT_TOKENS + 1, FAR if far else DECODE_KEYS
        held = torch.arange(t * pages, dtype=torch.int32).view(t, pages)
        kept, between = FIRST_KEYS // SPLIT_TOKENS, torch.full((t, (at - DECODE_KEYS) // SPLIT_TOKENS), -1).int()
        cache = PagedKV(
            random(t * pages, kv, d, SPLIT_TOKENS, dtype=dtype), random(t * pages, kv, SPLIT_TOKENS, d, dtype=dtype),
            torch.cat([held[:, :kept], between, held[:, kept:]], 1),
        )  # fmt: skip
        segments = Segments.build(list(range(t)), [at] * t, [1] * t)
        window = DECODE_KEYS + 1 - FIRST_KEYS if far else None
        ours = partial(
            ops.attention, q, k, v, rel, proj, segments, scale=1 / d, window=window, first=FIRST_KEYS, cache=cache
        )
        keys, values = (random(t, kv, DECODE_KEYS + 1, d, dtype=dtype) for _ in range(2))
        theirs = partial(
            F.scaled_dot_product_attention, q[:, :, None], keys, values, scale=1 / d, enable_gqa=True
        )  # fmt: skip
        flops = t * heads * (4.0 * d * DECODE_KEYS + 2 * REL_CHANNELS * REL_EXTENT)
        traffic = 2.0 * t * kv * d * DECODE_KEYS * dtype.itemsize
        calls = (torch.no_grad()(ours), torch.no_grad()(theirs))
        name = "attention_far" if far else "attention_decode"
        yield Case(name, dtype, f"{heads}q{kv}kv{d}", t, "forward", *calls, flops, traffic)


def prefill_cases(lengths: tuple[int, ...]) -> Iterator[Case]:
    """One whole sequence, as the learner runs it: causal, no cache."""
    for dtype, (heads, kv, d), t in product(DTYPES, HEADS[:2], lengths):
        q, k, v = (_leaf(t, h, d, dtype=dtype) for h in (heads, kv, kv))
        rel, proj = _leaf(t, heads, REL_CHANNELS, dtype=dtype), _leaf(REL_CHANNELS, REL_EXTENT, dtype=dtype)
        ours = partial(ops.attention, q, k, v, rel, proj, Segments.build([0], [0], [t]), scale=1 / d)
        flops = heads * (2.0 * d + REL_CHANNELS) * t * (t + 1)
        traffic = float(dtype.itemsize * t * (2 * heads + 2 * kv) * d)
        yield from _both_ways(
            "attention_prefill", f"{heads}q{kv}kv{d}", t, ours, partial(_torch_causal, q, k, v), [q, k, v, rel, proj],
            flops, traffic, [q, k, v],
        )  # fmt: skip


def _torch_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[3], enable_gqa=True)


# ---- mixture of experts ----


@dataclass(frozen=True)
class Routed:
    """Rows and the experts that they are routed to."""

    x: Tensor  # [T, D]
    index: Tensor  # int64 [T, J], ascending in a row
    weight: Tensor  # fp32 [T, J]
    expert: Tensor  # int32 [T * J], the same as ``index``, for `expert_linear`

    @staticmethod
    def random(t: int, experts: int, top_k: int, d: int, dtype: torch.dtype) -> Routed:
        index = torch.rand(t, experts).argsort(1)[:, :top_k].sort(1).values.contiguous()
        return Routed(_leaf(t, d, dtype=dtype), index, torch.rand(t, top_k), index.flatten().int())


def moe_cases(rows: tuple[int, ...], fastest: Callable[[list[Call]], int]) -> Iterator[Case]:
    """A mixture of experts as a whole, against the implementation of transformers that ``fastest`` picks."""
    for dtype, (experts, top_k, d, inner) in product(DTYPES, EXPERTS):
        config = InklingTextConfig(
            hidden_size=d, moe_intermediate_size=inner, n_routed_experts=experts, num_experts_per_tok=top_k
        )
        module = InklingExperts(config).to(dtype)
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
        gate_up, down = ops.pack_experts((module.gate_up_proj,)), ops.pack_experts((module.down_proj,))
        for t in rows:
            routed = Routed.random(t, experts, top_k, d, dtype)
            ours = partial(_moe, routed, gate_up, down)
            gathered = t * top_k * 3 * d * inner * dtype.itemsize
            names = TORCH_EXPERTS if gathered <= MOST_GATHERED else TORCH_EXPERTS[:2]
            ways = [partial(_torch_moe, module, way, routed) for way in names]
            theirs = ways[fastest([torch.no_grad()(way) for way in ways])]
            traffic = float(dtype.itemsize * (min(t * top_k, experts) * 3 * d * inner + 2 * t * d))
            yield from _both_ways(
                "moe", f"{experts}e{top_k}k{d}x{inner}", t, ours, theirs, [routed.x, *module.parameters()],
                6.0 * t * top_k * d * inner, traffic,
            )  # fmt: skip


def _moe(routed: Routed, gate_up: PackedExperts, down: PackedExperts) -> Tensor:
    inner = ops.swiglu(ops.expert_linear(routed.x, gate_up, routed.expert, routed.index.shape[1]))
    return ops.moe_combine(ops.expert_linear(inner, down, routed.expert), routed.weight)


def _torch_moe(module: InklingExperts, way: str, routed: Routed) -> Tensor:
    module.config._experts_implementation = way
    out: Tensor = module(routed.x, routed.index, routed.weight)
    return out


def torch_experts(x: Tensor, w: Tensor, expert: Tensor) -> Tensor:
    fan_out = expert.shape[0] // x.shape[0]
    out = x.new_empty(expert.shape[0], w.shape[1])
    for e in expert.unique().tolist():
        rows_of_expert = (expert == e).nonzero()[:, 0]
        out[rows_of_expert] = F.linear(x[rows_of_expert // fan_out], w[e])
    return out
