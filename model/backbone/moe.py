"""Inkling's feed-forward blocks: the mixture of routed and shared experts, and the dense MLP of early layers.

Shared experts are computed by the same expert op as the routed ones: the router appends them to every row's list of
experts. Their routing weight multiplies their output (transformers multiplies before the down projection, which is
equal in exact arithmetic), so both kinds of expert share one code path and one order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import InklingConfig

from kernels import ops
from kernels.layout import PackedExperts, PackedLinear
from model.backbone.embed import Weight


class Router(Weight):
    """``weight`` [E + shared, D]. The bias that only affects which experts are selected is a buffer, as in Inkling: it
    gets no gradient."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        text = config.text_config
        super().__init__(text.n_routed_experts + text.n_shared_experts, text.hidden_size, dtype=dtype)
        self.global_scale = nn.Parameter(torch.empty(1, dtype=dtype))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(text.n_routed_experts, dtype=torch.float32))


class Experts(nn.Module):
    """Parameters of the routed experts; gate and up projections are one matrix."""

    def __init__(self, experts: int, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner, dtype=dtype))


class SharedExperts(nn.Module):
    """Parameters of the experts that every row visits."""

    def __init__(self, experts: int, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner, dtype=dtype))


@dataclass(slots=True)
class _Packed:
    gate: PackedLinear
    gate_up: PackedExperts
    down: PackedExperts
    bias: Tensor  # fp32 [E]
    scale: Tensor  # fp32 [1], detached


class MixtureOfExperts(nn.Module):
    """Top-k routed experts plus the shared ones, weighted by the router."""

    packed: _Packed  # set by `pack`

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        text = config.text_config
        self.top_k, self.shared, self.route_scale = text.num_experts_per_tok, text.n_shared_experts, text.route_scale
        self.gate = Router(config, dtype)
        self.experts = Experts(text.n_routed_experts, text.hidden_size, text.moe_intermediate_size, dtype)
        self.shared_experts = SharedExperts(self.shared, text.hidden_size, text.moe_intermediate_size, dtype)

    def _scale(self) -> Tensor:
        return self.gate.global_scale.float() * self.route_scale

    def derived(self) -> dict[str, Tensor]:
        """Tensors computed from the parameters that the forward reads beside the packs (`model.weights.packs`)."""
        return {"bias": self.gate.e_score_correction_bias, "scale": self._scale().detach()}

    def pack(self) -> None:
        routed, shared = self.experts, self.shared_experts
        self.packed = _Packed(
            gate=ops.pack_linear(self.gate.weight),
            gate_up=ops.pack_experts((routed.gate_up_proj,), (shared.gate_proj, shared.up_proj)),
            down=ops.pack_experts((routed.down_proj,), (shared.down_proj,)),
            **self.derived(),
        )

    def repack(self) -> None:
        ops.repack(self.packed.gate)
        ops.repack(self.packed.gate_up)
        ops.repack(self.packed.down)
        for name, value in self.derived().items():
            setattr(self.packed, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] normed -> [T, D]."""
        w = self.packed
        logits = ops.linear(x, w.gate, torch.promote_types(x.dtype, torch.float32))
        expert, weight = ops.route(logits, w.bias, self.top_k, self.shared)
        weight = ops.scale(weight, self._scale() if torch.is_grad_enabled() else w.scale)
        fan_out, expert = expert.shape[1], expert.view(-1)
        inner = ops.swiglu(ops.expert_linear(x, w.gate_up, expert, fan_out))
        return ops.moe_combine(ops.expert_linear(inner, w.down, expert), weight)


@dataclass(slots=True)
class _PackedDense:
    gate_up: PackedLinear
    down: PackedLinear


class DenseMLP(nn.Module):
    """SwiGLU MLP with a learned scale on its output."""

    packed: _PackedDense  # set by `pack`

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
        self.gate_proj = Weight(inner, width, dtype=dtype)
        self.up_proj = Weight(inner, width, dtype=dtype)
        self.down_proj = Weight(width, inner, dtype=dtype)
        self.global_scale = nn.Parameter(torch.empty(1, dtype=dtype))

    def pack(self) -> None:
        self.packed = _PackedDense(
            gate_up=ops.pack_linear(self.gate_proj.weight, self.up_proj.weight),
            down=ops.pack_linear(self.down_proj.weight),
        )

    def repack(self) -> None:
        ops.repack(self.packed.gate_up)
        ops.repack(self.packed.down)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] normed -> [T, D]."""
        w = self.packed
        return ops.scale(ops.linear(ops.swiglu(ops.linear(x, w.gate_up)), w.down), self.global_scale)
