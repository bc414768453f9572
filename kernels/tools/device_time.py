"""How long calls take: on the device (the sum of their kernels' times) and on the host (until the call returns).

The device's time comes from torch's profiler, which also sees kernels of ops that wait for the device in between, where
a CUDA graph cannot be captured and a clock around the call would measure the host. Waiting and gaps between kernels are
not in it; copies between host and device are counted apart.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

MARK = "spin_kernel"
"""The kernel of `torch.cuda._sleep`, which marks in the trace where the next call's kernels begin."""

SYNCHRONIZING = "synchronizing CUDA operation"
"""Part of torch's warning where the host waits."""

PROFILER, EVENTS, HOST = "profiler", "events", "host"
"""Where `Times.device_us` is from: kernel times; time between two CUDA events, gaps and waits included, where the
profiler saw no kernels; on a CPU, the host's clock."""


@dataclass(frozen=True)
class Times:
    """Of one call, mean over some."""

    device_us: float  # sum of kernel times
    copies_us: float  # sum of the times of copies between host and device and of fills
    kernels: float  # kernels launched
    host_us: float  # until the call returns; without waiting, unless the call itself waits
    clock: str


def measure(calls: Sequence[Call], repeat: int, device: torch.device) -> list[Times]:
    """Each call, ``repeat`` times after three calls that compile and warm up. No other process may use the device."""
    for call in calls:
        for _ in range(3 if device.type == "cuda" else 1):
            call()
    host = [_host_us(call, repeat, device) for call in calls]
    if device.type != "cuda":
        return [Times(us, 0.0, 0.0, us, HOST) for us in host]
    seen = _profiled(calls, repeat)
    if seen is None:
        return [Times(_events_us(call, repeat), 0.0, 0.0, us, EVENTS) for call, us in zip(calls, host, strict=True)]
    return [Times(*times, us, PROFILER) for times, us in zip(seen, host, strict=True)]


def _host_us(call: Call, repeat: int, device: torch.device) -> float:
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    taken = time.perf_counter() - begin
    wait(device)
    return 1e6 * taken / repeat


def _profiled(calls: Sequence[Call], repeat: int) -> list[tuple[float, float, float]] | None:
    """(kernels' us, copies' us, number of kernels) of one call each; None when the profiler saw not all of them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        for call in calls:
            torch.cuda._sleep(100)
            for _ in range(repeat):
                call()
            torch.cuda.synchronize()
    kernels = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return per_call([(e.time_range.start, e.name, e.time_range.elapsed_us()) for e in kernels], len(calls), repeat)


def per_call(
    trace: Sequence[tuple[float, str, float]], calls: int, repeat: int
) -> list[tuple[float, float, float]] | None:
    """``trace``: (start, name, us) of all that ran on the device, in any order -> (kernels' us, copies' us, number of
    kernels) of one call each, of ``calls`` that each follow a MARK and were repeated. None when a mark is missing or a
    call shows no kernel."""
    found: list[list[float]] = []
    for _, name, us in sorted(trace):
        if MARK in name:
            found.append([0.0, 0.0, 0.0])
        elif found:
            copy = name.startswith(("Memcpy", "Memset"))
            found[-1][1 if copy else 0] += us
            found[-1][2] += not copy
    if len(found) != calls or not all(kernels for _, _, kernels in found):
        return None
    return [(us / repeat, copies / repeat, kernels / repeat) for us, copies, kernels in found]


def _events_us(call: Call, repeat: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return float(1000 * begin.elapsed_time(end) / repeat)


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Lists, while the block runs, the lines of Python at which the host waits for ``device``: ``embedded.py:203``, one
    entry a wait. Those that torch knows of (``torch.cuda.set_sync_debug_mode``); on a CPU none."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [f"{Path(w.filename).name}:{w.lineno}" for w in said if SYNCHRONIZING in str(w.message)]


def wait(device: torch.device) -> None:
    """Until all that was launched on ``device`` has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
