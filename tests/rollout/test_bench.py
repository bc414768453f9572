"""The bench compares what it says it compares: one set of weights, and tokens really sampled."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from kernels.layout import Segments
from rollout import bench


@torch.no_grad()
def test_both_models_are_one_function() -> None:
    ours, _, theirs = bench.text_models()
    assert 12.4e6 < sum(weight.numel() for weight in theirs.parameters()) < 12.8e6
    tokens = torch.randint(8, 1024, (40,), generator=torch.Generator().manual_seed(0))
    wanted = theirs(input_ids=tokens[None]).logits[0]
    got = ours.logits(ours(tokens, bench.NO_CODES, Segments.build([0], [0], [40])))
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SESSIONS": (1, 2), "SESSION_S": (1, 2), "SAMPLED_TOKENS": 4}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(sys, "argv", ["rollout.bench", "--json", str(tmp_path / "b.json"), "--rounds", "1"])
    bench.main()
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["sessions"] for row in report["text"]] == [1, 2]
    assert all(row["ours_fp32"] > 0 and row["transformers_fp32"] > 0 for row in report["text"])
    assert [row["session_s"] for row in report["micro_turn"]] == [1, 2]
