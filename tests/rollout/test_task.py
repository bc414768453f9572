"""Messages between a pool and its workers: where plays are cut, and what is not taken for an answer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from kernels.errors import MetronomeError
from rollout.engines.workers.task import PlayRequest, Reply, Task, check_episode, seal, task_boundaries, unseal
from rollout.record.episode import TEXT, Episode, Stream, load_episodes, pack_episodes, save_episodes, unpack_episodes
from rollout.turn.action import LISTEN
from tests.support.episodes import unequal_fields, with_text

WANTED = PlayRequest("timespeak", "train", 3, 1, chunks=2)
TASK = Task(0, (WANTED,), seed=5, temperature=0.7, weights_digest="d")
EPISODE = Episode(
    scenario="timespeak/train/3",
    rollout=1,
    seed=5,
    temperature=0.7,
    contract_id="c",
    weights_digest="d",
    facts={"family": "timespeak", "window": [0.1, 1 / 3]},
    actions=(LISTEN, LISTEN),
    tokens=torch.tensor([1, 2, 2, 2, 2, 3, 2, 2, 2, 2, 3]),
    codes=torch.arange(8 * 80, dtype=torch.int64).remainder(16).to(torch.uint8).reshape(8, 80),
    streams={
        TEXT: Stream(
            sampled_at=torch.tensor([5, 10]),
            row_class=torch.tensor([0, 0]),
            chunk=torch.tensor([0, 1]),
            logprob=torch.tensor([-0.5, -1 / 3]),
            digest=torch.tensor([2**63 - 1, -(2**63)]),
        )
    },
)


@given(
    groups=st.lists(st.integers(1, 6), max_size=12),
    workers=st.integers(1, 5),
    slots=st.integers(1, 12),
)
def test_cuts_cover_all_plays_once_and_keep_groups_together(groups: list[int], workers: int, slots: int) -> None:
    plays = [PlayRequest("timespeak", "train", g, r, 60) for g, size in enumerate(groups) for r in range(size)]
    places = task_boundaries(plays, workers, slots)
    assert places[-1] == len(plays) and (not plays or places[0] == 0)
    assert all(a < b for a, b in pairwise(places))
    assert len(places) - 1 >= min(workers, len(plays)), "every worker has something to do"
    if len(groups) >= workers:
        assert all(plays[i].rollout == 0 for i in places[:-1])


def test_cuts_of_a_step_and_of_an_evaluation() -> None:
    step = [PlayRequest("timespeak", "train", g, r, 60) for g in range(8) for r in range(6)]
    assert task_boundaries(step, 2, 24) == [0, 24, 48]
    assert task_boundaries(step, 3, 16) == [0, 12, 30, 48]
    assert task_boundaries(step[:6], 4, 2) == [0, 1, 3, 4, 6]
    held_out = [PlayRequest("timespeak", "held_out", i, 0, 60) for i in range(100)]
    assert task_boundaries(held_out, 2, 24) == [0, 16, 33, 50, 66, 83, 100]


def test_an_episode_comes_back_as_it_was() -> None:
    (back,) = unpack_episodes(unseal(seal(Reply(0, "c", pack_episodes([EPISODE])))).episodes)
    assert unequal_fields(back, EPISODE) == set()
    assert unequal_fields(back, with_text(EPISODE, chunk=torch.tensor([0, 0]))) == {"text.chunk"}
    check_episode(back, WANTED, TASK, "c")


@pytest.mark.parametrize("place", [0, 31, 32, 200, -1])
def test_one_wrong_bit_is_no_answer(place: int) -> None:
    data = bytearray(seal(Reply(0, "c", pack_episodes([EPISODE]))))
    data[place] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        unseal(bytes(data))


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 32, bytes(range(256))])
def test_noise_is_no_answer(data: bytes) -> None:
    with pytest.raises(ValueError, match="checksum"):
        unseal(data)


def test_a_cut_file_is_no_episodes() -> None:
    data = pack_episodes([EPISODE])
    for wrong in (data[:-1], data[:7], b"", data + b"\0"):
        with pytest.raises(ValueError):
            unpack_episodes(wrong)


def test_equal_episodes_are_equal_bytes() -> None:
    """Two keys of metadata would come in either order (the control)."""
    assert len({pack_episodes([EPISODE]) for _ in range(40)}) == 1
    content = {"tokens": EPISODE.tokens}
    assert len({save(content, metadata={"a": "1", "b": "2"}) for _ in range(40)}) == 2


def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "episodes.safetensors"
    save_episodes(path, [EPISODE])
    assert unequal_fields(load_episodes(path)[0], EPISODE) == set()
    old = {
        "tokens": EPISODE.tokens,
        **{f"0.{name}": tensor for name, tensor in vars(EPISODE.text).items() if tensor is not None},
    }
    for stored, version in (("[{}]", 1), ('{"format": 2}', 2), ('{"format": 4}', 4)):
        save_file(old, path, metadata={"episodes": stored})
        says = f"format {version}, this program reads 3.*Roll the episodes out again"
        with pytest.raises(MetronomeError, match=says):
            load_episodes(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scenario": "timespeak/train/4"}, "scenario"),
        ({"rollout": 0}, "rollout"),
        ({"seed": 6}, "seed"),
        ({"temperature": 1.0}, "temperature"),
        ({"contract_id": "e"}, "contract_id"),
        ({"weights_digest": "e"}, "weights_digest"),
        ({"actions": (LISTEN,)}, "1 actions"),
        ({"tokens": EPISODE.tokens.int()}, "tokens is torch.int32"),
        ({"codes": EPISODE.codes[:-1]}, r"codes is torch.uint8 \[7, 80\]"),
        ({"streams": {}}, r"has the streams \[\]"),
        ({"streams": {TEXT: EPISODE.text, "other": EPISODE.text}}, "streams .*other"),
        ({"streams": {"voice": EPISODE.text, TEXT: EPISODE.text}}, "streams .*voice"),
        ({"streams": {TEXT: EPISODE.text, "voice": EPISODE.text}}, "the sound of an episode is no 2 chains"),
        ({"logprob": EPISODE.text.logprob.double()}, "logprob is torch.float64"),
        ({"logprob": EPISODE.text.logprob[:1]}, r"logprob is torch.float32 \[1\]"),
        ({"digest": EPISODE.text.digest[:1]}, "digest"),
        ({"sampled_at": torch.tensor([5, 11])}, "outside its 11 tokens"),
        ({"sampled_at": torch.tensor([0, 10])}, "outside its 11 tokens"),
        ({name: value[:1] for name, value in vars(EPISODE.text).items() if value is not None}, "1 samples"),
    ],
)
def test_an_episode_of_something_else_is_no_answer(change: dict[str, object], says: str) -> None:
    of_text = change.keys() & vars(EPISODE.text).keys()
    wrong = with_text(EPISODE, **change) if of_text else replace(EPISODE, **change)
    with pytest.raises(ValueError, match=says):
        check_episode(wrong, WANTED, TASK, "c")
