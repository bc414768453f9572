"""The Triton backend: every op of `kernels.ops`, under the names of `kernels.backend.Backend`.

It runs on a GPU or, when TRITON_INTERPRET=1 is set before triton is first imported, slowly in Triton's interpreter on
CPU tensors, which is how it is tested where there is no GPU. NUMERICS_VERSION is raised whenever a change to a kernel
may change a bit of any result. What else decides bits, orders of reduction included, is in `kernels.triton.tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.layout import PackedExperts, PackedLinear, Segments
from kernels.triton import compiler, tables, tiles
from kernels.triton.attention import attention
from kernels.triton.conv import short_conv
from kernels.triton.deferred import deferred, fetch
from kernels.triton.elementwise import moe_combine, swiglu
from kernels.triton.embedding import embedding_sum
from kernels.triton.experts import expert_linear, fill_experts, pack_experts
from kernels.triton.gelu import gelu
from kernels.triton.launch import INTERPRET, PLACE
from kernels.triton.linear import fill_linear, linear, pack_linear
from kernels.triton.norm import rms_norm
from kernels.triton.optimizer import adamw, dot
from kernels.triton.router import route
from kernels.triton.sampling import logprob, sample

__all__ = [
    "DEVICE",
    "NAME",
    "adamw",
    "attention",
    "contract",
    "deferred",
    "dot",
    "embedding_sum",
    "expert_linear",
    "fetch",
    "gelu",
    "instruction_set",
    "linear",
    "logprob",
    "moe_combine",
    "pack_experts",
    "pack_linear",
    "repack",
    "rms_norm",
    "route",
    "sample",
    "short_conv",
    "swiglu",
    "upload",
]

NAME = "triton"
DEVICE = PLACE
NUMERICS_VERSION = 3


def contract() -> dict[str, str | int]:
    """What decides the bits: the kernels (NUMERICS_VERSION), their tiles, who compiled them, and for what.

    The architecture is in it and the card's name is not: an H100 and an H200 are both sm_90, run the same compiled code
    on the same units and differ in memory alone, so that episodes of one can be audited on the other. In Triton's
    interpreter nothing is compiled, and no compiler is named. Raises MetronomeError as `compiler.contract`."""
    made = {} if INTERPRET else compiler.contract(instruction_set())
    return {"architecture": instruction_set(), "numerics": NUMERICS_VERSION, **made, **tiles.contract()}


def instruction_set() -> str:
    """The architecture of this process's GPU (`model.program.gpu.take`), ``sm_90`` or ``gfx942``; or ``interpreter``.
    Read anew each time: before a process has taken its own, it is the first one's."""
    if INTERPRET:
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def upload(
    segments: Segments, page_tables: Sequence[Tensor], parts: tuple[Tensor, ...]
) -> tuple[Segments, tuple[Tensor, ...]]:
    return tables.upload(segments, page_tables, parts, torch.device(DEVICE))


def repack(packed: PackedLinear | PackedExperts) -> None:
    if isinstance(packed, PackedLinear):
        fill_linear(packed)
    else:
        fill_experts(packed)


if not INTERPRET and not torch.cuda.is_available():
    raise RuntimeError(
        "the triton backend needs a GPU, and torch finds none. METRONOME_BACKEND=cpu is the backend for this machine; "
        "TRITON_INTERPRET=1, set before the start, runs the triton kernels in an interpreter, for tests only"
    )
