"""Naive torch with importance weights: the ratio is what it says, and a run of it is reported, not stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.reference import naive
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint
from rl.study import baseline
from tests.kernels.contract import uneven


def test_ratios_are_cut_at_the_cap_only() -> None:
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])]
    result = baseline.truncated(weights, [torch.tensor([0.5, 5.0]), torch.tensor([1.5])])
    assert torch.equal(torch.cat(result), torch.tensor([0.5, -2.0 * baseline.CAP, 4.5]))


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "linear", uneven(naive.linear))  # on every machine, whatever torch's does there
    model = InteractionModel(preset("tiny"))
    model.init_weights(5)
    checkpoint.save(model, tmp_path / "model")
    content = baseline.run(tmp_path / "model", tmp_path / "out", 2, evaluated=1, groups=2, rollouts=2)
    assert dispatch.backend().NAME != "naive"
    ends, curves = content["tables"]
    assert [row[0] for row in ends["rows"]] == [method.name for method in baseline.METHODS]
    by_name = {row[0]: dict(zip(ends["columns"], row, strict=True)) for row in ends["rows"]}
    assert by_name["ours"]["tokens unequal, %"] == by_name["ours"]["k3, worst step"] == by_name["ours"]["max abs"] == 0
    bf16 = by_name["bf16 sampler + importance weights"]
    assert bf16["tokens unequal, %"] > 0 and bf16["max abs"] > by_name["naive + importance weights"]["max abs"] > 0
    assert len(curves["rows"]) == 2 * len(baseline.METHODS)
    assert json.loads((tmp_path / "out" / "baseline.json").read_text()) == content
    assert (tmp_path / "out" / "baseline.png").read_bytes().startswith(b"\x89PNG")
