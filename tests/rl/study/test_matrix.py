"""The matrix on a small model: nothing of ours changes a bit, naive torch does, and the counting itself is right.

Whether torch's product gives few rows other bits than many follows the machine; here the naive backend's does on every
one (`naive_linear`).
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.errors import MetronomeError
from kernels.reference import naive
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint
from rl.audit import command
from rl.audit.diagnosis.diagnose import diagnose
from rl.audit.document import plain
from rl.audit.table import Cell, Table
from rl.step.gradient import gradient_of
from rl.step.identity import Evidence, NotEqualError, check_identity
from rl.study import lesson, matrix, variants
from rl.study.lesson import completions
from rl.study.variants import Variant, _scatter, uncached
from rollout.record.episode import Episode
from rollout.turn.action import CHUNK_SAMPLES, Action
from rollout.turn.observation import Observation
from rollout.world.base import Scenario, User
from tests.kernels.contract import uneven
from tests.support.episodes import with_text
from tests.support.models import speaking_model

CHUNKS = 14


class NoFacts:
    def to_json(self) -> dict[str, Any]:
        return {}


class NoiseUser(User):
    def __init__(self, seed: int) -> None:
        super().__init__(CHUNKS)
        self._noise = np.random.default_rng(seed)

    def _produce(self, k: int, heard: Action | None) -> Observation:
        return Observation(torch.from_numpy(self._noise.standard_normal(CHUNK_SAMPLES, dtype=np.float32) / 10))

    def facts(self) -> NoFacts:
        return NoFacts()


@dataclass(frozen=True)
class Noise(Scenario):
    def user(self) -> User:
        return NoiseUser(self.seed)


ITEMS = [Noise("noise", "train", i, CHUNKS) for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = InteractionModel(preset("tiny"))
    model.init_weights(5)
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    checkpoint.save(model, path)
    return path


@pytest.fixture(autouse=True)
def embedded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cells whether vLLM is installed or not; its own tests are tests/rollout/vllm."""
    monkeypatch.setattr(variants, "unavailable_reason", lambda: "left out")


@pytest.fixture
def naive_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "linear", uneven(naive.linear))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> list[Episode]:
    return matrix.sampled(Variant.load("ours", folder, torch.float32), "session", ITEMS, len(ITEMS))


def cells(variant: Variant, tokens: list[Episode]) -> list[matrix.Comparison]:
    return list(matrix.comparisons(variant, ITEMS, tokens, uncached(variant, tokens, len(tokens))))


@pytest.mark.usefixtures("naive_linear")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_nothing_of_ours_changes_a_bit_and_naive_torch_does(
    folder: Path, tokens: list[Episode], dtype: torch.dtype
) -> None:
    sampled = sum(len(e.text.sampled_at) for e in tokens)
    ours = cells(Variant.load("ours", folder, dtype), tokens)
    for cell in ours:
        m = cell.mismatch
        assert (m.num_unequal, m.rows_unequal, m.k1_sum, m.k3_sum, m.max_abs) == (0, 0, 0, 0, 0), cell
        assert m.num_tokens >= (sampled if not cell.axis.startswith("engine") else 3 * CHUNKS)
    axes = list(dict.fromkeys(cell.axis for cell in ours))
    assert axes == [
        "batch size", "order", "neighbours", "chunk cuts", "cached or recomputed", "forked prefix", "page layout",
        "threads", "processes", "engine session",
    ]  # fmt: skip
    theirs = {(c.axis, c.setting): c.mismatch for c in cells(Variant.load("naive torch", folder, dtype), tokens)}
    assert theirs.keys() == {(c.axis, c.setting) for c in ours}
    for mismatch in (
        theirs["chunk cuts", "1 rows a call against all"],
        theirs["engine session", "sampler against learner"],
    ):
        assert mismatch.num_unequal and mismatch.rows_unequal and mismatch.max_abs > 0 and mismatch.k3_sum >= 0


