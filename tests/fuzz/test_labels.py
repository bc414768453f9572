"""Whatever stands in a file of labels, a manifest of recordings or a recording: it works, or one line says why not."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.errors import MetronomeError
from reward.learned.human import NEEDED, OPTIONAL, read_all_labels
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank, SpeechError

VOCABULARY, SCENARIOS = Vocabulary.build(256), ScenarioConfig()
MODERATE = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
SOUND = (0.1 * np.random.default_rng(0).standard_normal((2, 3 * CHUNK_SAMPLES))).clip(-1, 1).astype(np.float32)

numbers = [None, True, False, 0, -1, 1e308, 10**18, 10**400, 5e-324, -0.0, float("nan"), float("inf")]
texts = [
    "",
    " ",
    "\0",
    "a\nb",
    "\u2028",
    "\ud800",
    "x" * 5000,
    "four " * 500,
    "NaN",
    "1",
    "thank you",
    "~",
    "*",
    "<|end|>",
]
paths = ["../a.wav", "/etc/passwd", "/dev/zero", ".", "a.wav/b", "a" * 300, "a.wav", "b.wav"]
choices = ["first", "second", "tie", "train", "held_out", "timing", "content", "turn_taking"]
lists = [[], {}, [[]], {"": None}, ["listen"], [["listen"]] * 3, [["listen"]] * 3000, [["speak", "four"]] * 3]
actions = [[["speak", "<|listen|>"]] * 3, [["delegate", "four"]] * 3, [["speak"] + ["four"] * 99] * 3]
hostile = st.sampled_from([*numbers, *texts, *paths, *choices, *lists, *actions])
anything = hostile | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def changed(fields: list[str], valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Lines of JSON: a valid object of which up to three of ``fields`` (dotted names) are taken away, or are
    anything."""

    def change(changes: list[tuple[str, Any, bool]]) -> bytes:
        value = json.loads(json.dumps(valid))
        for name, new, away in changes:
            *path, last = name.split(".")
            place = value
            for key in path:
                place = place.get(key) if isinstance(place, dict) else None
            if isinstance(place, dict):
                place.pop(last, None)
                if not away:
                    place[last] = new
        return json.dumps(value).encode()

    one = st.tuples(st.sampled_from(fields), anything, st.integers(0, 9).map(lambda n: n == 0))
    return st.lists(one, max_size=3).map(change)


def lines(of: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A file of up to four lines, some of them no JSON, or cut short, or of any bytes."""
    deep = st.sampled_from(
        [b"[" * 10_000, b'{"a":' * 3000, b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"1" * 5000, b"\r"]
    )
    cut = st.tuples(of, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    line = of | of | of | cut | deep | st.binary(max_size=30)
    return st.lists(line, max_size=4).map(b"\n".join)


LABEL = {
    "id": "p", "family": "timespeak", "axis": "timing", "preferred": "first", "margin": 1, "split": "train",
    "annotator": "x", "first": {"audio": "a.wav", "actions": [["listen"]] * 3},
    "second": {"audio": "b.wav", "actions": [["listen"], ["speak", "four"], ["listen"]]},
}  # fmt: skip
LABEL_FIELDS = [
    *sorted(NEEDED | OPTIONAL),
    "other",
    *(f"{s}.{k}" for s in ("first", "second") for k in ("audio", "actions")),
]


def one_line(error: MetronomeError, path: Path) -> bool:
    text = str(error)
    return text.isprintable() and len(text) < 1000 and str(path) in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, samples in zip("ab", SOUND, strict=True):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="FLOAT")
    return tmp_path


@MODERATE
@given(content=lines(changed(LABEL_FIELDS, LABEL)))
def test_labels(folder: Path, content: bytes) -> None:
    path = folder / "labels.jsonl"
    path.write_bytes(content)
    try:
        found = read_all_labels([path], VOCABULARY, 1, SCENARIOS)
    except MetronomeError as error:
        assert one_line(error, path)
    else:
        assert sum(map(len, found.values())) >= 1
        assert all(
            p.chosen.digest != p.rejected.digest and 0 <= p.margin <= 10_000 for ps in found.values() for p in ps
        )


@MODERATE
@given(content=lines(changed(["file", "text", "seconds", "note"], {"file": "a.wav", "text": "four", "seconds": 0.6})))
def test_manifests(folder: Path, content: bytes) -> None:
    path = folder / "manifest.jsonl"
    path.write_bytes(content)
    try:
        bank = SpeechBank.open(folder)
    except SpeechError as error:
        assert one_line(error, path)
    else:
        assert bank.clips and all(np.isfinite(c.samples).all() for c in bank.clips)


def audio(kind: str, subtype: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, SOUND[0], 16000, format=kind, subtype=subtype)
    return out.getvalue()


FILES = [audio("WAV", "FLOAT"), audio("WAV", "PCM_16"), audio("FLAC", "PCM_16"), audio("WAV", "DOUBLE")]


@MODERATE
@given(
    whole=st.sampled_from(FILES),
    flips=st.lists(st.tuples(st.integers(0, 120) | st.integers(0, 20_000), st.integers(0, 255)), max_size=4),
    keep=st.just(sys.maxsize) | st.integers(0, 20_000),
)
def test_recordings(folder: Path, whole: bytes, flips: list[tuple[int, int]], keep: int) -> None:
    """Damaged headers and samples. Whatever is read is finite and within the common level."""
    data = bytearray(whole)
    for place, value in flips:
        data[place % len(data)] = value
    (folder / "c.wav").write_bytes(data[:keep])
    path = folder / "manifest.jsonl"
    path.write_text(json.dumps({"file": "c.wav", "text": "four", "seconds": 0.6}))
    try:
        (clip,) = SpeechBank.open(folder).clips
    except SpeechError as error:
        assert one_line(error, path)
    else:
        assert np.abs(clip.samples).max() < 2


def test_the_valid_ones_are_read(folder: Path) -> None:
    """The control: what is changed above is right unchanged."""
    (folder / "labels.jsonl").write_text(json.dumps(LABEL))
    assert len(read_all_labels([folder / "labels.jsonl"], VOCABULARY, 1, SCENARIOS)["train"]) == 1
    for data in FILES:
        (folder / "c.wav").write_bytes(data)
        (folder / "manifest.jsonl").write_text(json.dumps({"file": "c.wav", "text": "four", "seconds": 0.6}))
        assert len(SpeechBank.open(folder).clips) == 1
