"""A preference: two stretches of conversation, the better one first; and the table of them on disk.

A stretch is some chunks of a conversation (Christiano et al. 2017 compare segments). The whole conversation up to its
end is kept with it, because a reward depends on everything heard before. Rows are self-contained; the columns that
TRL knows (``chosen_ids``, ``rejected_ids``, ``margin``) have TRL's names. dMel codes, uint8 [A, 80], and the pixels of
video are stored as zlib's bytes, a quarter of their size: a conversation is in many pairs. No conversation is in two
splits of a table: what is held out must be unseen. Conversations are compared by what they hold: tokens, codes, video.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from numpy.typing import NDArray
from torch import Tensor

from kernels.errors import MetronomeError
from model.config import MEL_BINS, MEL_CHANNELS
from model.inputs import Senses, one_context
from model.program.files import whole_folder
from model.program.ranges import Range
from model.program.reading import UnreadableError
from model.senses.video import NO_VIDEO, Frames, patch_count
from model.tokenizer import words_digest
from reward.learned.origin import (
    UNKNOWN,
    PairsOrigin,
    has_pairs_origin,
    pairs_digest,
    read_pairs_origin,
    write_pairs_origin,
)
from rollout.turn.action import CHUNK_FRAMES
from rollout.turn.vocabulary import Vocabulary

MOST_MARGIN = 10_000
"""Largest margin of a pair; an event on time is worth 1."""
MOST_CODES = 1 << 26
"""dMel codes of a conversation; 64 Mi are more than two hours."""
MOST_PIXELS = 1 << 30
"""Bytes of pixels of a conversation."""
REMEDY = "Make the pairs anew: python -m reward.pairs"


@dataclass(frozen=True, eq=False)
class Stretch:
    """Chunks ``first`` … ``end - 1`` of a conversation."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    first: int
    end: int
    frames: Frames = NO_VIDEO
    contexts: Tensor = field(default_factory=one_context)  # reward models read one sequence

    @property
    def own(self) -> Tensor:
        """None: reward models do not hear a voice."""
        return self.codes[:0]

    @property
    def key(self) -> tuple[bytes, ...]:
        """Equal for stretches of one conversation."""
        parts = (self.tokens, self.codes, self.frames.pixels, self.frames.sizes)
        return tuple(part.numpy().tobytes() for part in parts)

    @cached_property
    def digest(self) -> bytes:
        """Of the conversation: equal for equal keys."""
        video = (self.frames.pixels.numpy(), self.frames.sizes.numpy())
        return _conversation_digest(self.tokens.numpy(), self.codes.numpy(), *video)


@dataclass(frozen=True, eq=False)
class Preference:
    """``chosen`` is better than ``rejected`` on one axis of reward. Example: the expert's play of timespeak/train/7 is
    preferred to the same play with the second reminder said 400 ms too early."""

    chosen: Stretch
    rejected: Stretch
    axis: str  # of reward, "timing" for one
    source: str  # kind of corruption, "rollouts", "segments" or "human"
    size_ms: int  # size of the corruption; 0 for other sources
    family: str
    scenario: str  # id of the chosen one's scenario, or what the human labels call it
    margin: float  # difference of the rule's rewards (an event on time is worth 1); 0 when unknown


_SIDE = {
    "ids": List(Value("int32")),
    "codes": Value("binary"),
    "pixels": Value("binary"),  # of the video (`model.senses.video.Frames`), as are its sizes, flattened
    "sizes": List(Value("int32")),
    "first": Value("int32"),
    "end": Value("int32"),
}
_NO_VIDEO: dict[str, Any] = {"pixels": b"", "sizes": []}
SIDES = ("chosen", "rejected")
FEATURES = Features(
    {f"{side}_{name}": feature for side in SIDES for name, feature in _SIDE.items()}
    | {name: Value("string") for name in ("axis", "source", "family", "scenario")}
    | {"size_ms": Value("int32"), "margin": Value("float32")}
)


def distinct(stretches: Sequence[Stretch]) -> tuple[list[Stretch], list[int]]:
    """One stretch of each of the S conversations, in the order of first appearance, and for each given stretch the
    index in it of its conversation."""
    index: dict[tuple[bytes, ...], int] = {}
    owner = [index.setdefault(s.key, len(index)) for s in stretches]
    return [stretches[owner.index(i)] for i in range(len(index))], owner


