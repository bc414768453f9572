"""What `kernels.tools.bench` prints: tables of times and ratios, which path of the experts is faster, and the aims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One line of the table. ``ratio`` is time over time: below 1 ours is faster."""

    op: str
    dtype: str
    shape: str
    rows: int
    direction: str
    ours_us: float
    torch_us: float
    ratio: float
    gbs: float
    gflops: float
    ceiling_gbs: float
    ceiling_gflops: float
    threads: int
    gather_us: float | None = None  # expert_linear only: its two paths
    grouped_us: float | None = None
    paths_equal: bool | None = None

    @property
    def where(self) -> str:
        return f"{self.dtype} {self.shape}, {self.rows} rows, {self.direction}"


@dataclass(frozen=True)
class Aim:
    """A limit that ``value`` must not exceed (``at_least``: fall below) in all cases that it applies to."""

    name: str
    limit: float
    applies: Callable[[Result], bool]
    value: Callable[[Result], float] = lambda r: r.ratio
    at_least: bool = False

    def met(self, r: Result) -> bool:
        return self.value(r) >= self.limit if self.at_least else self.value(r) <= self.limit


DECODE_TOKENS = 8  # a mixture of experts with up to so many tokens is decoding


def aims(last_level_cache: int) -> tuple[Aim, ...]:
    """``last_level_cache`` in bytes: weights beyond it come from memory."""

    def reads_memory(r: Result) -> bool:
        return r.op == "linear" and r.direction == "forward" and r.rows == 1 and weight_bytes(r) > last_level_cache

    return (
        Aim("linear / torch", 1.0, lambda r: r.op == "linear" and r.direction == "forward"),
        Aim("linear / torch, backward", 1.0, lambda r: r.op == "linear" and r.direction == "backward"),
        Aim(
            "linear / torch, bf16, up to 4 rows", 0.4,
            lambda r: r.op == "linear" and r.direction == "forward" and r.dtype == "bf16" and r.rows <= 4,
        ),
        Aim("attention decode / torch", 0.7, lambda r: r.op == "attention_decode"),
        Aim("experts' decode / transformers", 0.3, lambda r: _moe(r) and r.rows <= DECODE_TOKENS),
        Aim("experts' prefill / transformers", 0.8, lambda r: _moe(r) and r.rows > DECODE_TOKENS),
        Aim("decode linear: share of the bandwidth", 0.7, reads_memory, lambda r: r.gbs / r.ceiling_gbs, at_least=True),
    )  # fmt: skip


def _moe(r: Result) -> bool:
    return r.op == "moe" and r.direction == "forward"


def weight_bytes(r: Result) -> int:
    """Bytes of the weights of a linear case, whose shape is written KxN."""
    k, n = (int(size) for size in r.shape.split("x"))
    return k * n * {"fp32": 4, "bf16": 2}[r.dtype]


def last_level_cache() -> int:
    """Bytes, as Linux tells them ("32768K"); 0 where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=0)


def aims_table(results: list[Result]) -> Table:
    made = Table(title="aims: time over time unless said otherwise")
    for column in ("aim", "limit", "cases", "met", "median", "worst", "where"):
        made.add_column(column, justify="left" if column in ("aim", "where") else "right")
    for aim in aims(last_level_cache()):
        covered = [r for r in results if aim.applies(r)]
        if not covered:
            continue
        worst = (min if aim.at_least else max)(covered, key=aim.value)
        met = sum(aim.met(r) for r in covered)
        made.add_row(
            aim.name, f"{'≥' if aim.at_least else '≤'} {aim.limit}", str(len(covered)),
            f"[{'green' if met == len(covered) else 'red'}]{met}", f"{statistics.median(map(aim.value, covered)):.2f}",
            f"{aim.value(worst):.2f}", worst.where,
        )  # fmt: skip
    return made


def table(name: str, results: list[Result]) -> Table:
    made = Table(title=f"{name}: µs, ours / torch")
    for column in ("dtype", "shape", "rows", "direction", "ours µs", "torch µs", "ratio", "GB/s", "GFLOP/s"):
        made.add_column(column, justify="left" if column in ("dtype", "shape", "direction") else "right")
    for r in results:
        ratio = f"[{'green' if r.ratio <= 1 else 'red'}]{r.ratio:.2f}"
        made.add_row(
            r.dtype, r.shape, str(r.rows), r.direction, f"{r.ours_us:.1f}", f"{r.torch_us:.1f}", ratio, f"{r.gbs:.1f}",
            f"{r.gflops:.1f}",
        )  # fmt: skip
    return made


def paths_table(results: list[Result]) -> Table:
    made = Table(title="expert_linear: gather + GEMV against grouped GEMM, µs")
    for column in ("dtype", "shape", "tokens", "gather", "grouped", "taken", "torch", "wins", "equal bits"):
        made.add_column(column, justify="left" if column in ("dtype", "shape", "wins", "equal bits") else "right")
    for r in results:
        assert r.gather_us is not None and r.grouped_us is not None
        made.add_row(
            r.dtype, r.shape, str(r.rows), f"{r.gather_us:.1f}", f"{r.grouped_us:.1f}", f"{r.ours_us:.1f}",
            f"{r.torch_us:.1f}", "gather" if r.gather_us < r.grouped_us else "grouped",
            "[green]yes" if r.paths_equal else "[red]NO",
        )  # fmt: skip
    return made


def crossings(results: list[Result]) -> Iterator[str]:
    """For each shape a line with the least number of tokens from which grouped GEMM is the faster path."""
    for dtype, shape in dict.fromkeys((r.dtype, r.shape) for r in results):
        by_rows = [r for r in results if (r.dtype, r.shape) == (dtype, shape)]
        last = max((i for i, r in enumerate(by_rows) if (r.gather_us or 0) < (r.grouped_us or 0)), default=-1)
        where = f"from {by_rows[last + 1].rows} tokens on" if last + 1 < len(by_rows) else "nowhere measured"
        yield f"{dtype} {shape}: grouped GEMM wins {where}"
