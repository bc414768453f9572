"""The lexicon: the shipped words, their targets, and one clear error for each thing that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from model.voice.mel import CHUNK_SAMPLES, mel_chunks
from model.voice.sound import LATENCY_SAMPLES, Speaker, render
from rollout.scenarios.lookout import PLACES
from rollout.scenarios.timespeak import REMINDER
from rollout.scenarios.turn_taking import REPLY
from rollout.world.lexicon import MOST_CHUNKS, WORDS_FOLDER, Lexicon, LexiconError, check_target
from rollout.world.speech import NUMBER_WORDS, SpeechBank, SpeechError


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.open()


def folder_with(folder: Path, text: str, seconds: float) -> Path:
    """A folder of one recording: a hum with harmonics."""
    t = np.arange(round(seconds * 16000)) / 16000
    hum = np.stack([np.sin(2 * np.pi * 150 * k * t) for k in range(1, 9)]).sum(0) * 0.05
    folder.mkdir()
    soundfile.write(folder / "a.flac", hum.astype("f4"), 16000)
    (folder / "manifest.jsonl").write_text(json.dumps({"file": "a.flac", "text": text, "seconds": seconds}) + "\n")
    return folder


def test_it_has_what_the_families_say(lexicon: Lexicon) -> None:
    said = {*NUMBER_WORDS[1:], REMINDER, *REPLY, *PLACES}
    assert len(said) >= 21 and said <= set(lexicon.words) and len(lexicon.words) >= 24


def test_targets(lexicon: Lexicon) -> None:
    for word in lexicon.words:
        target = lexicon.target(word)
        assert target.dtype == torch.float32 and target.shape[1:] == (20, 80) and 1 <= len(target) <= 5, word
    (clip,) = SpeechBank.open().saying("four")
    assert torch.equal(lexicon.target("four"), mel_chunks(torch.tensor(clip.samples)))
    assert len(lexicon.target("four")) == -(-len(clip.samples) // CHUNK_SAMPLES)
    assert torch.equal(lexicon.target("Four."), lexicon.target("four"))


def test_the_digest_names_the_targets(lexicon: Lexicon) -> None:
    """Pinned: every machine makes these targets. Control: one bit of one target, and one word less."""
    assert lexicon.digest() == "6664c5be0acb8472"
    targets = {word: lexicon.target(word).clone() for word in lexicon.words}
    assert Lexicon(targets).digest() == lexicon.digest()
    targets["four"].view(torch.int32)[0, 0, 0] ^= 1
    assert Lexicon(targets).digest() != lexicon.digest()
    del targets["four"]
    assert Lexicon(targets).digest() != lexicon.digest()


def test_the_shipped_folder_is_small_and_says_whose_it_is() -> None:
    files = {file.name for file in WORDS_FOLDER.iterdir()}
    assert sum((WORDS_FOLDER / file).stat().st_size for file in files) < 400_000
    bank = SpeechBank.open(WORDS_FOLDER)
    assert files == {clip.file for clip in bank.clips} | {"manifest.jsonl", "LICENSE.txt"}
    licence = (WORDS_FOLDER / "LICENSE.txt").read_text()
    assert "Allison Smith" in licence and "CC-BY-SA-3.0" in licence and "espeak-ng" in licence
    assert all(clip.file in licence for clip in bank.clips)


@pytest.mark.parametrize("word", ["perambulate", "", "thank you", "\n", "x" * 1000])
def test_a_word_it_lacks(lexicon: Lexicon, word: str) -> None:
    with pytest.raises(LexiconError, match=r"no recording says .* alone: add one") as error:
        lexicon.target(word)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_first_folder_s_recording_counts(tmp_path: Path) -> None:
    own = folder_with(tmp_path / "a", "four", 0.5)
    assert len(Lexicon.open([own, WORDS_FOLDER]).target("four")) == 3
    assert len(Lexicon.open([folder_with(tmp_path / "b", "four five", 0.5), WORDS_FOLDER]).words) == 16


def test_too_long_or_silent_recordings(tmp_path: Path) -> None:
    with pytest.raises(LexiconError, match=r"target of 'four' \(.*a.flac\) has 10 chunks of 200 ms, at most 8"):
        Lexicon.open([folder_with(tmp_path / "long", "four", 2.0)])
    silent = folder_with(tmp_path / "silent", "four", 1.0)
    soundfile.write(silent / "a.flac", np.zeros(16000, "f4"), 16000)
    with pytest.raises(SpeechError, match="is silent"):
        Lexicon.open([silent])
    with pytest.raises(SpeechError, match="does not exist"):
        Lexicon.open([tmp_path / "none"])


def test_targets_that_are_none() -> None:
    good = torch.randn(2, 20, 80, generator=torch.Generator().manual_seed(0))
    check_target("x", good)
    nan = good.clone()
    nan[1, 2, 3] = float("nan")
    for target, says in (
        (good[:, :19], r"is \[2, 19, 80\]"),
        (good.double(), "float64"),
        (good[:0], "n >= 1"),
        (nan, "no numbers"),
        (mel_chunks(torch.zeros(CHUNK_SAMPLES)), "silent"),
        (good.repeat(5, 1, 1), f"10 chunks of 200 ms, at most {MOST_CHUNKS}"),
    ):
        with pytest.raises(LexiconError, match=says):
            Lexicon({"x": target})


def edge_jump(sound: Tensor, first: int) -> float:
    """The largest step from one sample to the next at the seams of chunks, ``first`` the first seam, over the largest
    that is not at one."""
    steps = sound.diff().abs()
    seams = torch.arange(first, len(sound) - CHUNK_SAMPLES // 2, CHUNK_SAMPLES)
    inside = torch.ones(len(steps), dtype=torch.bool)
    inside[seams - 1] = False
    return float(steps[seams - 1].max() / steps[inside].max())


def test_no_click_at_the_seams_of_streamed_chunks(lexicon: Lexicon) -> None:
    """The steps at the seams of words are smaller than the largest inside. Control: chunks rendered one by one and put
    side by side."""
    controls = []
    for word in ("seconds", "goodbye", "seven", "zero", "nine", "message"):
        target, speaker = lexicon.target(word), Speaker()
        sound = torch.cat([speaker.append(chunk) for chunk in (*target, None)])
        assert edge_jump(sound, LATENCY_SAMPLES) < 0.8, word  # where the mels of two chunks meet
        assert edge_jump(sound, CHUNK_SAMPLES) < 0.8, word  # where the sounds of two calls meet
        controls.append(edge_jump(torch.cat([render(chunk[None]) for chunk in target]), CHUNK_SAMPLES))
    assert sorted(controls)[3] > 1 and min(controls) > 0.7
