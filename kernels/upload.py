"""Between host and device in one copy each way: what the host knows before a forward pass goes in one buffer, what it
wants to know afterwards comes back in one.

Every copy costs a few microseconds of the host's time, and one out of memory that is not pinned makes it wait. Knows
tensors only, no op and no backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels.layout import Segments

ALIGN = 16
"""Each tensor begins at a multiple of so many bytes: Triton compiles another kernel for a pointer that is none."""


def send(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on ``device`` of tensors of any types but bf16 that lie on the CPU: views of one buffer, filled by one
    copy for which the host does not wait.

    The host's buffer is pinned. It is written once and comes back from torch's allocator of pinned memory only when its
    copy has ended (the allocator records an event with each such copy), so that buffers of successive calls alternate
    and none is overwritten under a copy."""
    places, raw, end = [], [], 0
    for part in parts:
        raw.append(part.detach().numpy().tobytes())
        places.append(end)
        end += -(-len(raw[-1]) // ALIGN) * ALIGN
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = buffer.numpy().data
    for place, content in zip(places, raw, strict=True):
        memory[place : place + len(content)] = content
    there = buffer.to(device, non_blocking=True)
    typed = {dtype: there.view(dtype) for dtype in {part.dtype for part in parts}}  # a view costs a microsecond
    out = []
    for part, place in zip(parts, places, strict=True):
        first = place // part.element_size()
        field = typed[part.dtype][first : first + part.numel()]
        out.append(field if part.dim() == 1 else field.view(part.shape))
    return out


def receive(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors that lie on one device, by one copy, for which the host waits."""
    order = sorted(range(len(parts)), key=lambda i: -parts[i].element_size())  # so each begins where its type may
    flat = [parts[i].contiguous().view(-1).view(torch.uint8) for i in order]
    here = torch.cat(flat).cpu().split([part.shape[0] for part in flat])
    found = {i: part.view(parts[i].dtype).view(parts[i].shape) for i, part in zip(order, here, strict=True)}
    return [found[i] for i in range(len(parts))]


# ---- of a backend whose tensors lie on the CPU ----


def upload(
    segments: Segments, tables: Sequence[Tensor], parts: tuple[Tensor, ...]
) -> tuple[Segments, tuple[Tensor, ...]]:
    """`kernels.ops.upload` where there is no other device: everything as it is."""
    return segments, parts


def deferred() -> AbstractContextManager[None]:
    """`kernels.ops.deferred` where nothing is gained by it: ops raise at once."""
    return nullcontext()


def fetch(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`kernels.ops.fetch` where there is no other device."""
    return parts
