"""Sessions that see: every engine's bits are the learner's, and one pixel makes another episode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.backbone.transformer import InteractionModel
from model.senses.video import Frames
from rl.step.batch import choice_logprobs, collate
from rl.step.identity import Evidence
from rollout.engines.embedded import SessionEngine
from rollout.record.episode import Episode, concatenate, load_episodes, pack_episodes, save_episodes, unpack_episodes
from rollout.record.transcript import from_observations
from rollout.turn.grammar import chunk_ends
from rollout.turn.observation import MissingSenseError, Observation
from rollout.turn.vocabulary import Vocabulary
from tests.support.episodes import unequal_fields
from tests.support.models import fresh_model
from tests.support.sessions import everything, picture, record, sound

CHUNKS = 9
SIZES = {"slots": 6, "max_tokens": 400, "words_per_chunk": 2, "max_patches": 6, "max_event_words": 2}


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return fresh_model()


def make_engine(model: InteractionModel, **sizes: int) -> SessionEngine:
    return SessionEngine(model, Vocabulary.build(model.vocab), **(SIZES | sizes))


def episode(model: InteractionModel, observations: list[Observation], key: int = 1) -> Episode:
    engine = make_engine(model)
    session = engine.open(key)
    for observation in observations:
        engine.append([session], [observation])
    return record(session)


def evidence(model: InteractionModel, episodes: list[Episode]) -> Evidence:
    classes = Vocabulary.build(model.vocab).classes
    with torch.no_grad():
        logprob, _, digest = choice_logprobs(model, collate(episodes, model.senses), classes, 1.0)
    return Evidence(0, episodes, logprob, digest, len(episodes))


def test_the_learner_gives_the_bits_of_a_session_that_sees(model: InteractionModel) -> None:
    seen = [episode(model, [everything(100 * e + k) for k in range(CHUNKS)], e) for e in range(3)]
    assert all(len(e.frames.chunks()) == 6 and len(e.events) == 3 for e in seen)
    learned = evidence(model, seen)
    assert torch.equal(learned.logprob, concatenate(seen, "logprob"))
    assert torch.equal(learned.digest, concatenate(seen, "digest"))
    mismatch = learned.mismatch()
    assert (mismatch.num_unequal, mismatch.rows_unequal) == (0, 0) and mismatch.num_tokens > 3 * CHUNKS


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_pixel_of_one_frame_is_caught_and_named(model: InteractionModel, place: str) -> None:
    """The control: the learner is shown another level of one pixel than the session saw."""
    seen = episode(model, [everything(k) for k in range(CHUNKS)])
    pixels = seen.frames.pixels.clone()
    pixels[0 if place == "first" else -1] ^= 1
    other = replace(seen, frames=Frames(pixels, seen.frames.sizes))
    chunk = int(seen.frames.sizes[0 if place == "first" else -1, 0])
    found = evidence(model, [other])
    assert found.mismatch().rows_unequal > 0
    assert found.first().chunk == chunk and f"chunk {chunk}," in found.describe()


def test_forks_share_until_a_pixel_differs(model: InteractionModel) -> None:
    engine = make_engine(model)
    origin = engine.open(5)
    engine.append([origin], [everything(1)])
    twin, branch = engine.fork(origin, 5), engine.fork(origin, 5)
    shown = replace(sound(2), frames=picture(2))
    other = replace(shown, frames=shown.frames.clone())
    other.frames[0, 19, 19, 2] ^= 1
    engine.append([origin, twin, branch], [shown, replace(shown, frames=shown.frames.clone()), other])
    assert origin.slot == twin.slot != branch.slot
    assert not unequal_fields(record(origin), record(twin))
    alone = [episode(model, [everything(1), one], 5) for one in (shown, other)]
    assert not unequal_fields(record(twin), alone[0]) and not unequal_fields(record(branch), alone[1])
    assert "text.digest" in unequal_fields(record(twin), record(branch))


def test_frames_and_events_that_differ_in_form_only_are_not_shared(model: InteractionModel) -> None:
    """A frame of 2 x 8 pixels has the bytes of one of 4 x 4; the same texts may be one event or two."""
    flat, square = picture(3, 1, 2, 8), picture(3, 1, 2, 8).view(1, 4, 4, 3)
    for one, two in (
        (replace(sound(0), frames=flat), replace(sound(0), frames=square)),
        (replace(sound(0), events=("four", "two")), replace(sound(0), events=("four two",))),
    ):
        engine = make_engine(model)
        origin = engine.open(5)
        fork = engine.fork(origin, 5)
        engine.append([origin, fork], [one, two])
        assert not unequal_fields(record(origin), episode(model, [one], 5))
        assert not unequal_fields(record(fork), episode(model, [two], 5))


def test_episodes_with_video_come_back_whole(model: InteractionModel, tmp_path: Path) -> None:
    seen = [episode(model, [everything(50 * e + k) for k in range(4)], e) for e in range(2)]
    data = pack_episodes(seen)
    assert pack_episodes(unpack_episodes(data)) == data
    assert all(not unequal_fields(a, b) for a, b in zip(unpack_episodes(data), seen, strict=True))
    save_episodes(tmp_path / "e.safetensors", seen)
    assert load_episodes(tmp_path / "e.safetensors")[0].events == {2: ("four",)}


def test_a_transcript_is_what_a_session_writes(model: InteractionModel) -> None:
    observed = [everything(k) for k in range(CHUNKS)]
    seen = episode(model, observed)
    written = from_observations(observed, seen.actions, make_engine(model).grammar)
    assert torch.equal(written.tokens, seen.tokens) and torch.equal(written.codes, seen.codes)
    assert torch.equal(written.frames.pixels, seen.frames.pixels)
    assert torch.equal(written.text.sampled_at, seen.text.sampled_at)
    assert len(chunk_ends(seen.tokens, model.senses.audio)) == CHUNKS


def test_a_client_may_use_its_picture_again(model: InteractionModel) -> None:
    engine, frames = make_engine(model), picture(7)
    before = frames.clone()
    session = engine.open(0)
    engine.append([session], [replace(sound(0), frames=frames)])
    frames.zero_()
    assert torch.equal(record(session).frames.pixels, before.flatten())


@pytest.mark.parametrize(
    ("observation", "says"),
    [
        (replace(sound(0), frames=picture(0, 1, 48, 32)), "cut into 9 patches, but .* room for 6 patches"),
        (replace(sound(0), events=("one two", "four")), "have 3 words, .* room for 2"),
    ],
)
def test_more_than_there_is_room_for_is_refused(model: InteractionModel, observation: Observation, says: str) -> None:
    engine = make_engine(model)
    session = engine.open(0)
    with pytest.raises(MissingSenseError, match=says):
        engine.append([session], [observation])
    assert session.chunks == 0 and not session.closed
    engine.append([session], [everything(1)])
