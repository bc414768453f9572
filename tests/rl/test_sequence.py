"""Teams of processes that share the rows of the same episodes give the bits of one process, and keep less each."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import MetronomeError
from model.program import ranks, teams
from rl.consistency import check_minimal
from rl.step.batch import collate
from rl.step.sequence import choice_logprobs, part
from rl.train import parse
from tests.rl.resuming import content, digests, go
from tests.rl.sequence_of_ranks import CASES, episodes, steps
from tests.support.models import SENSES, VOCABULARY, fresh_model
from tests.support.settings import run


def started(*arguments: object) -> str:
    done = run(["-m", "tests.rl.sequence_of_ranks", *map(str, arguments)], {})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(world: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """``SIZE:MISTAKE.CASE.RANK of PROCESSES`` -> tensors and digest."""
    out = {f"1.{case}.0 of 1": steps(case) for case in CASES}
    for processes, *sizes in ((2, "2", "1", "2:halo", "2:sums"), (4, "4", "2")):
        folder = tmp_path_factory.mktemp("steps")
        started(processes, "steps", folder, *sizes)
        out |= {f"{file.name} of {processes}": torch.load(file) for file in folder.iterdir()}
    return out


def same(a: dict[str, Any], b: dict[str, Any]) -> list[bool]:
    """Of each tensor (log-probs, entropies, row digests, gradients, norm, step by step) and of the weights' digest."""
    equal = [torch.equal(x, y) for x, y in zip(a["tensors"], b["tensors"], strict=True)]
    return [*equal, a["digest"] == b["digest"]]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "processes", "alone"), [(2, 2, 1), (4, 4, 1), (2, 4, 2)])
