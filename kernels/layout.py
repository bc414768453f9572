"""Containers that the ops take: which rows form a sequence, where keys lie, how weights are packed.

This module knows tensors and integers, nothing of models or sessions. Axes: T packed rows (tokens of several sequences,
one after another), S segments, N output features, K input features, E experts, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)
"""Types that activations and weights may have."""

SPLIT_TOKENS = 64
"""Tokens of one page of the KV cache, and keys of one attention split (the keys that are reduced together before splits
are combined). A page holds exactly one split, so where pages lie cannot change bits. A backend reduces a split at once
or in aligned parts."""

CONV_TAPS = 4
"""Taps of a short convolution. A sequence keeps its last CONV_TAPS - 1 inputs from call to call."""

MOST_ROWS = 2**31 - 1
"""The most rows that a sequence, or a call, may have: positions and offsets are int32."""


@dataclass(frozen=True)
class Segments:
    """The packed rows of one call: segment s owns rows ``offset[s] : offset[s + 1]``, which continue the sequence in
    slot ``slot[s]`` at absolute positions ``start[s], start[s] + 1, …``.

    >>> Segments.build(slots=[3, 0], starts=[10, 0], lengths=[2, 1]).position.tolist()
    [10, 11, 0]
    """

    slot: Tensor  # int32 [S]
    start: Tensor  # int32 [S], absolute position of the segment's first row
    offset: Tensor  # int32 [S + 1], offset[0] = 0, offset[S] = T
    position: Tensor  # int32 [T], absolute position of every row

    def __post_init__(self) -> None:
        """Raises ValueError for a wrong shape, type, stride or device. Values are checked by `build` only."""
        slot, offset = self.slot, self.offset
        for name, x in (("slot", slot), ("start", self.start), ("offset", offset), ("position", self.position)):
            if x.dtype != torch.int32 or x.dim() != 1 or not x.is_contiguous() or x.device != slot.device:
                raise ValueError(
                    f"segments: {name} is {x.dtype} {tuple(x.shape)} on {x.device}, strides {x.stride()}; need "
                    f"contiguous int32 of one axis beside slot, on {slot.device}"
                )
        if self.start.shape != slot.shape or offset.shape[0] != slot.shape[0] + 1:
            raise ValueError(
                f"segments: slot, start and offset have {slot.shape[0]}, {self.start.shape[0]} and {offset.shape[0]} "
                "elements; need S, S and S + 1"
            )

    @staticmethod
    def build(slots: list[int], starts: list[int], lengths: list[int]) -> Segments:
        """From one entry a segment: its slot, its start and its number of rows. Raises ValueError when the lists differ
        in length, a length is < 1, a start is < 0, a slot comes twice or a position would not fit int32."""
        if not len(slots) == len(starts) == len(lengths):
            raise ValueError(f"segments: {len(slots)} slots, {len(starts)} starts, {len(lengths)} lengths; need equal")
        if len(set(slots)) != len(slots):
            raise ValueError(f"segments: a slot comes twice in one call: {slots}")
        if any(n < 1 for n in lengths) or any(s < 0 for s in starts):
            raise ValueError(f"segments: lengths must be >= 1 and starts >= 0, got {lengths} and {starts}")
        if any(s + n > MOST_ROWS for s, n in zip(starts, lengths, strict=True)) or sum(lengths) > MOST_ROWS:
            raise ValueError(f"segments: positions must stay below 2**31, got lengths {lengths} from {starts}")
        # One tensor from one list: each call of torch costs microseconds, and this runs before every prefill of 200 ms.
        offset = list(accumulate(lengths, initial=0))
        position = [p for start, length in zip(starts, lengths, strict=True) for p in range(start, start + length)]
        fields = torch.tensor([*slots, *starts, *offset, *position], dtype=torch.int32)
        return Segments(*fields.split((len(slots), len(starts), len(offset), len(position))))

    @property
    def rows(self) -> int:
        return self.position.shape[0]


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of one layer for every slot, in pages of SPLIT_TOKENS positions.

    ``table[slot, p]`` names the page holding positions ``[p * SPLIT_TOKENS, (p + 1) * SPLIT_TOKENS)`` of the sequence
    in ``slot``, or -1 when that range is not held (not reached yet, or wholly outside a sliding window).
    Keys are stored transposed, so that one vector load reads one component of neighbouring keys.
    """

    key: Tensor  # [P, H_kv, D, SPLIT_TOKENS]
    value: Tensor  # [P, H_kv, SPLIT_TOKENS, D]
    table: Tensor  # int32 [slots, max_pages]; beside the keys, or on the CPU, where the host keeps it


