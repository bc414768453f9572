"""How a profiler's trace becomes times of calls."""

from __future__ import annotations

import warnings

import pytest
import torch

from kernels.tools.device_time import HOST, MARK, measure, per_call, waits

TRACE = [
    (9.0, f"at::cuda::{MARK}(long)", 50.0),
    (0.0, "warm-up", 100.0),
    (1.0, f"at::cuda::{MARK}(long)", 50.0),
    (2.0, "product_kernel", 4.0),
    (3.0, "Memcpy HtoD (Pageable -> Device)", 1.0),
    (4.0, "product_kernel", 6.0),
    (10.0, "gemm", 3.0),
    (11.0, "gemm", 5.0),
]


def test_kernels_belong_to_the_mark_before_them() -> None:
    assert per_call(TRACE, 2, repeat=2) == [(5.0, 0.5, 1.0), (4.0, 0.0, 1.0)]


def test_a_trace_that_lost_something_is_refused() -> None:
    assert per_call(TRACE[1:], 2, repeat=2) is None
    assert per_call(TRACE[:5], 2, repeat=2) is None
    assert per_call([], 1, repeat=2) is None


def test_on_a_cpu_the_hosts_clock_counts() -> None:
    done: list[int] = []
    (times,) = measure([lambda: done.append(1)], 5, torch.device("cpu"))
    assert len(done) == 6 and times.clock == HOST and times.device_us == times.host_us > 0


def test_waits_are_listed_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own warning, as its sync debug mode gives it; other warnings are none, and a CPU has none."""
    modes: list[str | int] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits(torch.device("cuda")) as lines:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("deprecated", UserWarning, stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
    assert [line.partition(":")[0] for line in lines] == ["test_device_time.py"] * 2 and len(set(lines)) == 2
    assert modes == ["warn", 0]
    with waits(torch.device("cpu")) as lines:
        pass
    assert lines == [] and modes == ["warn", 0]
