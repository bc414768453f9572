"""Preferences that people gave, read from a JSON-lines file.

One object a line: two recorded conversations, and which one a person prefers on one axis.

    {"id": "p17", "family": "timespeak", "axis": "timing",
     "first":  {"audio": "p17a.flac", "actions": [["listen"], ["listen"], ["speak", "four"]]},
     "second": {"audio": "p17b.flac", "actions": [["listen"], ["speak", "four"], ["listen"]]},
     "preferred": "first"}

- ``id``: a name for the pair, up to 200 characters. Lines of one id show one pair of conversations, to several people
  perhaps; so do lines of other ids that show the same two conversations.
- ``family``: which scenario family the conversations are of; ``axis``: what was asked about, one of the
  family's axes of reward: "timing" (was it said at the right moments?), "content" (were the words right?).
- ``first``, ``second``: ``audio`` is the user's microphone, a 16 kHz mono FLAC or WAV file within this one's folder
  (so that the folder can be moved and shared), exactly 200 ms (3,200 samples) for every entry of ``actions``, at most
  `MOST_CHUNKS`; samples lie within full scale, silence is allowed. An entry is what the model did after hearing that
  chunk: ``["listen"]``, or ``["speak", word, …]`` with words of the tokenizer, control tokens excepted.
- ``preferred``: "first", "second" or "tie". Nothing can be learned from a tie, so ties give no pair; but they count
  when lines are compared: where one line of a pair and axis says "tie" and another does not, or two prefer different
  ones, the labels contradict each other and are refused. (Decide by vote, or remove the pair.)
- optional: ``margin``, a number from 0 to `reward.learned.preference.MOST_MARGIN`, how much better (0 when left out);
  ``split``, "train" (when left out) or "held_out"; ``annotator``, up to 200 characters.

Lines that agree about a pair on an axis give one preference. They must also agree about family, split and margin, and
no conversation may be in both splits. Conversations are told apart by what the model reads, actions and the sound's
dMel codes, not by the name of a file; and all files of a recipe are compared with each other.

Unknown keys are errors; every error names file and line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.errors import MetronomeError
from model.program.ranges import Range, shown
from model.program.reading import read_json_lines
from reward.learned.preference import MOST_MARGIN, Preference, Stretch
from rollout.record.transcript import from_observations
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_MS, CHUNK_SAMPLES, Action, Mode
from rollout.turn.grammar import Grammar
from rollout.turn.observation import audio_observations
from rollout.turn.vocabulary import Vocabulary
from rollout.world.recording import RecordingError, read_recording

NEEDED = {"id", "family", "axis", "first", "second", "preferred"}
OPTIONAL = {"margin", "split", "annotator"}
SIDES = ("first", "second")
CHOICES = (*SIDES, "tie")
SPLITS = ("train", "held_out")
MOST_CHUNKS = 300
"""Of a conversation: one minute."""
LONGEST_NAME = 200


@dataclass(frozen=True)
class Place:
    """A line of a file of labels."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    def seen_from(self, other: Place) -> str:
        """As a line of another file or of the same one."""
        return f"line {self.line}" if self.path == other.path else str(self)


@dataclass(frozen=True)
class Label:
    """One line, checked."""

    place: Place
    id: str
    family: str
    axis: str
    split: str
    margin: float
    preferred: str
    sides: dict[str, Stretch]  # "first", "second"

    def says(self) -> bytes | None:
        """Digest of the preferred conversation; None for a tie."""
        return None if self.preferred == "tie" else self.sides[self.preferred].digest

    @property
    def pair(self) -> frozenset[bytes]:
        """Digests of the two conversations."""
        return frozenset(side.digest for side in self.sides.values())


