"""`reward.evaluate`: inputs are checked before the work, what is undefined is said to be, and a failure leaves the
models as they were."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.errors import MetronomeError
from model.weights import checkpoint
from model.weights.finite import NotFiniteError
from reward import evaluate
from reward.learned.model import RewardModel
from reward.learned.preference import Preference, Stretch, origin_of, save_preferences
from tests.support.models import conversation, fresh_model, reward_model


def stretch(seed: int) -> Stretch:
    talk = conversation(seed, 6)
    return Stretch(talk.tokens, talk.codes, seed % 3, 6)


def pairs(count: int = 24) -> list[Preference]:
    """Of both axes, no two with a conversation or a scenario in common."""
    return [
        Preference(
            stretch(2 * i), stretch(2 * i + 1), ("timing", "content")[i % 2], "segments", 0, "timespeak", str(i), 0.5
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models, a policy, and pairs of both axes."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoint.save(fresh_model("nano"), folder / "policy")
    reward_model(("timing",), seed=1).save(folder / "timing")
    reward_model(("content",), seed=2).save(folder / "content")
    save_preferences(folder / "pairs", {"held_out": pairs()})
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs, tmp_path / "inputs"))


def run(folder: Path, *models: str, **more: Any) -> dict[str, Any]:
    report = folder / "report.json"
    given = {"pairs": folder / "pairs", "json": report, "unseen.policy.checkpoint": folder / "policy"}
    given |= {"unseen.scenarios": 1} | more
    named = ", ".join(str(folder / model) for model in models)
    evaluate.main(["--models", f"[{named}]", *(f"--{name}={value}" for name, value in given.items())])
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_results_and_what_they_rest_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: RewardModel.load(folder / name) for name in ("timing", "content")}
    found = run(folder, "timing", "content")
    assert found["pairs"] == origin_of(folder / "pairs").digest
    assert found["policy"] == checkpoint.weights_digest(checkpoint.load(folder / "policy"))
    for name, model in before.items():
        after = RewardModel.load(folder / name)
        assert found[f"model/{name}"] == checkpoint.weights_digest(model) == checkpoint.weights_digest(after)
        assert after.temperature == {name: found[f"{name}/temperature"]} != model.temperature
        assert after.origin == model.origin
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    family = "timing/spearman/family/timespeak"  # one episode
    assert found[family] is None and found[f"{family}/undefined"] == "fewer than two episodes"
    shown = capsys.readouterr().out
    assert f"{family:48s} undefined" in shown and "nan" not in shown.lower()


def test_correlations_that_are_undefined_say_why() -> None:
    rising, equal = np.arange(4.0), np.ones(4)
    assert dict(evaluate.correlation("r", rising, rising**3)) == {"r": 1.0}
    assert dict(evaluate.correlation("r", rising, equal)) == {
        "r": None,
        "r/undefined": "the rules' scores of all 4 episodes are equal",
    }
    assert dict(evaluate.correlation("r", equal, rising))["r/undefined"].startswith("the learned scores of all 4")
    assert dict(evaluate.correlation("r", rising[:1], rising[:1]))["r/undefined"] == "fewer than two episodes"
    assert dict(evaluate.correlation("r", rising[:0], rising[:0]))["r"] is None


def second_timing(folder: Path) -> None:
    reward_model(("timing",), seed=3).save(folder / "content")


def link(folder: Path) -> None:
    shutil.rmtree(folder / "content")
    (folder / "content").symlink_to(folder / "timing")


def of_another_axis(folder: Path) -> None:
    reward_model(("warmth",), seed=3).save(folder / "content")


def not_finite(folder: Path) -> None:
    model = reward_model(("content",), seed=2)
    with torch.no_grad():
        model.heads.weight.fill_(3e38)
    model.save(folder / "content")


def one_scenario(folder: Path) -> None:
    shutil.rmtree(folder / "pairs")
    save_preferences(folder / "pairs", {"held_out": [replace(p, scenario="s") for p in pairs()]})


def damaged_pairs(folder: Path) -> None:
    path = next((folder / "pairs" / "held_out").glob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def a_file_added_to_pairs(folder: Path) -> None:
    (folder / "pairs" / "held_out" / "more.arrow").write_bytes(b"")


def another_record_of_pairs(folder: Path) -> None:
    path = folder / "pairs" / "pairs.json"
    path.write_text(path.read_text().replace('"digest": "', '"digest": "0'))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (second_timing, r"\S*timing and \S*content both score timing"),
        (link, "names .*content twice"),
        (of_another_axis, "no pair has the axis warmth"),
        (not_finite, r"reward model \S*content: it gives rewards that are not finite"),
        (one_scenario, "held-out"),
        (damaged_pairs, r"preference pairs \S*pairs: held_out/\S*arrow is damaged"),
        (a_file_added_to_pairs, r"held_out/more\.arrow is not listed in manifest\.json"),
        (another_record_of_pairs, r"pairs\.json is damaged"),
        (lambda folder: shutil.rmtree(folder / "policy"), "policy"),
        (lambda folder: shutil.rmtree(folder / "pairs"), r"holds no preference pairs.*python -m reward\.pairs"),
        (lambda folder: (folder / "pairs/manifest.json").unlink(), r"manifest\.json is missing"),
    ],
)
def test_a_failure_is_one_line_and_leaves_the_models_as_they_were(
    folder: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(folder)
    before = content(folder)
    with pytest.raises(MetronomeError, match=says) as caught:
        run(folder, "timing", "content")
    assert content(folder) == before and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["timing/x.json", "timing/backbone/x.json", "pairs/new/x.json", "policy/config.json"])
def test_results_are_not_written_into_what_is_evaluated(folder: Path, place: str) -> None:
    """The model takes its place last: a result in it would be gone. The control is the test of results above."""
    before = content(folder)
    with pytest.raises(MetronomeError, match=r"json.*has a manifest of its files|json.*a file of a model"):
        run(folder, "timing", "content", json=folder / place)
    assert content(folder) == before


@pytest.mark.parametrize("models", [[], ["timing", "timing"], ["nowhere"]])
def test_models_must_be_some_and_different(folder: Path, models: list[str]) -> None:
    before = content(folder)
    with pytest.raises(MetronomeError, match="model"):
        run(folder, *models)
    assert content(folder) == before


@pytest.mark.parametrize("broken", ["plot", "write_json", "on_rollouts"])
def test_models_are_written_last(folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fails(*_: Any) -> None:
        raise MetronomeError("no room")

    before = {name: content(folder / name) for name in ("timing", "content")}
    monkeypatch.setattr(evaluate, broken, fails)
    with pytest.raises(MetronomeError, match="no room"):
        run(folder, "timing", "content")
    assert {name: content(folder / name) for name in before} == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "nothing is left beside them"


def test_one_model_that_cannot_be_written_keeps_the_other_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RewardModel.write

    def fails(model: RewardModel, place: Path, name: str) -> None:
        if name == "content":
            raise MetronomeError("no room")
        write(model, place, name)

    before = content(folder)
    monkeypatch.setattr(RewardModel, "write", fails)
    with pytest.raises(MetronomeError, match="no room"):
        run(folder, "timing", "content")
    assert content(folder) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_differences_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    model, some = reward_model(("timing",)), [p for p in pairs() if p.axis == "timing"]
    assert np.isfinite(evaluate.compare(model, "timing", some)).all()
    monkeypatch.setattr(evaluate, "differences", lambda *_: torch.tensor([1.0, value]))
    with pytest.raises(NotFiniteError, match="1 of 2 values of differences of timing scores are not finite"):
        evaluate.compare(model, "timing", some)
