"""What of a chunk is no text, as vLLM's multimodal items: its dMel codes, those of the model's own sound, and its video
patches.

vLLM's prefix cache compares items by their identifiers, so these are digests of all that the item holds: sessions that
differ in one pixel share nothing from there on.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from model.senses.video import CHANNELS, Patches
from rollout.turn.grammar import OWN_ROWS

FIELD = "address"
"""Name of the field of a multimodal item that has its data. vLLM drops the data of items whose rows have been computed,
except items with a field called "address" (meant for items in shared memory). The data is needed when a preempted
session is recomputed; without it vLLM fails with an encoder cache miss."""
OWN_DATA_ROWS = OWN_ROWS + 1
"""Rows of the data of an item of own sound; one of the user's sound has `AUDIO_ROWS`."""
AUDIO, IMAGE, OWN = "audio", "image", "video"
"""vLLM's names of the kinds of items, of which it passes one kind at a time; the last is ours for own sound."""


def codes_item(first: int, codes: Tensor) -> Any:
    """One chunk's codes uint8 [4, 80], whose rows begin at ``first``."""
    return _item(AUDIO, first, len(codes), codes)


def own_item(first: int, codes: Tensor) -> Any:
    """One chunk's codes uint8 [4, 80] of the model's own sound, whose rows begin at ``first``. A row of zeros after
    them makes them other data than the same codes of the user's sound."""
    data = codes.new_zeros(OWN_DATA_ROWS, codes.shape[1])
    data[: len(codes)] = codes
    return _item(OWN, first, len(codes), data)


def patches_item(first: int, patches: Patches) -> Any:
    """One chunk's patches (one at least), whose rows begin at ``first``."""
    return _item(IMAGE, first, len(patches), packed(patches))


def packed(patches: Patches) -> Tensor:
    """The patches of one chunk as uint8 [B]: two numbers (pictures a patch, the patch's side), then for each picture
    its ``inside`` as int16, then all pictures."""
    side = patches.pictures.shape[1]
    head = torch.tensor([int(patches.count[0]), side], dtype=torch.int16)
    parts = (head, patches.inside.reshape(-1))
    return torch.cat([*(part.view(torch.uint8) for part in parts), patches.pictures.reshape(-1)])


def unpacked(data: Tensor) -> Patches:
    """The inverse of `packed`, on the CPU."""
    data = data.cpu()
    count, side = data[:4].view(torch.int16).tolist()
    each = side * side * CHANNELS
    pictures = (len(data) - 4) // (each + 4)
    inside = data[4 : 4 + 4 * pictures].clone().view(torch.int16).view(pictures, 2)
    return Patches(
        data[4 + 4 * pictures :].view(pictures, side, side, CHANNELS),
        inside,
        torch.full((pictures // count,), count),
    )


def _item(kind: str, first: int, rows: int, data: Tensor) -> Any:
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    name = blake2b(data.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem({FIELD: MultiModalFieldElem(data=data, field=MultiModalBatchedField())}),
        modality=kind,
        identifier=name,
        mm_position=PlaceholderRange(offset=first, length=rows),
        mm_hash=name,
    )
