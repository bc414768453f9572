"""The native CPU backend: every op of `kernels.ops`, gathered here under the names that `kernels.dispatch` calls.

NUMERICS_VERSION goes up whenever a change to the native code may change a bit of any result.

**Orders of reduction**, on every instruction set alike (the sources of native/ say how):

- products (linear, experts, their gradients): one chain acc = fma(a, b, acc) over ascending k;
- attention: whole splits of 64 keys from left to right, each element of a split's sums a chain over ascending keys;
- RMS norm, log-probabilities: 16 lanes, lane l over elements l, l + 16, …, joined by one fixed tree;
- convolution, experts' weighted sum, embedding, the router's weights: one chain in ascending index.
"""

from __future__ import annotations

from torch import Tensor

from kernels.cpu.attention import attention
from kernels.cpu.conv import short_conv
from kernels.cpu.embedding import embedding_sum
from kernels.cpu.library import isa
from kernels.cpu.linear import fill_linear, linear, pack_linear, panels_of
from kernels.cpu.moe import expert_linear, fill_experts, moe_combine, pack_experts, swiglu
from kernels.cpu.norm import rms_norm
from kernels.cpu.sampling import logprob, route, sample
from kernels.layout import PackedExperts, PackedLinear

__all__ = [
    "NAME",
    "attention",
    "contract",
    "embedding_sum",
    "expert_linear",
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


def contract() -> dict[str, str | int]:
    # exact: bf16 is widened and multiplied in fp32 FMA chains; no instruction set's bf16 dot product is used
    return {"isa": isa(), "numerics": NUMERICS_VERSION, "bf16": "exact"}


def repack(packed: PackedLinear | PackedExperts) -> None:
    _refuse_changed(packed)
    if isinstance(packed, PackedLinear):
        fill_linear(packed)
    else:
        fill_experts(packed)


def _refuse_changed(packed: PackedLinear | PackedExperts) -> None:
    """A parameter's ``data`` may have been exchanged since it was packed: what is more would go past the panels."""
    panels, one = panels_of(packed, "repack"), isinstance(packed, PackedLinear)
    groups: tuple[tuple[Tensor, ...], ...] = (packed.parts,) if isinstance(packed, PackedLinear) else packed.groups
    for part in (part for group in groups for part in group):
        fits = part.dim() == (2 if one else 3) and part.shape[-1] == packed.cols and part.dtype == panels.dtype
        if not fits or not part.is_contiguous() or not part.is_cpu:
            raise ValueError(
                f"repack: a weight is now {part.dtype} {tuple(part.shape)} on {part.device}, strides {part.stride()}; "
                f"what was packed is contiguous {panels.dtype} with {packed.cols} columns, on the CPU"
            )
    rows = [sum(part.shape[-2] for part in group) for group in groups]
    experts = 0 if one else sum(group[0].shape[0] for group in groups)
    alike = all(part.shape[:-2] == group[0].shape[:-2] for group in groups for part in group)
    if rows != [packed.rows] * len(groups) or not alike or (not one and experts != packed.experts):
        raise ValueError(f"repack: the weights now have {rows} rows a group; {packed.rows} were packed: pack them anew")
