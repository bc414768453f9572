"""Teams of processes: consecutive ranks that hold the same episodes and share out their rows (`rl.step.sequence`).

A team stands where one process stands without teams: its members know the same and do the same, so of what all
processes hold together each team's part counts once. Without teams (of one member each) nothing is sent here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.errors import MetronomeError
from model.program import ranks


@dataclass
class _Formed:
    size: int = 1
    group: dist.ProcessGroup | None = None  # this process's team


_formed = _Formed()


def form(size: int) -> None:
    """Divides the processes into teams of ``size``, in place of the teams before. Every process must call it. Raises
    MetronomeError when they cannot be divided."""
    if ranks.world() % size:
        raise MetronomeError(
            f"rl.sequence_parallel is {size}, but there are {ranks.world()} processes: give a number that divides "
            "theirs, or the launcher another --num_processes"
        )
    _formed.size, _formed.group = size, None
    for first in range(0, ranks.world() if size > 1 else 0, size):  # every process takes part in making every group
        group = dist.new_group(list(range(first, first + size)))
        if first == count_before() * size:
            _formed.group = group


def size() -> int:
    """The number of members of each team."""
    return _formed.size if ranks.world() > 1 else 1


def member() -> int:
    """This process's place in its team."""
    return ranks.rank() % size()


def count() -> int:
    """The number of teams."""
    return ranks.world() // size()


def count_before() -> int:
    """This team's place among the teams."""
    return ranks.rank() // size()


def share(items: int) -> range:
    """The contiguous indices of so many items that this team works on; together the teams cover all, in order."""
    return range(count_before() * items // count(), (count_before() + 1) * items // count())


def part(items: Sequence[Any]) -> Sequence[Any]:
    """Of what the team has to do, this member's part; maybe nothing. `merged` puts the parts together."""
    return items[member() * len(items) // size() : (member() + 1) * len(items) // size()]


def merged(own: Sequence[Any]) -> list[Any]:
    """The members' items, one member's after another's, on each of them (pickled)."""
    if size() == 1:
        return list(own)
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, list(own), group=_formed.group)
    return [item for part in parts for item in part]


def gather(value: Any) -> list[Any]:
    """Each team's value, in order, on every rank: its first member's, which must be the others', too."""
    return ranks.gather(value)[:: size()]


# ---- a `kernels.rows.Team`; bytes are sent, whatever their type ----


def gather_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """See `kernels.rows.Team`. All members send equally many rows, the last ones of which some make up."""
    most, total = max(counts), sum(counts)
    if not total:
        return own
    flat = own.reshape(own.shape[0], math.prod(own.shape[1:])).view(torch.uint8)
    received = flat.new_empty(len(counts) * most, flat.shape[1])
    if len(flat) < most:
        flat = torch.cat((flat, flat.new_empty(most - len(flat), flat.shape[1])))
    dist.all_gather_into_tensor(received, flat, group=_formed.group)
    if sum(counts[:-1]) == most * (len(counts) - 1):  # what is made up lies at the end
        rows = received[:total]
    else:
        rows = torch.cat([received[i * most : i * most + n] for i, n in enumerate(counts)])
    return rows.view(own.dtype).view(total, *own.shape[1:])


def swap_rows(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """See `kernels.rows.Team`."""
    sent = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
    own, sizes = parts[member()], [part.numel() * part.element_size() for part in parts]
    width = own.shape[1] * own.element_size()
    received = sent.new_empty(sum(counts) * width)
    dist.all_to_all_single(received, sent, [n * width for n in counts], sizes, group=_formed.group)
    return received.view(own.dtype).view(sum(counts), own.shape[1])
