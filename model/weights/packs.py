"""Guards against stale packed weights.

A forward does not read parameters but packed copies of them (`kernels.ops.pack_linear`) and small tensors derived from
them. Sampler and learner share these copies, so a copy that was not refreshed after an update would falsify both
equally, and comparing the two would not show it. Three guards: a pack records the generation of the weights that it was
made from, and ops refuse an outdated one (`kernels.layout.Generation`); `check` computes every copy afresh and
compares; `digest` covers the copies themselves, so that an audit can recompute it from the checkpoint.

Copies are found by a search of all submodules, not in a list: packs in a submodule's attribute ``packed``, derived
tensors by its method ``derived()``.
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
    """A packed copy differs from its parameters: sampler and learner would agree, and both be wrong."""


def packs(module: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedExperts]]:
    """(name, pack) of every pack of ``module`` and its submodules, as in ``layers.0.self_attn.packed.qkvr``."""
    for name, value in _held(module):
        if isinstance(value, PackedLinear | PackedExperts):
            yield name, value


def mark_current(module: nn.Module, generation: Generation) -> None:
    """Records that all packs of ``module`` were made from the present ``generation`` of the weights."""
    for _, pack in packs(module):
        pack.weights, pack.made = generation, generation.now


def digest(module: nn.Module) -> str:
    """The first 32 hexadecimal digits of a SHA-256 over names, dtypes, shapes and bytes of all copies, in name order.
    Packed layouts differ by backend, so digests can be compared only under one contract id."""
    hashed = hashlib.sha256()
    for name, copy in sorted(_copies(module)):
        hashed.update(f"{name} {copy.dtype} {list(copy.shape)}\n".encode())
        hashed.update(_bytes(copy).cpu().numpy().data)
    return hashed.hexdigest()[:32]


def release(module: nn.Module) -> None:
    """Frees the parameters that were copied into packs: module and packs then hold ones of the same shape without
    memory (meta device). A backend that packs nothing keeps them."""
    empty: dict[int, nn.Parameter] = {}

    def without_memory(part: Tensor) -> Tensor:
        if part.is_meta:
            return part
        return empty.setdefault(id(part), nn.Parameter(torch.empty_like(part, device="meta"), requires_grad=False))

    for _, pack in packs(module):
        if not pack.data:
            continue
        if isinstance(pack, PackedLinear):
            pack.parts = tuple(map(without_memory, pack.parts))
        else:
            pack.groups = tuple(tuple(map(without_memory, group)) for group in pack.groups)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) in empty:
                setattr(part, name, empty[id(parameter)])


@torch.no_grad()
def check(module: nn.Module) -> None:
    """Raises StaleCopyError unless every copy equals, bit for bit, one made afresh from the parameters."""
    for name, pack in packs(module):
        # A fresh pack of the same buffers; the one of the transpose exists only after the first backward.
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
    """x as uint8 [bytes], so that comparison is by bits: a NaN equals itself and -0 differs from +0."""
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