def to_row(preference: Preference) -> dict[str, Any]:
    """A preference as a row of the data set, with the columns `FEATURES`."""
    row: dict[str, Any] = {}
    for side, stretch in (("chosen", preference.chosen), ("rejected", preference.rejected)):
        row[f"{side}_ids"] = stretch.tokens.to(torch.int32).numpy()
        row[f"{side}_codes"] = zlib.compress(stretch.codes.numpy().tobytes(), level=1)
        row[f"{side}_pixels"] = zlib.compress(stretch.frames.pixels.numpy().tobytes(), level=1)
        row[f"{side}_sizes"] = stretch.frames.sizes.flatten().to(torch.int32).numpy()
        row[f"{side}_first"], row[f"{side}_end"] = stretch.first, stretch.end
    return row | {
        name: getattr(preference, name) for name in ("axis", "source", "family", "scenario", "size_ms", "margin")
    }


def from_row(row: Mapping[str, Any]) -> Preference:
    """The inverse of `to_row`. ``row`` must come from a dataset in its plain format: in numpy's format trailing zero
    bytes of the codes would be lost."""
    chosen, rejected = (
        Stretch(
            torch.from_numpy(np.asarray(row[f"{side}_ids"], np.int64)),
            torch.from_numpy(_decompressed(row[f"{side}_codes"]).reshape(-1, MEL_CHANNELS).copy()),
            int(row[f"{side}_first"]),
            int(row[f"{side}_end"]),
            _frames(row, side),
        )
        for side in SIDES
    )
    texts = {name: str(row[name]) for name in ("axis", "source", "family", "scenario")}
    return Preference(chosen, rejected, size_ms=int(row["size_ms"]), margin=float(row["margin"]), **texts)


@lru_cache(maxsize=64)
def _decompressed(data: bytes, most: int = MOST_CODES) -> NDArray[np.uint8]:
    """uint8 [B]. Kept for a while: neighbouring pairs share their conversations. Raises zlib.error for what is no whole
    stream of at most ``most`` bytes."""
    stream = zlib.decompressobj()
    out = stream.decompress(data, most)
    if not stream.eof:
        raise zlib.error(f"cut short, or more than {most:,} bytes")
    return np.frombuffer(out, np.uint8)


def _frames(row: Mapping[str, Any], side: str) -> Frames:
    """A row's video. Raises zlib.error or ValueError for what is damaged."""
    sizes = torch.from_numpy(np.asarray(row[f"{side}_sizes"], np.int64).reshape(-1, 4))
    if not len(sizes):
        return NO_VIDEO
    return Frames(torch.from_numpy(_decompressed(row[f"{side}_pixels"], MOST_PIXELS).copy()), sizes)


def _conversation_digest(
    tokens: NDArray[np.int64], codes: NDArray[np.uint8], pixels: NDArray[np.uint8], sizes: NDArray[np.integer]
) -> bytes:
    """``codes`` and ``sizes`` of any shape. Without video it is what it was before there was any."""
    digest = blake2b(np.ascontiguousarray(tokens, np.int64).tobytes() + b"/", digest_size=16)
    digest.update(np.ascontiguousarray(codes).tobytes())
    if sizes.size:
        digest.update(b"/" + np.ascontiguousarray(sizes, np.int64).tobytes() + np.ascontiguousarray(pixels).tobytes())
    return digest.digest()


@lru_cache(maxsize=256)
def _stored_digest(tokens: bytes, codes: bytes, pixels: bytes, sizes: bytes) -> bytes:
    """`Stretch.digest` from a row's int32 tokens, compressed codes and pixels, and int32 sizes. Kept as
    `_decompressed`."""
    shown = np.frombuffer(sizes, np.int32)
    video = _decompressed(pixels, MOST_PIXELS) if shown.size else np.empty(0, np.uint8)
    return _conversation_digest(np.frombuffer(tokens, np.int32), _decompressed(codes), video, shown)


def save_preferences(
    folder: Path,
    splits: Mapping[str, Sequence[Preference]],
    recipe: str = UNKNOWN,
    recordings: str = UNKNOWN,
    policies: Sequence[str] = (),
    tokenizer: str = UNKNOWN,
) -> None:
    """Writes a `DatasetDict`, whole or not at all, with a `PairsOrigin`; ``recipe`` and what follows as there. Raises
    MetronomeError as `check_apart` does."""
    check_apart(folder, {name: _held(preferences) for name, preferences in splits.items()})
    tables = DatasetDict({name: table(preferences) for name, preferences in splits.items()})
    counts = {name: len(preferences) for name, preferences in splits.items()}
    origin = PairsOrigin(pairs_digest(splits), counts, recipe, recordings, tuple(policies), tokenizer)
    with whole_folder(folder) as temporary:
        tables.save_to_disk(temporary)
        write_pairs_origin(temporary, folder.name, origin)


