"""What decides the Triton backend's bits: tile sizes, warps, the compiler's settings; pure functions of the weights.

The row contract rests on one argument. Every call of an op, whatever its row count, runs *the same compiled kernel*
over tiles of one size, and a tile's rows are computed alike; only the number of programs follows the row count. So

- no tile size, warp count or pipeline depth is a function of the row count (`product_tile`, `norm_tile`);
- row counts are passed unspecialised, and activations always with the same alignment (`aligned` copies what is not),
  for Triton compiles another kernel for an integer that 16 divides, or that is 1;
- fp32 products keep fp32 inputs (``input_precision="ieee"``), and a multiply and an add are fused only where the source
  says so (``enable_fp_fusion=False``, whose default changed between Triton's versions).

No atomics, no split of a reduction over programs. Left out on purpose: autotuning, which would let the clock choose bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.layout import Segments

FP_FUSION = False
INTERPRET: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 was set when this module was first imported: kernels run in Triton's interpreter, on CPU tensors."""

ALIGN = 16  # Triton specialises on divisibility by 16: of a pointer in bytes, of a stride or a width in elements


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
    from kernels.triton import conv, elementwise, embedding, experts, linear, norm  # they import this module

    modules = (linear, experts, norm, conv, elementwise, embedding)
    return [spec for module in modules for spec in module.specs()]