def test_a_team_has_the_bits_of_one_process(
    found: dict[str, dict[str, Any]], case: str, size: int, processes: int, alone: int
) -> None:
    """Two teams of two have those of two processes."""
    for rank in range(processes):
        one = found[f"1.{case}.{rank // size} of {alone}"]
        assert all(same(found[f"{size}.{case}.{rank} of {processes}"], one)) and len(one["tensors"]) > 100


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "first"), [("halo", 0), ("sums", 3)])
def test_control_mistakes_are_seen(found: dict[str, dict[str, Any]], mistake: str, first: int) -> None:
    """A convolution that sees other rows before its own changes log-probs; sums of the members' sums change gradients,
    by rounding, and so the weights."""
    wrong, one = found[f"2:{mistake}.float32.0 of 2"], found["1.float32.0 of 1"]
    equal = same(wrong, one)
    assert all(equal[:first]) and not equal[-1] and equal.count(False) > 50
    if mistake == "sums":
        close = [
            torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(wrong["tensors"], one["tensors"], strict=True)
        ]
        assert all(close[: len(close) // 2]), "of the first step"


@pytest.mark.slow
def test_a_run_of_a_team_is_the_run_of_one_process(whole: Path, tmp_path: Path) -> None:
    """Weights, metrics, episodes and checkpoints; and either goes on with the other's."""
    started(2, "run", tmp_path, "team", 2)
    team = tmp_path / "team"
    mine, other = content(team), content(whole)
    assert mine.keys() == other.keys()
    assert {n for n in mine if n.startswith("episodes/")} == {
        f"episodes/step_{i:06d}.rank_0.safetensors" for i in range(3)
    }
    for name in mine:
        if name.startswith("episodes/") or name.endswith("optimizer.safetensors"):
            assert mine[name] == other[name], name
    records = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (team, whole)]
    for a, b in zip(*records, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("time/")} == {
            k: v for k, v in b.items() if not k.startswith("time/")
        }
    audit, theirs = (json.loads((run / "audit/report.json").read_text()) for run in (team, whole))
    assert audit["verdict"] == theirs["verdict"] == "identical"
    shutil.copytree(whole, tmp_path / "one")
    for name in ("team", "one"):  # the team's run is resumed by one process
        go(tmp_path, name, rl__steps=4)
    assert digests(team) == digests(tmp_path / "one") and len(digests(team)) == 4


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_is_divided() -> None:
    """Of an episode of 4,100 rows: at most 0.55 of one process's bytes in each of two, 0.30 in each of four."""
    lines = re.findall(r"measured (\d+) (\d+) (\d+)", started(4, "measure"))
    kept = {int(size): int(count) for size, rows, count in lines if int(rows) > 4000}
    assert kept.keys() == {1, 2, 4} and kept[1] > 100 * 2**20
    assert kept[2] < 0.55 * kept[1] and kept[4] < 0.30 * kept[1], kept


@pytest.mark.usefixtures("world")
def test_processes_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    message = r"^rl\.sequence_parallel is 2, but there are 1 processes: give a number that divides theirs"
    with pytest.raises(MetronomeError, match=message):
        go(tmp_path, "a", resume=False, rl__sequence_parallel=2)
    assert content(tmp_path) == {}
    assert (teams.size(), teams.count(), teams.member()) == (1, 1, 0)
    with pytest.raises(MetronomeError, match=r"^rl\.sequence_parallel is 2, which rl\.minimal leaves out"):
        check_minimal(parse(["--rl.sequence_parallel", "2"])[0], False)


def test_shares_of_teams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six processes in teams of three: the first three are one team; of five items a team has two or three, of which
    its members have parts."""
    monkeypatch.setattr(ranks, "world", lambda: 6)
    monkeypatch.setattr(teams, "_formed", teams._Formed(3))
    seen = []
    for rank in range(6):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        own = list(teams.share(5))
        seen.append((teams.count_before(), teams.member(), own, list(teams.part(own))))
    assert seen == [
        (0, 0, [0, 1], []),
        (0, 1, [0, 1], [0]),
        (0, 2, [0, 1], [1]),
        (1, 0, [2, 3, 4], [2]),
        (1, 1, [2, 3, 4], [3]),
        (1, 2, [2, 3, 4], [4]),
    ]


def test_slices_of_rows_together_are_the_inputs() -> None:
    """Whatever a cut falls into: a conversation, its sound, the patches of a frame."""
    every = episodes()
    inputs = collate(every, SENSES).inputs
    rows = len(inputs.tokens)
    for bounds in ((0, 7, 8, 600, rows), (*range(0, rows, 97), rows)):
        parts = [part(inputs, first, end) for first, end in pairwise(bounds)]
        for name in ("tokens", "codes"):
            assert torch.equal(torch.cat([getattr(one, name) for one in parts]), getattr(inputs, name))
        for name in ("audio_rows", "image_rows"):
            moved = [getattr(one, name) + first for one, first in zip(parts, bounds, strict=False)]
            assert torch.equal(torch.cat(moved), getattr(inputs, name))
        assert sum(len(one.patches) for one in parts) == len(inputs.patches) > 20


def test_members_with_other_episodes_and_fewer_rows_than_members_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fresh_model("nano"), collate(episodes()[1:2], SENSES)
    monkeypatch.setattr(teams, "size", lambda: 2)
    monkeypatch.setattr(teams, "merged", lambda own: [*own, "another digest"])
    with pytest.raises(RuntimeError, match="the members of a team hold different episodes"):
        choice_logprobs(model, batch, VOCABULARY.classes, 1.0)
    held: list[str] = []
    monkeypatch.setattr(teams, "merged", lambda own: held.extend(own) or [*own, "another digest"])
    patches = batch.inputs.patches
    brighter = replace(patches, pictures=patches.pictures.clone())
    brighter.pictures[0, 0, 0, 0] ^= 1  # one level of one pixel
    classes = batch.row_class.clone()
    classes[-1] += 1
    for one, temperature in (
        (batch, 1.0), (batch, 0.5), (replace(batch, inputs=replace(batch.inputs, patches=brighter)), 1.0),
        (replace(batch, row_class=classes), 1.0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="the members of a team hold different episodes"):
            choice_logprobs(model, one, VOCABULARY.classes, temperature)
    assert len(set(held)) == 4
    monkeypatch.setattr(teams, "size", lambda: 10_000)
    monkeypatch.setattr(teams, "merged", lambda own: own * 2)  # the control: equal ones
    with pytest.raises(MetronomeError, match=r"^rl\.sequence_parallel is 10000, but a forward pass has only \d+ rows"):
        choice_logprobs(model, batch, VOCABULARY.classes, 1.0)