def check_apart(folder: Path, splits: Mapping[str, Iterable[tuple[int, bytes]]]) -> None:
    """Raises MetronomeError when two splits hold one conversation; ``splits``: (row, `Stretch.digest`) of each side of
    each pair."""
    owner: dict[bytes, tuple[str, int]] = {}
    for split, held in splits.items():
        for row, digest in held:
            other, at = owner.setdefault(digest, (split, row))
            if other != split:
                raise MetronomeError(
                    f"{folder}, {split}, row {row}: its conversation is in the split {other}, too (row {at}); what is "
                    "held out must be unseen. Make the pairs anew, or take these out"
                )


def _held(preferences: Iterable[Preference]) -> Iterator[tuple[int, bytes]]:
    for row, preference in enumerate(preferences):
        yield row, preference.chosen.digest
        yield row, preference.rejected.digest


def _held_in(rows: Dataset) -> Iterator[tuple[int, bytes]]:
    """As `_held`, from disk; a damaged conversation, which `problem_of` will name, is left out."""
    for side in SIDES:
        names = [f"{side}_{name}" for name in ("ids", "codes", "pixels", "sizes")]
        columns = rows.select_columns(names).with_format("arrow")
        for first in range(0, len(rows), 1000):
            for i, cells in enumerate(zip(*columns[first : first + 1000].columns, strict=True)):
                tokens, codes, pixels, sizes = cells
                if all(cell.is_valid for cell in cells) and not tokens.values.null_count + sizes.values.null_count:
                    video = pixels.as_py(), sizes.values.to_numpy().tobytes()
                    with suppress(zlib.error):
                        yield first + i, _stored_digest(tokens.values.to_numpy().tobytes(), codes.as_py(), *video)


def table(preferences: Sequence[Preference]) -> Dataset:
    """One row a preference, with the columns `FEATURES`."""
    rows = [to_row(p) for p in preferences]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


def load_preferences(folder: Path, split: str, axes: Sequence[str], senses: Senses) -> Dataset:
    """The rows of one split whose axis is among ``axes``, each checked by `check`.

    ``senses``: those of the model that will read them. Raises MetronomeError when the data set is missing or damaged,
    lacks the split or a column, has no pair of these axes, or at the first row that `check` refuses; and as
    `check_apart` does."""
    if has_pairs_origin(folder):
        read_pairs_origin(folder)
    splits = _tables(folder)
    if split not in splits:
        raise MetronomeError(f"{folder}: has no split {split!r}. {REMEDY}")
    for name, rows in splits.items():
        if missing := sorted(set(FEATURES) - set(rows.column_names)):
            raise MetronomeError(f"{folder}, {name}: the columns {', '.join(missing)} are missing")
        if wrong := next((column for column in FEATURES if rows.features[column] != FEATURES[column]), None):
            raise MetronomeError(
                f"{folder}, {name}: the column {wrong} holds {rows.features[wrong]}, and must hold {FEATURES[wrong]}"
            )
    rows = splits[split]
    with _reading(folder):
        wanted = [i for i, axis in enumerate(rows["axis"]) if axis in axes]
        rows = rows.select(wanted)
        check(((f"{folder}, {split}, row {i}", row) for i, row in zip(wanted, rows, strict=True)), senses)
        if not wanted:
            raise MetronomeError(f"{folder}, {split}: no pair has the axis {' or '.join(axes)}")
        check_apart(folder, {name: _held_in(one) for name, one in splits.items()})
    return rows


def origin_of(folder: Path) -> PairsOrigin:
    """What is known of a data set that `load_preferences` reads; of one that another program wrote its digest is
    computed here. Raises MetronomeError for a data set that is damaged."""
    if has_pairs_origin(folder):
        return read_pairs_origin(folder)
    tables = _tables(folder)
    with _reading(folder):
        splits = {name: [from_row(row) for row in rows] for name, rows in tables.items()}
    return PairsOrigin(pairs_digest(splits), {name: len(pairs) for name, pairs in splits.items()})


def check_words(folder: Path, vocabulary: Vocabulary) -> None:
    """Raises MetronomeError for a data set that was written with another tokenizer, where it is known with which."""
    if origin_of(folder).tokenizer not in (UNKNOWN, words_digest(vocabulary.tokenizer)):
        raise MetronomeError(f"{folder}: its pairs were written with another tokenizer than the model's. {REMEDY}")


def _tables(folder: Path) -> DatasetDict:
    """The tables on disk by split, their rows unchecked. Raises UnreadableError when there are none or they are
    damaged."""
    with _reading(folder):
        tables = load_from_disk(str(folder))
    if not isinstance(tables, DatasetDict):
        raise UnreadableError(folder, f"holds one table, and not one for each split. {REMEDY}")
    return DatasetDict({name: _with_video(rows) for name, rows in tables.items()})