class Generation:
    """Counts the changes of a model's weights. The model and all its packed weights share one object: who changes the
    weights adds 1 to ``now``, and every op refuses a pack made before until `kernels.ops.repack` has refreshed it."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


@dataclass
class PackedLinear:
    """Weights of one linear op, ``parts`` stacked along the output axis, with the backend's packed copy.

    `kernels.ops.pack_linear` makes the copy, `kernels.ops.repack` refreshes it after a weight update.
    """

    parts: tuple[Tensor, ...]  # each [N_i, K], one dtype; parameters stay the caller's
    rows: int  # N = sum of N_i
    cols: int  # K
    data: dict[str, Tensor] = field(default_factory=dict)  # backend buffers, by the backend's own names
    weights: Generation = field(default_factory=Generation)
    made: int = 0  # ``weights.now`` when ``data`` was copied

    @staticmethod
    def build(
        parts: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...] = FLOATS, op: str = "pack_linear"
    ) -> PackedLinear:
        """With ``data`` still empty. Raises ValueError, naming ``op``, for parts that cannot be stacked or have a type
        that is not among ``dtypes``."""
        if not parts:
            raise ValueError(f"{op}: parts is empty; give at least one weight [N, K]")
        if parts[0].dim() != 2:
            raise ValueError(f"{op}: parts[0] is {tuple(parts[0].shape)}, not [N, K]")
        cols = parts[0].shape[1]
        for i, part in enumerate(parts):
            if part.dim() != 2 or part.shape[1] != cols:
                raise ValueError(f"{op}: parts[{i}] is {tuple(part.shape)}, not [N, {cols}]")
            _check_weight(f"{op}: parts[{i}]", part, parts[0], dtypes)
        return PackedLinear(parts, sum(part.shape[0] for part in parts), cols)


@dataclass
class PackedExperts:
    """Weights of one `expert_linear`. ``groups`` are consecutive ranges of experts; inside a group, tensors
    ``[E_g, N_i, K]`` are stacked along N, as in ``((gate_up,), (shared_gate, shared_up))``.
    """

    groups: tuple[tuple[Tensor, ...], ...]  # parameters, which stay the caller's
    experts: int  # E = sum of E_g
    rows: int  # N, equal in every group
    cols: int  # K
    data: dict[str, Tensor] = field(default_factory=dict)  # these three as in `PackedLinear`
    weights: Generation = field(default_factory=Generation)
    made: int = 0

    @staticmethod
    def build(
        groups: tuple[tuple[Tensor, ...], ...], dtypes: tuple[torch.dtype, ...] = FLOATS, op: str = "pack_experts"
    ) -> PackedExperts:
        """With ``data`` still empty. Raises ValueError, naming ``op``, for groups that cannot be stacked or have a type
        that is not among ``dtypes``."""
        if not all(groups) or not groups:
            raise ValueError(f"{op}: groups or one of them is empty; give at least one weight [E, N, K]")
        first = groups[0][0]
        if first.dim() != 3:
            raise ValueError(f"{op}: groups[0][0] is {tuple(first.shape)}, not [E, N, K]")
        cols, rows = first.shape[2], sum(part.shape[1] for part in groups[0] if part.dim() == 3)
        for g, group in enumerate(groups):
            experts = group[0].shape[0] if group[0].dim() else 0
            for i, part in enumerate(group):
                if part.dim() != 3 or part.shape[0] != experts or part.shape[2] != cols:
                    raise ValueError(f"{op}: groups[{g}][{i}] is {tuple(part.shape)}, not [{experts}, N, {cols}]")
                _check_weight(f"{op}: groups[{g}][{i}]", part, first, dtypes)
            if sum(part.shape[1] for part in group) != rows:
                raise ValueError(f"{op}: groups[{g}] has other rows than groups[0], which has {rows}")
        return PackedExperts(groups, sum(group[0].shape[0] for group in groups), rows, cols)


@dataclass(frozen=True)
class DMelTables:
    """The constants of dMel codes (`kernels.dmel.codes`), fp64. C channels, L the longest filter, B bins."""

    window: Tensor  # [1600]
    roots: Tensor  # [1600, 2], real and imaginary part of e^(-2 pi i k / 1600)
    first: Tensor  # int64 [C], the first frequency bin of each filter, 1 ... 799
    weight: Tensor  # [C, L], of a filter's frequency bins from its first on, 0 after its last
    edges: Tensor  # [B - 1] ascending: a mel value's code is the number of edges that it reaches


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one AdamW update (Loshchilov & Hutter 2019, arXiv 1711.05101), as `kernels.ops.adamw` reads them.

    >>> AdamWStep.build(lr=0.5, beta1=0.5, beta2=0.75, eps=1e-8, weight_decay=0.25, taken=1)
    AdamWStep(keep=0.875, new1=0.5, old2=0.75, new2=0.25, rate=0.6666666666666666, root=0.6614378277661477, eps=1e-08)
    """

    keep: float  # 1 - lr * weight_decay
    new1: float  # 1 - beta1
    old2: float  # beta2
    new2: float  # 1 - beta2
    rate: float  # lr / (1 - beta1 ** t), t the number of this update, counted from 1
    root: float  # sqrt(1 - beta2 ** t)
    eps: float

    @staticmethod
    def build(*, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, taken: int) -> AdamWStep:
        """``taken``: the number of updates before this one. Powers are computed by repeated multiplication: a library's
        ``pow`` may give another last bit on another processor."""
        power1 = power2 = 1.0
        for _ in range(taken + 1):
            power1, power2 = power1 * beta1, power2 * beta2
        return AdamWStep(
            keep=1.0 - lr * weight_decay,
            new1=1.0 - beta1,
            old2=beta2,
            new2=1.0 - beta2,
            rate=lr / (1.0 - power1),
            root=math.sqrt(1.0 - power2),
            eps=eps,
        )


def _check_weight(name: str, part: Tensor, first: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if part.dtype not in dtypes or part.dtype != first.dtype:
        raise ValueError(f"{name} is {part.dtype}; all parts need one of {list(dtypes)}, the first is {first.dtype}")
    if part.device != first.device or not part.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous and beside the first, on {first.device}; it is on {part.device}, strides "
            f"{part.stride()}"
        )
