"""Pairs are named by what they hold: another pair, order or split is another digest, another recipe is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from model.weights import manifest
from reward import pairs as command
from reward.learned.origin import PairsOrigin, digest_of, pairs_digest
from reward.learned.preference import Preference, origin_of, save_preferences, table
from rollout.world.speech import Clip, SpeechBank
from tests.reward.test_evaluate import pairs

SOME = pairs(6)


def changed(index: int, **fields: object) -> list[Preference]:
    return [*SOME[:index], replace(SOME[index], **fields), *SOME[index + 1 :]]


@pytest.mark.parametrize(
    "other",
    [
        SOME[::-1],
        SOME[:-1],
        changed(2, margin=0.25),
        changed(2, axis="content"),
        changed(2, scenario="seven"),
        changed(2, size_ms=200),
        changed(2, chosen=replace(SOME[2].chosen, end=SOME[2].chosen.end - 1)),
        changed(2, chosen=replace(SOME[2].chosen, codes=SOME[2].chosen.codes.flip(0))),
        changed(2, rejected=SOME[2].chosen, chosen=SOME[2].rejected),
        changed(0, source="segment", family="stimespeak"),
    ],
)
def test_other_pairs_have_another_digest(other: list[Preference]) -> None:
    digest = pairs_digest({"train": SOME})
    assert pairs_digest({"train": list(SOME)}) == digest != pairs_digest({"train": other})
    assert pairs_digest({"held_out": SOME}) != digest


def test_a_set_says_what_it_was_made_from(tmp_path: Path) -> None:
    splits = {"train": SOME[:4], "held_out": SOME[4:]}
    save_preferences(tmp_path / "pairs", splits, "a" * 32, "b" * 32, ["c" * 32])
    assert origin_of(tmp_path / "pairs") == PairsOrigin(
        pairs_digest(splits), {"train": 4, "held_out": 2}, "a" * 32, "b" * 32, ("c" * 32,)
    )
    save_preferences(tmp_path / "again", splits)  # by another recipe
    assert origin_of(tmp_path / "again").digest == pairs_digest(splits)
    shutil.move(tmp_path / "again", tmp_path / "moved")
    assert origin_of(tmp_path / "moved").digest == pairs_digest(splits)


def test_a_set_of_another_program_has_the_digest_of_its_pairs(tmp_path: Path) -> None:
    from datasets import DatasetDict

    DatasetDict({"train": table(SOME)}).save_to_disk(str(tmp_path / "pairs"))
    assert origin_of(tmp_path / "pairs") == PairsOrigin(pairs_digest({"train": SOME}), {"train": len(SOME)})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "pairs.json").unlink(), r"pairs\.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda folder: (folder / "pairs.json").write_text("{}"), r"pairs\.json is damaged"),
        (lambda folder: (folder / "train" / "state.json").unlink(), r"train/state\.json is missing"),
        (lambda folder: (folder / "more").write_text(""), "more is not listed"),
    ],
)
def test_a_damaged_set_is_refused_by_file(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    save_preferences(tmp_path / "pairs", {"train": SOME})
    origin_of(tmp_path / "pairs")
    damage(tmp_path / "pairs")
    with pytest.raises(MetronomeError, match=rf"preference pairs \S*pairs: {says}"):
        origin_of(tmp_path / "pairs")


def test_recordings_are_named_by_texts_and_samples() -> None:
    bank = SpeechBank.open()
    digest = bank.digest()
    first: Clip = bank.clips[0]
    for other in (replace(first, text=first.text + "!"), replace(first, samples=first.samples * 2)):
        assert SpeechBank(bank.folder, (other, *bank.clips[1:])).digest() != digest
    assert SpeechBank(bank.folder, bank.clips[::-1]).digest() != digest
    assert SpeechBank.open().digest() == digest


def test_the_order_of_keys_is_no_difference() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


def test_the_command_looks_for_the_folder_under_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are started at once do not both find nothing there."""
    out = tmp_path / "pairs"

    @contextmanager
    def slow(folder: Path) -> Iterator[None]:
        assert folder == out
        out.symlink_to("nowhere")  # made by another while this one waited
        yield

    made: list[Path] = []
    monkeypatch.setattr(command, "make", lambda recipe, out: made.append(out))
    command.main(["--out", str(out)])
    assert made == [out], "the control"
    monkeypatch.setattr(command, "locked", slow)
    with pytest.raises(MetronomeError, match="already exists"):
        command.main(["--out", str(out)])
    assert made == [out]


def test_numbers_of_pairs_are_counts(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    save_preferences(folder, {"train": SOME})
    origin = json.loads((folder / "pairs.json").read_text())
    for count, says in ((-1, r"pairs\.train is -1: give a number from 0"), (6, None)):
        (folder / "pairs.json").write_text(json.dumps(origin | {"pairs": {"train": count}}))
        manifest.write(folder, folder.name)
        if says is None:
            origin_of(folder)
            continue
        with pytest.raises(MetronomeError, match=says):
            origin_of(folder)


def test_the_command_names_recipe_and_recordings(tmp_path: Path) -> None:
    few = ["--corruptions.train_scenarios=1", "--corruptions.held_out_scenarios=1", "--corruptions.segments=2"]
    found = []
    for name, more in (("one", []), ("two", ["--seed=1"])):
        command.main(["--out", str(tmp_path / name), *few, *more])
        found.append(json.loads((tmp_path / name / "pairs.json").read_text()))
    assert found[0]["recordings"] == found[1]["recordings"] == SpeechBank.open().digest()
    assert found[0]["recipe"] != found[1]["recipe"] and found[0]["digest"] != found[1]["digest"]
