"""The native CPU backend: every op of `kernels.ops`, under the names of `kernels.backend.Backend`.

NUMERICS_VERSION is raised whenever a change to the native code may change a bit of any result.

**Orders of reduction**, the same on every instruction set (the sources in native/ say how):

- products (linear, experts, their gradients): one chain acc = fma(a, b, acc) in ascending k;
- attention: whole splits of 64 keys from left to right; within a split, each sum is a chain in ascending key;
- RMS norm, log-probabilities: 16 lanes, lane l over elements l, l + 16, …, joined by one fixed tree;
- convolution, experts' weighted sum, embedding, the router's weights: one chain in ascending index.
"""

from __future__ import annotations

from torch import Tensor

from kernels.checks.common import check_device
from kernels.cpu.attention import attention
from kernels.cpu.conv import short_conv
from kernels.cpu.embedding import embedding_sum
from kernels.cpu.gelu import gelu
from kernels.cpu.library import isa
from kernels.cpu.linear import fill_linear, linear, pack_linear, panels_of
from kernels.cpu.moe import expert_linear, fill_experts, moe_combine, pack_experts, swiglu
from kernels.cpu.norm import rms_norm
from kernels.cpu.optimizer import adamw, dot
from kernels.cpu.sampling import logprob, route, sample
from kernels.layout import PackedExperts, PackedLinear
from kernels.upload import deferred, fetch, upload

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

NAME = "cpu"
DEVICE = "cpu"
NUMERICS_VERSION = 2


def contract() -> dict[str, str | int]:
    # exact: bf16 is widened and multiplied in fp32 FMA chains; no instruction set's bf16 dot product is used
    return {"numerics": NUMERICS_VERSION, "bf16": "exact"}


def instruction_set() -> str:
    return isa()


def repack(packed: PackedLinear | PackedExperts) -> None:
    """Raises ValueError when a weight's shape, type or device is no longer what was packed: its ``data`` may have been
    replaced since, and other sizes would be written beyond the panels."""
    dtypes = (panels_of(packed, "repack").dtype,)
    if isinstance(packed, PackedLinear):
        now = PackedLinear.build(packed.parts, dtypes, "repack")
        _refuse_changed((now.rows, now.cols), (packed.rows, packed.cols), packed.parts[0])
        fill_linear(packed)
    else:
        experts = PackedExperts.build(packed.groups, dtypes, "repack")
        _refuse_changed(
            (experts.experts, experts.rows, experts.cols), (packed.experts, packed.rows, packed.cols),
            packed.groups[0][0],
        )  # fmt: skip
        fill_experts(packed)


def _refuse_changed(now: tuple[int, ...], packed: tuple[int, ...], first: Tensor) -> None:
    check_device("repack", "cpu", "cpu", weight=first)
    if now != packed:
        raise ValueError(f"repack: the weights are now {list(now)}, but {list(packed)} were packed: pack them anew")
