"""The kernels' bench: its cases compare equal work, its results hold what they promise, and both expert paths agree."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.tools import bench
from kernels.tools import bench_cases as cases
from tests.kernels.contract import relative_error, telling

KEYS = {"op", "dtype", "shape", "rows", "direction", "ours_us", "torch_us", "ratio", "gbs", "gflops"}
QUICK = bench.Effort(rounds=1, seconds=0.0, sample_s=0.0)


@pytest.mark.parametrize("make", [cases.linear_cases, cases.norm_cases, cases.gelu_cases, cases.logprob_cases])
def test_both_sides_compute_one_function(make) -> None:  # type: ignore[no-untyped-def]
    for case in islice(make((5,)), 4):
        ours, theirs = case.ours(), case.torch()
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        bound = 1e-5 if case.dtype == torch.float32 else 1e-2
        for mine, other in pairs:
            assert isinstance(mine, Tensor) and isinstance(other, Tensor)
            assert relative_error(mine.flatten(), other.flatten()) < bound, (case.op, case.direction)


def test_experts_compute_one_function() -> None:
    case = next(cases.moe_cases((3,), lambda calls: 0))
    assert relative_error(case.ours(), case.torch()) < 1e-5


def test_paths_of_expert_linear_give_equal_bits() -> None:
    found = bench.measure_paths((1, 9), QUICK, (1.0, 1.0))
    assert len(found) == 2 * len(cases.DTYPES) * len(cases.EXPERTS)
    assert all(r.paths_equal for r in found)


def test_other_order_of_summation_is_seen() -> None:
    """The control: the same products in descending order of k are other bits."""
    x, expert = telling(16, 256), torch.arange(32, dtype=torch.int32) % 4
    packed = bench.ops.pack_experts((torch.ones(4, 64, 256),))
    ascending, descending = (bench.ops.expert_linear(rows, packed, expert, 2) for rows in (x, x.flip(1).contiguous()))
    assert relative_error(ascending, descending) < 1e-4 and not torch.equal(ascending, descending)


def test_crossing_is_where_grouped_begins_to_win() -> None:
    line = bench.Result("expert_linear", "fp32", "s", 1, "forward", 1, 1, 1, 1, 1, 1, 1, 1, 2.0, 3.0, True)
    lines = [line, replace(line, rows=2), replace(line, rows=4, gather_us=4.0), replace(line, rows=8, gather_us=9.0)]
    assert list(bench.crossings(lines)) == ["fp32 s: grouped GEMM wins from 4 tokens on"]
    assert list(bench.crossings(lines[:2])) == ["fp32 s: grouped GEMM wins nowhere measured"]


def test_ceilings_are_of_this_world() -> None:
    gbs, gflops = bench.ceilings(16)
    assert 0.5 < gbs < 2000 and 1 < gflops < 20000


@pytest.mark.slow
def test_quick_run_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LINEAR", cases.LINEAR[:3])
    monkeypatch.setattr(cases, "EXPERTS", cases.EXPERTS[:2])
    monkeypatch.setattr(sys, "argv", ["kernels.tools.bench", "--quick", "--json", str(tmp_path / "bench.json")])
    bench.main()
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert {row["op"] for row in rows} == {*bench.OPS}
    for row in rows:
        assert row.keys() >= KEYS and row["ours_us"] > 0 and row["torch_us"] > 0
        assert row["direction"] in ("forward", "backward") and row["dtype"] in ("fp32", "bf16")
        assert row["ratio"] == pytest.approx(row["ours_us"] / row["torch_us"])
    assert all(row["paths_equal"] for row in rows if row["op"] == "expert_linear")
