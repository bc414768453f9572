"""The vision tower beside transformers' on this machine: one frame, from pixels to what the backbone reads.

Ours is timed from the frame's bytes on (cut into patches, normalised, embedded); transformers' from normalised patches
on, because its processor needs torchvision. Both have the same weights and alternate in one process.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.config import Preset, preset
from model.senses.video import Patches, normalised
from rollout.bench.timing import seconds

SIDE = 240  # pixels of the frame
PRESETS: tuple[Preset, ...] = ("tiny", "base")


@dataclass(frozen=True)
class VisionSpeed:
    """Milliseconds for one frame of SIDE x SIDE pixels: medians."""

    preset: str
    patches: int
    ours_ms: float
    cut_ms: float  # of ours: until the patches are normalised
    transformers_ms: float

    @property
    def times(self) -> float:
        return self.transformers_ms / self.ours_ms


def measure_vision(rounds: int) -> list[VisionSpeed]:
    """One for each of PRESETS."""
    frame = torch.randint(0, 256, (1, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [_measure(name, frame, rounds) for name in PRESETS]


def _measure(name: Preset, frame: Tensor, rounds: int) -> VisionSpeed:
    from transformers.models.inkling.modeling_inkling import InklingVisionModel  # a slow import

    model = InteractionModel(preset(name))
    model.init_weights(0)
    model.pack()
    tower = model.model.vision_tower
    theirs = InklingVisionModel(model.config.vision_config).eval()
    theirs.load_state_dict(tower.state_dict())

    def cut() -> Patches:
        patches = Patches.cut(frame, model.senses.patch)
        normalised(patches.pictures, patches.inside)
        return patches

    def ours() -> Tensor:
        patches = Patches.cut(frame, model.senses.patch)
        return tower(patches.pictures, patches.inside, patches.steps())

    patches = cut()
    pixels = normalised(patches.pictures, patches.inside)[patches.steps()].transpose(0, 1).contiguous()
    calls = (ours, cut, partial(theirs, pixels))
    with torch.inference_mode():
        for call in calls:
            call()
        taken = [[1000 * seconds(call) for call in calls] for _ in range(rounds)]
    result = VisionSpeed(name, len(patches), *(statistics.median(column) for column in zip(*taken, strict=True)))
    print(
        f"{name}: a frame of {SIDE} x {SIDE} pixels, {result.patches} patches: {result.ours_ms:.2f} ms, of which "
        f"{result.cut_ms:.2f} to cut and normalise; transformers' tower {result.transformers_ms:.2f} ms "
        f"({result.times:.1f} times)"
    )
    return result
