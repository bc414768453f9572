"""What decides the Triton backend's bits: tile sizes, warps, the compiler's settings; pure functions of the weights.

The row contract rests on one argument. Every call of an op, whatever its row count, runs *the same compiled kernel*
over tiles of one size, and a tile's rows are computed alike; only the number of programs follows the row count. So

- no tile size, warp count or pipeline depth is a function of the row count (`product_tile`, `norm_tile`);
- row counts are passed unspecialised, and activations always with the same alignment (`aligned` copies what is not),
  for Triton compiles another kernel for an integer that 16 divides, or that is 1;
- fp32 products keep fp32 inputs (``input_precision="ieee"``), and a multiply and an add are fused only where the source
  says so (``enable_fp_fusion=False``, whose default changed between Triton's versions).

No atomics, no split of a reduction over programs. Left out: autotuning, which would let the clock choose bits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.layout import Segments

FP_FUSION = False
INTERPRET: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 was set when this was first imported: kernels run in Triton's interpreter, on CPU tensors."""

if INTERPRET:
    from kernels.triton.interpreter import mend

    mend()

ALIGN = 16  # Triton specialises on divisibility by 16: of a pointer in bytes, of a stride or a width in elements

GATHER_ROWS = 64
"""Up to so many rows experts run one row a program (gather + GEMV), beyond it rows sorted by expert (grouped GEMM)."""

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work. ``k`` is the number of terms reduced at a time."""

    m: int  # rows
    n: int  # columns
    k: int
    warps: int
    stages: int


def product_tile(dtype: torch.dtype) -> Tile:
    """The one tile of every matrix product in ``dtype``: rows few or many, gathered or grouped, forward or backward.

    64 rows let Hopper's and Blackwell's matrix instructions be used, which take no fewer; a decode of one row wastes
    them, but waits for the weights to arrive all the same. In fp32, which runs on the plain FMA units, 16 rows are what
    the units can hide behind the weights."""
    if dtype == torch.bfloat16:
        return Tile(m=64, n=64, k=64, warps=4, stages=3)
    return Tile(m=16, n=64, k=32, warps=4, stages=3)


def expert_form(rows: int) -> str:
    """Which kernel runs ``rows`` expert rows. Both reduce over the same tile, so the choice cannot change a bit."""
    return "gather" if rows <= GATHER_ROWS else "grouped"


MAP_TILE = Tile(m=16, n=128, k=1, warps=4, stages=1)
"""The tile of ops that treat every element alone, or sum few terms in a loop."""


def norm_tile(width: int) -> Tile:
    """About a thousand elements a program; a row wider than n is taken n columns at a time."""
    n = min(triton.next_power_of_2(width), 2048)
    return Tile(m=min(max(1024 // n, 1), 16), n=n, k=n, warps=4, stages=1)


def settings() -> str:
    """What decides bits beside the kernels' text, for the contract id."""
    tiles = {short: product_tile(dtype) for dtype, short in SHORT.items()}
    return f"triton {triton.__version__}, fp_fusion {FP_FUSION}, {tiles}"


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, tile: Tile, *args: Any, **constants: int | bool
) -> None:
    """Launches ``kernel`` on ``device``; an empty grid launches nothing."""
    if 0 in grid:
        return
    with contextlib.nullcontext() if INTERPRET else torch.cuda.device(device):
        kernel[grid](*args, **constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=FP_FUSION)


def check(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(SHORT)) -> None:
    """Raises ValueError unless ``x`` is where this backend's kernels run, of one of ``dtypes``."""
    if x.device.type != ("cpu" if INTERPRET else "cuda"):
        where = "the CPU, for TRITON_INTERPRET is set" if INTERPRET else "a GPU"
        raise ValueError(f"{op}: {name} is on {x.device}; the triton backend needs it on {where}")
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {x.dtype}; need one of {', '.join(map(str, dtypes))}")


def check_columns(op: str, name: str, x: Tensor) -> None:
    """Raises ValueError unless the last axis of ``x`` is adjacent in memory."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{op}: {name} must have adjacent columns; its strides are {x.stride()}")


def aligned(x: Tensor) -> Tensor:
    """``x`` [..., K] itself when every row starts at a multiple of 16 bytes, and 16 divides K and the row strides; else
    a copy of which that holds, K padded with zeros.

    So alignment is a constant of every compiled kernel, never a property of the call."""
    width = x.shape[-1]
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    last = x.stride(-1) == 1 or width == 1
    if last and width % ALIGN == 0 and x.data_ptr() % ALIGN == 0 and all(s % ALIGN == 0 for s in strides):
        return x
    copy = x.new_zeros(*x.shape[:-1], -(-width // ALIGN) * ALIGN)
    copy[..., :width] = x
    return copy


def row_stride(x: Tensor, axis: int = 0) -> int:
    """The stride of a row axis of an `aligned` tensor. Of an axis of one row torch may report any; 0 serves it."""
    return x.stride(axis) if x.shape[axis] > 1 else 0


def placed(segments: Segments, device: torch.device) -> Segments:
    """``segments`` with its tensors on ``device``."""
    parts = (segments.slot, segments.start, segments.offset, segments.position)
    return Segments(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class CompileSpec:
    """One kernel as it is launched, for compiling ahead of time without a device.

    ``CompileSpec("swiglu/bf16", swiglu_kernel, {"x": "*bf16", "rows": "i32"}, {"BLOCK": 128}, ("x",), 4, 1)``
    """

    name: str  # op, form and dtype
    fn: Any  # the triton.jit function
    signature: dict[str, str]  # argument -> "*fp32", "*bf16", "i32", "fp32"; constexprs are not in it
    constexprs: dict[str, int | bool]
    divisible: tuple[str, ...]  # arguments that 16 divides: pointers (bytes) and integers
    num_warps: int
    num_stages: int


def compile_specs() -> list[CompileSpec]:
    """Every kernel of the backend, in fp32 and bf16."""
    from kernels.triton import (
        attention,
        conv,
        elementwise,
        embedding,
        experts,
        linear,
        norm,
        router,
        sampling,
    )  # these import launch

    modules = (linear, experts, norm, conv, elementwise, embedding, attention, router, sampling)
    return [spec for module in modules for spec in module.specs()]
