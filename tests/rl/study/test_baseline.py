"""Naive torch with importance weights: the ratio is what it says, and a run of it is reported, not stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
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


def result(method: str, tokens: int, unequal: int) -> baseline.Result:
    counts = {"mismatch/num_tokens": tokens, "mismatch/num_unequal": unequal, "mismatch/rows_unequal": 0}
    return baseline.Result(method, [counts] if tokens else [], 0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("tokens", "unequal", "verdict"), [(9, 0, "identical"), (9, 1, "different"), (0, 0, "nothing_compared")]
)
def test_the_verdict_is_on_ours(tokens: int, unequal: int, verdict: str) -> None:
    found = baseline.finding([result("ours", tokens, unequal), result("bf16 sampler", 9, 7)])
    assert found.verdict == verdict and found.headline.endswith("in the control, the other runs, 7 of 9.")


@pytest.mark.parametrize(("unequal", "verdict"), [(0, "nothing_compared"), (1, "different")])
def test_a_control_that_does_not_differ_shows_nothing(unequal: int, verdict: str) -> None:
    for control in ([result("bf16 sampler", 9, 0)], []):
        found = baseline.finding([result("ours", 9, unequal), *control])
        assert found.verdict == verdict and "so that nothing here shows that a difference would" in found.headline


def test_no_step_compares_nothing(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="nothing is compared"):
        baseline.run(tmp_path, tmp_path, 0)


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
    assert content["verdict"] == "identical" and "in the control, the other runs" in content["headline"]
    assert len(curves["rows"]) == 2 * len(baseline.METHODS)
    assert json.loads((tmp_path / "out" / "baseline.json").read_text()) == content
    assert (tmp_path / "out" / "baseline.png").read_bytes().startswith(b"\x89PNG")
