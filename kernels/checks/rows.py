"""Checks of the ops that treat each row alone: `swiglu`, `gelu`, `moe_combine`, `rms_norm`, `embedding_sum`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import Layout
from kernels.layout import FLOATS

CODES = (torch.uint8, torch.int16, torch.int32, torch.int64)
"""Types of the codes that `embedding_sum` takes."""


def check_swiglu(gate_up: Tensor) -> Layout:
    """gate_up [T, 2I], fp32 or bf16; rows may be strided, columns may not."""
    shape, stride, dtype = gate_up.shape, gate_up.stride(), gate_up.dtype
    if len(shape) != 2 or shape[1] % 2:
        raise ValueError(f"swiglu: gate_up is {tuple(shape)}, not [T, 2I]")
    if dtype not in FLOATS or stride[1] != 1:
        raise ValueError(
            f"swiglu: gate_up is {dtype}, strides {stride}; need float32 or bfloat16 with adjacent columns"
        )
    return shape, stride, dtype


def check_gelu(x: Tensor) -> Layout:
    """x [T, N], fp32 or bf16; rows may be strided, columns may not."""
    shape, stride, dtype = x.shape, x.stride(), x.dtype
    if len(shape) != 2:
        raise ValueError(f"gelu: x is {tuple(shape)}, not [T, N]")
    if dtype not in FLOATS or (shape[1] > 1 and stride[1] != 1):
        raise ValueError(f"gelu: x is {dtype}, strides {stride}; need float32 or bfloat16 with adjacent columns")
    return shape, stride, dtype


def check_moe_combine(y: Tensor, weight: Tensor) -> None:
    """y [T * J, D], fp32 or bf16, and weight fp32 [T, J], both contiguous."""
    shape = weight.shape
    if len(shape) != 2 or weight.dtype is not torch.float32 or not weight.is_contiguous():
        raise ValueError(f"moe_combine: weight is {weight.dtype} {tuple(shape)}, not contiguous float32 [T, J]")
    if y.dim() != 2 or y.shape[0] != shape[0] * shape[1]:
        raise ValueError(f"moe_combine: y is {tuple(y.shape)}, not [{shape[0]} * {shape[1]}, D]")
    if y.dtype not in FLOATS or not y.is_contiguous():
        raise ValueError(f"moe_combine: y is {y.dtype}, strides {y.stride()}; need contiguous, float32 or bfloat16")


def check_rms_norm(x: Tensor, weight: Tensor) -> Layout:
    """x [T, D] or [T, H, D] with adjacent columns, and weight [D], contiguous, of one dtype."""
    shape, stride, dtype = x.shape, x.stride(), x.dtype
    n = shape[-1] if shape else 0
    if len(shape) not in (2, 3) or n == 0 or weight.shape != (n,):
        raise ValueError(f"rms_norm: x is {tuple(shape)}, weight {tuple(weight.shape)}; need [T, D] or [T, H, D], [D]")
    if dtype not in FLOATS or weight.dtype is not dtype or not weight.is_contiguous():
        raise ValueError(
            f"rms_norm: x is {dtype}, weight {weight.dtype}, strides {weight.stride()}; need one type, float32 or "
            "bfloat16, and a contiguous weight"
        )
    if n > 1 and stride[-1] != 1:
        raise ValueError(f"rms_norm: x must have adjacent columns; its strides are {stride}")
    return shape, stride, dtype


def check_embedding_sum(codes: Tensor, table: Tensor, bins: int) -> None:
    """codes [T, C] of an integer type in CODES, table [C * bins, D], contiguous, fp32 or bf16."""
    shape, taken = table.shape, codes.shape
    if len(shape) != 2 or bins < 1 or shape[0] % bins or not table.is_contiguous():
        raise ValueError(f"embedding_sum: table is {tuple(shape)}, not contiguous [C * {bins}, D]")
    if len(taken) != 2 or taken[1] * bins != shape[0]:
        raise ValueError(f"embedding_sum: codes is {tuple(taken)}, not [T, {shape[0] // bins}]")
    if codes.dtype not in CODES or table.dtype not in FLOATS:
        raise ValueError(
            f"embedding_sum: codes is {codes.dtype}, table {table.dtype}; codes must be uint8, int16, int32 or int64, "
            "table float32 or bfloat16"
        )


def no_such_code(codes: Tensor, index: int, bins: int) -> ValueError:
    """The error for the code at ``index`` of the flattened codes, which is not below ``bins``."""
    row, channel = divmod(index, codes.shape[1])
    return ValueError(f"embedding_sum: codes[{row}, {channel}] is {int(codes[row, channel])}, outside 0..{bins - 1}")
