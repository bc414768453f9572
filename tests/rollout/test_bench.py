"""The bench compares what it says it compares: one set of weights, tokens really sampled, counts that see a leak."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.errors import MetronomeError
from kernels.layout import Segments
from model.context import ContextConfig
from rollout.bench import __main__ as bench
from rollout.bench import hour, overhead, serving, text, workers
from rollout.bench.crowd import Crowd, Served, embedded, served, tiny_model
from rollout.bench.hour_result import SLOWER
from rollout.bench.pictures import hour_picture
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.turn.action import Action


@torch.no_grad()
def test_both_models_are_one_function() -> None:
    ours, _, theirs = text.text_models()
    assert 12.4e6 < sum(weight.numel() for weight in theirs.parameters()) < 12.8e6
    tokens = torch.randint(8, 1024, (40,), generator=torch.Generator().manual_seed(0))
    wanted = theirs(input_ids=tokens[None]).logits[0]
    got = ours.logits(ours(text.written(tokens, Segments.build([0], [0], [40]))))
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_a_crowd_is_served_as_many_chunks_as_it_counts() -> None:
    crowd = Crowd(embedded(tiny_model(), 3, 20, words_per_chunk=2))
    crowd.join(3)
    result = served(crowd, 6)
    assert [s.chunks for s in crowd.sessions] == [6, 6, 6]
    assert result.sessions == 3 and 1 < result.tokens_per_chunk <= 3
    assert result.tokens_per_s == pytest.approx(result.chunks_per_s * result.tokens_per_chunk)
    assert 0 < result.p50_ms <= result.p99_ms
    assert len({tuple(s.tokens) for s in crowd.sessions}) == 3
    crowd.leave()
    assert crowd.engine.free == 3


def test_real_time_is_held_by_those_below_the_limit() -> None:
    def row(sessions: int, p99_ms: float) -> Served:
        return Served(sessions, 1.0, p99_ms, 1.0, 1.0, 1.0)

    assert serving.holds_real_time([row(16, 90), row(32, 199), row(48, 201)]) == 32
    assert serving.holds_real_time([row(16, 300)]) == 0


class Leaking(SessionEngine):
    """Keeps four small tensors a chunk."""

    kept: list[Tensor]

    def append(self, sessions: list[Session], chunks: Tensor) -> list[Action]:
        self.kept = [*vars(self).get("kept", []), *(torch.zeros(1) for _ in range(4))]
        return super().append(sessions, chunks)


def test_growth_sees_a_leak_of_a_few_small_tensors_a_chunk() -> None:
    model = tiny_model()
    chunks = 200
    flat = overhead.growth(embedded(model, 1, 300), chunks)
    assert not flat.state_moved
    assert flat.heap_bytes_per_chunk < 120  # 8 bytes a token
    assert flat.python_blocks < 3 * chunks
    engine = embedded(model, 1, 300)
    engine.__class__ = Leaking
    leaking = overhead.growth(engine, chunks)
    assert leaking.heap_bytes_per_chunk > 480
    assert leaking.python_blocks > 3 * chunks


def test_overhead_is_a_part_of_the_chunk() -> None:
    result = overhead.measure_overhead(20)
    assert 0 < result.overhead_ms < result.chunk_ms


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SESSIONS", (1, 2))
    monkeypatch.setattr(text, "SAMPLED_TOKENS", 4)
    for name, value in {"SESSIONS": (1, 2), "SESSION_S": (1, 2), "MOST_SESSIONS": 4, "JOIN": 2}.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(workers, "IDLE_S", 0.5)
    parts = [part for part in bench.PARTS if part != "engines"]
    monkeypatch.setattr(
        sys, "argv", ["rollout.bench", "--json", str(tmp_path / "b.json"), "--rounds", "1", "--only", *parts]
    )
    bench.main()
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["sessions"] for row in report["text"]] == [1, 2]
    assert all(row["ours_fp32"] > 0 and row["transformers_fp32"] > 0 for row in report["text"])
    assert [row["session_s"] for row in report["turns"]] == [1, 2]
    assert [(row["words_per_chunk"], row["sessions"]) for row in report["serving"]] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert [row["sessions"] for row in report["real_time"]["joining"]] == [2, 4]
    assert report["overhead"]["growth"]["state_moved"] is False
    assert report["workers"]["episodes_that_differ"] == 0
    assert 0 < report["sharing"]["shared_rows"] < report["sharing"]["separate_rows"]


def test_vllm_is_left_out_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.process, "unavailable_reason", lambda: "vLLM is not installed")
    assert bench.engines(argparse.Namespace(rounds=1)) == "left out: vLLM is not installed"


def test_a_short_hour() -> None:
    """A session of many times its windows; times are left out, which a busy machine decides in so short a run."""
    result = hour.measure(200, ContextConfig("window", first=64, window=64))
    steady = replace(result, end_ms=result.young_ms)
    assert steady.problems() == [] and result.unequal == 0
    assert result.rows > 6 * 128 and result.pages_freed > 10 and len(result.points) > 50
    for change, said in (
        ({"end_ms": 1.2 * result.young_ms}, "in a young session"),
        ({"end_ms": math.nan}, "in a young session"),
        ({"state_moved": True}, "allocated anew"),
        ({"window": 0}, "pages, more than 3"),
        ({"process_bytes_per_chunk": 1e6}, "beside the session's record"),
        ({"unequal": 1}, "differ in the learner"),
    ):
        (problem,) = replace(steady, **change).problems()
        assert said in problem
    assert hour_picture(result, SLOWER).startswith(b"\x89PNG")
    with pytest.raises(MetronomeError, match="--chunks 200: too few; the session's windows were full at 4160 rows"):
        hour.main(["--chunks", "200"])
