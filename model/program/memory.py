"""How much memory this process can still allocate before the machine or its container would kill it.

Linux only, as the kernels are; limits of containers are read from control groups version 2.
"""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

from kernels.errors import MetronomeError
from model.program import gpu

RESERVED_FRACTION = 0.1
"""Fraction of the free memory that `check_room` leaves to activations, libraries and other processes."""

_GROUPS = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS) -> int:
    """Bytes that this process can still take: the least of the machine's free memory and what its own limit (``ulimit
    -v``) and that of each of its control groups leave. File caches count as free, since the kernel drops them on
    demand."""
    machine = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    left = [1024 * int(machine.split()[1])]
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        left.append(limit_bytes - pages * resource.getpagesize())
    own = Path("/proc/self/cgroup").read_text().split("0::", 1)[-1].strip().lstrip("/")
    for group in [groups / own, *(groups / own).parents]:
        limit = group / "memory.max"
        if group.is_relative_to(groups) and limit.exists() and limit.read_text().strip() != "max":
            cached = next(x for x in (group / "memory.stat").read_text().splitlines() if x.startswith("inactive_file "))
            used = int((group / "memory.current").read_text()) - int(cached.split()[1])
            left.append(int(limit.read_text()) - used)
    return max(0, min(left))


def return_freed() -> None:
    """Gives memory that was freed back to the system. The C library keeps blocks of up to 32 MiB that were freed
    between others in use: a third of a model's size, when the weights of each part are dropped after packing it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process that is in use, once the C library's heap has given back its free pages."""
    return_freed()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def check_room(needed: int, purpose: str, remedy: str, device: torch.device | None = None) -> None:
    """Raises MetronomeError, before anything is allocated, when ``needed`` bytes are more than ``device`` (the CPU if
    None) can give; the message says that ``purpose`` needs them and what to do (``remedy``)."""
    place = ""
    if device is None or device.type == "cpu":
        free = available_bytes()
    else:
        memory = gpu.memory(device)
        free = memory.free
        place = f" on the GPU, which has {memory.total / 2**30:.2f} GiB"
        if memory.others:
            place += f" (other processes hold {memory.others / 2**30:.2f} GiB of it: `nvidia-smi` lists them)"
    usable = int((1 - RESERVED_FRACTION) * free)
    if needed > usable:
        raise MetronomeError(
            f"{purpose} would take {needed / 2**30:.2f} GiB of memory, of which {usable / 2**30:.2f} GiB can be had"
            f"{place}: {remedy}"
        )
