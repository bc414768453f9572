"""The arithmetic of the reference backend: sums as chains of elementwise torch calls, and exp and log in float64.

IEEE 754 rounds each addition and multiplication by itself, so a loop over elementwise calls keeps the row contract; exp
and log are computed in float64 and rounded to fp32, because torch's own fp32 exp may give another last bit for elements
at the end of a row than for those that fill a vector register.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import Segments


def require(condition: bool, message: str) -> None:
    """Raises ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def widen(x: Tensor) -> Tensor:
    """x in the type that sums are taken in: float64 for float64, else fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exp(x: Tensor) -> Tensor:
    return torch.exp(x.double()).to(x.dtype)


def log(x: Tensor) -> Tensor:
    return torch.log(x.double()).to(x.dtype)


def sum_last(x: Tensor) -> Tensor:
    """Sum over the last axis, one chain in ascending index."""
    total = torch.zeros_like(x[..., 0])
    for term in x.unbind(-1):
        total = total + term
    return total


LANES, CHAIN = 8, 512
"""How a whole tensor is summed: in blocks of LANES * CHAIN products, lane l of a block adding elements l, l + LANES,
…"""


def product_lanes(a: Tensor, b: Tensor) -> Tensor:
    """Sums of the products of two fp32 tensors by lane, fp64 [blocks, LANES]. Each product is exact."""
    terms = a.detach().double().flatten() * b.detach().double().flatten()
    blocks = F.pad(terms, (0, -len(terms) % (LANES * CHAIN))).view(-1, CHAIN, LANES)
    total = blocks.new_zeros(len(blocks), LANES)
    for k in range(CHAIN):
        total += blocks[:, k]
    return total


def joined_lanes(lanes: Tensor) -> Tensor:
    """fp64 [blocks, LANES] -> fp64 []: in each block lanes l and l + 4 are added, then l + 2, then l + 1; then the
    blocks in order."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    total = 0.0
    for part in lanes[:, 0].tolist():
        total += part
    return torch.tensor(total, dtype=torch.float64, device=lanes.device)


def matmul_chain(x: Tensor, w: Tensor) -> Tensor:
    """x [..., K], w [N, K] -> [..., N]: one chain over k in ascending order, in the accumulation type."""
    x, w = widen(x), widen(w)
    total = x.new_zeros(*x.shape[:-1], w.shape[0])
    for k in range(x.shape[-1]):
        total = total + x[..., k, None] * w[:, k]
    return total


def bounds(segments: Segments) -> list[tuple[int, int, int, int]]:
    """(slot, start, first row, past-the-last row) of each segment."""
    offset = segments.offset.tolist()
    return list(zip(segments.slot.tolist(), segments.start.tolist(), offset[:-1], offset[1:], strict=True))
