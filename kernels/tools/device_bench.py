"""``python -m kernels.tools.device_bench [--json FILE]``: every op beside torch's function for the same work, on a GPU.

cuBLAS for products (one for each expert where rows are many), scaled_dot_product_attention for attention (without a
relative bias, which ours has on top), torch's own kernels for the rest; none of them promises anything about bits.
``device`` is the sum of an op's kernel times on the device, ``host`` the time until its call returns
(`kernels.tools.device_time`); with it stands a lower bound, the bytes that must move at RATE. A ratio is ours over
torch's, of device times.

Run it with no other work on the device. ``--dry`` takes tiny sizes, for the interpreter and the CPU, and compares
nothing of use.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("kernels.tools.device_bench")

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch, ops
from kernels.layout import SPLIT_TOKENS, AdamWStep, PagedKV, Segments
from kernels.tools.device_time import Call, measure
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file
from model.program.ranges import Range, number

RATE = 3.0e12
"""Bytes a second: what a large copy reached on an H100's memory."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Two calls that do one piece of work, and how much it is."""

    op: str
    what: str  # direction, type and sizes
    ours: Call
    torch: Call
    moved: float  # bytes that are read and written at least
    flops: float = 0.0


@dataclass(frozen=True)
class Result:
    """Microseconds of one call; see `kernels.tools.device_time.Times`."""

    op: str
    what: str
    ours_us: float
    torch_us: float
    ratio: float  # ours over torch
    ours_copies_us: float
    ours_host_us: float
    torch_host_us: float
    ours_kernels: float  # launched by one call
    torch_kernels: float
    bound_us: float  # the bytes at RATE
    tflops: float | None  # 10^12 operations a second, of products
    clock: str


