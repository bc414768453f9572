"""Video frames: their record, and the patches that the vision tower embeds.

A micro-turn has 0, 1 or 2 frames, RGB of any size up to `MOST_PIXELS`. They are cut as transformers'
`InklingImageProcessor` cuts a picture: a grid of ceil(H / p) rows by W // p + 1 columns of patches of p x p pixels, row
by row, where what lies outside the frame counts as the level -1 (so a width that p divides gives a last column that is
all outside: the processor's rule, and so what Inkling was trained on). A patch has two time steps. One frame is a still
picture, whose two steps are equal; of two frames, the earlier is the first step and the later the second, so that both
give as many patches, and so rows, as one.

Levels are normalised as that processor does: (level - 255 mean) / (255 std) by channel, with CLIP's mean and std. Each
operation is rounded once, in fp32, so the values depend on no library and no processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

MOST_FRAMES = 2
"""The most video frames in one micro-turn."""
TIME_STEPS = 2
"""Time steps of a patch."""
MOST_PIXELS = 2**20
"""The most pixels of a frame (1024 x 1024), and the longest side is `LONGEST_SIDE`."""
LONGEST_SIDE = 2048
CHANNELS = 3
DIGEST_BYTES = 16
OUTSIDE = -1.0
"""The level of what a patch has beyond the frame's edge."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures (Radford et al. 2021, arXiv 2103.00020), for levels from 0 to 1."""


def grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """(rows, columns) of the patches of a frame.

    >>> grid(240, 240, 40), grid(31, 31, 16)
    ((6, 7), (2, 2))
    """
    return -(-height // patch), width // patch + 1


def patch_count(frames: Tensor, patch: int) -> int:
    """The patches of one micro-turn's frames uint8 [F, H, W, 3]: as many for two frames as for one, 0 for none."""
    if not len(frames):
        return 0
    rows, columns = grid(frames.shape[1], frames.shape[2], patch)
    return rows * columns


@dataclass(frozen=True, slots=True)
class Patches:
    """P patches, in the order of their rows. Patch i has one picture if it is still, else two (the earlier first); the
    pictures of all patches lie one after another, Q in all."""

    pictures: Tensor  # uint8 [Q, p, p, 3], 0 outside the frame
    inside: Tensor  # int16 [Q, 2], how many of its rows and columns lie in the frame
    count: Tensor  # int64 [P], pictures of each patch: 1 or 2

    @staticmethod
    def none(patch: int) -> Patches:
        """No patches, for a side of ``patch`` pixels."""
        return Patches(
            torch.empty(0, patch, patch, CHANNELS, dtype=torch.uint8),
            torch.empty(0, 2, dtype=torch.int16),
            torch.empty(0, dtype=torch.int64),
        )

    @staticmethod
    def cut(frames: Tensor, patch: int) -> Patches:
        """The patches of one micro-turn's frames, uint8 [F, H, W, 3]."""
        if not len(frames):
            return Patches.none(patch)
        number, height, width, _ = frames.shape
        rows, columns = grid(height, width, patch)
        padded = F.pad(frames, (0, 0, 0, columns * patch - width, 0, rows * patch - height))
        pictures = padded.view(number, rows, patch, columns, patch, CHANNELS).permute(1, 3, 0, 2, 4, 5)
        tall = (height - patch * torch.arange(rows)).clamp(0, patch)
        wide = (width - patch * torch.arange(columns)).clamp(0, patch)
        inside = torch.stack((tall[:, None].expand(rows, columns), wide.expand(rows, columns)), -1)
        return Patches(
            pictures.reshape(-1, patch, patch, CHANNELS),
            inside.to(torch.int16).reshape(-1, 1, 2).expand(-1, number, 2).reshape(-1, 2),
            torch.full((rows * columns,), number),
        )

    @staticmethod
    def cat(parts: Sequence[Patches]) -> Patches:
        """The patches of all parts (one at least), in order."""
        if len(parts) == 1:
            return parts[0]
        return Patches(*(torch.cat([getattr(p, name) for p in parts]) for name in ("pictures", "inside", "count")))

    def __len__(self) -> int:
        return self.count.shape[0]

    def part(self, spans: Sequence[tuple[int, int]]) -> Patches:
        """Patches ``first`` … ``end - 1`` of each span (first, end), in the order of the spans."""
        ends = [0, *self.count.cumsum(0).tolist()]
        pictures = [slice(ends[first], ends[end]) for first, end in spans]
        return Patches(
            torch.cat([self.pictures[s] for s in pictures]),
            torch.cat([self.inside[s] for s in pictures]),
            torch.cat([self.count[first:end] for first, end in spans]),
        )

    def digests(self) -> list[NDArray[np.uint8]]:
        """uint8 [DIGEST_BYTES] of each patch: equal for equal patches only, but for a chance of 2^-128."""
        out, end = [], 0
        pictures, inside = self.pictures.numpy(), self.inside.numpy()
        for count in self.count.tolist():
            here = slice(end, end + count)
            content = inside[here].tobytes() + pictures[here].tobytes()
            out.append(np.frombuffer(blake2b(content, digest_size=DIGEST_BYTES).digest(), np.uint8))
            end += count
        return out

    def steps(self) -> Tensor:
        """int64 [2, P]: the picture of each patch's first and of its second time step."""
        last = self.count.cumsum(0) - 1
        return torch.stack((last - self.count + 1, last))


def normalised(pictures: Tensor, inside: Tensor) -> Tensor:
    """uint8 [Q, p, p, 3] and int16 [Q, 2] as in `Patches` -> fp32 [Q, p, p, 3], on their device."""
    side, device = pictures.shape[1], pictures.device
    # Rows of 3 p levels: with an innermost axis of three, each of these steps would take several times as long.
    place = torch.arange(CHANNELS * side, device=device, dtype=inside.dtype)
    tall, wide = inside[:, 0, None, None], inside[:, 1, None, None]
    seen = (place[:side, None] < tall) & (place < CHANNELS * wide)  # [Q, p, 3 p]
    mean, std = ((255 * torch.tensor(values)).repeat(side).to(device) for values in (MEAN, STD))
    levels = torch.where(seen, pictures.reshape(-1, side, CHANNELS * side).float(), OUTSIDE)
    return levels.sub_(mean).div_(std).view(pictures.shape)


@dataclass(frozen=True)
class Frames:
    """The video of a conversation, as it was shown.

    Example: one picture of 2 x 3 pixels in chunk 4: 18 bytes of pixels, and sizes ``[[4, 1, 2, 3]]``.
    """

    pixels: Tensor  # uint8 [B], RGB of all frames, one after another
    sizes: Tensor  # int64 [K, 4]: chunk, frames (1 or 2), height, width of each chunk that has frames, ascending

    @staticmethod
    def of(chunks: Sequence[Tensor]) -> Frames:
        """From the frames uint8 [F, H, W, 3] of every chunk, from chunk 0 on."""
        shown = [(k, frames) for k, frames in enumerate(chunks) if len(frames)]
        if not shown:
            return NO_VIDEO
        return Frames(
            torch.cat([frames.reshape(-1) for _, frames in shown]),
            torch.tensor([[k, *frames.shape[:3]] for k, frames in shown]),
        )

    def chunks(self) -> list[tuple[int, Tensor]]:
        """(chunk, its frames uint8 [F, H, W, 3]) of each chunk that has frames. Raises ValueError unless sizes and
        pixels agree and are a micro-turn's."""
        if self.sizes.ndim != 2 or self.sizes.shape[1] != 4 or self.pixels.ndim != 1:
            raise ValueError(f"frames: pixels are {list(self.pixels.shape)}, sizes {list(self.sizes.shape)}")
        sizes: list[list[int]] = self.sizes.tolist()
        for k, number, height, width in sizes:
            if not 1 <= number <= MOST_FRAMES or k < 0 or size_problem(height, width):
                raise ValueError(f"frames: chunk {k} has {number} frames of {height} x {width} pixels")
        if any(a[0] >= b[0] for a, b in itertools.pairwise(sizes)):
            raise ValueError("frames: the chunks are not in order")
        lengths = [number * height * width * CHANNELS for _, number, height, width in sizes]
        if sum(lengths) != len(self.pixels):
            raise ValueError(f"frames: {len(self.pixels)} bytes of pixels, but the sizes need {sum(lengths)}")
        parts = self.pixels.split(lengths) if lengths else ()
        return [(k, part.view(*shape, CHANNELS)) for (k, *shape), part in zip(sizes, parts, strict=True)]

    def patches(self, patch: int) -> Patches:
        """All patches, in order. Raises ValueError as `chunks` does."""
        return Patches.cat([Patches.none(patch), *(Patches.cut(frames, patch) for _, frames in self.chunks())])


def size_problem(height: int, width: int) -> str:
    """Why a frame cannot have this size, or ""."""
    if height < 1 or width < 1:
        return "a frame has one pixel or more"
    if max(height, width) > LONGEST_SIDE or height * width > MOST_PIXELS:
        return f"a frame has at most {MOST_PIXELS:,} pixels and sides of at most {LONGEST_SIDE}: make it smaller"
    return ""


NO_FRAMES = torch.empty(0, 0, 0, CHANNELS, dtype=torch.uint8)
"""The frames of a micro-turn that shows nothing."""

NO_VIDEO = Frames(torch.empty(0, dtype=torch.uint8), torch.empty(0, 4, dtype=torch.int64))
