"""Linear layers on the CPU: packing, forward and gradient. The reduction order is stated in native/gemm.h.

Packed weights are stored as panels of PANEL columns. The gradient of x needs panels of the transposed weights; the
first backward makes them, and `repack` refreshes them from then on. Gradients are computed in fp32, for bf16 too, and
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.weights import check_out_dtype, check_rows, packed_buffer
from kernels.cpu.library import bind
from kernels.layout import PackedExperts, PackedLinear
from kernels.rows import active, over_all_rows

PANEL = 16  # columns of a panel; the same number is in native/gemm.h

_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}
_PACK = {dtype: bind(f"pack_rows_{name}", "piipi") for dtype, name in _SHORT.items()}
_TRANSPOSE = {dtype: bind(f"pack_transposed_{name}", "piip") for dtype, name in _SHORT.items()}
_LINEAR = {
    (dtype, out): bind(f"linear_{name}_{out_name}", "piipiipi")
    for dtype, name in _SHORT.items()
    for out, out_name in _SHORT.items()
}
_WEIGHT_GRADIENT = bind("linear_weight_gradient", "pipiiiip")


def pack_linear(parts: tuple[Tensor, ...]) -> PackedLinear:
    packed = PackedLinear.build(parts)
    check_device("pack_linear", "cpu", "cpu", parts=parts[0])
    dtype = parts[0].dtype
    packed.data["panels"] = torch.zeros(panel_count(packed.rows), panel_depth(packed.cols, dtype), PANEL, dtype=dtype)
    fill_linear(packed)
    return packed


def panel_count(columns: int) -> int:
    return -(-columns // PANEL)


def panel_depth(cols: int, dtype: torch.dtype) -> int:
    """Rows of PANEL elements in a panel: K, for bf16 rounded up to pairs."""
    return cols + cols % 2 if dtype == torch.bfloat16 else cols


def fill_linear(packed: PackedLinear) -> None:
    """Writes the panels, and those of the transpose if there are any, from the parts' current values."""
    panels = panels_of(packed, "repack")
    fill_panels(panels, packed.parts)
    if "transposed" in packed.data:
        fill_transposed(panels, packed.rows, packed.cols, packed.data["transposed"])


def fill_panels(panels: Tensor, parts: tuple[Tensor, ...]) -> None:
    first = 0
    for part in parts:
        rows, cols = part.shape
        _PACK[part.dtype](part.data_ptr(), rows, cols, panels.data_ptr(), first)
        first += rows


def fill_transposed(panels: Tensor, rows: int, cols: int, out: Tensor) -> None:
    _TRANSPOSE[panels.dtype](panels.data_ptr(), rows, cols, out.data_ptr())


def panels_of(packed: PackedLinear | PackedExperts, op: str) -> Tensor:
    return packed_buffer(op, packed, "panels", "cpu")


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in packed.parts)):
        out: Tensor = _Linear.apply(x, packed, out_dtype, *packed.parts)
        return out
    k, n, panels = packed.cols, packed.rows, packed_buffer("linear", packed, "panels", "cpu")
    shape, stride, dtype = check_rows("linear", x, k, panels.dtype)
    check_out_dtype("linear", out_dtype)
    if not (x.is_cpu and panels.is_cpu):
        check_device("linear", "cpu", "cpu", x=x, packed=panels)
    rows = shape[0]
    y = torch.empty(rows, n, dtype=out_dtype)
    _LINEAR[dtype, out_dtype](x.data_ptr(), stride[0], rows, panels.data_ptr(), n, k, y.data_ptr(), n)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, out_dtype, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.packed, ctx.rows = packed, active()
        return linear(x, packed, out_dtype)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,), packed = ctx.saved_tensors, ctx.packed
        grad = grad.float().contiguous()
        need_x, need_parts = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = _input_gradient(grad, packed).to(x.dtype) if need_x else None
        if not any(need_parts):
            return dx, None, None, *[None] * len(need_parts)
        whole = over_all_rows(ctx.rows, weight_gradient, grad, x).to(x.dtype)
        pieces = whole.split([part.shape[0] for part in packed.parts]) if len(packed.parts) > 1 else (whole,)
        return dx, None, None, *(piece if need else None for piece, need in zip(pieces, need_parts, strict=True))


def _input_gradient(grad: Tensor, packed: PackedLinear) -> Tensor:
    """grad [T, N] fp32 -> [T, K]: one chain in ascending n."""
    if "transposed" not in packed.data:
        out = torch.zeros(panel_count(packed.cols), packed.rows, PANEL)
        fill_transposed(packed.data["panels"], packed.rows, packed.cols, out)
        packed.data["transposed"] = out
    rows, k = grad.shape[0], packed.cols
    dx = torch.empty(rows, k)
    panels = packed.data["transposed"].data_ptr()
    _LINEAR[torch.float32, torch.float32](grad.data_ptr(), packed.rows, rows, panels, k, packed.rows, dx.data_ptr(), k)
    return dx


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [T, N] fp32, x [T, K] -> [N, K] fp32: one chain in ascending t."""
    x = x.float()
    dw = torch.empty(grad.shape[1], x.shape[1])
    arguments = (grad.data_ptr(), grad.shape[1], x.data_ptr(), x.stride(0), grad.shape[0], *dw.shape, dw.data_ptr())
    _WEIGHT_GRADIENT(*arguments)
    return dw
