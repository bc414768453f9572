"""How a profiler's trace becomes times of calls."""

from __future__ import annotations

import torch

from kernels.tools.device_time import HOST, MARK, measure, per_call

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
