"""Video: frames are cut as transformers' processor cuts them, and the tower keeps the row contract."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.backbone.vision import folds
from model.config import preset
from model.senses.video import LONGEST_SIDE, NO_FRAMES, NO_VIDEO, Frames, Patches, normalised, patch_count, size_problem
from tests.model.cases import Rows, in_pieces, pixel_values, random_rows, random_video, twins, whole
from tests.model.processor import GOLDEN, digest, pictures
from tests.support.models import fresh_model


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def embedded(model: InteractionModel, patches: Patches) -> Tensor:
    with torch.no_grad():
        return model.model.vision_tower(patches.pictures, patches.inside, patches.steps())


def cut_as_the_processor(picture: Tensor, side: int) -> Tensor:
    rows = Rows(torch.empty(0), torch.empty(0), Frames.of([picture[None]]))
    return pixel_values(rows, side)


def test_patches_are_those_of_transformers_processor() -> None:
    golden = json.loads(GOLDEN.read_text())
    found = {name: digest(cut_as_the_processor(picture, side)) for name, side, picture in pictures()}
    assert found == golden
    for name, side, picture in pictures():  # the control: one level of one pixel, and rows and columns swapped
        picture[0, 0, 0] ^= 1
        assert digest(cut_as_the_processor(picture, side)) != golden[name]
        picture[0, 0, 0] ^= 1
        if picture.shape[0] != picture.shape[1]:
            assert digest(cut_as_the_processor(picture.transpose(0, 1), side)) != golden[name]


def test_every_level_is_normalised_as_its_formula_says() -> None:
    """(level / 255 - mean) / std in fp64, within fp32's rounding of three operations; outside the frame the level is
    -1."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    whole_patch, nothing = torch.tensor([[16, 16]], dtype=torch.int16), torch.tensor([[0, 16]], dtype=torch.int16)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    wanted = (levels.double() / 255 - mean) / std
    assert (normalised(levels, whole_patch) - wanted).abs().max() < 1e-6
    assert (normalised(levels, nothing) - (-1 / 255 - mean) / std).abs().max() < 1e-6


def test_folds_follow_the_prime_factors() -> None:
    """Inkling's tower of 4 layers on patches of 40: 75 -> 128, 512 -> 320 and so on, as released checkpoints have."""
    shapes = [(f.inputs, f.outputs) for f in folds(preset("inkling_small").vision_config)]
    assert shapes == [(75, 128), (512, 320), (5120, 4800), (9600, 4096)]
    assert [(f.space, f.time) for f in folds(preset("tiny").vision_config)] == [(8, 1), (2, 2)]


@pytest.mark.parametrize("seed", range(4))
def test_a_patch_is_embedded_by_itself(seed: int) -> None:
    """The row contract: alone, in any order, beside others, still or moving, a patch has the same bits."""
    model, _ = twins(seed)
    side = model.senses.patch
    shown = [noise(seed, 2, 3 * side - 1, 2 * side, 3), noise(seed + 9, 1, side, 2 * side + 1, 3)]
    parts = [Patches.cut(frames, side) for frames in shown]
    both = embedded(model, Patches.cat(parts))
    assert torch.equal(both, torch.cat([embedded(model, part) for part in parts]))
    together = Patches.cat(parts)
    for i in range(len(together)):
        assert torch.equal(embedded(model, together.part([(i, i + 1)])), both[i : i + 1])
    backwards = [(i, i + 1) for i in reversed(range(len(together)))]
    assert torch.equal(embedded(model, together.part(backwards)), both.flip(0))