class Cases:
    """Cases by op; ``dry``: tiny."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = dispatch.device()
        self.draw = torch.Generator().manual_seed(0)
        self.rows = (1, 4) if dry else (1, 8, 64, 512, 4096)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.draw).to(dtype).to(self.device)

    def linear(self) -> Iterator[Case]:
        sizes = ((128, 400),) if self.dry else ((128, 400), (512, 1536), (512, 32768), (4096, 4096))
        for (name, dtype), (k, n) in product(DTYPES.items(), sizes):
            w = self.normal(n, k, dtype=dtype) / math.sqrt(k)
            packed = ops.pack_linear(w)
            for t in self.rows:
                x = self.normal(t, k, dtype=dtype)
                moved, flops = float(dtype.itemsize * (k * n + t * (k + n))), 2.0 * t * k * n
                what = f"forward {name}, {t} x {k} -> {n}"
                yield Case("linear", what, partial(ops.linear, x, packed), partial(F.linear, x, w), moved, flops)
            if (k, n) == sizes[-1]:
                continue
            t = self.rows[-1]
            x, w = self.normal(t, k, dtype=dtype).requires_grad_(), w.requires_grad_()
            calls = backward(ops.linear(x, ops.pack_linear(w)), [x, w]), backward(F.linear(x, w), [x, w])
            yield Case("linear", f"backward {name}, {t} x {k} -> {n}", *calls, 2 * moved, 2 * flops)

    def experts(self) -> Iterator[Case]:
        sizes = ((64, 32, 4, 2),) if self.dry else ((128, 256, 9, 3), (512, 512, 17, 5))
        for (name, dtype), (k, n, experts, fan) in product(DTYPES.items(), sizes):
            w = self.normal(experts, n, k, dtype=dtype) / math.sqrt(k)
            packed = ops.pack_experts((w,))
            for t in self.rows:
                x = self.normal(t, k, dtype=dtype)
                expert = torch.rand(t, experts, generator=self.draw).topk(fan).indices.flatten().int().to(self.device)
                used = min(experts, t * fan)
                moved, flops = float(dtype.itemsize * (used * k * n + t * k + t * fan * n)), 2.0 * t * fan * k * n
                ours, theirs = partial(ops.expert_linear, x, packed, expert, fan), partial(gather, x, w, expert, fan)
                yield Case("expert_linear", f"{name}, {t} x {k} -> {n}, {fan} of {experts}", ours, theirs, moved, flops)

    def rowwise(self) -> Iterator[Case]:
        for (name, dtype), t in product(DTYPES.items(), (1, 4) if self.dry else (1, 64, 4096)):
            size = dtype.itemsize
            for width in (128,) if self.dry else (512, 4096):
                x, w = self.normal(t, width, dtype=dtype), self.normal(width, dtype=dtype)
                calls = partial(ops.rms_norm, x, w, 1e-6), partial(F.rms_norm, x, (width,), w, 1e-6)
                yield Case("rms_norm", f"forward {name}, {t} x {width}", *calls, 2.0 * t * width * size)
            x = self.normal(t, 1024, dtype=dtype)
            calls = partial(ops.swiglu, x), partial(gated, x)
            yield Case("swiglu", f"{name}, {t} x 512", *calls, 1.5 * t * 1024 * size)
            calls = partial(ops.gelu, x), partial(F.gelu, x)
            yield Case("gelu", f"{name}, {t} x 1024", *calls, 2.0 * t * 1024 * size)
            y, weight = self.normal(t * 5, 512, dtype=dtype), self.normal(t, 5).abs()
            calls = partial(ops.moe_combine, y, weight), partial(weighted, y, weight)
            yield Case("moe_combine", f"{name}, {t} x 5 x 512", *calls, 6.0 * t * 512 * size)
            taps = self.normal(1024, 4)
            segments = Segments.build([0], [0], [t])
            calls = partial(ops.short_conv, x, taps, segments), partial(convolved, x, taps.to(dtype)[:, None])
            yield Case("short_conv", f"{name}, {t} x 1024", *calls, 2.0 * t * 1024 * size)
        for t in self.rows:
            table, codes = self.normal(80 * 16, 512), torch.randint(0, 16, (t, 80), generator=self.draw)
            codes = codes.to(torch.uint8).to(self.device)
            places = codes.long() + 16 * torch.arange(80, device=self.device)
            calls = partial(ops.embedding_sum, codes, table, 16), partial(F.embedding_bag, places, table, mode="sum")
            yield Case("embedding_sum", f"fp32, {t} x 80 -> 512", *calls, 4.0 * (min(t * 80, 1280) + t) * 512)
            logits, bias = self.normal(t, 17), self.normal(16)
            ours, theirs = partial(ops.route, logits, bias, 4, 1), partial(routed, logits, bias)
            yield Case("route", f"{t} x 17", ours, theirs, 4.0 * t * 27)

    def attention(self) -> Iterator[Case]:
        heads, kv, width = 8, 2, 64
        for name, dtype in DTYPES.items():
            for sessions, length in ((1, 64),) if self.dry else ((1, 512), (48, 512), (1, 8192), (48, 4096)):
                pages = length // SPLIT_TOKENS
                cache = PagedKV(
                    self.normal(sessions * pages, kv, width, SPLIT_TOKENS, dtype=dtype),
                    self.normal(sessions * pages, kv, SPLIT_TOKENS, width, dtype=dtype),
                    torch.arange(sessions * pages, dtype=torch.int32, device=self.device).view(sessions, pages),
                )
                q, k, v, rel, proj = self._heads(sessions, heads, kv, width, dtype)
                segments = Segments.build(list(range(sessions)), [length - 1] * sessions, [1] * sessions)
                keys, values = (self.normal(sessions, kv, length, width, dtype=dtype) for _ in range(2))
                ours = partial(ops.attention, q, k, v, rel, proj, segments, scale=1 / width, cache=cache)
                theirs = partial(
                    F.scaled_dot_product_attention, q[:, :, None], keys, values, scale=1 / width, enable_gqa=True
                )
                moved = 2.0 * sessions * kv * length * width * dtype.itemsize
                yield Case("attention, decode", f"{name}, {sessions} sessions x {length} keys", ours, theirs, moved)
            for sequences, length in ((1, 40),) if self.dry else ((8, 500), (48, 500)):
                rows = sequences * length
                q, k, v, rel, proj = self._heads(rows, heads, kv, width, dtype)
                segments = Segments.build(list(range(sequences)), [0] * sequences, [length] * sequences)
                each = [x.view(sequences, length, -1, width).transpose(1, 2) for x in (q, k, v)]  # [S, H, T, D]
                attend = partial(ops.attention, segments=segments, scale=1 / width)
                theirs = partial(causal, each, 1 / width)
                flops, moved = 2.0 * rows * heads * length * width, 2.0 * rows * (heads + kv) * width * dtype.itemsize
                what = f"{name}, {sequences} x {length}"
                yield Case(
                    "attention, whole", f"forward {what}", partial(attend, q, k, v, rel, proj), theirs, moved, flops
                )
                leaves = [x.detach().requires_grad_() for x in (q, k, v, rel, proj)]
                other = [x.detach().requires_grad_() for x in each]
                out = attend(*leaves)
                library = causal(other, 1 / width)
                calls = backward(out, leaves), backward(library, other)
                yield Case("attention, whole", f"backward {what}", *calls, 2 * moved, 2.5 * flops)

    def _heads(self, rows: int, heads: int, kv: int, width: int, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (self.normal(rows, h, width, dtype=dtype) for h in (heads, kv, kv))
        return [q, k, v, self.normal(rows, heads, 16, dtype=dtype), 0.02 * self.normal(16, 1024, dtype=dtype)]

    def logits(self) -> Iterator[Case]:
        for v, t in product((256,) if self.dry else (256, 32768), (2,) if self.dry else (1, 48, 2048)):
            logits, allowed = self.normal(t, v), torch.ones(3, v, dtype=torch.bool, device=self.device)
            kinds, keys = torch.zeros(t, dtype=torch.int64, device=self.device), torch.arange(t, device=self.device)
            tokens, what, moved = keys % v, f"{t} x {v}", 4.0 * t * v
            calls = partial(ops.sample, logits, 1.0, keys, allowed, kinds), partial(drawn, logits)
            yield Case("sample", what, *calls, moved)
            calls = partial(ops.logprob, logits, tokens, 1.0, allowed, kinds), partial(picked, logits, tokens)
            yield Case("logprob", f"forward {what}", *calls, moved)
            leaf = logits.clone().requires_grad_()
            ours = ops.logprob(leaf, tokens, 1.0, allowed, kinds)[0]
            yield Case(
                "logprob", f"backward {what}", backward(ours, [leaf]), backward(picked(leaf, tokens), [leaf]), 3 * moved
            )

    def updates(self) -> Iterator[Case]:
        for n in (1000,) if self.dry else (2_000_000, 125_000_000):
            a, b, c, d = (torch.rand(n, device=self.device) for _ in range(4))
            yield Case("dot", f"{n:,}", partial(ops.dot, a, b), partial(product64, a, b), 8.0 * n)
            step = AdamWStep.build(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, taken=3)
            other = torch.nn.Parameter(a.clone())
            other.grad = b.clone()
            library = torch.optim.AdamW([other], lr=1e-3, fused=True)
            yield Case("adamw", f"{n:,}", partial(ops.adamw, a, b, c, d, step), library.step, 28.0 * n)


def causal(heads: list[Tensor], scale: float) -> Tensor:
    """q, k and v of whole sequences, each [S, H, T, D]."""
    q, k, v = heads
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, is_causal=True)


def backward(out: Tensor, leaves: list[Tensor]) -> Call:
    """The backward alone, over and over on one graph."""
    return partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)


def gather(x: Tensor, w: Tensor, expert: Tensor, fan: int) -> Tensor:
    """Rows' own expert weights gathered and multiplied while they are few, a product for each expert when not."""
    if len(expert) <= 64:
        return torch.bmm(w[expert], x.repeat_interleave(fan, 0)[:, :, None])[:, :, 0]
    order = expert.argsort()
    ends = torch.bincount(expert, minlength=len(w)).cumsum(0)
    rows, out = x.repeat_interleave(fan, 0)[order], x.new_empty(len(expert), w.shape[1])
    bounds = [0, *ends.tolist()]
    for e in range(len(w)):
        out[order[bounds[e] : bounds[e + 1]]] = rows[bounds[e] : bounds[e + 1]] @ w[e].T
    return out


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def weighted(y: Tensor, weight: Tensor) -> Tensor:
    return (y.view(*weight.shape, -1) * weight[:, :, None]).sum(1)


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    return x + F.conv1d(F.pad(x.T[None], (3, 0)), taps, groups=x.shape[1])[0].T


