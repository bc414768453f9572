"""How much memory is left before the machine, or the container around the process, would kill it.

Linux only, as the kernels are. Of containers, those of control groups version 2.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kernels.errors import MetronomeError

RESERVED_FRACTION = 0.1
"""Share of what is left that nobody may plan with: activations, libraries and other processes want some too."""

_GROUPS = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS) -> int:
    """The least of what the machine has left and what the limit of each control group leaves. Memory that caches files
    counts as left: it is given up on demand."""
    machine = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    left = [1024 * int(machine.split()[1])]
    own = Path("/proc/self/cgroup").read_text().split("0::", 1)[-1].strip().lstrip("/")
    for group in [groups / own, *(groups / own).parents]:
        limit = group / "memory.max"
        if group.is_relative_to(groups) and limit.exists() and limit.read_text().strip() != "max":
            cached = next(x for x in (group / "memory.stat").read_text().splitlines() if x.startswith("inactive_file "))
            used = int((group / "memory.current").read_text()) - int(cached.split()[1])
            left.append(int(limit.read_text()) - used)
    return max(0, min(left))


def check_room(needed: int, purpose: str, remedy: str, device: torch.device | None = None) -> None:
    """Raises MetronomeError when ``needed`` bytes cannot be taken; the alternative is to be killed while using them."""
    there = device is not None and device.type == "cuda"
    usable = int((1 - RESERVED_FRACTION) * (torch.cuda.mem_get_info(device)[0] if there else available_bytes()))
    if needed > usable:
        raise MetronomeError(
            f"{purpose} would take {needed / 2**30:.2f} GiB of memory, of which {usable / 2**30:.2f} GiB can be had: "
            f"{remedy}"
        )