def test_a_still_picture_has_the_bits_of_two_equal_frames() -> None:
    model, _ = twins(1)
    frame = noise(0, 1, 9, 10, 3)
    still, pair = (Patches.cut(frame.expand(n, -1, -1, -1), model.senses.patch) for n in (1, 2))
    assert len(still.pictures) == len(still) and len(pair.pictures) == 2 * len(still)
    assert torch.equal(embedded(model, still), embedded(model, pair))
    swapped = torch.cat((frame, noise(1, 1, 9, 10, 3)))
    first, second = (Patches.cut(frames, model.senses.patch) for frames in (swapped, swapped.flip(0)))
    assert not torch.equal(embedded(model, first), embedded(model, second))  # the control: time has a direction


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_a_session_with_video_equals_the_learner(seed: int) -> None:
    model, _ = twins(seed)
    rows = random_video(seed, model.senses.patch)
    count = len(rows.tokens)
    learner = whole(model, rows)
    for pieces in ([count], [1] * count, [17] * (count // 17) + [count % 17]):
        state = SessionState(model.config, 1, count, torch.float32)
        assert torch.equal(in_pieces(model, rows, [n for n in pieces if n], state, state.open()), learner)


@torch.no_grad()
def test_one_pixel_changes_its_row_and_all_after_it() -> None:
    """The control of all identity checks with video: one level of one pixel is seen, at the row of its patch."""
    model, _ = twins(2)
    rows = random_video(2, model.senses.patch)
    pixels = rows.frames.pixels.clone()
    pixels[-1] ^= 1  # in the last patch that lies in the second frame of the second micro-turn
    other = Rows(rows.tokens, rows.codes, Frames(pixels, rows.frames.sizes))
    before, after = whole(model, rows), whole(model, other)
    differs = (before != after).any(1).nonzero()[:, 0]
    shown = (rows.tokens == model.senses.image).nonzero()[:, 0]
    assert int(differs[0]) in shown.tolist() and int(differs[0]) > len(rows.tokens) // 3
    assert torch.equal(before[: int(differs[0])], after[: int(differs[0])])


def test_every_weight_of_the_tower_is_packed_and_learns() -> None:
    model = fresh_model("tiny", 0)
    rows = random_rows(0, 5)
    frames = Frames.of([noise(0, 1, 31, 31, 3)])
    tokens = torch.cat((rows.tokens, torch.full((4,), model.senses.image)))
    codes = rows.codes[: int((tokens == model.senses.audio).sum())]
    model.logits(whole(model, Rows(tokens, codes, frames))).square().mean().backward()
    tower = dict(model.model.vision_tower.named_parameters())
    assert tower and all(weight.grad is not None and bool(weight.grad.any()) for weight in tower.values())


def test_frames_are_kept_as_they_were_shown() -> None:
    chunks = [NO_FRAMES, noise(0, 2, 3, 5, 3), NO_FRAMES, noise(1, 1, 40, 7, 3)]
    frames = Frames.of(chunks)
    assert frames.sizes.tolist() == [[1, 2, 3, 5], [3, 1, 40, 7]]
    back = dict(frames.chunks())
    assert back.keys() == {1, 3} and all(torch.equal(back[k], chunks[k]) for k in back)
    assert Frames.of([NO_FRAMES] * 3) is NO_VIDEO and NO_VIDEO.chunks() == [] and len(NO_VIDEO.patches(4)) == 0
    assert [patch_count(c, 16) for c in chunks] == [0, 1, 0, 3]


@pytest.mark.parametrize(
    ("pixels", "sizes", "message"),
    [
        (12, [[0, 1, 2, 3]], "12 bytes of pixels, but the sizes need 18"),
        (18, [[0, 3, 1, 2]], "chunk 0 has 3 frames of 1 x 2 pixels"),
        (18, [[-1, 1, 2, 3]], "chunk -1 has 1 frames"),
        (0, [[0, 1, 0, 3]], "frames of 0 x 3 pixels"),
        (0, [[0, 1, 2**40, 2**40]], "1 frames of 1099511627776 x 1099511627776 pixels"),
        (36, [[1, 1, 2, 3], [1, 1, 2, 3]], "not in order"),
        (18, [[0, 1, 2]], r"sizes \[1, 3\]"),
    ],
)
def test_damaged_frames_are_refused(pixels: int, sizes: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frames(torch.zeros(pixels, dtype=torch.uint8), torch.tensor(sizes)).chunks()


def test_the_limit_of_a_frame() -> None:
    assert not size_problem(1024, 1024) and not size_problem(1, LONGEST_SIDE)
    assert "1,048,576 pixels" in size_problem(1024, 1025) and "2048" in size_problem(LONGEST_SIDE + 1, 1)
    assert "one pixel" in size_problem(0, 7)
