"""The bank of recordings: what it finds, how it trims, and one clear error for each thing that can be wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile

from model.senses.audio import SAMPLE_RATE_HZ
from rollout.world.speech import DEFAULT_FOLDER, NUMBER_WORDS, RESERVED_WORDS, SpeechBank, SpeechError


def tone(seconds: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ)).astype("f4")


def write(folder: Path, *entries: dict | str, samples: np.ndarray | None = None, rate_hz: int = SAMPLE_RATE_HZ) -> Path:
    """A folder with one second of tone in a.flac and a manifest of ``entries`` (the tone's own by default)."""
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / "a.flac", tone(1.0) if samples is None else samples, rate_hz)
    lines = entries or ({"file": "a.flac", "text": "four", "seconds": 1.0},)
    (folder / "manifest.jsonl").write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in lines))
    return folder


def test_shipped_folder_has_what_the_families_need(bank: SpeechBank) -> None:
    for text in (*NUMBER_WORDS[1:], "second", "seconds", "thank you", "goodbye"):
        assert bank.saying(text), text
    files = list(DEFAULT_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 4e6
    assert {file.name for file in files} == {c.file for c in bank.clips} | {"manifest.jsonl", "LICENSE.txt"}
    licence = (DEFAULT_FOLDER / "LICENSE.txt").read_text()
    assert "Allison Smith" in licence and "CC-BY-SA-3.0" in licence


def test_clips_are_trimmed_and_levelled(bank: SpeechBank) -> None:
    for clip in bank.clips:
        assert clip.samples.dtype == np.float32 and not clip.samples.flags.writeable
        np.testing.assert_allclose(np.sqrt(np.mean(clip.samples.astype("f8") ** 2)), 0.1, rtol=1e-5)
        # Audible speech in the first and the last 20 ms, so that "where the word ends" means something.
        for end in (clip.samples[:320], clip.samples[-320:]):
            assert np.abs(end).max() > 0.002, clip.file


def test_levels_are_those_of_exact_sums(bank: SpeechBank) -> None:
    """The level of a clip is 0.1 to the rounding of fp32 samples, by sums that round once. Control: a hundredth less
    is seen."""
    for clip in bank.clips:
        for factor, right in ((1.0, True), (0.99, False)):
            squares = (float(x) * float(x) for x in clip.samples * np.float32(factor))
            rms = math.sqrt(math.fsum(squares) / len(clip.samples))
            assert (abs(rms - 0.1) < 1e-8) == right, clip.file


def test_trim_removes_exactly_the_silence(tmp_path: Path) -> None:
    silence = np.zeros(SAMPLE_RATE_HZ // 2, "f4")
    whole = {"file": "a.flac", "text": "four", "seconds": 1.5}
    folder = write(tmp_path, whole, samples=np.concatenate([silence, tone(0.5), silence]))
    (clip,) = SpeechBank.open(folder).clips
    assert len(clip.samples) == SAMPLE_RATE_HZ // 2


def test_splits_of_fillers_are_disjoint_by_recording_and_by_words(bank: SpeechBank) -> None:
    for words, seconds in (((1, 3), (0.4, 1.1)), ((2, 12), (0.7, 2.0))):
        train = bank.fillers("train", words, seconds)
        held_out = bank.fillers("held_out", words, seconds)
        assert len(train) >= 20 and len(held_out) >= 10
        assert not {c.file for c in train} & {c.file for c in held_out}
        assert not {c.words for c in train} & {c.words for c in held_out}
        for clip in (*train, *held_out):
            assert not RESERVED_WORDS & set(clip.words)
            assert words[0] <= len(clip.words) <= words[1] and seconds[0] <= clip.seconds <= seconds[1]


def test_wav_is_read_as_well(tmp_path: Path) -> None:
    write(tmp_path, {"file": "b.wav", "text": "Four!", "seconds": 1})
    soundfile.write(tmp_path / "b.wav", tone(1.0), SAMPLE_RATE_HZ)
    assert [c.file for c in SpeechBank.open(tmp_path).saying("four")] == ["b.wav"]


def test_a_whole_folder_loads(tmp_path: Path) -> None:
    """The control of every error below."""
    assert len(SpeechBank.open(write(tmp_path)).clips) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "is not JSON"),
        ('{"file": "a.flac", "file": "b.flac"}', "the key 'file' comes twice"),
        ('["a.flac"]', "must be a JSON object"),
        ({"file": "a.flac", "text": "four"}, "needs the keys"),
        ({"file": "a.flac", "text": "...", "seconds": 1.0}, "file and text"),
        ({"file": "a.flac", "text": "\u0447\u0435\u0442\u044b\u0440\u0435", "seconds": 1.0}, "file and text"),
        ({"file": 3, "text": "four", "seconds": 1.0}, "file and text"),
        ({"file": "a.flac", "text": "four " * 101, "seconds": 1.0}, "text has 101 words"),
        ({"file": "a.flac", "text": "four" * 1000, "seconds": 1.0}, "4000 characters"),
        ({"file": "a.flac", "text": "four", "seconds": "1.0"}, "seconds is '1.0': give a number"),
        ({"file": "a.flac", "text": "four", "seconds": True}, "seconds is True"),
        ({"file": "a.flac", "text": "four", "seconds": -1}, "seconds is -1"),
        ({"file": "a.flac", "text": "four", "seconds": 0}, "seconds is 0"),
        ({"file": "a.flac", "text": "four", "seconds": 180}, "seconds is 180: give a number above 0 to 30"),
        ({"file": "../a.flac", "text": "four", "seconds": 1.0}, r"without '\.\.'"),
        ({"file": "/a.flac", "text": "four", "seconds": 1.0}, "outside the folder"),
        ({"file": "a\n.flac", "text": "four", "seconds": 1.0}, "none of control"),
        ({"file": "a\0.flac", "text": "four", "seconds": 1.0}, "none of control"),
        ({"file": "", "text": "four", "seconds": 1.0}, "give a file's name"),
        ({"file": ".", "text": "four", "seconds": 1.0}, "is a folder"),
        ({"file": "a" * 201, "text": "four", "seconds": 1.0}, "of up to 200 characters"),
        ({"file": "gone.flac", "text": "four", "seconds": 1.0}, "gone.flac is missing"),
        ({"file": "b.flac", "text": "four", "seconds": 1.5}, r"holds 1.000 s where manifest.jsonl says 1.500 s"),
        ({"file": "b.flac", "text": "four", "seconds": 0.1}, r"holds 1.000 s where manifest.jsonl says 0.100 s"),
        ({"file": "a.flac", "text": "four", "seconds": 1.0}, "a.flac is the same sound as line 1's recording"),
        ({"file": "a.flac", "text": "five", "seconds": 1.0}, "the same sound as line 1's"),
        ({"file": "copy.wav", "text": "four", "seconds": 1.0}, "copy.wav is the same sound as line 1's"),
        ({"file": "copy.wav", "text": "please hold", "seconds": 1.0}, "the same sound as line 1's"),
    ],
)
def test_bad_manifest_line_is_named(tmp_path: Path, line: dict | str, message: str) -> None:
    folder = write(tmp_path, {"file": "a.flac", "text": "four", "seconds": 1.0}, line)
    soundfile.write(folder / "b.flac", 0.5 * tone(1.0)[::-1], SAMPLE_RATE_HZ)
    soundfile.write(folder / "copy.wav", tone(1.0), SAMPLE_RATE_HZ, subtype="PCM_16")
    with pytest.raises(SpeechError, match=f"manifest.jsonl, line 2: .*{message}") as raised:
        SpeechBank.open(folder)
    assert "\n" not in str(raised.value)


