"""The summed dMel embedding on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.rows import check_embedding_sum, no_such_code
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
    check_embedding_sum(codes, table, bins)
    if not (codes.is_cpu and table.is_cpu):
        check_device("embedding_sum", "cpu", "cpu", codes=codes, table=table)
    codes = codes.contiguous()
    (rows, channels), width = codes.shape, table.shape[1]
    total = torch.empty(rows, width, dtype=table.dtype)
    bad = _FORWARD[codes.dtype, table.dtype](
        codes.data_ptr(), table.data_ptr(), total.data_ptr(), rows, channels, bins, width
    )
    if bad:
        raise no_such_code(codes, bad - 1, bins)
    return total


class _EmbeddingSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, table, bins):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, table)
        ctx.bins = bins
        return embedding_sum(codes, table, bins)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        codes, table = ctx.saved_tensors
        indices, grad = codes.to(torch.int64).contiguous(), grad.float().contiguous()
        out = torch.zeros(table.shape)
        _BACKWARD(indices.data_ptr(), grad.data_ptr(), out.data_ptr(), *indices.shape, ctx.bins, table.shape[1])
        return None, out.to(table.dtype), None
