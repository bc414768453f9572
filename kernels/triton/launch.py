"""Launching a Triton kernel: where tensors must lie, how they must be aligned, and how to compile a kernel ahead.

`kernels.triton.tiles` holds the sizes of a launch; the functions of this module see to it that one compiled kernel
serves every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.checks.common import check_device, program_line
from kernels.triton.tiles import FP_FUSION, MAP_TILE, Tile

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when triton was imported: then kernels run in its interpreter, on CPU tensors."""

if INTERPRET:
    from kernels.triton.interpreter import mend

    mend()

ALIGN = 16  # Triton specialises on divisibility by 16: of a pointer in bytes, of a stride or a width in elements

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


PLACE = "cpu" if INTERPRET else "cuda"
"""Type of the device on which the kernels' tensors lie."""

Launch = Callable[[Any, tuple[int, ...], torch.device, tuple[Any, ...], dict[str, Any]], None]
"""A kernel, its grid, its device, positional arguments, and by name its constants and how it is compiled."""


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with contextlib.nullcontext() if INTERPRET else torch.cuda.device(device):
        kernel[grid](*args, **named)


launch: Launch = _launch
"""How `run` launches. With `PLACE` all that a test replaces so that the host's code runs on a device of its own."""


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, tile: Tile, *args: Any, **constants: int | bool
) -> None:
    """Launches ``kernel`` with the positional ``args`` and the compile-time ``constants`` over ``grid``, on ``device``.
    An empty grid launches nothing."""
    if 0 in grid:
        return
    compiled = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": FP_FUSION}
    launch(kernel, grid, device, args, constants | compiled)


def map_grid(rows: int, columns: int) -> tuple[int, int]:
    """The grid of a kernel that computes each element by itself, in tiles of `MAP_TILE`."""
    return triton.cdiv(rows, MAP_TILE.m), triton.cdiv(columns, MAP_TILE.n)


def check_place(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all of ``tensors`` are on one GPU, or on the CPU for the interpreter."""
    check_device(op, "triton", PLACE, **tensors)
    places = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} is on {place}" for name, place in places.items())
        raise ValueError(f"{op}: need one GPU; {found} ({program_line()})")


def aligned(x: Tensor) -> Tensor:
    """``x`` [..., K] itself when its address in bytes, K and the row strides are multiples of 16; else a copy of which
    that holds, K padded with zeros.

    Triton compiles another kernel for other alignments; so all calls, whatever their tensors, run the same one. Weights
    that a kernel reads as they are lie where an optimizer put them: those arguments are compiled for any address
    (``do_not_specialize_on_alignment``), so that no call copies them."""
    width = x.shape[-1]
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    last = x.stride(-1) == 1 or width == 1
    if last and width % ALIGN == 0 and x.data_ptr() % ALIGN == 0 and all(s % ALIGN == 0 for s in strides):
        return x
    copy = x.new_zeros(*x.shape[:-1], -(-width // ALIGN) * ALIGN)
    copy[..., :width] = x
    return copy


def row_stride(x: Tensor, axis: int = 0) -> int:
    """The stride of a row axis of an `aligned` tensor; 0 for an axis of one row, for which torch may report any."""
    return x.stride(axis) if x.shape[axis] > 1 else 0


def plain(x: Tensor) -> Tensor:
    """``x`` itself when it is contiguous and starts at a multiple of 16 bytes, else a copy of which that holds."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGN == 0 else x.clone()


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