def _with_video(rows: Dataset) -> Dataset:
    """A table of conversations without video may lack the columns for it."""
    for name, nothing in ((f"{side}_{column}", value) for side in SIDES for column, value in _NO_VIDEO.items()):
        if name not in rows.column_names:
            rows = rows.add_column(name, [nothing] * len(rows), feature=FEATURES[name])
    return rows


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns all that the library may raise for damaged tables into UnreadableError."""
    try:
        yield
    except (MetronomeError, MemoryError):
        raise
    # Broad on purpose: what the library raises for damaged tables is open-ended.
    except Exception as error:
        problem = " ".join(str(error).split())[:300]
        raise UnreadableError(
            folder, f"holds no preference pairs that can be read ({problem or type(error).__name__}). {REMEDY}"
        ) from error


def check(rows: Iterable[tuple[str, Mapping[str, Any]]], senses: Senses) -> None:
    """Raises MetronomeError for the first (name, row) that cannot be learned from or contradicts an earlier one."""
    seen: dict[bytes, str] = {}
    for where, row in rows:
        if problem := problem_of(row, senses):
            raise MetronomeError(f"{where}: {problem}")
        one, other = (_digest(row, side) for side in ("chosen", "rejected"))
        if one == other:
            raise MetronomeError(f"{where}: a tie, chosen and rejected are the same; nothing can be learned from it")
        axis = str(row["axis"]).encode()
        seen[axis + one + other] = where
        if (earlier := seen.get(axis + other + one)) is not None:
            raise MetronomeError(f"{where}: prefers what {earlier} rejects; remove the wrong one of the two")


def problem_of(row: Mapping[str, Any], senses: Senses) -> str | None:
    """What is wrong with a row of the data set, in words, or None. ``senses``: those of the model that will read it."""
    if empty := [name for name in FEATURES if row[name] is None]:
        return f"{empty[0]} is missing"
    for name in ("axis", "family"):
        if not str(row[name]).isidentifier():
            return f"{name} {str(row[name])!r} is no name of one"
    if problem := Range(0, MOST_MARGIN).problem(float(row["margin"])):
        return f"margin {float(row['margin'])}: {problem}"
    for side in SIDES:
        tokens = np.asarray(row[f"{side}_ids"])
        if len(tokens) and (tokens.dtype.kind != "i" or tokens.min() < 0):
            return f"{side}: a token is no whole number of at least 0"
        try:
            codes = _decompressed(row[f"{side}_codes"])
        except zlib.error as error:
            return f"{side}: the dMel codes are damaged ({error})"
        heard = int((tokens == senses.audio).sum())
        if not heard:
            return f"the {side} conversation is empty"
        if len(codes) != heard * MEL_CHANNELS:
            return f"{side}: {heard} audio tokens, but {len(codes)} codes; {heard * MEL_CHANNELS} would belong to them"
        if heard % CHUNK_FRAMES or tokens[-1] == senses.audio:
            return f"{side}: the audio is not whole chunks of {CHUNK_FRAMES} frames, each answered"
        if codes.max() >= MEL_BINS:
            return f"{side}: a dMel code is {codes.max()}, the largest is {MEL_BINS - 1}"
        first, end = int(row[f"{side}_first"]), int(row[f"{side}_end"])
        if not 0 <= first < end <= heard // CHUNK_FRAMES:
            return f"{side}: chunks {first} to {end} are no stretch of {heard // CHUNK_FRAMES} chunks"
        if problem := _video_problem(row, side, int((tokens == senses.image).sum()), senses.patch):
            return f"{side}: {problem}"
    return None


def _video_problem(row: Mapping[str, Any], side: str, shown: int, patch: int) -> str | None:
    """As `problem_of`, of the video, of which the tokens have ``shown`` patches."""
    try:
        patches = sum(patch_count(frames, patch) for _, frames in _frames(row, side).chunks())
    except (zlib.error, ValueError) as error:
        return f"the video is damaged ({error})"
    if patches != shown:
        return f"{shown} image tokens, but the video has {patches} patches of {patch} x {patch} pixels"
    return None


def _digest(row: Mapping[str, Any], side: str) -> bytes:
    """Of a stretch."""
    at = np.array([row[f"{side}_first"], row[f"{side}_end"]], np.int64)
    tokens = np.asarray(row[f"{side}_ids"], np.int32)
    video = row[f"{side}_pixels"], np.asarray(row[f"{side}_sizes"], np.int32).tobytes()
    return _stored_digest(tokens.tobytes(), row[f"{side}_codes"], *video) + at.tobytes()