def read_all_labels(
    paths: Sequence[Path], vocabulary: Vocabulary, words_per_chunk: int, scenarios: ScenarioConfig
) -> dict[str, list[Preference]]:
    """The preferences of all files by split, for the families of ``scenarios``. ``words_per_chunk``: most words that an
    action may say. Raises MetronomeError, naming the line, for a file that does not have the format above, and for
    labels that contradict each other."""
    preferences: dict[str, list[Preference]] = {split: [] for split in SPLITS}
    known = _Known()
    grammar = Grammar(vocabulary, words_per_chunk)
    for path in paths:
        preferred = []
        for number, content in read_json_lines(path):
            label = _label(Place(path, number), content, grammar, scenarios)
            preferred.append(label.preferred)
            if known.add(label) and label.preferred != "tie":  # one for each pair and axis, however many were asked
                preferences[label.split].append(_preference(label))
        if not preferred:
            raise MetronomeError(f"{path}: holds no label; see the format in reward/learned/human.py")
        if set(preferred) == {"tie"}:
            raise MetronomeError(f"{path}: every label is a tie; nothing can be learned from it")
    return preferences


def _preference(label: Label) -> Preference:
    rejected = "second" if label.preferred == "first" else "first"
    return Preference(
        label.sides[label.preferred], label.sides[rejected], label.axis, "human", 0, label.family, label.id,
        label.margin,
    )  # fmt: skip


class _Known:
    """All labels so far, to compare the next one with."""

    def __init__(self) -> None:
        self._of_id: dict[tuple[Path, str], Label] = {}  # files may have ids in common
        self._of_pair: dict[frozenset[bytes], Label] = {}
        self._of_axis: dict[tuple[str, frozenset[bytes]], Label] = {}
        self._of_conversation: dict[bytes, Label] = {}

    def add(self, label: Label) -> bool:
        """Whether the label is the first of its pair and axis. Raises MetronomeError for what contradicts an earlier
        label."""
        where, pair = label.place, label.pair
        same_id = self._of_id.setdefault((where.path, label.id), label)
        if same_id.pair != pair:
            raise MetronomeError(
                f"{where}: id {label.id!r} names other conversations in {same_id.place.seen_from(where)}"
            )
        for name, same in (("family", self._of_pair.setdefault(pair, label)), ("split", same_id)):
            if (here := getattr(label, name)) != (there := getattr(same, name)):
                raise MetronomeError(
                    f"{where}: {name} of this pair is {there!r} in {same.place.seen_from(where)} and {here!r} here"
                )
        for digest in pair:
            same = self._of_conversation.setdefault(digest, label)
            if same.split != label.split:
                raise MetronomeError(
                    f"{where}: a conversation of the split {label.split!r} is in the split {same.split!r} in "
                    f"{same.place.seen_from(where)}; what is held out must be unseen"
                )
        earlier = self._of_axis.setdefault((label.axis, pair), label)
        if earlier is not label:
            _agree(label, earlier)
        return earlier is label


def _agree(label: Label, before: Label) -> None:
    """Raises MetronomeError unless two labels of one pair and axis say the same."""
    where, there = label.place, before.place.seen_from(label.place)
    other = "" if before.id == label.id else f" (there called {shown(before.id)})"
    if label.margin != before.margin:
        raise MetronomeError(
            f"{where}: pair {shown(label.id)} has margin {label.margin:g} here and {before.margin:g} in {there}{other}"
        )
    if (says := label.says()) == before.says():
        return
    sides = {before.sides[side].digest: side for side in SIDES}
    preferred = "tie" if says is None else sides[says]
    kind = "is a one-sided tie" if "tie" in (preferred, before.preferred) else "contradicts itself"
    raise MetronomeError(
        f"{where}: pair {shown(label.id)} {kind}: {there}{other} prefers {before.preferred!r}, this line {preferred!r} "
        "(in that line's order). Decide by vote, or remove the pair"
    )


