"""The sound in the audit's page: as much as there is room for, and where there is none, why."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from model.voice.mel import mel_chunks
from rl.audit import sounds
from rl.audit.records import Records, read
from rl.audit.sounds import Sounds
from rollout.record.episode import VOICE, Episode
from rollout.turn.action import CHUNK_SAMPLES
from rollout.world.speech import SpeechBank
from tests.support.episodes import spoken


@pytest.fixture(scope="module")
def one() -> Episode:
    bank = SpeechBank.open()
    return spoken(bank, mel_chunks(torch.from_numpy(bank.clips[0].samples.copy())))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Of a run of the shipped families."""
    (tmp_path / "config.yaml").write_text("name: some")
    return read(tmp_path)


def test_an_episode_with_a_voice_has_sound(one: Episode, records: Records) -> None:
    found = Sounds(records).of(one)["sound"]
    assert found["note"] == sounds.SIDES
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(found["mp3"])))
    assert samples.shape == ((len(one.actions) + 1) * CHUNK_SAMPLES + 480, 2) and rate == 16000
    assert Sounds(records).of(one) == {"sound": found}, "equal sound, equal bytes"
    assert Sounds(records).of(replace(one, streams={"text": one.text})) == {}


def test_there_is_room_for_the_first(one: Episode, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MOST_CHUNKS", 2 * len(one.actions) - 1)
    made = Sounds(records)
    assert "mp3" in made.of(one)["sound"]
    assert made.of(one) == {"sound": {"note": sounds.LEFT_OUT}}


def test_a_side_that_cannot_be_played_again_is_rough(
    one: Episode, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.heard.from_codes", lambda codes: torch.zeros(len(codes) * 800))
    for changed, of, says in (
        (replace(records, scenarios=None), one, "played again (the recipe's families are unknown)."),
        (records, replace(one, scenario="turn_taking/train/1"), "played again, says something else."),
    ):
        found = Sounds(changed).of(of)["sound"]
        assert "is rough" in found["note"] and found["note"].endswith(says) and "mp3" in found


def test_damage_is_said(one: Episode, records: Records) -> None:
    voice = one.voice
    assert voice is not None and voice.payload is not None
    spoiled = replace(voice, payload=voice.payload * torch.nan)
    for damaged, says in (
        (replace(one, streams={**one.streams, VOICE: spoiled}), "the sound of an episode is no"),
        (replace(one, codes=one.codes[:-4]), "do not fit"),
    ):
        found = Sounds(records).of(damaged)["sound"]
        assert found["note"].startswith("No sound: ") and says in found["note"] and "mp3" not in found
