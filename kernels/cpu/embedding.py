"""The summed dMel embedding on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind

_CODES = {torch.uint8: "uint8", torch.int16: "int16", torch.int32: "int32", torch.int64: "int64"}
_FORWARD = {
    (code, dtype): bind(f"embedding_sum_{name}_{short}", "pppiiii")
    for code, name in _CODES.items()
    for dtype, short in ((torch.float32, "f32"), (torch.bfloat16, "bf16"))
}
_BACKWARD = bind("embedding_sum_backward", "pppiiii")


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    if torch.is_grad_enabled() and table.requires_grad:
        out: Tensor = _EmbeddingSum.apply(codes, table, bins)
        return out
    return _forward(codes, table, bins)


def _forward(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    if table.dim() != 2 or bins < 1 or table.shape[0] % bins or not table.is_contiguous() or not table.is_cpu:
        raise ValueError(f"embedding_sum: table is {tuple(table.shape)}, not contiguous [C * {bins}, D] on the CPU")
    channels, width = table.shape[0] // bins, table.shape[1]
    if codes.dim() != 2 or codes.shape[1] != channels or not codes.is_cpu:
        raise ValueError(f"embedding_sum: codes is {tuple(codes.shape)} on {codes.device}, not [T, {channels}] on cpu")
    call = _FORWARD.get((codes.dtype, table.dtype))
    if call is None:
        raise ValueError(
            f"embedding_sum: codes is {codes.dtype}, table {table.dtype}; codes must be uint8, int16, int32 or "
            "int64, table float32 or bfloat16"
        )
    codes = codes.contiguous()
    rows = codes.shape[0]
    out = torch.empty(rows, width, dtype=table.dtype)
    bad = call(codes.data_ptr(), table.data_ptr(), out.data_ptr(), rows, channels, bins, width)
    if bad:
        row, channel = divmod(bad - 1, channels)
        code = int(codes[row, channel])
        raise ValueError(f"embedding_sum: codes[{row}, {channel}] is {code}, outside 0..{bins - 1}")
    return out


class _EmbeddingSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, table, bins):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, table)
        ctx.bins = bins
        return _forward(codes, table, bins)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        codes, table = ctx.saved_tensors
        indices, grad = codes.to(torch.int64).contiguous(), grad.float().contiguous()
        out = torch.zeros(table.shape)
        _BACKWARD(indices.data_ptr(), grad.data_ptr(), out.data_ptr(), *indices.shape, ctx.bins, table.shape[1])
        return None, out.to(table.dtype), None