@pytest.mark.usefixtures("naive_linear")
def test_naive_torch_cannot_pass_for_exact(folder: Path) -> None:
    """Whoever trains with it meets the identity check."""
    variant = Variant.load("naive torch", folder, torch.float32)
    episodes = matrix.sampled(variant, "session", ITEMS, len(ITEMS))
    with variant.active():
        weights = [torch.ones(len(e.text.chunk)) for e in episodes]
        g = gradient_of(variant.model, episodes, weights, variant.vocabulary.classes, 1.0, 2)
        with pytest.raises(NotEqualError) as caught:
            check_identity(Evidence(0, episodes, g.logprob, g.digest, 2))
        assert caught.value.evidence is not None
        assert re.search(
            r"kernels\.reference\.naive|depends on", diagnose(variant.model, caught.value.evidence).sentence()
        )


def test_samplings_that_part_count_from_where_they_part(tokens: list[Episode]) -> None:
    one = tokens[0]
    n = len(one.text.sampled_at)
    assert matrix.compare_samplings([one], [one]).num_unequal == 0
    other = one.tokens.clone()
    other[one.text.sampled_at[n - 3]] += 1
    logprob = one.text.logprob.clone()
    logprob[0] = torch.nextafter(logprob[0], torch.tensor(0.0))
    logprob[n - 1] += 1  # after the parting: no number of a comparison
    mismatch = matrix.compare_samplings([with_text(replace(one, tokens=other), logprob=logprob)], [one])
    assert (mismatch.num_tokens, mismatch.num_unequal, mismatch.rows_unequal) == (n, 4, 3)
    assert 0 < mismatch.max_abs < 1e-5


def test_scattered_pages_lie_elsewhere(folder: Path) -> None:
    config = checkpoint.load(folder).config
    tables = []
    for scatter in (False, True):
        state = SessionState(config, 8, 300, torch.float32)
        if scatter:
            _scatter(state, 300)
        slot = state.open()
        state.extend([slot], [300])
        tables.append(state.layers[-1].kv.table[slot].tolist())
    assert tables[0] != tables[1]


@pytest.mark.usefixtures("naive_linear")
def test_completions_of_ours_are_one_under_any_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = torch.randn(6, CHUNK_SAMPLES, generator=torch.Generator().manual_seed(1)) / 10
    others = [torch.randn(9, CHUNK_SAMPLES, generator=torch.Generator().manual_seed(s)) / 10 for s in (2, 3)]
    ours = completions(Variant.load("ours", folder, torch.float32), heard, others, 40)
    assert (ours.count, ours.distinct, ours.distinct_rows, ours.chunks) == (40, 1, 1, 6)
    # One session brings few rows and two bring many, for `naive_linear`; both come among forty.
    monkeypatch.setattr(lesson, "MAX_TOGETHER", 2)
    monkeypatch.setattr(lesson, "MAX_OTHERS", 0)
    theirs = completions(Variant.load("naive torch", folder, torch.float32), heard, others, 40)
    assert theirs.count == 40 and theirs.distinct_rows > 1 and theirs.distinct >= 1


def table(*rows: tuple[str, int, int, int]) -> Table:
    """Of (variant, tokens, unequal, rows unequal)."""
    cells = [["order", "reversed", name, "float32", n, m, k, 0.0, 0.0] for name, n, m, k in rows]
    return Table("Invariance matrix", matrix.COLUMNS, cells)


THEIRS = ("naive torch", 9, 4, 5)


@pytest.mark.parametrize(
    ("rows", "verdict", "says"),
    [
        (
            [("ours", 9, 0, 0), THEIRS],
            "identical",
            "0 of 1 comparisons of ours differ, over 9 tokens. The control: 1 of 1",
        ),
        ([("ours", 9, 1, 0), THEIRS], "different", "The first: order, reversed, ours, float32."),
        ([("ours", 9, 0, 1), THEIRS], "different", "1 of 1 comparisons of ours differ"),
        ([("ours", 9, 0, 0), ("naive torch", 9, 0, 0)], "nothing_compared", "so that nothing here shows that a diff"),
        ([("ours", 9, 0, 0)], "nothing_compared", "The control: 0 of 0 comparisons of naive torch differ, so that"),
        ([("ours", 9, 1, 0), ("naive torch", 9, 0, 0)], "different", "1 of 1 comparisons of ours differ"),
        ([("ours", 9, 0, 0), ("ours", 0, 0, 0), THEIRS], "nothing_compared", "1 of these compared no token"),
        ([THEIRS], "nothing_compared", "0 of 0 comparisons of ours"),
        ([], "nothing_compared", "0 of 0 comparisons of ours"),
    ],
)
def test_the_verdict_is_on_ours_and_the_control_is_stated(rows: Any, verdict: str, says: str) -> None:
    found = matrix.finding([table(*rows)])
    assert found.verdict == verdict and says in found.headline


