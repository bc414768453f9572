"""Preferences that people gave, read from a JSON-lines file.

One object a line: two recorded conversations, and which one a person prefers on one axis.

    {"id": "p17", "family": "timespeak", "axis": "timing",
     "first":  {"audio": "p17a.flac", "actions": [["listen"], ["listen"], ["speak", "four"]]},
     "second": {"audio": "p17b.flac", "actions": [["listen"], ["speak", "four"], ["listen"]]},
     "preferred": "first"}

- ``id``: a name for the pair, any text. Lines of one id show one pair of conversations, to several people perhaps.
- ``family``: which scenario family the conversations are of; ``axis``: what was asked about, one of the
  family's axes of reward: "timing" (was it said at the right moments?), "content" (were the words right?).
- ``first``, ``second``: ``audio`` is the user's microphone, a 16 kHz mono FLAC or WAV file beside this one, exactly
  200 ms (3,200 samples) for every entry of ``actions``; an entry is what the model did after hearing that chunk:
  ``["listen"]``, or ``["speak", word, …]`` with words of the tokenizer.
- ``preferred``: "first", "second" or "tie". Nothing can be learned from a tie, so ties give no pair; but they count
  when lines are compared: where one line of an id and axis says "tie" and another does not, or two prefer different
  ones, the file contradicts itself and is refused. (Decide by vote, or remove the pair.)
- optional: ``margin``, a number of at least 0, how much better (0 when left out); ``split``, "train" (when left out) or
  "held_out"; ``annotator``, any text.

Unknown keys are errors; every error names file and line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from kernels.errors import MetronomeError
from model.program.ranges import shown
from model.program.reading import UnreadableError, one_line, read_json_lines, size_of
from model.senses.audio import SAMPLE_RATE_HZ
from reward.learned.preference import Preference, Stretch
from rollout.record.transcript import from_audio
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_MS, CHUNK_SAMPLES, Action, Mode
from rollout.turn.grammar import Grammar
from rollout.turn.vocabulary import Vocabulary

NEEDED = {"id", "family", "axis", "first", "second", "preferred"}
OPTIONAL = {"margin", "split", "annotator"}
CHOICES = ("first", "second", "tie")
SPLITS = ("train", "held_out")


def read_labels(
    path: Path, split: str, vocabulary: Vocabulary, words_per_chunk: int, scenarios: ScenarioConfig
) -> list[Preference]:
    """The file's preferences of one split, for the families of ``scenarios``. Raises MetronomeError, naming the line,
    for a file that does not have the format above; lines of both splits are checked. ``words_per_chunk``: most words
    that an action may say."""
    seen: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
    preferences = []
    for number, label in read_json_lines(path):
        where = f"{path}, line {number}"
        _check_label(where, label, scenarios)
        earlier, before = seen.setdefault((label["id"], label["axis"]), (number, label))
        if earlier != number:
            _agree(where, label, earlier, before)
        conversations = {side: _conversation(where, path.parent, side, label[side]) for side in ("first", "second")}
        if label["preferred"] == "tie" or earlier != number or label.get("split", "train") != split:
            continue  # one pair for each id and axis, however many people were asked
        stretches = {
            side: _stretch(where, side, samples, actions, vocabulary, words_per_chunk)
            for side, (samples, actions) in conversations.items()
        }
        rejected = "second" if label["preferred"] == "first" else "first"
        preferences.append(
            Preference(
                stretches[label["preferred"]], stretches[rejected], label["axis"], "human", 0, label["family"],
                label["id"], float(label.get("margin", 0.0)),
            )
        )  # fmt: skip
    if not seen:
        raise MetronomeError(f"{path}: holds no label; see the format in reward/learned/human.py")
    if all(label["preferred"] == "tie" for _, label in seen.values()):
        raise MetronomeError(f"{path}: every label is a tie; nothing can be learned from it")
    return preferences


def _check_label(where: str, label: dict[str, Any], scenarios: ScenarioConfig) -> None:
    if wrong := sorted(NEEDED - label.keys()):
        raise MetronomeError(f"{where}: {', '.join(wrong)} is missing")
    if wrong := sorted(label.keys() - NEEDED - OPTIONAL):
        raise MetronomeError(
            f"{where}: unknown key {one_line(', '.join(wrong)[:80])}; known are {', '.join(sorted(NEEDED | OPTIONAL))}"
        )
    axes = {name: family.axes for name, family in scenarios.members.items()}
    for name, choices in (
        ("family", tuple(axes)),
        ("axis", axes.get(str(label["family"]), ())),
        ("preferred", CHOICES),
        ("split", SPLITS),
    ):
        if name in label and label[name] not in choices:
            raise MetronomeError(f"{where}: {name} is {shown(label[name])}; choose one of {', '.join(choices)}")
    if not isinstance(label["id"], str) or not label["id"]:
        raise MetronomeError(f"{where}: id must be a text, not {shown(label['id'])}")
    margin = label.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or margin < 0:
        raise MetronomeError(f"{where}: margin is {shown(margin)}; a finite number of at least 0 is needed")
    if label["first"] == label["second"]:
        raise MetronomeError(f"{where}: first and second are the same conversation")


def _agree(where: str, label: dict[str, Any], earlier: int, before: dict[str, Any]) -> None:
    """Raises MetronomeError unless two lines of one id and axis say the same."""
    same = [label[side] for side in ("first", "second")] == [before[side] for side in ("first", "second")]
    turned = [label[side] for side in ("second", "first")] == [before[side] for side in ("first", "second")]
    if not (same or turned):
        raise MetronomeError(f"{where}: id {label['id']!r} names other conversations in line {earlier}")
    preferred = (
        label["preferred"] if same or label["preferred"] == "tie" else CHOICES[1 - CHOICES.index(label["preferred"])]
    )
    if preferred == before["preferred"]:
        return
    kind = "is a one-sided tie" if "tie" in (preferred, before["preferred"]) else "contradicts itself"
    raise MetronomeError(
        f"{where}: pair {label['id']!r} {kind}: line {earlier} prefers {before['preferred']!r}, this line "
        f"{preferred!r} (in that line's order). Decide by vote, or remove the pair"
    )


def _conversation(where: str, folder: Path, side: str, value: Any) -> tuple[np.ndarray, list[Action]]:
    """(samples float32 [chunks * CHUNK_SAMPLES], actions [chunks])"""
    if not isinstance(value, dict) or value.keys() != {"audio", "actions"} or not isinstance(value["audio"], str):
        raise MetronomeError(f"{where}, {side}: must be an object of audio (a file name) and actions")
    actions = []
    for k, entry in enumerate(value["actions"] if isinstance(value["actions"], list) else [None]):
        try:
            mode, *words = entry
            action = Action(Mode(mode), tuple(words))
        except (TypeError, ValueError):
            action = None
        if action is None or action.mode is Mode.DELEGATE or not all(isinstance(word, str) for word in action.words):
            raise MetronomeError(
                f'{where}, {side}, action {k}: {shown(entry)} is neither ["listen"] nor ["speak", word, …]'
            )
        actions.append(action)
    if not actions:
        raise MetronomeError(f"{where}, {side}: the conversation is empty")
    path = folder / value["audio"]
    try:
        size_of(path)  # a pipe or a device would never end
    except UnreadableError as error:
        raise MetronomeError(
            f"{where}, {side}: recording {shown(value['audio'])} cannot be read (it {error.problem})"
        ) from None
    try:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise MetronomeError(f"{where}, {side}: recording {path} cannot be read ({error})") from None
    if rate_hz != SAMPLE_RATE_HZ or samples.shape[1] != 1:
        raise MetronomeError(f"{where}, {side}: {path} has {samples.shape[1]} channels at {rate_hz} Hz, not 1 at 16000")
    if len(samples) != len(actions) * CHUNK_SAMPLES:
        raise MetronomeError(
            f"{where}, {side}: {path} holds {len(samples)} samples, but {len(actions)} actions of {CHUNK_MS} ms need "
            f"{len(actions) * CHUNK_SAMPLES}"
        )
    if not np.isfinite(samples).all():
        raise MetronomeError(f"{where}, {side}: {path} holds samples that are no numbers")
    return samples[:, 0], actions


def _stretch(
    where: str, side: str, samples: np.ndarray, actions: list[Action], vocabulary: Vocabulary, words_per_chunk: int
) -> Stretch:
    try:
        written = from_audio(samples, actions, Grammar(vocabulary, words_per_chunk))
    except ValueError as error:
        raise MetronomeError(f"{where}, {side}: {error}") from None
    return Stretch(written.tokens, written.codes, 0, len(actions))
