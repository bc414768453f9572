"""The copies that a forward multiplies with: found in a module, compared with its parameters, digested.

A forward does not read parameters but packed copies of them (`kernels.ops.pack_linear`) and small tensors derived from
them. Sampler and learner read the same copies, so copies that were not refreshed after an update would make both wrong
alike, and no comparison of the two would show it. Hence three guards: a pack knows which generation of the weights it
was made from and an op refuses an older one (`kernels.layout.Generation`); `check` makes every copy anew and compares;
`digest` names what is multiplied, so that an audit can make the same from the checkpoint's file.

Modules are searched, not listed: whatever a module keeps under ``packed`` is found, and what it derives it says in
``derived()``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels import ops
from kernels.errors import MetronomeError
from kernels.layout import Generation, PackedExperts, PackedLinear


class StaleCopyError(MetronomeError):
    """A copy of the weights is not what its parameters say: sampler and learner would be equal and both wrong."""


def packs(module: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedExperts]]:
    """Every pack below ``module`` with its name, ``layers.0.self_attn.packed.qkvr``."""
    for name, value in _held(module):
        if isinstance(value, PackedLinear | PackedExperts):
            yield name, value


def mark_current(module: nn.Module, generation: Generation) -> None:
    """Makes all packs below ``module`` copies of the present ``generation``."""
    for _, pack in packs(module):
        pack.weights, pack.made = generation, generation.now


def digest(module: nn.Module) -> str:
    """32 hexadecimal digits over every copy below ``module``, in name order: names, dtypes, shapes and bytes. It
    depends on the backend's layout, so it compares runs of one contract."""
    hashed = hashlib.sha256()
    for name, copy in sorted(_copies(module)):
        hashed.update(f"{name} {copy.dtype} {list(copy.shape)}\n".encode())
        hashed.update(_bytes(copy).cpu().numpy().data)
    return hashed.hexdigest()[:32]


@torch.no_grad()
def check(module: nn.Module) -> None:
    """Raises StaleCopyError unless every copy is, bit for bit, what its parameters' present values give."""
    for name, pack in packs(module):
        # Filled from nothing, with the same buffers: those of the transpose are there once a gradient has used them.
        empty = {buffer: torch.zeros_like(x) for buffer, x in pack.data.items()}
        fresh = replace(pack, data=empty, weights=Generation(), made=0)
        ops.repack(fresh)
        for buffer, wanted in fresh.data.items():
            _compare(f"{name}.{buffer}", pack.data[buffer], wanted)
    for name, part in module.named_modules():
        for field, wanted in _derived(part).items():
            _compare(f"{name}.packed.{field}", getattr(part.packed, field), wanted)


def _compare(name: str, copy: Tensor, wanted: Tensor) -> None:
    if copy.shape != wanted.shape or not torch.equal(_bytes(copy), _bytes(wanted)):
        raise StaleCopyError(
            f"{name}: this copy of the weights was not refreshed after their last update, so that sampler and learner "
            "would compute with other weights than those that are saved; call repack() on the model after each update"
        )


def _bytes(x: Tensor) -> Tensor:
    """As uint8: a NaN is like itself, and -0 is not +0."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _derived(part: nn.Module) -> dict[str, Tensor]:
    derive = getattr(type(part), "derived", None)
    return {} if derive is None else derive(part)


def _copies(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, pack in packs(module):
        # The buffers of a fresh pack; those of the transpose, made by the first backward, are not part of a forward.
        yield from ((f"{name}.{buffer}", x) for buffer, x in pack.data.items() if buffer != "transposed")
    for name, part in module.named_modules():
        yield from ((f"{name}.packed.{field}", getattr(part.packed, field)) for field in _derived(part))


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        value = part.__dict__.get("packed")
        if value is None:
            continue
        if isinstance(value, PackedLinear | PackedExperts):
            items = [("", value)]
        elif is_dataclass(value):
            items = [(f.name, getattr(value, f.name)) for f in fields(value)]
        else:
            raise TypeError(f"{name}.packed is a {type(value).__name__}: packs are looked for in dataclasses")
        prefix = f"{name}.packed" if name else "packed"
        for field, item in items:
            yield (f"{prefix}.{field}" if field else prefix), item
