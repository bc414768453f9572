"""Writes tests/golden/patches.json: digests of what transformers' image processor makes of random pictures.

    python -m tests.model.processor

It needs torchvision, which the tests do not: the file was written with transformers 5.19.0 and torchvision 0.28.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "patches.json"
CASES = 24


def pictures() -> Iterator[tuple[str, int, Tensor]]:
    """(name, side of a patch, picture uint8 [H, W, 3])."""
    draw = np.random.Generator(np.random.PCG64(0))
    for case in range(CASES):
        side = (40, 16, 6, 10, 7)[case % 5]
        height, width = (int(x) for x in draw.integers(1, 100, 2))
        if case % 6 == 0:  # the processor then adds a column that shows nothing
            width = (width // side + 1) * side
        levels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield f"{height} x {width} in patches of {side}", side, torch.from_numpy(levels)


def digest(pixel_values: Tensor) -> str:
    """Of patches fp32 [P, 2, p, p, 3], shape included."""
    content = pixel_values.contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(pixel_values.shape)).encode() + content).hexdigest()[:32]


def main() -> None:
    from transformers.models.inkling.image_processing_inkling import InklingImageProcessor

    found = {}
    for name, side, picture in pictures():
        processor = InklingImageProcessor(size={"height": side, "width": side})
        made = processor(picture.permute(2, 0, 1), return_tensors="pt", input_data_format="channels_first")
        found[name] = digest(made.pixel_values)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
