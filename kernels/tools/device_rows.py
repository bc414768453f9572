"""``python -m kernels.tools.device_rows [--json FILE]``: the row contract on the device that the backend works on.

Every op, fp32 and bf16, forward and backward: row counts from 1 to 1,000, order, neighbours, cuts, pages; sampler
beside learner; ops whose bits are the CPU backend's on every device. Controls are products that break the contract:
each must be reported as differing. Exit status 1 when a check does not hold or a control is not caught.

``--only`` runs some groups, so that several processes can share the work; most of the time goes into compiling kernels.
``--dry`` takes few and small sizes, for Triton's interpreter and the CPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("kernels.tools.device_rows")

import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import dispatch, ops
from kernels.cpu import backend as cpu
from kernels.layout import AdamWStep, PackedLinear
from kernels.tools.row_contract import (
    COUNTS,
    FEW_COUNTS,
    attention_differences,
    convolution_differences,
    gradient_differences,
    row_differences,
    same,
)
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file

GROUPS = ("products", "rows", "attention", "gradients", "controls")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Check:
    """``differences`` is empty where the contract holds. A control must have some."""

    group: str
    name: str
    differences: Callable[[], list[str]]


@dataclass(frozen=True)
class Sizes:
    """What the ops are called with."""

    rows: int
    counts: tuple[int, ...]
    few: tuple[int, ...]  # counts for gradients
    linear: tuple[tuple[int, int], ...]  # K, N
    experts: tuple[tuple[int, int, int, int], ...]  # K, N, experts, chosen for each row
    norms: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]  # query heads, key heads, head width
    length: int  # of attention's sequence
    cuts: tuple[tuple[int, ...], ...]  # rows of its calls with a cache, again and again, beside one call of all
    vocabularies: tuple[int, ...]
    elements: int  # of `dot` and `adamw`


FULL = Sizes(
    1000, COUNTS, FEW_COUNTS, ((128, 400), (512, 1536), (2048, 512), (4096, 1000), (801, 80)),
    ((128, 256, 9, 3), (512, 512, 17, 5)), (32, 64, 128, 512, 4096), ((4, 2, 32), (8, 4, 64), (32, 8, 128)), 300,
    ((1,), (5, 1, 2), (63, 1, 64, 65)), (256, 32768), 350_005,
)  # fmt: skip
DRY = Sizes(
    20, (1, 17), (3,), ((64, 80),), ((64, 32, 5, 3),), (128,), ((4, 2, 32),), 70, ((66, 1, 2),), (256,), 9_001,
)  # fmt: skip


class Cases:
    """The checks, on tensors of one seed."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.device = dispatch.device()
        self.draw = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.draw).to(dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.draw).to(self.device)

    def products(self) -> Iterator[Check]:
        s = self.sizes
        for name, dtype in DTYPES.items():
            for k, n in s.linear:
                packed = ops.pack_linear(self.normal(n, k, dtype=dtype) / math.sqrt(k))
                op = partial(ops.linear, packed=packed)
                x = self.normal(s.rows, k, dtype=dtype)
                yield Check(
                    "products", f"linear {k} -> {n}, {name}", partial(row_differences, op, (x,), s.counts, True)
                )
            for k, n, experts, fan in s.experts:
                chosen = ops.pack_experts((self.normal(experts, n, k, dtype=dtype) / math.sqrt(k),))

                def expert(x: Tensor, e: Tensor, pack=chosen, fan: int = fan) -> Tensor:  # type: ignore[no-untyped-def]
                    return ops.expert_linear(x, pack, e.reshape(-1).contiguous(), fan).view(x.shape[0], -1)

                inputs = self.normal(s.rows, k, dtype=dtype), self.integers(experts, s.rows, fan).int()
                title = f"expert_linear {k} -> {n} of {experts}, {name}"
                yield Check("products", title, partial(row_differences, expert, inputs, s.counts))

    def rows(self) -> Iterator[Check]:
        s = self.sizes
        for name, dtype in DTYPES.items():
            for width in s.norms:
                op = partial(ops.rms_norm, weight=self.normal(width, dtype=dtype), eps=1e-6)
                x = self.normal(s.rows, width, dtype=dtype)
                yield Check("rows", f"rms_norm {width}, {name}", partial(row_differences, op, (x,), s.counts))
            x = self.normal(s.rows, 512, dtype=dtype)
            yield Check("rows", f"swiglu, {name}", partial(row_differences, ops.swiglu, (x,), s.counts))
            x = 3 * self.normal(s.rows, 256, dtype=dtype)
            yield Check("rows", f"gelu, {name}", partial(row_differences, ops.gelu, (x,), s.counts))
            combined = self.normal(s.rows, 3, 128, dtype=dtype), self.normal(s.rows, 3).abs()
            yield Check("rows", f"moe_combine, {name}", partial(row_differences, _combine, combined, s.counts))
            for width in (256, 1024):
                x, taps = self.normal(40, width, dtype=dtype), self.normal(width, 4)
                cut = (1, 1, 2, 7, 1, 20, 8)
                yield Check("rows", f"short_conv {width}, {name}", partial(convolution_differences, x, taps, cut))
        table = self.normal(80 * 16, 128)
        codes = self.integers(16, s.rows, 80).to(torch.uint8)
        embed = partial(ops.embedding_sum, table=table, bins=16)
        yield Check("rows", "embedding_sum", partial(row_differences, embed, (codes,), s.counts))
        route = partial(ops.route, bias=self.normal(8), top_k=2, shared=1)
        yield Check("rows", "route", partial(row_differences, route, (self.normal(s.rows, 9),), s.counts))
        yield from self._sampling()
        yield Check("rows", "dot: bits of the CPU", self._dot)
        yield Check("rows", "adamw: bits of the CPU", self._adamw)

    def _sampling(self) -> Iterator[Check]:
        s = self.sizes
        for vocabulary in s.vocabularies:
            allowed = (torch.rand(3, vocabulary, generator=self.draw) > 0.1).to(self.device)
            logits, classes = self.normal(s.rows, vocabulary), self.integers(3, s.rows)
            keys = torch.randint(-(2**62), 2**62, (s.rows,), generator=self.draw).to(self.device)

            def sample(x: Tensor, key: Tensor, kind: Tensor, allowed: Tensor = allowed) -> tuple[Tensor, ...]:
                return ops.sample(x, 1.0, key, allowed, kind)

            def scored(
                x: Tensor = logits, key: Tensor = keys, kind: Tensor = classes, a: Tensor = allowed
            ) -> list[str]:
                token, logprob, digest = ops.sample(x, 1.0, key, a, kind)
                learned, _, other = ops.logprob(x.clone().requires_grad_(), token, 1.0, a, kind)
                return [] if same(learned.detach(), logprob) and same(other, digest) else ["sampler and learner"]

            inputs = logits, keys, classes
            yield Check("rows", f"sample of {vocabulary}", partial(row_differences, sample, inputs, s.counts))
            yield Check("rows", f"logprob of {vocabulary}: the sampler's bits", scored)

    def _dot(self) -> list[str]:
        a, b = self.normal(self.sizes.elements), self.normal(self.sizes.elements)
        return [] if same(ops.dot(a, b).cpu(), cpu.dot(a.cpu(), b.cpu())) else ["sum"]

    def _adamw(self) -> list[str]:
        n = self.sizes.elements
        p, g, m, v = there = self.normal(n), self.normal(n), self.normal(n), self.normal(n).abs()
        host = p2, g2, m2, v2 = tuple(x.cpu().clone() for x in there)
        step = AdamWStep.build(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, taken=3)
        ops.adamw(p, g, m, v, step)
        cpu.adamw(p2, g2, m2, v2, step)
        names = ("parameter", "gradient", "first moment", "second moment")
        return [name for name, x, y in zip(names, there, host, strict=True) if not same(x.cpu(), y)]

    def attention(self) -> Iterator[Check]:
        length = self.sizes.length
        cuts = ((length,), *self.sizes.cuts)
        for name, dtype in DTYPES.items():
            for heads, key_heads, width in self.sizes.heads:
                for window, first in ((None, 0), (128, 0), (64, 64)):
                    shapes = (heads, width), (key_heads, width), (key_heads, width), (heads, 16)
                    inputs = [self.normal(length, *shape, dtype=dtype) for shape in shapes]
                    bias = (0.02 * self.normal(16, 512)).to(dtype)
                    run = partial(attention_differences, inputs, bias, 1 / width, window, cuts, first)
                    keys = f"window {window}" + (f" and first {first}" if first else "")
                    yield Check("attention", f"attention {heads}/{key_heads} x {width}, {keys}, {name}", run)

    def gradients(self) -> Iterator[Check]:
        s = self.sizes

        def check(title: str, op: Callable[..., Tensor], inputs: tuple[Tensor, ...], *weights: Tensor) -> Check:
            run = partial(gradient_differences, op, inputs, weights, s.few)
            return Check("gradients", f"gradient of {title}", run)

        for name, dtype in DTYPES.items():
            x, w = self.normal(s.rows, 128, dtype=dtype), self.normal(400, 128, dtype=dtype) / 11
            yield check(f"linear, {name}", lambda x, w: ops.linear(x, ops.pack_linear(w)), (x,), w)
            w = self.normal(128, dtype=dtype)
            yield check(f"rms_norm, {name}", lambda x, w: ops.rms_norm(x, w, 1e-6), (x,), w)
            yield check(f"swiglu, {name}", ops.swiglu, (self.normal(s.rows, 256, dtype=dtype),))
            yield check(f"gelu, {name}", ops.gelu, (3 * self.normal(s.rows, 128, dtype=dtype),))
            inputs = self.normal(s.rows, 3, 128, dtype=dtype), self.normal(s.rows, 3).abs()
            yield check(f"moe_combine, {name}", _combine, inputs)
            x, w = self.normal(s.rows, 64, dtype=dtype), self.normal(5, 96, 64, dtype=dtype) / 8
            yield check(f"expert_linear, {name}", _first_expert, (x,), w)
        allowed = torch.ones(1, 256, dtype=torch.bool, device=self.device)

        def chosen(x: Tensor) -> Tensor:
            zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            logprob, entropy, _ = ops.logprob(x, zeros, 1.0, allowed, zeros)
            return logprob + entropy

        yield check("logprob and entropy", chosen, (self.normal(s.rows, 256),))

    def controls(self) -> Iterator[Check]:
        """Products whose order of summation, or whose rounding, depends on the number of rows."""
        s = self.sizes
        for name, dtype in DTYPES.items():
            k, n = s.linear[0]
            weight = self.normal(n, k, dtype=dtype) / math.sqrt(k)
            whole, halves = ops.pack_linear(weight), [ops.pack_linear(w.contiguous()) for w in weight.split(k // 2, 1)]
            inputs = (self.normal(s.rows, k, dtype=dtype),)
            op = partial(_split_by_rows, whole=whole, halves=halves)
            title = f"product that splits K for 16 rows and more, {name}"
            yield Check("controls", title, partial(row_differences, op, inputs, s.counts))


def _combine(y: Tensor, weight: Tensor) -> Tensor:
    """y [T, J, D], weight [T, J] -> [T, D]."""
    return ops.moe_combine(y.reshape(-1, y.shape[-1]), weight.contiguous())


def _first_expert(x: Tensor, weight: Tensor) -> Tensor:
    expert = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    return ops.expert_linear(x, ops.pack_experts((weight,)), expert, 1)


def _split_by_rows(x: Tensor, whole: PackedLinear, halves: list[PackedLinear]) -> Tensor:
    """Breaks the row contract as a library does that splits K by the shape and adds partial results of x's type."""
    if len(x) < 16:
        return ops.linear(x, whole)
    parts = x.split(halves[0].cols, dim=1)
    first, second = (ops.linear(part, pack) for part, pack in zip(parts, halves, strict=True))
    return first + second


def run(groups: tuple[str, ...], sizes: Sizes) -> dict[str, dict[str, list[str]]]:
    """Differences by name, for ``rows`` (must be empty) and ``controls`` (must not be). An error is a difference, and a
    control that raises is not caught; whatever fails, the other checks still run."""
    report: dict[str, dict[str, list[str]]] = {"rows": {}, "controls": {}}
    cases = Cases(sizes)
    for group in groups:
        is_control = group == "controls"
        book = report["controls" if is_control else "rows"]
        try:
            for check in getattr(cases, group)():
                error, found = _tried(check)
                book[check.name] = [] if is_control and error else found
                right = bool(book[check.name]) == is_control
                print(f"{'ok  ' if right else 'FAIL'} {check.name} {'; '.join(found[:4])}", flush=True)
        except Exception as error:
            traceback.print_exc()
            book[f"group {group}"] = [] if is_control else [f"{type(error).__name__}: {str(error)[:300]}"]
            print(f"FAIL group {group} ended early: {error}", flush=True)
    return report


def _tried(check: Check) -> tuple[bool, list[str]]:
    """Whether it raised, and the differences."""
    try:
        return False, check.differences()
    except Exception as error:
        traceback.print_exc()
        return True, [f"{type(error).__name__}: {str(error)[:300]}"]


def parser() -> Parser:
    parser = Parser("kernels.tools.device_rows", __doc__)
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write what differed to FILE")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--dry", action="store_true", help="few and small sizes")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    begin = time.perf_counter()
    report = run(tuple(given.only), DRY if given.dry else FULL)
    failed = [name for name, found in report["rows"].items() if found]
    missed = [name for name, found in report["controls"].items() if not found]
    held = len(report["rows"]) - len(failed)
    caught = len(report["controls"]) - len(missed)
    print(
        f"row contract on {dispatch.instruction_set()}: {held} of {len(report['rows'])} hold, {caught} of "
        f"{len(report['controls'])} controls caught, {time.perf_counter() - begin:.0f} s"
    )
    if given.json is not None:
        stamp = {"contract_id": dispatch.contract_id(), "contract": dispatch.contract()}
        write_json(given.json, stamp | report, indent=1)
    if failed or missed:
        raise SystemExit(1)
