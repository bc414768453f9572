"""Shared beginnings are read once, and nobody's bits show it."""

from __future__ import annotations

import pytest
import torch

from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.senses.video import NO_FRAMES, NO_VIDEO, Frames
from reward.learned.model import RewardModel
from reward.learned.prefixes import MIN_SHARED_ROWS, Node, tree
from rollout.record.transcript import Transcript, write_transcript
from rollout.turn.action import CHUNK_FRAMES, LISTEN, Action, speak
from rollout.turn.grammar import Grammar
from tests.support.models import SENSES, VOCABULARY, conversation, reward_model

CHUNKS = 30


def talk(
    changes: dict[int, Action], heard_from: int = CHUNKS, chunks: int = CHUNKS, frames: Frames = NO_VIDEO
) -> Transcript:
    """One of a group: its actions differ in ``changes``, what it hears from chunk ``heard_from`` on."""
    codes = torch.randint(16, (chunks, CHUNK_FRAMES, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes[heard_from:] = 15 - codes[heard_from:]
    actions = [changes.get(k, speak("breathe") if k % 7 == 3 else LISTEN) for k in range(chunks)]
    return write_transcript(codes, actions, Grammar(VOCABULARY, 2, max_patches=4), frames)


GROUP = [
    talk({}),
    talk({12: speak("thank", "you")}),
    talk({12: speak("thank", "you"), 25: speak("breathe")}),
    talk({}, heard_from=20),
    talk({}),  # an equal twin
    talk({}, chunks=18),  # the beginning of the first
    talk({0: speak("breathe")}),  # differs before a node is worth it
    conversation(5, 12),  # another scenario
]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return reward_model()


def paths(nodes: list[Node]) -> list[tuple[Node, ...]]:
    return [(node, *rest) for node in nodes for rest in (paths(node.children) or [()])]


def test_every_row_is_in_one_node_of_its_path() -> None:
    roots = tree(GROUP, SENSES)
    covered = {m: [] for m in range(len(GROUP))}
    level = roots
    while level:
        for node in level:
            assert node.end > node.first
            sample = GROUP[node.members[0]].tokens[: node.end]
            for m in node.members:
                covered[m] += range(node.first, node.end)
                assert torch.equal(GROUP[m].tokens[: node.end], sample)
        level = [child for node in level for child in node.children]
    assert all(covered[m] == list(range(len(GROUP[m].tokens))) for m in covered)
    sizes = [len(path) for path in paths(roots)]
    assert len(roots) == 3 and max(sizes) >= 3
    assert all(s.end - s.first >= MIN_SHARED_ROWS for path in paths(roots) for s in path if len(s.members) > 1)


def test_shared_rows_are_read_once_and_give_everybodys_bits(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = InteractionModel.forward

    def counted(self: InteractionModel, inputs: Inputs, *rest: object) -> torch.Tensor:
        rows.append(inputs.segments.rows)
        return forward(self, inputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(InteractionModel, "forward", counted)
    with torch.no_grad():
        expected = [model([one])[0] for one in GROUP]
    separate, rows[:] = sum(rows), []
    result = model.score(GROUP)
    assert sum(rows) < 0.65 * separate
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    order = [6, 3, 0, 7, 2, 5, 1, 4]
    assert all(torch.equal(a, expected[i]) for a, i in zip(model.score([GROUP[i] for i in order]), order, strict=True))


def test_what_differs_is_not_shared(model: RewardModel) -> None:
    """The control: one code of one frame apart, and the rewards are other ones from there on."""
    one = talk({})
    codes = one.codes.clone()
    codes[10 * CHUNK_FRAMES, 3] ^= 1
    other = Transcript(one.tokens, codes, one.text)
    first, second = model.score([one, other])
    assert torch.equal(first[:10], second[:10]) and not torch.equal(first[10], second[10])
    assert torch.equal(second, model([other])[0].detach())


def test_a_pixel_that_differs_is_not_shared(model: RewardModel) -> None:
    """The same for video: what lies before the other picture is shared, it itself is not."""
    picture = torch.full((1, 20, 20, 3), 128, dtype=torch.uint8)
    other = picture.clone()
    other[0, 3, 5, 1] ^= 1
    one, two = (talk({}, frames=Frames.of([NO_FRAMES] * 10 + [shown])) for shown in (picture, other))
    first, second = model.score([one, two])
    assert torch.equal(first[:10], second[:10]) and not torch.equal(first[10], second[10])
    assert torch.equal(first, model([one])[0].detach()) and torch.equal(second, model([two])[0].detach())