def test_the_lesson_enters_the_verdict() -> None:
    ours = table(("ours", 9, 0, 0), THEIRS)
    for distinct, verdict in ((1, "identical"), (2, "different")):
        cells = [
            ["ours", "float32", "6 chunks", 9, 40, 1, distinct],
            ["naive torch", "float32", "6 chunks", 9, 40, 1, 7],
        ]
        assert matrix.finding([ours, Table("Distinct", lesson.COMPLETIONS, cells)]).verdict == verdict
    for gap, verdict in ((0.0, "identical"), (1e-9, "different"), (float("nan"), "different")):
        rows: list[list[Cell]] = [["float32", lesson.ZERO[3], 0.1, 0.1, gap], ["float32", "time", 1.0, 1.0, 0.7]]
        assert matrix.finding([ours, Table("The lesson", lesson.LESSON, rows)]).verdict == verdict


@pytest.mark.parametrize(("unequal", "tokens", "status"), [(1, 9, 1), (0, 9, 0), (0, 0, 3)])
def test_both_commands_fail_on_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unequal: int, tokens: int, status: int
) -> None:
    result = matrix.Matrix("", "", {}, [table(("ours", tokens, unequal, 0), THEIRS)])
    monkeypatch.setattr(matrix, "run", lambda *a, **k: result)
    of_audit = ["--checkpoint", str(tmp_path), "--matrix", "--out", str(tmp_path / "out")]
    own = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    for main, arguments in ((command.main, of_audit), (matrix.main, own)):
        main(arguments)  # without the option the status is 0
        with pytest.raises(SystemExit, match=str(status)) if status else nullcontext():
            main([*arguments, "--fail-on", "mismatch"])


def test_a_model_with_a_voice_is_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the same model without a voice is not."""

    class BegunError(Exception):
        pass

    def begun(*_: object) -> None:
        raise BegunError

    monkeypatch.setattr(matrix, "load_variants", begun)
    checkpoint.save(speaking_model(), tmp_path / "model")
    with pytest.raises(MetronomeError, match=r"has a voice, and the matrix compares only tokens: .* --run") as said:
        command.measure(tmp_path / "model", tmp_path / "out", "cpu")
    assert "\n" not in str(said.value) and not list(tmp_path.glob("out/*.json"))
    with pytest.raises(BegunError):
        command.measure(folder, tmp_path / "out", "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("naive_linear")
def test_command_writes_the_tables(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("GROUPS", 1), ("ROLLOUTS", 2), ("MAX_TOGETHER", 2), ("MAX_OTHERS", 1), ("LONG", 1)):
        monkeypatch.setattr(lesson, name, small)
    result = matrix.run(
        folder, tmp_path, episodes=2, completions=2, long_completions=0, rounds=1, dtypes=[torch.float32]
    )
    written = json.loads((tmp_path / "matrix.json").read_text())
    assert written == plain(result) | plain(matrix.finding(result.tables)) and written["verdict"] == "identical"
    titles = [table.title for table in result.tables]
    assert titles[0] == "Invariance matrix" and "lesson" in titles[1] and len(titles) == 3
    for table in result.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert table.text().startswith(f"{table.title}\n{table.columns[0]}")
    assert {row[2] for row in result.tables[0].rows} == {"ours", "naive torch"}
    assert all(row[5] == 0 for row in result.tables[0].rows if row[2] == "ours")
