"""A head with weights that do something, and torch's own computation of it in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.voice.config import VoiceConfig
from model.voice.flow import EPS, FlowHead, time_features

HIDDEN = 48
SHAPE = VoiceConfig(width=32, blocks=2, steps=4)


def some_head(config: VoiceConfig = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> FlowHead:
    head, generator = FlowHead(config, HIDDEN, dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in head.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * drawn if weight.dim() == 1 else drawn / math.sqrt(weight.shape[1]))
    head.pack()
    return head


def oracle(head: FlowHead, x: Tensor, hidden: Tensor, level: Tensor) -> Tensor:
    """What the head expects, by torch's functions in fp64."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.double())

    condition = F.gelu(
        linear(hidden.double(), head.hear.weight) + linear(time_features()[level].double(), head.time.weight)
    )
    y = linear(x.double(), head.enter.weight)
    for block in head.layers:
        scale, shift, gate = linear(condition, block.modulate.weight).chunk(3, 1)
        z = norm(y, block.norm.weight) * (1 + scale) + shift
        y = y + gate * linear(F.gelu(linear(z, block.up.weight)), block.down.weight)
    scale, shift = linear(condition, head.modulate.weight).chunk(2, 1)
    return linear(norm(y, head.norm.weight) * (1 + scale) + shift, head.leave.weight)
