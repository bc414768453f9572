"""The flow head: from a noisy chunk of sound, its time and the hidden state that it is conditioned on, the clean chunk.

An MLP whose blocks are scaled, shifted and gated by the condition (adaptive layer norm: Peebles & Xie 2023, arXiv
2212.09748; as a head for continuous tokens: Li et al. 2024, arXiv 2406.11838), of the ops of `kernels.ops`: RMS norm in
place of layer norm and GELU in place of SiLU. Everything else is one multiplication or addition a number, which IEEE
754 rounds alike everywhere, so a chunk's bits depend on nothing but its own row.

It predicts the clean chunk x1 and not the velocity: a head narrower than the 1,600 numbers of a chunk cannot pass on
the noise that is part of the velocity. With time t from 0 (noise) to 1, x_t = (1 - t) x0 + t x1 and velocity
(x1 - x_t) / (1 - t) (conditional flow matching: Lipman et al. 2023, arXiv 2210.02747, with sigma_min 0).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from kernels import ops
from kernels.exact import roots_of_unity
from kernels.layout import PackedLinear
from model.backbone.embed import Weight
from model.voice.config import LEVELS, NUMBERS, VoiceConfig

EPS = 1e-6
ZERO = ("voice_head.leave.weight", "modulate.weight")
"""Ends of the names of weights that begin as 0: at first no block changes anything, and silence is expected."""
FREQUENCIES = tuple(1 << i for i in range(8))
"""Turns of the time features' phases while t goes from 0 to 2."""


@functools.cache
def time_features() -> Tensor:
    """fp32 [LEVELS, 2 * len(FREQUENCIES)]: cosine and sine of pi f t at t = i / LEVELS for each frequency f."""
    roots = torch.from_numpy(roots_of_unity(2 * LEVELS, 2 * LEVELS))
    index = torch.arange(LEVELS)[:, None] * torch.tensor(FREQUENCIES) % (2 * LEVELS)
    return roots[index].flatten(1).float()


class Linear(Weight):
    """``weight`` [out, in], without bias."""

    packed: PackedLinear  # set by `FlowHead.pack`

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return ops.linear(x, self.packed, out_dtype)


class Block(nn.Module):
    """x + gate * MLP((1 + scale) * norm(x) + shift), with scale, shift and gate from the condition."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = Weight(width, dtype=dtype)
        self.modulate = Linear(3 * width, width, dtype=dtype)
        self.up = Linear(2 * width, width, dtype=dtype)
        self.down = Linear(width, 2 * width, dtype=dtype)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x and condition [R, width] -> [R, width]."""
        scale, shift, gate = self.modulate(condition).chunk(3, dim=1)
        y = ops.rms_norm(x, self.norm.weight, EPS) * (1 + scale) + shift
        return x + gate * self.down(ops.gelu(self.up(y)))


class FlowHead(nn.Module):
    """See the module's text. ``hidden``: width D of the hidden states that it is conditioned on."""

    def __init__(self, config: VoiceConfig, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype, width = config, dtype, config.width
        self.enter = Linear(width, NUMBERS, dtype=dtype)
        self.hear = Linear(width, hidden, dtype=dtype)
        self.time = Linear(width, 2 * len(FREQUENCIES), dtype=dtype)
        blocks = [Block(width, dtype) for _ in range(config.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.layers = blocks  # typed
        self.norm = Weight(width, dtype=dtype)
        self.modulate = Linear(2 * width, width, dtype=dtype)
        self.leave = Linear(NUMBERS, width, dtype=dtype)

    def pack(self) -> None:
        for part in self.linears():
            part.packed = ops.pack_linear(part.weight)

    def repack(self) -> None:
        for part in self.linears():
            ops.repack(part.packed)

    def linears(self) -> list[Linear]:
        return [part for part in self.modules() if isinstance(part, Linear)]

    def conditions(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> [R, width]: what `forward` takes, the same for all times."""
        return self.hear(hidden)

    def forward(self, x: Tensor, conditions: Tensor, level: Tensor) -> Tensor:
        """x fp32 [R, NUMBERS] at time level / LEVELS, int64 [R]; conditions [R, width] -> the clean chunks that are
        expected, fp32 [R, NUMBERS]."""
        features = time_features().to(x.device)[level].to(self.dtype)
        condition = ops.gelu(conditions + self.time(features))
        y = self.enter(x.to(self.dtype))
        for block in self.layers:
            y = block(y, condition)
        scale, shift = self.modulate(condition).chunk(2, dim=1)
        y = ops.rms_norm(y, self.norm.weight, EPS) * (1 + scale) + shift
        return self.leave(y, torch.float32)
