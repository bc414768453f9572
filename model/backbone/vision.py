"""The vision tower: hMLP patches in Inkling's form (a variant of Touvron et al. 2022, arXiv 2203.09795).

Each patch is embedded by itself. In every layer, neighbouring places (in space first, in time last) are folded into one
by putting their channels side by side; then a linear map without bias, and except after the last layer RMS norm and
GELU; a final RMS norm ends it. How far each layer folds, and how wide it is, follows from the prime factors of the
patch's side and the number of layers (transformers' `plan_out_scales`).

Up to the layer that folds time the two time steps do not meet, so a still picture, whose steps are equal, is computed
once: by the row contract its copy would have the same bits.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import InklingConfig, InklingVisionConfig

from kernels import ops
from kernels.layout import PackedLinear
from model.backbone.embed import Weight
from model.senses.video import normalised

NORM_EPS = 1e-6  # a constant in transformers' vision tower; its config field is not read


@dataclass(frozen=True)
class Fold:
    """What one layer folds, and its linear map's shape."""

    space: int  # side of the square of places that become one
    time: int  # time steps that become one
    inputs: int
    outputs: int


def folds(config: InklingVisionConfig) -> tuple[Fold, ...]:
    """The layers' folds, first to last. Raises ValueError for a tower whose time steps are not folded by one layer, in
    the end or before."""
    return _folds(
        config.temporal_patch_size, config.patch_size, config.n_layers, config.num_channels, config.text_hidden_size
    )


@functools.cache
def _folds(time: int, patch: int, layers: int, channels: int, width: int) -> tuple[Fold, ...]:
    from transformers.models.inkling.modeling_inkling import plan_out_scales  # a slow import

    scales = plan_out_scales(time, patch, layers, channels).tolist()
    made, depth = [], channels
    for i, (before, after) in enumerate(itertools.pairwise(scales)):
        space, steps = after[1] // before[1], after[0] // before[0]
        outputs = width if i == layers - 1 else after[3]
        made.append(Fold(space, steps, depth * space * space * steps, outputs))
        depth = outputs
    return tuple(made)


class VisionLayer(nn.Module):
    """``projection`` [out, in], and ``layer_norm`` [out] except in the last layer."""

    packed: PackedLinear  # set by `VisionTower.pack`

    def __init__(self, fold: Fold, last: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.fold = fold
        self.projection = Weight(fold.outputs, fold.inputs, dtype=dtype)
        self.layer_norm = None if last else Weight(fold.outputs, dtype=dtype)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [Q, t, h, w, C] -> [Q, t / time, h / space, w / space, out]; where time is folded, ``steps`` int64 [2, P]
        says which pictures are a patch's time steps, and the result has P patches."""
        fold = self.fold
        if fold.time > 1:  # the two time steps of each patch, which are one picture for a still one
            x = torch.stack((x[:, 0].index_select(0, steps[0]), x[:, 0].index_select(0, steps[1])), 1)
        count, t, h, w, c = x.shape
        t, h, w = t // fold.time, h // fold.space, w // fold.space
        if fold.space > 1 or fold.time > 1:
            x = x.view(count, t, fold.time, h, fold.space, w, fold.space, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        y = ops.linear(x.reshape(count * t * h * w, fold.inputs), self.packed)
        if self.layer_norm is not None:
            y = ops.gelu(ops.rms_norm(y, self.layer_norm.weight, NORM_EPS))
        return y.view(count, t, h, w, -1)


class VisionTower(nn.Module):
    """See the module's text. Parameter names are those of transformers' `InklingVisionModel`."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        vision = config.vision_config
        self.dtype, self.patch = dtype, vision.patch_size
        plan = folds(vision)
        layers = [VisionLayer(fold, i == len(plan) - 1, dtype) for i, fold in enumerate(plan)]
        self.encoder_layers = nn.ModuleList(layers)
        self.layers = layers  # typed
        self.final_norm = Weight(config.text_config.hidden_size, dtype=dtype)

    def pack(self) -> None:
        for layer in self.layers:
            layer.packed = ops.pack_linear(layer.projection.weight)

    def repack(self) -> None:
        for layer in self.layers:
            ops.repack(layer.packed)

    def forward(self, pictures: Tensor, inside: Tensor, steps: Tensor) -> Tensor:
        """pictures uint8 [Q, p, p, 3], inside int16 [Q, 2] and steps int64 [2, P] (`model.senses.video.Patches`) -> the
        embedded patches [P, D]."""
        x = normalised(pictures, inside).to(self.dtype)[:, None]
        for layer in self.layers:
            x = layer(x, steps)
        return ops.rms_norm(x.reshape(x.shape[0], -1), self.final_norm.weight, NORM_EPS)
