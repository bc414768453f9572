"""Checks of `linear` and `expert_linear` and of their packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import Layout
from kernels.errors import MetronomeError, StaleWeightsError
from kernels.layout import FLOATS, PackedExperts, PackedLinear


def stale_weights(op: str) -> StaleWeightsError:
    """The error for packed weights that are older than the parameters they were made from."""
    return StaleWeightsError(
        f"{op}: the weights were changed after they were packed, so that this would multiply with old ones; call "
        "repack() on the model after each update"
    )


def packed_buffer(op: str, packed: PackedLinear | PackedExperts, name: str, backend: str) -> Tensor:
    """The backend's buffer ``name`` of ``packed``. Raises StaleWeightsError when it is older than the weights, and
    ValueError when another backend packed them."""
    if packed.made != packed.weights.now:
        raise stale_weights(op)
    try:
        return packed.data[name]
    except KeyError:
        raise ValueError(
            f"{op}: packed was made by another backend; pack the weights anew after use_backend('{backend}')"
        ) from None


def check_held(op: str, packed: PackedLinear | PackedExperts) -> None:
    """Raises MetronomeError when the weights were given up after they were packed (`model.weights.packs.release`)."""
    parts = packed.parts if isinstance(packed, PackedLinear) else packed.groups[0]
    if parts[0].is_meta:
        raise MetronomeError(
            f"{op}: the weights of this pack were not kept, since it was made for inference only; load the model with "
            "its weights (keep_weights)"
        )


def check_rows(op: str, x: Tensor, cols: int, dtype: torch.dtype) -> Layout:
    """x [T, cols] of the weights' dtype; rows may be strided, columns may not."""
    shape, stride = x.shape, x.stride()
    if len(shape) != 2 or shape[1] != cols:
        raise ValueError(f"{op}: x is {tuple(shape)}, not [T, {cols}]")
    if x.dtype is not dtype:
        raise ValueError(f"{op}: x is {x.dtype}, the weights {dtype}")
    if stride[1] != 1 and cols > 1:
        raise ValueError(f"{op}: x must have adjacent columns; its strides are {stride}")
    return shape, stride, dtype


def check_out_dtype(op: str, dtype: torch.dtype) -> None:
    """fp32 or bf16."""
    if dtype not in FLOATS:
        raise ValueError(f"{op}: out_dtype is {dtype}; choose float32 or bfloat16")


def check_experts(x: Tensor, expert: Tensor, fan_out: int) -> int:
    """expert int32 [R], contiguous, for x [T, K]; returns R = T * fan_out."""
    count = x.shape[0] * fan_out
    if fan_out < 1 or expert.dtype is not torch.int32 or expert.shape != (count,) or not expert.is_contiguous():
        raise ValueError(
            f"expert_linear: expert is {expert.dtype} {tuple(expert.shape)}, not contiguous int32 [{count}] "
            f"(= {x.shape[0]} rows * fan_out {fan_out})"
        )
    return count


def no_such_expert(expert: Tensor, row: int, experts: int) -> ValueError:
    """The error for row ``row`` of ``expert``, which names none of ``experts`` experts."""
    return ValueError(f"expert_linear: expert[{row}] is {int(expert[row])}, outside 0..{experts - 1}")
