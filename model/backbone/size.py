"""How much memory a model takes, to be asked before it is taken (`model.program.memory.check_room`, `model.info`).

All are lower bounds, so that nothing is refused that fits: copies that live for a moment are left out.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from transformers import InklingConfig

from kernels.layout import CONV_TAPS
from model import config as shapes
from model.backbone.transformer import InteractionModel

UNPACKED = ("embed", "conv", "rel_logits_proj")
"""Parts of the names of matrices that the forward reads as they are."""


def empty(config: InklingConfig, dtype: torch.dtype) -> InteractionModel:
    """The model without memory for its weights (meta device)."""
    with torch.device("meta"):
        return InteractionModel(config, dtype)


def model_bytes(model: InteractionModel) -> int:
    """The weights, and the packed copies of its matrices (`model.weights.packs`)."""
    return weight_bytes(model) + pack_bytes(model)


def weight_bytes(model: InteractionModel) -> int:
    """The weights, with the router's biases."""
    return sum(w.nbytes for w in (*model.parameters(), *model.buffers()))


def pack_bytes(model: InteractionModel) -> int:
    """The packed copies of its matrices, without the padding of their last columns."""
    named = model.named_parameters()
    return sum(w.nbytes for name, w in named if w.ndim >= 2 and not any(part in name for part in UNPACKED))


@dataclass(frozen=True)
class TrainingBytes:
    """What one process of several that train together holds while it takes a step."""

    weights: int
    packs: int
    masters: int  # fp32 copies of weights of another dtype
    optimizer: int  # AdamW's two moments, and with ZeRO also DeepSpeed's copy of the values that this process updates
    gradient: int  # as summed over episodes, its sum over processes, and what DeepSpeed makes of it

    @property
    def total(self) -> int:
        return sum(astuple(self))


GRADIENTS = 2
"""Whole copies of the gradient that the policy's learner has on every process at any ZeRO stage, beside what it hands
to DeepSpeed: its own, and the sum over the processes, which all take in one order (`rl.learner.deepspeed`)."""


def training_bytes(
    model: InteractionModel, zero_stage: int = 0, processes: int = 1, gradients: int = GRADIENTS
) -> TrainingBytes:
    """Stages 0 to 2, as `rl.learner.deepspeed` runs them: each process holds all weights and packed copies, stages 1
    and 2 share the optimizer's state and what DeepSpeed is handed, and so take the same memory. All in fp32, whatever
    the weights are. ``gradients``: whole copies beside what the optimizer is handed."""
    trained = [w for w in model.parameters() if w.requires_grad]
    count = 4 * sum(w.numel() for w in trained)
    sharing = processes if zero_stage else 1
    return TrainingBytes(
        weights=weight_bytes(model),
        packs=pack_bytes(model),
        masters=count if any(w.dtype != torch.float32 for w in trained) else 0,
        optimizer=(3 if zero_stage else 2) * count // sharing,
        gradient=gradients * count + count // sharing,
    )


def zero_bytes(model: InteractionModel, zero_stage: int, processes: int) -> int:
    """What a process holds in the formula of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, figure 1): weights and
    gradient in the model's dtype, AdamW's moments and, beside weights that are not fp32, masters. Stage 1 shares the
    last, 2 the gradient, too, and 3 the weights."""
    count = sum(w.numel() for w in model.parameters() if w.requires_grad)
    masters = 4 * count if model.dtype != torch.float32 else 0
    parts = (8 * count + masters, model.dtype.itemsize * count, weight_bytes(model))  # as stages begin to share them
    return sum(size // processes if stage <= zero_stage else size for stage, size in enumerate(parts, 1))


def activation_bytes(config: InklingConfig, rows: int, dtype: torch.dtype) -> int:
    """What the forward pass of ``rows`` keeps for the backward pass, at least: of each layer the inputs of its two
    norms and their outputs, [rows, D] each. `kept_bytes` says what today's layers keep."""
    text = config.text_config
    return 4 * rows * int(text.num_hidden_layers) * int(text.hidden_size) * dtype.itemsize


def kept_bytes(config: InklingConfig, rows: int, dtype: torch.dtype) -> int:
    """What the layers of the ``cpu`` backend keep for the backward pass of ``rows``, all of it; on a GPU attention's
    inputs stay in bf16. Without embedding and logits, of which a pass keeps those of sampled rows only."""
    text = config.text_config
    width, total = text.hidden_size, 0
    for i in range(text.num_hidden_layers):
        heads, kv_heads, head = shapes.heads(text, i)
        q, kv, rel = heads * head, kv_heads * head, heads * text.d_rel
        # Inputs of norms and convolutions and outputs of norms; the projections; k and v after their convolution; the
        # output of attention.
        own = 6 * width + (q + 2 * kv + rel) + 2 * kv + q
        fp32 = heads  # of each the logarithm of its softmax's sum
        fixed = 2 * kv * CONV_TAPS
        if dtype == torch.float32:
            own += q + kv  # normed
        else:  # as the kernel reads them, its output before it is rounded, and its profile of distances
            fp32 += q + 2 * kv + rel + q
            fixed += text.d_rel * (text.sliding_window_size if shapes.is_sliding(text, i) else text.rel_extent)
        if text.mlp_layer_types[i] == "sparse":
            experts = text.num_experts_per_tok + text.n_shared_experts
            own += experts * (3 * text.moe_intermediate_size + width)
            fp32 += text.n_routed_experts + text.n_shared_experts + 3 * experts  # logits; ids and weights, scaled too
            fixed += 1
        else:
            own += 3 * text.intermediate_size + width
        total += rows * (own * dtype.itemsize + 4 * fp32) + 4 * fixed
    return int(total)