def routed(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    score = torch.sigmoid(logits)
    best = torch.topk(score[:, :-1] + bias, 4).indices
    chosen = torch.cat([score.gather(1, best), score[:, -1:]], 1)
    return best, chosen / chosen.sum(1, keepdim=True)


def drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits, 1), 1)


def picked(logits: Tensor, token: Tensor) -> Tensor:
    return torch.log_softmax(logits, 1).gather(1, token[:, None])


def product64(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b)


FAMILIES = ("linear", "attention", "logits", "experts", "rowwise", "updates")
"""In the order of what is asked first, should the time run out."""


TOGETHER = 8
"""Cases that share one trace of the profiler, whose start costs more than they do."""


def run(dry: bool, families: tuple[str, ...], repeat: int, keep: Callable[[list[Result]], None]) -> list[Result]:
    """Every case of ``families``; ``keep`` is called with all results so far after each family."""
    torch.backends.cuda.matmul.allow_tf32 = False
    cases, results = Cases(dry), list[Result]()
    for family in families:
        try:
            group = getattr(cases, family)()
            while some := list(islice(group, TOGETHER)):
                for result in _measured(some, repeat, cases.device):
                    results.append(result)
                    print(line(result), flush=True)
        except Exception:  # the other families are still measured
            print(f"{family} ended early", flush=True)
            traceback.print_exc()
        keep(results)
    return results


