"""``python -m kernels.tools.bench [--json FILE]``: times of the cpu kernels and of torch's, which keep no row contract.

Both run in one process in turn, so that a busy moment of the machine hits both, and the median over the rounds counts.
Compared with: ``torch.nn.functional``'s `linear`, `rms_norm`, `gelu`, `scaled_dot_product_attention` (without a
relative bias, which ours adds), `log_softmax` with the pick of one token (ours adds entropy and a digest of the
row), and for a mixture of experts the fastest of transformers' implementations of Inkling's experts. Backward is the
backward alone. `expert_linear` is timed on both of its paths, gather + GEMV and grouped GEMM, and their results must be
equal in every bit.

Beside the times are printed the GB/s (each input, weight and output counted once) and GFLOP/s, and the most that the
machine can do: by a loop that only reads, and by one that only multiplies and adds. At the end are the aims: each with
its limit, in how many cases it was met, and the worst case. torch.set_num_threads and OMP_NUM_THREADS govern both
libraries.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("kernels.tools.bench")

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product

import torch
from rich.console import Console

from kernels import dispatch, ops
from kernels.cpu.library import bind
from kernels.cpu.moe import GATHER, GROUPED, expert_linear_by
from kernels.tools import bench_cases as cases
from kernels.tools.bench_cases import Call, Case
from kernels.tools.bench_report import Result, aims_table, crossings, paths_table, table
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file

SLOW_S = 0.5
"""Seconds beyond which a call is run once only; when it is torch's, the shape's greater row counts are left out (on
processors without bf16 instructions torch's bf16 backward can take a hundred times as long as ours)."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds stop after ``seconds`` a case, but never before ``rounds``."""

    rounds: int
    seconds: float
    sample_s: float  # a sample repeats its call until it takes about this long


def medians(calls: tuple[Call, ...], effort: Effort) -> list[float]:
    """The median time of each call in seconds. The calls take turns, each round beginning with another one. A call too
    short to be timed alone is repeated, after one run that is not timed, since another call has emptied the caches. A
    call of more than SLOW_S is run once in all."""
    first = [_seconds(call, 1) for call in calls]  # fills caches, packs what is packed lazily
    slow = [taken > SLOW_S for taken in first]
    repeats = [
        max(1, min(1000, int(effort.sample_s / max(_seconds(call, 1), 1e-7)))) if not wait else 1
        for call, wait in zip(calls, slow, strict=True)
    ]
    samples: list[list[float]] = [[taken] if wait else [] for taken, wait in zip(first, slow, strict=True)]
    end = time.perf_counter() + effort.seconds
    for done in range(99):
        if done >= effort.rounds and time.perf_counter() > end:
            break
        begin = done % len(calls)
        for i in (*range(begin, len(calls)), *range(begin)):
            if slow[i]:
                continue
            if repeats[i] > 1:
                calls[i]()
            samples[i].append(_seconds(calls[i], repeats[i]))
    return [statistics.median(taken) for taken in samples]


def _seconds(call: Call, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def fastest(effort: Effort, calls: list[Call]) -> int:
    """Index of the fastest call, by a short measurement."""
    taken = medians(tuple(calls), replace(effort, rounds=2, seconds=0))
    return min(range(len(calls)), key=taken.__getitem__)


def ceilings(megabytes: int) -> tuple[float, float]:
    """(GB/s of a loop that reads memory far beyond the caches, GFLOP/s of one that only multiplies and adds)."""
    read, multiply_add = bind("ceiling_read", "pi"), bind("ceiling_fma", "i")
    lanes, steps = bind("ceiling_lanes", "")(), 1_000_000
    buffer = torch.zeros(megabytes * 250_000)
    read(buffer.data_ptr(), buffer.numel())
    read_s = min(_seconds(partial(read, buffer.data_ptr(), buffer.numel()), 1) for _ in range(7))
    fma_s = min(_seconds(partial(multiply_add, steps), 1) for _ in range(5))
    return buffer.numel() * 4 / read_s / 1e9, 24 * lanes * steps * torch.get_num_threads() / fma_s / 1e9


@torch.no_grad()
def measure_paths(rows: tuple[int, ...], effort: Effort, ceiling: tuple[float, float]) -> list[Result]:
    """Times `expert_linear` by each path and by the one it chooses, and one `F.linear` for each expert in use."""
    results = []
    for dtype, (experts, top_k, d, inner) in product(cases.DTYPES, cases.EXPERTS):
        n = 2 * inner
        w = cases.random(experts, n, d, dtype=dtype) / d**0.5
        packed = ops.pack_experts((w,))
        for t in rows:
            routed = cases.Routed.random(t, experts, top_k, d, dtype)
            x, expert = routed.x.detach(), routed.expert
            paths = [partial(expert_linear_by, path, x, packed, expert, top_k) for path in (GATHER, GROUPED)]
            calls = (
                partial(ops.expert_linear, x, packed, expert, top_k),
                *paths,
                partial(cases.torch_experts, x, w, expert),
            )
            ours_s, gather_s, grouped_s, torch_s = medians(calls, effort)
            traffic = dtype.itemsize * (min(t * top_k, experts) * n * d + t * d + t * top_k * n)
            results.append(
                Result(
                    "expert_linear", _name(dtype), f"{experts}e{top_k}k{d}x{n}", t, "forward", ours_s * 1e6,
                    torch_s * 1e6, ours_s / torch_s, traffic / ours_s / 1e9, 2.0 * t * top_k * d * n / ours_s / 1e9,
                    *ceiling, torch.get_num_threads(), gather_s * 1e6, grouped_s * 1e6,
                    torch.equal(paths[0](), paths[1]()),
                )
            )  # fmt: skip
    return results


# ---- running and printing ----


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def measure(case: Case, effort: Effort, ceiling: tuple[float, float]) -> Result:
    ours_s, torch_s = medians((case.ours, case.torch), effort)
    return Result(
        case.op, _name(case.dtype), case.shape, case.rows, case.direction, ours_s * 1e6, torch_s * 1e6,
        ours_s / torch_s, case.bytes / ours_s / 1e9, case.flops / ours_s / 1e9, *ceiling, torch.get_num_threads(),
    )  # fmt: skip


def measure_all(group: Iterator[Case], effort: Effort, ceiling: tuple[float, float]) -> Iterator[Result]:
    too_slow = set()
    for case in group:
        kind = (case.op, case.dtype, case.shape, case.direction)
        if kind in too_slow:
            continue
        result = measure(case, effort, ceiling)
        if result.torch_us > 1e6 * SLOW_S:
            too_slow.add(kind)
        yield result


OPS = (
    "linear", "rms_norm", "gelu", "logprob", "attention_decode", "attention_far", "attention_prefill", "moe",
    "expert_linear",
)  # fmt: skip


def run(quick: bool, chosen: tuple[str, ...] = OPS) -> list[Result]:
    effort = Effort(2, 0.0, 1e-4) if quick else Effort(3, 0.12, 2e-4)
    rows = (1, 8) if quick else cases.ROWS
    ceiling = ceilings(64 if quick else 512)
    groups = {
        "linear": cases.linear_cases(rows),
        "rms_norm": cases.norm_cases(rows),
        "gelu": cases.gelu_cases(rows),
        "logprob": cases.logprob_cases(rows),
        "attention_decode": cases.decode_cases((1,) if quick else (1, 8)),
        "attention_far": cases.decode_cases((1,) if quick else (1, 8), far=True),
        "attention_prefill": cases.prefill_cases((64,) if quick else (64, 256, 1024)),
        "moe": cases.moe_cases(rows, partial(fastest, effort)),
    }
    console = Console()
    results: list[Result] = []
    console.print(
        f"{dispatch.contract()}\n{torch.get_num_threads()} of {os.cpu_count()} processors; ceilings: reading "
        f"{ceiling[0]:.1f} GB/s, fp32 multiply-add {ceiling[1]:.1f} GFLOP/s"
    )
    for name, group in groups.items():
        if name in chosen:
            timed = list(measure_all(group, effort, ceiling))
            console.print(table(name, timed))
            results += timed
    if "expert_linear" in chosen:
        timed = measure_paths(rows, effort, ceiling)
        console.print(paths_table(timed))
        for line in crossings(timed):
            console.print(line)
        results += timed
    console.print(aims_table(results))
    return results


def parser() -> Parser:
    parser = Parser("kernels.tools.bench", __doc__)
    parser.add_argument("--json", type=output_file(), help="file for the results: a list of objects")
    parser.add_argument("--quick", action="store_true", help="few rows and rounds: checks the bench, not the speed")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="time only these")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    torch.manual_seed(0)
    results = run(given.quick, tuple(given.ops))
    if given.json is not None:
        write_json(given.json, [asdict(r) for r in results], indent=1)
        print(f"written to {given.json}")
    if not all(r.paths_equal for r in results if r.paths_equal is not None):
        raise SystemExit("expert_linear: gather + GEMV and grouped GEMM differ, which breaks the row contract")
