"""The arithmetic of the reference backend: sums as chains of elementwise torch calls, exp and log that no vector bends.

IEEE 754 rounding of one add or one multiply cannot depend on the neighbours, so a loop over them keeps the row contract
by itself; exp and log are taken in float64 and rounded to fp32, because torch's own fp32 exp may give another last bit
in a vector's tail than in its middle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import Segments


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def widen(x: Tensor) -> Tensor:
    """The accumulation type: fp32, or float64 for a float64 oracle."""
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
"""A sum over a whole tensor: blocks of LANES * CHAIN products, lane l of a block adding elements l, l + LANES, …"""


def product_lanes(a: Tensor, b: Tensor) -> Tensor:
    """The lanes' sums of the products of two fp32 tensors, fp64 [blocks, LANES]. Each product is exact."""
    terms = a.detach().double().flatten() * b.detach().double().flatten()
    blocks = F.pad(terms, (0, -len(terms) % (LANES * CHAIN))).view(-1, CHAIN, LANES)
    total = blocks.new_zeros(len(blocks), LANES)
    for k in range(CHAIN):
        total += blocks[:, k]
    return total


def joined_lanes(lanes: Tensor) -> Tensor:
    """fp64 [blocks, LANES] -> fp64 []: lanes l and l + 4 of a block, l + 2, l + 1; then a chain over blocks."""
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
