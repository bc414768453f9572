"""Labels by people: what is right becomes pairs, what is wrong is named by file and line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kernels.errors import MetronomeError
from model.tokenizer import SPECIALS
from model.weights import checkpoint
from reward.learned.human import read_all_labels
from reward.pairs import PairMaker, PairsConfig, PolicyRecipe, RolloutRecipe
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.grammar import chunk_ends
from rollout.turn.vocabulary import Vocabulary
from tests.support.models import fresh_model

VOCABULARY = Vocabulary.build(256)
FIRST = [["listen"], ["listen"], ["speak", "four"]]
SECOND = [["listen"], ["speak", "four"], ["listen"]]


def label(**changes: Any) -> dict[str, Any]:
    return {
        "id": "p1", "family": "timespeak", "axis": "timing",
        "first": {"audio": "a.flac", "actions": FIRST}, "second": {"audio": "b.wav", "actions": SECOND},
        "preferred": "first",
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("labels")
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 3 * CHUNK_SAMPLES)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", noise[0], 16000)
    soundfile.write(tmp_path / "b.wav", noise[1], 16000)
    soundfile.write(tmp_path / "short.flac", noise[0, 1:], 16000)
    soundfile.write(tmp_path / "fast.flac", noise[0], 22050)
    soundfile.write(tmp_path / "stereo.flac", noise[:2].T, 16000)
    soundfile.write(tmp_path / "c.flac", noise[2], 16000)
    soundfile.write(tmp_path / "d.flac", noise[3], 16000)
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "a.flac", tmp_path / "more" / "copy.flac")
    samples, _ = soundfile.read(tmp_path / "a.flac")
    soundfile.write(tmp_path / "more" / "copy.wav", samples, 16000, subtype="FLOAT")
    for name, value in (("nan", np.nan), ("inf", -np.inf), ("loud", 1.5), ("denormal", 1e-40), ("full", -1.0)):
        changed = noise[1].copy()
        changed[7] = value
        soundfile.write(tmp_path / f"{name}.wav", changed, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "silence.wav", 0 * noise[1], 16000)
    soundfile.write(tmp_path / "minutes.wav", np.zeros(16000 * 61, np.float32), 16000)
    os.mkfifo(tmp_path / "pipe.wav")
    return tmp_path


def read(folder: Path, *labels: dict[str, Any] | str, split: str = "train") -> list[Any]:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in labels]
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return read_all_labels([folder / "labels.jsonl"], VOCABULARY, 1, ScenarioConfig())[split]


def turned(**changes: Any) -> dict[str, Any]:
    one = label()
    return one | {"first": one["second"], "second": one["first"]} | changes


def other(**changes: Any) -> dict[str, Any]:
    """A label of two other conversations."""
    one, two = {"audio": "c.flac", "actions": FIRST}, {"audio": "d.flac", "actions": SECOND}
    return label(id="p2", first=one, second=two) | changes


def side(audio: str, actions: Any = None) -> dict[str, Any]:
    return {"audio": audio, "actions": FIRST if actions is None else actions}


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
        other(split="held_out"),
        other(id="p3", preferred="tie", axis="content", split="held_out"),
        label(id="p4", axis="content", margin=1),
    ]
    assert [p.scenario for p in read(folder, *labels)] == ["p1", "p4"]
    assert [p.scenario for p in read(folder, *labels, split="held_out")] == ["p2"]


def test_people_who_agree_make_one_pair(folder: Path) -> None:
    assert (
        len(read(folder, label(), label(), turned(preferred="second"), label(axis="content", preferred="second"))) == 2
    )
    assert len(read(folder, label(), label(id="q"), turned(id="r", preferred="second"))) == 1  # whatever they call it


def test_files_are_compared_with_each_other(folder: Path) -> None:
    def read_both(*two: dict[str, Any]) -> dict[str, list[Any]]:
        paths = [folder / f"{i}.jsonl" for i in range(2)]
        for path, one in zip(paths, two, strict=True):
            path.write_text("\n" + json.dumps(one))
        return read_all_labels(paths, VOCABULARY, 1, ScenarioConfig())

    assert len(read_both(label(), other(id="p1", split="held_out"))["held_out"]) == 1  # their ids are their own
    with pytest.raises(MetronomeError, match=r"1\.jsonl, line 2: pair 'p9' contradicts itself: .*0\.jsonl, line 2"):
        read_both(label(), label(id="p9", preferred="second"))
    with pytest.raises(MetronomeError, match=r"1\.jsonl, line 2: .*is in the split 'train' in .*0\.jsonl, line 2"):
        read_both(label(), other(second=side("a.flac"), split="held_out"))


def test_pairs_read_labels_before_anything_slow(folder: Path) -> None:
    """The policy's weights and the recordings that the recipe names are missing; the labels are complained of first.
    The control: right labels get as far as the recordings."""
    checkpoint.save(fresh_model("nano"), folder / "policy")
    (folder / "policy/model.safetensors").unlink()
    nowhere = RolloutRecipe(policies=(PolicyRecipe(str(folder / "policy")),))
    for name, labels, message in (
        ("wrong", [label(), label(id="p9", preferred="second")], "wrong.jsonl, line 2: pair 'p9' contradicts itself"),
        ("right", [label()], "nowhere"),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, labels)))
        with pytest.raises(MetronomeError, match=message):
            PairMaker(PairsConfig(human=(str(path),), speech_dir=str(folder / "nowhere"), rollouts=nowhere))


def test_unusual_labels_are_taken(folder: Path) -> None:
    """The controls of limits: silence, full scale, a file in a folder within, the longest names, the largest margin."""
    assert read(folder, label(second=side("silence.wav"), id="i" * 200, annotator="a" * 200, margin=10_000))
    assert read(folder, label(second=side("full.wav")), label(id="x", first=side("more/copy.wav", SECOND)))
    assert read(folder, label(second=side("a.flac", SECOND)))  # one sound, two behaviours
    soundfile.write(folder / "long.wav", np.zeros(300 * CHUNK_SAMPLES, np.float32), 16000)
    assert read(folder, label(second=side("long.wav", [["listen"]] * 300)))
    (folder / "labels.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(label(id="\u2028".join("ab"))).encode())
    with pytest.raises(MetronomeError, match="id must be"):
        read_all_labels([folder / "labels.jsonl"], VOCABULARY, 1, ScenarioConfig())
    text = json.dumps(label(id="caf\u00e9"), ensure_ascii=False)
    (folder / "labels.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_all_labels([folder / "labels.jsonl"], VOCABULARY, 1, ScenarioConfig())
    (folder / "labels.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(MetronomeError, match="line 1: is not UTF-8"):
        read_all_labels([folder / "labels.jsonl"], VOCABULARY, 1, ScenarioConfig())


@pytest.mark.parametrize(
    ("labels", "line", "message"),
    [
        ([label(), "{"], 2, "is not JSON"),
        (["[]"], 1, "must be a JSON object"),
        ([{k: v for k, v in label().items() if k != "axis"}], 1, "axis is missing"),
        ([label(prefered="first")], 1, "unknown key 'prefered'"),
        ([label(family="chess")], 1, "family is 'chess'; choose one of timespeak, turn_taking"),
        ([label(axis="tone")], 1, "axis is 'tone'"),
        ([label(preferred="both")], 1, "preferred is 'both'"),
        ([label(split="test")], 1, "split is 'test'"),
        ([label(id="")], 1, "id must be a text"),
        ([label(margin=-1)], 1, "margin is -1"),
        (['{"margin": NaN, ' + json.dumps(label())[1:]], 1, "NaN is no number"),
        ([label(margin="big")], 1, "margin is 'big'"),
        ([label(margin=1e308)], 1, "margin is 1e.308: give a number from 0 to 10,000"),
        ([label(margin=True)], 1, "margin is True"),
        (['{"id": "x", ' + json.dumps(label())[1:]], 1, "the key 'id' comes twice"),
        ([label(), label(id="i" * 201)], 2, "id must be a text of 1 to 200 characters"),
        ([label(id="a\nb")], 1, "id must be a text .* without control characters"),
        ([label(annotator="a" * 10**6)], 1, "annotator must be a text"),
        ([label(annotator=["x"])], 1, "annotator must be a text"),
        ([label(second=label()["first"])], 1, "the same conversation"),
        ([label(second=side("more/copy.flac"))], 1, "the same conversation: equal actions and sound"),
        ([label(second=side("more/copy.wav"))], 1, "the same conversation"),
        ([label(first=side("./more/../a.flac"))], 1, "first: recording .* give its path .* without"),
        ([label(), label(preferred="second")], 2, "contradicts itself: line 1 prefers 'first'"),
        ([label(), turned(preferred="first")], 2, "contradicts itself"),
        ([label(), label(id="p9", preferred="second")], 2, r"'p9' contradicts .* line 1 \(there called 'p1'\) prefers"),
        ([label(), other(), turned(id="p9", preferred="first")], 3, "'p9' contradicts itself: line 1"),
        ([label(), label(id="p9", preferred="second", first=side("more/copy.wav"))], 2, "'p9' contradicts itself"),
        ([label(), label(preferred="tie")], 2, "is a one-sided tie"),
        ([label(), label(id="p9", preferred="tie")], 2, "'p9' is a one-sided tie"),
        ([label(preferred="tie"), turned(preferred="second")], 2, "is a one-sided tie"),
        ([label(), label(second=side("a.flac", SECOND))], 2, "names other conversations in line 1"),
        ([label(), label(second=side("a.flac", SECOND), axis="content")], 2, "names other conversations in line 1"),
        ([label(), label(split="held_out")], 2, "split of this pair is 'train' in line 1 and 'held_out' here"),
        ([label(), label(axis="content", split="held_out")], 2, "split of this pair is 'train' in line 1"),
        ([label(), label(id="p9", split="held_out")], 2, "a conversation .* is in the split 'train' in line 1"),
        ([label(), other(first=side("a.flac"), split="held_out")], 2, "is in the split 'train' in line 1"),
        ([label(), label(margin=2)], 2, "has margin 2 here and 0 in line 1"),
        ([label(margin=1), turned(id="p9", preferred="second")], 2, r"margin 0 here and 1 in line 1 \(there called"),
        ([label(), label(id="p9", family="turn_taking")], 2, "family of this pair is 'timespeak' in line 1"),
        ([label(first=side("a.flac", []))], 1, "first: the conversation is empty"),
        ([label(first=side("a.flac", "listen"))], 1, "first: the conversation is empty"),
        ([label(first={"audio": "a.flac"})], 1, "first: must be an object"),
        ([label(first=side("a.flac", [["listen"]] * 301))], 1, "first: 301 actions; at most 300, 60 s, can be read"),
        ([label(first=side("a.flac", [["listen"], ["shout"], ["listen"]]))], 1, "first, action 1"),
        ([label(first=side("a.flac", [["listen"], ["speak"], ["listen"]]))], 1, "first, action 1"),
        ([label(first=side("a.flac", ["listen", ["listen"], ["listen"]]))], 1, "first, action 0: 'listen' is neither"),
        ([label(first=side("a.flac", [["listen"], ["delegate", "four"], ["listen"]]))], 1, "first, action 1"),
        ([label(first=side("a.flac", [["listen"], ["speak", 4], ["listen"]]))], 1, "first, action 1"),
        ([label(first=side("a.flac", [["listen"], ["speak", "qux"], ["listen"]]))], 1, "no word 'qux'"),
        ([label(first=side("a.flac", [["listen"], ["speak", ""], ["listen"]]))], 1, "no word ''"),
        ([label(first=side("a.flac", [["listen"], ["speak", "Four"], ["listen"]]))], 1, "no word 'Four'"),
        *(
            ([label(first=side("a.flac", [["listen"], ["speak", word], ["listen"]]))], 1, "is a control token")
            for word in SPECIALS
        ),
        ([other(split="held_out"), label(first=side("a.flac", [["speak", "<|end|>"]] * 3))], 2, "is a control token"),
        ([other(), label(first=side("a.flac", [["speak", "qux"]] * 3), split="held_out")], 2, "no word 'qux'"),
        ([label(first=side("a.flac", [["speak", "four", "two"]] * 3))], 1, "says 2 words; words_per_chunk allows 1"),
        ([label(second=side("none.wav", SECOND))], 1, "second: recording .*none.wav is missing"),
        ([label(second=side("more", SECOND))], 1, "second: recording .*more is a folder"),
        ([label(second=side("pipe.wav", SECOND))], 1, "second: recording .*pipe.wav is no regular file"),
        ([label(second=side("", SECOND))], 1, "second: recording '': give a file's name"),
        ([label(second=side("a\nb.wav", SECOND))], 1, "none of control"),
        ([label(second=side("../b.wav", SECOND))], 1, "second: recording '../b.wav': give its path in the folder"),
        ([label(second=side("/b.wav", SECOND))], 1, "lies outside the folder"),
        ([label(second=side("short.flac", SECOND))], 1, "holds 9599 samples, but 3 actions .* 9600"),
        ([label(second=side("fast.flac", SECOND))], 1, "22050 Hz and 1 channels"),
        ([label(second=side("stereo.flac", SECOND))], 1, "16000 Hz and 2 channels"),
        ([label(second=side("nan.wav", SECOND))], 1, "nan.wav holds values that are no numbers"),
        ([label(second=side("inf.wav", SECOND))], 1, "inf.wav holds values that are no numbers"),
        ([label(second=side("loud.wav", SECOND))], 1, "loud.wav holds samples beyond full scale, up to 1.5"),
        ([label(second=side("denormal.wav", SECOND))], 1, "denormal.wav holds denormal numbers"),
        ([label(second=side("minutes.wav", SECOND))], 1, "minutes.wav is longer than 60 s"),
        ([label(), "", other(second=side("loud.wav", SECOND), preferred="tie")], 3, "beyond full scale"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder: Path, labels: list[Any], line: int, message: str) -> None:
    for split in ("train", "held_out"):
        with pytest.raises(MetronomeError, match=rf"labels\.jsonl, line {line}(,|:).*{message}") as raised:
            read(folder, *labels, split=split)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_files_without_a_preference_are_refused(folder: Path) -> None:
    with pytest.raises(MetronomeError, match="holds no label"):
        read(folder, "", "  ")
    with pytest.raises(MetronomeError, match="every label is a tie"):
        read(folder, label(preferred="tie"))
    with pytest.raises(MetronomeError, match=r"nothing\.jsonl: is missing"):
        read_all_labels([folder / "nothing.jsonl"], VOCABULARY, 1, ScenarioConfig())
