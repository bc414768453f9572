"""How much memory a model takes, to be asked before it is taken (`model.program.memory.check_room`).

All are lower bounds, so that nothing is refused that fits: copies that live for a moment are left out.
"""

from __future__ import annotations

import torch
from transformers import InklingConfig

from model.backbone.transformer import InteractionModel

UNPACKED = ("embed", "conv", "rel_logits_proj")
"""Parts of the names of matrices that the forward reads as they are."""


def empty(config: InklingConfig, dtype: torch.dtype) -> InteractionModel:
    """The model without memory for its weights (meta device)."""
    with torch.device("meta"):
        return InteractionModel(config, dtype)


def model_bytes(model: InteractionModel) -> int:
    """The weights, and the packed copies of its matrices (`model.weights.packs`)."""
    named = model.named_parameters()
    packed = [w for name, w in named if w.ndim >= 2 and not any(part in name for part in UNPACKED)]
    return sum(w.nbytes for w in model.parameters()) + sum(w.nbytes for w in packed)


def training_bytes(model: InteractionModel, shards: int = 1) -> int:
    """Weights, packed copies, the gradient, and AdamW's two moments, in fp32 each; beside weights of another dtype also
    fp32 masters. ``shards``: processes that share the moments among them (ZeRO)."""
    weights = [w for w in model.parameters() if w.requires_grad]
    masters = any(w.dtype != torch.float32 for w in weights)
    count = sum(w.numel() for w in weights)
    return model_bytes(model) + 4 * count * (1 + masters) + 8 * count // shards


def activation_bytes(config: InklingConfig, rows: int, dtype: torch.dtype) -> int:
    """What the forward pass of ``rows`` keeps for the backward pass, at least: of each layer the inputs of its two
    norms and their outputs, [rows, D] each. Today's layers keep six times as much, which depends on how ops are
    joined."""
    text = config.text_config
    return 4 * rows * int(text.num_hidden_layers) * int(text.hidden_size) * dtype.itemsize