def test_manifests_of_other_editors(tmp_path: Path) -> None:
    """A byte-order mark, further keys and U+2028 inside a text are read; another encoding is named."""
    line = {"file": "a.flac", "text": "four\u2028", "seconds": 1.0, "note": "caf\u00e9"}
    folder = write(tmp_path, line)
    for encoding in ("utf-8", "utf-8-sig"):
        (folder / "manifest.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding=encoding)
        assert SpeechBank.open(folder).saying("four")
    (folder / "manifest.jsonl").write_bytes(json.dumps(line | {"text": "four"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(SpeechError, match="save it as UTF-8"):
        SpeechBank.open(folder)


def of_ones(*at: int, count: int = SAMPLE_RATE_HZ) -> np.ndarray:
    samples = np.zeros(count, "f4")
    samples[list(at)] = 0.9
    return samples


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full(SAMPLE_RATE_HZ, 0.3, "f4"), "constant offset of 0.3"),
        (0.6 + 0.3 * tone(1.0), "constant offset of 0.6"),
        (of_ones(8000), "holds a click, not speech"),
        (of_ones(0, 15_999), "holds a click"),
        (of_ones(*range(0, 16_000, 1600)), "holds clicks, not speech"),
        (of_ones(8000) + 1e-3 * tone(1.0), "holds a click"),
        (of_ones(), "is silent"),
        (1e-4 * tone(1.0), "is silent"),
        (tone(31.0), "is longer than 30 s"),
        (np.zeros(0, "f4"), "holds no sample"),
        (3 * tone(1.0), "beyond full scale, up to 1.5"),
        (np.where(np.arange(SAMPLE_RATE_HZ) == 5, np.float32(np.nan), tone(1.0)), "no numbers"),
        (np.where(np.arange(SAMPLE_RATE_HZ) == 5, np.float32(np.inf), tone(1.0)), "no numbers"),
        (np.where(np.arange(SAMPLE_RATE_HZ) == 5, np.float32(1e-40), tone(1.0)), "denormal"),
    ],
)
def test_what_is_no_speech_is_refused(tmp_path: Path, samples: np.ndarray, message: str) -> None:
    """Brought to the common level, a click would be a blast of many times full scale."""
    line = {"file": "b.wav", "text": "four", "seconds": min(len(samples) / SAMPLE_RATE_HZ, 30.0) or 0.01}
    folder = write(tmp_path, line)
    soundfile.write(folder / "b.wav", samples, SAMPLE_RATE_HZ, subtype="FLOAT")
    with pytest.raises(SpeechError, match=f"manifest.jsonl, line 1: .*b.wav .*{message}"):
        SpeechBank.open(folder)


@pytest.mark.parametrize(
    "samples",
    [
        0.01 * tone(1.0),
        2 * tone(1.0),  # full scale
        tone(30.0),
        tone(0.06),
        0.02 + tone(1.0),
        np.concatenate([of_ones(80, count=160), 0.3 * tone(1.0)]),  # a click beside speech
    ],
)
def test_unusual_speech_is_taken(tmp_path: Path, samples: np.ndarray) -> None:
    """The controls: just inside the limits."""
    folder = write(tmp_path, {"file": "b.wav", "text": "four", "seconds": len(samples) / SAMPLE_RATE_HZ})
    soundfile.write(folder / "b.wav", samples, SAMPLE_RATE_HZ, subtype="FLOAT")
    (clip,) = SpeechBank.open(folder).clips
    assert np.abs(clip.samples).max() < 1.6


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(SpeechError, match="does not exist"):
        SpeechBank.open(tmp_path / "nowhere")
    with pytest.raises(SpeechError, match=r"has no manifest\.jsonl"):
        SpeechBank.open(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("\n\n")
    with pytest.raises(SpeechError, match="lists no recordings"):
        SpeechBank.open(tmp_path)


def test_bad_audio_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpeechError, match=r"sample rate of 8000 Hz .*: convert"):
        SpeechBank.open(write(tmp_path / "rate", rate_hz=8000))
    with pytest.raises(SpeechError, match="2 channels"):
        SpeechBank.open(write(tmp_path / "stereo", samples=np.stack([tone(1.0)] * 2, axis=1)))
    for name in ("a.ogg", "a.raw"):  # a lossy format; one without a header
        folder = write(tmp_path / name, {"file": name, "text": "four", "seconds": 1.0})
        soundfile.write(folder / name, tone(1.0), SAMPLE_RATE_HZ, **({"subtype": "PCM_16"} if name == "a.raw" else {}))
        with pytest.raises(SpeechError, match=rf"{name} (is OGG: convert|cannot be decoded)"):
            SpeechBank.open(folder)
    folder = write(tmp_path / "noise")
    (folder / "a.flac").write_bytes(b"this is no audio")
    with pytest.raises(SpeechError, match=r"a\.flac cannot be decoded"):
        SpeechBank.open(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_audio_is_an_error(tmp_path: Path, share: float) -> None:
    folder = write(tmp_path)
    whole = (folder / "a.flac").read_bytes()
    (folder / "a.flac").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SpeechError, match=r"a\.flac (cannot be decoded|holds)"):
        SpeechBank.open(folder)


def test_words_that_a_folder_lacks_are_named(tmp_path: Path) -> None:
    bank = SpeechBank.open(write(tmp_path))
    with pytest.raises(SpeechError, match="no recording that says 'thank you'"):
        bank.saying("thank you")
    with pytest.raises(SpeechError, match="no train recording of 2 to 9 words"):
        bank.fillers("train", (2, 9), (0.1, 2.0))
