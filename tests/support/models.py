"""Models with initial weights."""

from __future__ import annotations

import torch

from model.backbone.transformer import InteractionModel
from model.config import preset


def fresh_model(name: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32) -> InteractionModel:
    """A preset with the weights of ``seed``, packed."""
    model = InteractionModel(preset(name), dtype)
    model.init_weights(seed)
    model.pack()
    return model
