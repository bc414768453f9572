"""Our ops on the pretend device: the cpu backend's, for tensors there and no others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.layout import PackedExperts, PackedLinear, PagedKV, Segments
from kernels.upload import receive, send
from tests.support.pretend.device import DEVICE, PretendTensor, bare, ledger, where


class _Enter(torch.autograd.Function):
    """From the device to the CPU tensor behind it, uncounted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        raw: Tensor = x.raw.detach()  # type: ignore[attr-defined]
        return raw.view_as(raw)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return PretendTensor(grad)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return PretendTensor(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raw: Tensor = grad.raw  # type: ignore[attr-defined]
        return raw


def enter(x: Any) -> Any:
    if not isinstance(x, PretendTensor):
        return x
    return _Enter.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.raw


def leave(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(leave, x))
    if not isinstance(x, Tensor) or isinstance(x, PretendTensor):
        return x
    return _Leave.apply(x) if x.requires_grad else PretendTensor(x)


class PretendBackend:
    """A backend (`kernels.backend.Backend`) whose tensors lie on the pretend device, with the cpu backend's bits.

    ``spoilt``: names of ops of whose results each row's first number is moved to the next one, as a broken kernel's;
    "linear:learner" and "linear:sampler" only where the learner, or who samples, calls it."""

    NAME = "triton"
    DEVICE = DEVICE

    def __init__(self, spoilt: frozenset[str] = frozenset()) -> None:
        from kernels.cpu import backend

        self._inner = backend
        self.spoilt = spoilt

    def contract(self) -> dict[str, str | int]:
        return self._inner.contract() | {"place": DEVICE}

    def instruction_set(self) -> str:
        return DEVICE

    def upload(
        self, segments: Segments, page_tables: Sequence[Tensor], parts: tuple[Tensor, ...]
    ) -> tuple[Segments, tuple[Tensor, ...]]:
        moving = [part for part in parts if not isinstance(part, PretendTensor)]
        sent = iter(send(moving, torch.device(DEVICE)))
        return segments, tuple(part if isinstance(part, PretendTensor) else next(sent) for part in parts)

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(receive(parts))

    def pack_linear(self, parts: tuple[Tensor, ...]) -> PackedLinear:
        packed = PackedLinear.build(parts)
        self._take("pack_linear", parts, "parts")
        inner = self._inner.pack_linear(tuple(bare(part).detach() for part in parts))
        packed.data |= {name: PretendTensor(buffer) for name, buffer in inner.data.items()}
        return packed

    def pack_experts(self, groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
        packed = PackedExperts.build(groups)
        self._take("pack_experts", groups, "groups")
        inner = self._inner.pack_experts(tuple(tuple(bare(part).detach() for part in group) for group in groups))
        packed.data |= {name: PretendTensor(buffer) for name, buffer in inner.data.items()}
        return packed

    def repack(self, packed: PackedLinear | PackedExperts) -> None:
        ledger.kernel("repack")
        with torch.no_grad():
            self._inner.repack(self._take("repack", packed, "packed"))

    def _take(self, op: str, x: Any, name: str) -> Any:
        """``x`` as the cpu backend takes it. Segments may lie on the CPU, as for a GPU's backend."""
        if isinstance(x, Segments):
            return Segments(*(bare(part) for part in (x.slot, x.start, x.offset, x.position)))
        if isinstance(x, PagedKV):
            pages = {n: self._take(op, vars(x)[n], f"cache.{n}") for n in ("key", "value")}
            return replace(x, **pages, table=bare(x.table))
        if isinstance(x, PackedLinear):
            parts = tuple(self._take(op, part, name) for part in x.parts)
            return replace(x, parts=parts, data={key: bare(value) for key, value in x.data.items()})
        if isinstance(x, PackedExperts):
            groups = tuple(self._take(op, group, name) for group in x.groups)
            return replace(x, groups=groups, data={key: bare(value) for key, value in x.data.items()})
        if isinstance(x, tuple):
            return tuple(self._take(op, part, name) for part in x)
        if isinstance(x, Tensor):
            if not isinstance(x, PretendTensor):
                raise ValueError(f"{op}: {name} is on {x.device}; the backend needs it on {DEVICE} ({where()})")
            return enter(x)
        return x

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._inner, name)

        @functools.wraps(op)
        def run(*arguments: Any) -> Any:
            ledger.kernel(name)
            names = op.__code__.co_varnames
            taken = [self._take(name, x, names[i] if i < len(names) else "?") for i, x in enumerate(arguments)]
            result = leave(op(*taken))
            who = "learner" if torch.is_grad_enabled() else "sampler"
            if self.spoilt & {name, f"{name}:{who}"}:
                _spoil(result[0] if isinstance(result, tuple) else result)
            return result

        return run


def _spoil(x: Any) -> None:
    """Moves the first number of each row to the next one, upwards."""
    if isinstance(x, PretendTensor) and x.is_floating_point() and x.numel():
        raw = x.raw.data  # of which autograd is told nothing
        first = raw[(..., *[0] * (raw.dim() - 1))]
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