def _label(place: Place, content: dict[str, Any], grammar: Grammar, scenarios: ScenarioConfig) -> Label:
    """``content``: the line's object."""
    if wrong := sorted(NEEDED - content.keys()):
        raise MetronomeError(f"{place}: {', '.join(wrong)} is missing")
    if wrong := sorted(content.keys() - NEEDED - OPTIONAL):
        raise MetronomeError(
            f"{place}: unknown key {shown(wrong[0])}; known are {', '.join(sorted(NEEDED | OPTIONAL))}"
        )
    axes = {name: family.axes for name, family in scenarios.members.items()}
    for name, choices in (
        ("family", tuple(axes)),
        ("axis", axes.get(str(content["family"]), ())),
        ("preferred", CHOICES),
        ("split", SPLITS),
    ):
        if name in content and content[name] not in choices:
            raise MetronomeError(f"{place}: {name} is {shown(content[name])}; choose one of {', '.join(choices)}")
    for name in ("id", "annotator"):
        text = content.get(name, "nobody")
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_NAME or not text.isprintable():
            raise MetronomeError(
                f"{place}: {name} must be a text of 1 to {LONGEST_NAME} characters without control characters, not "
                f"{shown(text)}"
            )
    margin = content.get("margin", 0)
    if problem := Range(0, MOST_MARGIN).problem(margin):
        raise MetronomeError(f"{place}: margin is {shown(margin)}: {problem}")
    sides = {side: _conversation(f"{place}, {side}", place.path.parent, content[side], grammar) for side in SIDES}
    if sides["first"].digest == sides["second"].digest:
        raise MetronomeError(
            f"{place}: first and second are the same conversation: equal actions and sound, by whatever names"
        )
    return Label(
        place, content["id"], content["family"], content["axis"], content.get("split", "train"), float(margin),
        content["preferred"], sides,
    )  # fmt: skip


def _conversation(where: str, folder: Path, value: Any, grammar: Grammar) -> Stretch:
    """``value``: what a line says of one side; ``folder``: that of the file of labels."""
    if not isinstance(value, dict) or value.keys() != {"audio", "actions"} or not isinstance(value["audio"], str):
        raise MetronomeError(f"{where}: must be an object of audio (a file name) and actions")
    entries = value["actions"]
    if not isinstance(entries, list) or not entries:
        raise MetronomeError(f"{where}: the conversation is empty: actions must be a list of at least one action")
    if len(entries) > MOST_CHUNKS:
        raise MetronomeError(
            f"{where}: {len(entries)} actions; at most {MOST_CHUNKS}, {MOST_CHUNKS * CHUNK_MS / 1000:g} s, can be read"
        )
    actions = [_action(f"{where}, action {k}", entry, grammar) for k, entry in enumerate(entries)]
    try:
        samples = read_recording(folder, value["audio"], MOST_CHUNKS * CHUNK_MS / 1000)
    except RecordingError as error:
        raise MetronomeError(f"{where}: {error}") from None
    if len(samples) != len(actions) * CHUNK_SAMPLES:
        raise MetronomeError(
            f"{where}: {folder / value['audio']} holds {len(samples)} samples, but {len(actions)} actions of "
            f"{CHUNK_MS} ms need {len(actions) * CHUNK_SAMPLES}"
        )
    audio = torch.from_numpy(samples.reshape(-1, CHUNK_SAMPLES))
    written = from_observations(audio_observations(audio), actions, grammar)
    return Stretch(written.tokens, written.codes, 0, len(actions))


def _action(where: str, entry: Any, grammar: Grammar) -> Action:
    if entry == ["listen"]:
        return Action(Mode.LISTEN)
    vocabulary = grammar.vocabulary
    sayable = vocabulary.classes.allowed.any(0)  # bool [V]
    words = entry[1:] if isinstance(entry, list) else []
    if not words or entry[0] != "speak" or not all(isinstance(word, str) for word in words):
        raise MetronomeError(f'{where}: {shown(entry)} is neither ["listen"] nor ["speak", word, …]')
    if len(words) > grammar.words_per_chunk:
        raise MetronomeError(f"{where}: says {len(words)} words; words_per_chunk allows {grammar.words_per_chunk}")
    for word in words:
        if word not in vocabulary.ids:
            raise MetronomeError(f"{where}: the tokenizer has no word {shown(word)}; use words of its list")
        if word.startswith("<|") or not sayable[vocabulary.ids[word]]:
            raise MetronomeError(f"{where}: {shown(word)} is a control token of the model, which nobody says")
    return Action(Mode.SPEAK, tuple(words))
