"""Labels by people: what is right becomes pairs, what is wrong is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kernels.errors import MetronomeError
from reward.learned.human import read_labels
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.grammar import chunk_ends
from rollout.turn.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(256)
FIRST = [["listen"], ["listen"], ["speak", "four"]]
SECOND = [["listen"], ["speak", "four"], ["listen"]]


def label(**changes: Any) -> dict[str, Any]:
    return {
        "id": "p1", "family": "timespeak", "axis": "timing",
        "first": {"audio": "a.flac", "actions": FIRST}, "second": {"audio": "b.wav", "actions": SECOND},
        "preferred": "first",
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 3 * CHUNK_SAMPLES)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", noise[0], 16000)
    soundfile.write(tmp_path / "b.wav", noise[1], 16000)
    soundfile.write(tmp_path / "short.flac", noise[0, 1:], 16000)
    soundfile.write(tmp_path / "fast.flac", noise[0], 22050)
    soundfile.write(tmp_path / "stereo.flac", noise.T, 16000)
    return tmp_path


def read(folder: Path, *labels: dict[str, Any] | str, split: str = "train") -> list[Any]:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in labels]
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return read_labels(folder / "labels.jsonl", split, VOCABULARY, 1, ScenarioConfig())


def turned(**changes: Any) -> dict[str, Any]:
    one = label()
    return one | {"first": one["second"], "second": one["first"]} | changes


def test_a_label_becomes_a_pair(folder: Path) -> None:
    (pair,) = read(folder, label(margin=0.25, annotator="x"))
    assert (pair.axis, pair.source, pair.family, pair.scenario, pair.margin) == (
        "timing", "human", "timespeak", "p1", 0.25,
    )  # fmt: skip
    assert (pair.chosen.first, pair.chosen.end) == (0, 3)
    ends = chunk_ends(pair.chosen.tokens, VOCABULARY.audio).tolist()
    assert [int(pair.chosen.tokens[e]) for e in ends] == [VOCABULARY.listen, VOCABULARY.listen, VOCABULARY.end]
    (other,) = read(folder, label(preferred="second"))
    assert other.chosen.key == pair.rejected.key != pair.chosen.key


def test_splits_and_ties(folder: Path) -> None:
    labels = [
        label(),
        label(id="p2", split="held_out"),
        label(id="p3", preferred="tie"),
        label(id="p4", axis="content"),
    ]
    assert [p.scenario for p in read(folder, *labels)] == ["p1", "p4"]
    assert [p.scenario for p in read(folder, *labels, split="held_out")] == ["p2"]


def test_people_who_agree_make_one_pair(folder: Path) -> None:
    assert (
        len(read(folder, label(), label(), turned(preferred="second"), label(axis="content", preferred="second"))) == 2
    )


@pytest.mark.parametrize(
    ("labels", "line", "message"),
    [
        ([label(), "{"], 2, "is not JSON"),
        (["[]"], 1, "must be a JSON object"),
        ([{k: v for k, v in label().items() if k != "axis"}], 1, "axis is missing"),
        ([label(prefered="first")], 1, "unknown key prefered"),
        ([label(family="chess")], 1, "family is 'chess'; choose one of timespeak, turn_taking"),
        ([label(axis="tone")], 1, "axis is 'tone'"),
        ([label(preferred="both")], 1, "preferred is 'both'"),
        ([label(split="test")], 1, "split is 'test'"),
        ([label(id="")], 1, "id must be a text"),
        ([label(margin=-1)], 1, "margin is -1"),
        (['{"margin": NaN, ' + json.dumps(label())[1:]], 1, "NaN is no number"),
        ([label(margin="big")], 1, "margin is 'big'"),
        ([label(second=label()["first"])], 1, "the same conversation"),
        ([label(), label(preferred="second")], 2, "contradicts itself: line 1 prefers 'first'"),
        ([label(), turned(preferred="first")], 2, "contradicts itself"),
        ([label(), label(preferred="tie")], 2, "is a one-sided tie"),
        ([label(preferred="tie"), turned(preferred="second")], 2, "is a one-sided tie"),
        ([label(), label(second={"audio": "a.flac", "actions": SECOND})], 2, "names other conversations in line 1"),
        ([label(first={"audio": "a.flac", "actions": []})], 1, "first: the conversation is empty"),
        ([label(first={"audio": "a.flac"})], 1, "first: must be an object"),
        ([label(first={"audio": "a.flac", "actions": [["listen"], ["shout"], ["listen"]]})], 1, "first, action 1"),
        ([label(first={"audio": "a.flac", "actions": [["listen"], ["speak"], ["listen"]]})], 1, "first, action 1"),
        ([label(first={"audio": "a.flac", "actions": [["listen"], ["speak", "qux"], ["listen"]]})], 1, "no word 'qux'"),
        ([label(first={"audio": "a.flac", "actions": [["speak", "four", "two"]] * 3})], 1, "says 2 words"),
        ([label(second={"audio": "none.wav", "actions": SECOND})], 1, "second: recording .*none.wav cannot be read"),
        ([label(second={"audio": "short.flac", "actions": SECOND})], 1, "holds 9599 samples, but 3 actions .* 9600"),
        ([label(second={"audio": "fast.flac", "actions": SECOND})], 1, "1 channels at 22050 Hz"),
        ([label(second={"audio": "stereo.flac", "actions": SECOND})], 1, "2 channels at 16000 Hz"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder: Path, labels: list[Any], line: int, message: str) -> None:
    with pytest.raises(MetronomeError, match=rf"labels\.jsonl, line {line}(,|:).*{message}"):
        read(folder, *labels)


def test_files_without_a_preference_are_refused(folder: Path) -> None:
    with pytest.raises(MetronomeError, match="holds no label"):
        read(folder, "", "  ")
    with pytest.raises(MetronomeError, match="every label is a tie"):
        read(folder, label(preferred="tie"))
    with pytest.raises(MetronomeError, match=r"nothing\.jsonl: is missing"):
        read_labels(folder / "nothing.jsonl", "train", VOCABULARY, 1, ScenarioConfig())
