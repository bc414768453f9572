"""The table of pairs keeps every byte, and a row that cannot be learned from is named."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict, Features, Value

from kernels.errors import MetronomeError
from model.senses.video import NO_FRAMES, Frames
from reward.learned.preference import (
    FEATURES,
    Preference,
    Stretch,
    check,
    from_row,
    load_preferences,
    origin_of,
    save_preferences,
    table,
    to_row,
)
from rollout.record.transcript import write_transcript
from rollout.turn.action import LISTEN
from rollout.turn.grammar import Grammar
from tests.fuzz.hostile import FILES, places, refusal, with_value
from tests.support.models import SENSES, VOCABULARY, conversation


def stretch(seed: int, chunks: int = 6, first: int = 0, end: int | None = None) -> Stretch:
    talk = conversation(seed, chunks)
    return Stretch(talk.tokens, talk.codes, first, chunks if end is None else end)


def pair(seed: int, axis: str = "timing", **fields: Any) -> Preference:
    fields = {"source": "shift", "size_ms": -400, "family": "timespeak", "scenario": f"s{seed}", "margin": 0.5} | fields
    return Preference(stretch(2 * seed), stretch(2 * seed + 1, first=1, end=4), axis, **fields)


def same(a: Preference, b: Preference) -> bool:
    sides = all(
        x.key == y.key and (x.first, x.end) == (y.first, y.end)
        for x, y in ((a.chosen, b.chosen), (a.rejected, b.rejected))
    )
    names = ("axis", "source", "size_ms", "family", "scenario", "margin")
    return sides and all(getattr(a, n) == getattr(b, n) for n in names)


def test_disk_keeps_pairs(tmp_path: Path) -> None:
    pairs = [pair(0), pair(1, "content"), pair(2)]
    save_preferences(tmp_path / "pairs", {"train": pairs, "held_out": [pair(3)]})
    rows = load_preferences(tmp_path / "pairs", "train", ["timing", "content"], SENSES)
    assert all(same(from_row(row), p) for row, p in zip(rows, pairs, strict=True))
    assert not same(from_row(rows[0]), pairs[1])
    assert [row["axis"] for row in load_preferences(tmp_path / "pairs", "train", ["timing"], SENSES)] == ["timing"] * 2


def test_codes_that_end_in_zeros_survive(tmp_path: Path) -> None:
    one = pair(0)
    quiet = replace(one, chosen=replace(one.chosen, codes=torch.zeros_like(one.chosen.codes)))
    many = [
        quiet,
        *(replace(p, chosen=replace(p.chosen, codes=p.chosen.codes * (i % 2))) for i, p in enumerate([one] * 40)),
    ]
    many = [replace(p, scenario=str(i)) for i, p in enumerate(many)]
    save_preferences(tmp_path / "pairs", {"train": many})
    rows = load_preferences(tmp_path / "pairs", "train", ["timing"], SENSES)
    assert all(same(from_row(row), p) for row, p in zip(rows, many, strict=True))


def test_a_split_without_the_axis_is_refused(tmp_path: Path) -> None:
    save_preferences(tmp_path / "pairs", {"train": [pair(0)]})
    with pytest.raises(MetronomeError, match="no pair has the axis content"):
        load_preferences(tmp_path / "pairs", "train", ["content"], SENSES)
    with pytest.raises(MetronomeError, match="has no split 'held_out'"):
        load_preferences(tmp_path / "pairs", "held_out", ["timing"], SENSES)
    with pytest.raises(MetronomeError, match=r"python -m reward\.pairs"):
        load_preferences(tmp_path / "nowhere", "train", ["timing"], SENSES)


def test_a_bad_row_on_disk_is_named(tmp_path: Path) -> None:
    save_preferences(tmp_path / "pairs", {"train": [pair(0, "content"), pair(1), replace(pair(2), margin=math.nan)]})
    with pytest.raises(MetronomeError, match=r"train, row 2: margin nan: give a number from 0 to 10,000"):
        load_preferences(tmp_path / "pairs", "train", ["timing"], SENSES)


def row(**changes: Any) -> dict[str, Any]:
    return to_row(pair(0)) | changes


def test_good_rows_pass() -> None:
    check([("row 0", row()), ("row 1", to_row(pair(1))), ("row 2", row(axis="content"))], SENSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": ""}, "family '' is no name of one"),
        ({"family": "a/b"}, "family 'a/b' is no name of one"),
        ({"margin": math.nan}, "margin nan"),
        ({"margin": math.inf}, "margin inf"),
        ({"margin": -0.5}, "margin -0.5"),
        ({"margin": 1e30}, "margin 1e.30: give a number from 0 to 10,000"),
        ({"margin": None}, "margin is missing"),
        ({"rejected_codes": None}, "rejected_codes is missing"),
        ({"chosen_ids": [1, -2, 3]}, "chosen: a token is no whole number of at least 0"),
        ({"chosen_ids": [1, None, 3]}, "chosen: a token is no whole number of at least 0"),
        ({"chosen_codes": zlib.compress(bytes(80 * 24))[:-3]}, "the dMel codes are damaged .*cut short"),
        ({"chosen_codes": zlib.compress(bytes(2**26 + 1))}, "the dMel codes are damaged .*more than 67,108,864 bytes"),
        ({"chosen_ids": np.array([], np.int32)}, "the chosen conversation is empty"),
        ({"rejected_ids": np.array([1], np.int32)}, "the rejected conversation is empty"),
        ({"chosen_codes": zlib.compress(bytes(80 * 23))}, "24 audio tokens, but 1840 codes; 1920 would belong to them"),
        ({"chosen_codes": b"no zlib"}, "the dMel codes are damaged"),
        ({"rejected_codes": zlib.compress(bytes([16] * 80 * 24))}, "a dMel code is 16, the largest is 15"),
        ({"chosen_first": 3, "chosen_end": 3}, "chunks 3 to 3 are no stretch of 6 chunks"),
        ({"rejected_end": 7}, "chunks 1 to 7 are no stretch of 6 chunks"),
        ({"rejected_ids": [1, 2, 2, 2, 2], "rejected_codes": zlib.compress(bytes(320))}, "each answered"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MetronomeError, match=f"^row 7: .*{message}"):
        check([("row 6", to_row(pair(3))), ("row 7", row(**changes))], SENSES)


def test_a_conversation_in_two_splits_is_refused(tmp_path: Path) -> None:
    """When pairs are written, and when another program wrote them; whichever side, axis, stretch or compression."""
    one, other = pair(0), pair(1, "content")
    shared = replace(other, rejected=replace(one.chosen, first=2, end=3))
    with pytest.raises(MetronomeError, match=r"held_out, row 1: its conversation is in the split train, too \(row 0\)"):
        save_preferences(tmp_path / "pairs", {"train": [one], "held_out": [pair(2), shared]})
    assert not (tmp_path / "pairs").exists()
    tables = DatasetDict({"train": table([one]), "held_out": table([pair(2), shared])})
    packed = zlib.compress(shared.rejected.codes.numpy().tobytes(), level=9)
    tables["held_out"] = tables["held_out"].map(
        lambda row, i: row | ({"rejected_codes": packed} if i == 1 else {}), with_indices=True, features=FEATURES
    )
    tables.save_to_disk(str(tmp_path / "pairs"))
    for split in ("train", "held_out"):
        with pytest.raises(MetronomeError, match=r"held_out, row 1: its conversation is in the split train, too"):
            load_preferences(tmp_path / "pairs", split, ["timing"], SENSES)
    save_preferences(tmp_path / "apart", {"train": [one], "held_out": [pair(2), other]})  # the control
    assert len(load_preferences(tmp_path / "apart", "held_out", ["timing"], SENSES)) == 1


@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-*"])
def test_damaged_tables_are_refused_in_one_line(tmp_path: Path, file: str) -> None:
    """By both readers, of a data set that another program wrote, which no manifest covers."""
    folder = tmp_path / "pairs"
    DatasetDict({"train": table([pair(i) for i in range(3)])}).save_to_disk(str(folder))
    (path,) = folder.glob(file)
    good = path.read_bytes()

    def refusals(content: bytes) -> list[str | None]:
        path.write_bytes(content)
        readers = (lambda: load_preferences(folder, "train", ["timing"], SENSES), lambda: origin_of(folder))
        return [refusal(read) for read in readers]

    told = good if path.suffix == ".json" else b"null"
    hostile = [*FILES, *(with_value(json.loads(told), at, text).encode() for at in places(json.loads(told))
               for text in ("null", "[]", "3", '"no"', "{}"))]  # fmt: skip
    hostile += [good[: len(good) // 2], good[:-1], good[100:]]
    found = [refusals(content) for content in hostile]
    assert sum(None not in one for one in found) > 10
    assert refusals(good) == [None, None], "the control"


def test_a_single_table_is_no_set_of_pairs(tmp_path: Path) -> None:
    table([pair(0)]).save_to_disk(str(tmp_path / "pairs"))
    for read in (lambda f: load_preferences(f, "train", ["timing"], SENSES), origin_of):
        with pytest.raises(MetronomeError, match=r"holds one table, and not one for each split.*reward\.pairs"):
            read(tmp_path / "pairs")


def test_columns_of_another_type_are_refused(tmp_path: Path) -> None:
    wide = Features(FEATURES | {"margin": Value("float64")})
    DatasetDict({"train": table([pair(0)]).cast(wide)}).save_to_disk(str(tmp_path / "pairs"))
    with pytest.raises(MetronomeError, match=r"train: the column margin holds .*float64.* must hold .*float32"):
        load_preferences(tmp_path / "pairs", "train", ["timing"], SENSES)


def test_a_contradiction_is_found_whatever_the_compression() -> None:
    one = to_row(pair(0))
    turned = to_row(replace(pair(0), chosen=pair(0).rejected, rejected=pair(0).chosen))
    turned["chosen_codes"] = zlib.compress(zlib.decompress(turned["chosen_codes"]), level=9)
    assert turned["chosen_codes"] != one["rejected_codes"]
    with pytest.raises(MetronomeError, match="row 1: prefers what row 0 rejects"):
        check([("row 0", one), ("row 1", turned)], SENSES)


def test_a_tie_is_named() -> None:
    tie = Preference(stretch(0), stretch(0), "timing", "human", 0, "timespeak", "s", 0.0)
    with pytest.raises(MetronomeError, match="row 0: a tie, chosen and rejected are the same"):
        check([("row 0", to_row(tie))], SENSES)


def test_a_contradiction_is_named() -> None:
    one = pair(0)
    turned = replace(one, chosen=one.rejected, rejected=one.chosen)
    check([("row 0", to_row(one)), ("row 1", to_row(replace(turned, axis="content")))], SENSES)  # of another axis
    with pytest.raises(MetronomeError, match="row 5: prefers what row 0 rejects"):
        check([("row 0", to_row(one)), ("row 5", to_row(turned))], SENSES)


def shown(seed: int, level: int = 7) -> Stretch:
    """A conversation of 3 chunks with a picture in the second; ``level``: of its first pixel."""
    talk = conversation(seed, 3)
    picture = torch.full((1, 20, 20, 3), 9, dtype=torch.uint8)
    picture[0, 0, 0, 0] = level
    written = write_transcript(
        talk.codes.unflatten(0, (3, -1)), [LISTEN] * 3, Grammar(VOCABULARY, 2, max_patches=4),
        Frames.of([NO_FRAMES, picture]),
    )  # fmt: skip
    return Stretch(written.tokens, written.codes, 0, 3, written.frames)


def seen(better: Stretch, worse: Stretch) -> Preference:
    return replace(pair(0), chosen=better, rejected=worse)


def test_video_is_kept_and_tells_conversations_apart(tmp_path: Path) -> None:
    pairs = [seen(shown(0), shown(1)), seen(shown(0), shown(0, level=8))]
    save_preferences(tmp_path / "pairs", {"train": pairs})
    rows = load_preferences(tmp_path / "pairs", "train", ["timing"], SENSES)
    assert all(same(from_row(row), p) for row, p in zip(rows, pairs, strict=True))
    assert not same(from_row(rows[0]), pairs[1])
    digests = [origin_of(tmp_path / "pairs").digest]
    save_preferences(tmp_path / "other", {"train": [pairs[0], seen(shown(0), shown(0, level=6))]})
    digests.append(origin_of(tmp_path / "other").digest)
    assert digests[0] != digests[1]  # one pixel
    with pytest.raises(MetronomeError, match="is in the split"):
        save_preferences(tmp_path / "twice", {"train": pairs[:1], "held_out": [seen(shown(0), shown(2))]})
    save_preferences(tmp_path / "apart", {"train": pairs[:1], "held_out": [seen(shown(0, level=1), shown(2))]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen_pixels": b"no stream"}, "chosen: the video is damaged"),
        ({"chosen_pixels": zlib.compress(b"123")}, "chosen: the video is damaged .*3 bytes of pixels"),
        ({"rejected_sizes": [1, 1, 20, 31]}, "rejected: the video is damaged"),
        ({"chosen_pixels": b"", "chosen_sizes": []}, "chosen: 4 image tokens, but the video has 0 patches"),
        ({"rejected_sizes": [1, 1, 20]}, "rejected: the video is damaged"),
    ],
)
def test_damaged_video_is_named(change: dict[str, Any], says: str) -> None:
    row = to_row(seen(shown(0), shown(1)))
    check([("a row", row)], SENSES)
    with pytest.raises(MetronomeError, match=says):
        check([("a row", row | change)], SENSES)


def test_a_table_without_video_needs_no_columns_for_it(tmp_path: Path) -> None:
    columns = [name for name in FEATURES if not name.endswith(("_pixels", "_sizes"))]
    DatasetDict({"train": table([pair(0)]).select_columns(columns)}).save_to_disk(tmp_path / "older")
    (row,) = load_preferences(tmp_path / "older", "train", ["timing"], SENSES)
    assert same(from_row(row), pair(0))