@torch.no_grad()
def _measured(cases: list[Case], repeat: int, device: torch.device) -> list[Result]:
    times = iter(measure([call for case in cases for call in (case.ours, case.torch)], repeat, device))
    return [
        Result(
            case.op, case.what, ours.device_us, theirs.device_us, ours.device_us / theirs.device_us, ours.copies_us,
            ours.host_us, theirs.host_us, ours.kernels, theirs.kernels, 1e6 * case.moved / RATE,
            case.flops / ours.device_us / 1e6 if case.flops else None, ours.clock,
        )
        for case, ours, theirs in zip(cases, times, times, strict=True)
    ]  # fmt: skip


def line(r: Result) -> str:
    rate = f"{r.tflops:7.1f} TFLOP/s" if r.tflops else ""
    return (
        f"{r.op:18s} {r.what:44s} ours {r.ours_us:9.1f} us, torch {r.torch_us:9.1f} us, ratio {r.ratio:6.2f}, host "
        f"{r.ours_host_us:7.0f}/{r.torch_host_us:5.0f} us, {r.ours_kernels:.0f} kernels, bound {r.bound_us:7.1f} us "
        f"{rate}"
    )


def parser() -> Parser:
    parser = Parser("kernels.tools.device_bench", __doc__)
    parser.add_argument(
        "--json", type=output_file(), metavar="FILE", help="write the results to FILE, after each family of ops"
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument(
        "--repeat", type=number(int, Range(1, 10_000)), default=10, help="calls that are averaged (default: 10)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)

    def keep(results: list[Result]) -> None:
        if given.json is not None:
            report = {"contract_id": dispatch.contract_id(), "bench": [asdict(r) for r in results]}
            write_json(given.json, report, indent=1)

    results = run(given.dry, tuple(given.only), given.repeat, keep)
    if not results:
        raise SystemExit("nothing was measured")
