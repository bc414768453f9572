"""What a backend of the ops must offer, as a type: mypy reports a backend that lacks an op or declares it otherwise.

A backend is a module of functions, or any object with these methods. `kernels.ops` says what each op computes, its
shapes and its errors; what is written here is only what a backend is called with: every argument by position, defaults
filled in. `kernels.dispatch` returns each backend as a `Backend`, which is where mypy compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from kernels.layout import AdamWStep, PackedExperts, PackedLinear, PagedKV, Segments


class Backend(Protocol):
    """One implementation of every op of `kernels.ops`."""

    NAME: str
    """As in METRONOME_BACKEND and in the contract."""
    DEVICE: str
    """Type of the torch device on which the ops' tensors must lie, "cpu" or "cuda"."""

    def contract(self) -> dict[str, str | int]:
        """What decides this backend's bits, beside what `kernels.dispatch.contract` adds for every backend."""

    def instruction_set(self) -> str:
        """What the kernels run on: ``avx2``, ``avx512``, ``sm_90``, ``interpreter``, ``torch``."""

    # ---- between host and device ----

    def upload(
        self, segments: Segments, page_tables: Sequence[Tensor], parts: tuple[Tensor, ...]
    ) -> tuple[Segments, tuple[Tensor, ...]]: ...

    def deferred(self) -> AbstractContextManager[None]: ...

    def fetch(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...

    # ---- linear layers and experts ----

    def pack_linear(self, parts: tuple[Tensor, ...]) -> PackedLinear: ...

    def pack_experts(self, groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts: ...

    def repack(self, packed: PackedLinear | PackedExperts) -> None: ...

    def linear(self, x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor: ...

    def expert_linear(self, x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor: ...

    # ---- single rows ----

    def swiglu(self, gate_up: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor: ...

    def moe_combine(self, y: Tensor, weight: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def embedding_sum(self, codes: Tensor, table: Tensor, bins: int) -> Tensor: ...

    # ---- sequences ----

    def short_conv(
        self, x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None
    ) -> Tensor: ...

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rel: Tensor,
        rel_proj: Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
        first: int,
        tau: Tensor | None,
        cache: PagedKV | None,
    ) -> Tensor: ...

    # ---- rows of logits ----

    def route(self, logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]: ...

    def logprob(
        self, logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def sample(
        self, logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    # ---- gradients and updates ----

    def dot(self, a: Tensor, b: Tensor) -> Tensor: ...

    def adamw(self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep) -> None: ...
