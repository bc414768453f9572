"""The native CPU backend: every op of `kernels.ops`, gathered here under the names that `kernels.dispatch` calls.

NUMERICS_VERSION goes up whenever a change to the native code may change a bit of any result.
"""

from __future__ import annotations

from kernels.cpu.attention import attention
from kernels.cpu.conv import short_conv
from kernels.cpu.embedding import embedding_sum
from kernels.cpu.library import isa
from kernels.cpu.linear import fill_linear, linear, pack_linear
from kernels.cpu.moe import expert_linear, fill_experts, moe_combine, pack_experts, swiglu
from kernels.cpu.norm import rms_norm
from kernels.cpu.sampling import logprob, route, sample
from kernels.layout import PackedExperts, PackedLinear

__all__ = [
    "NAME",
    "NUMERICS_VERSION",
    "attention",
    "embedding_sum",
    "expert_linear",
    "isa",
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
]

NAME = "cpu"
NUMERICS_VERSION = 1


def repack(packed: PackedLinear | PackedExperts) -> None:
    if isinstance(packed, PackedLinear):
        fill_linear(packed)
    else:
        fill_experts(packed)
