"""Every setting has a range, in its type: what is outside is one line, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch

from kernels.errors import MetronomeError
from model.backbone.size import empty, model_bytes, training_bytes
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.program import memory, ranges
from model.program.ranges import Ascending, Length, Multiples, Range, Text
from model.program.recipe import read_recipe
from model.weights import checkpoint
from model.weights.packs import packs
from reward import evaluate, pairs, train
from reward.evaluate import EvaluateConfig
from reward.hacks import HacksConfig
from reward.pairs import PairsConfig
from reward.study.overoptimisation import Point, WatchConfig, alarm
from reward.train import RewardTrainConfig
from rl import minimal
from rl.bestofn import BestOfNConfig
from rl.config import TrainConfig
from rl.consistency import check_shares
from rl.room import check_fits
from rl.train import main as train_policy
from rl.train import parse
from rollout.scenarios.family import AnyFamily
from tests.examples.confide import FAMILY
from tests.support.recipes import classes, commands, leaves

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def without_range(kind: Any) -> Iterator[str]:
    """Fields, or items of fields, that may be any number, list or text."""
    for name, hint in leaves(kind):
        yield from unlimited(name, hint)


def unlimited(name: str, hint: Any) -> Iterator[str]:
    limits = ranges.limits_of(hint)
    kind, _ = ranges.bare(hint)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is bool or origin is Literal or is_dataclass(kind):
        return
    if origin is tuple and arguments[-1] is ...:
        if not any(isinstance(limit, Length) for limit in limits):
            yield name
        yield from unlimited(f"{name}[]", arguments[0])
    elif origin is tuple:
        if len(arguments) == 2 and not any(isinstance(limit, Ascending) for limit in limits):
            yield name
        for i, one in enumerate(arguments):
            yield from unlimited(f"{name}[{i}]", one)
    elif origin is dict and arguments[1] is not Any:
        yield from unlimited(f"{name}{{}}", arguments[1])
    elif not limits:
        yield name


def test_the_classes_are_those_of_the_commands() -> None:
    """Found by source, so that a new command's is among them."""
    assert {"rl.train", "rl.bestofn", "reward.train", "reward.pairs", "reward.evaluate"} < commands().keys()
    assert {TrainConfig, RewardTrainConfig, PairsConfig, EvaluateConfig, HacksConfig, BestOfNConfig} <= set(classes())


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_number_list_and_text_has_a_range(kind: type[Any]) -> None:
    assert list(without_range(kind)) == []


def test_the_examples_family_too() -> None:
    family: AnyFamily = FAMILY
    assert list(without_range(family.settings)) == []


def test_multiples() -> None:
    limit = Multiples(64, 256, of=64)
    assert not any(map(limit.problem, (64, 192, 256)))
    for value in (0, 65, 320, True, 64.5, None):
        assert limit.problem(value) == "give a number from 64 to 256, a multiple of 64"


@dataclass(frozen=True)
class Inner:
    free: float = 1.0
    kept: Annotated[float, Range(0, 1)] = 1.0


@dataclass(frozen=True)
class Loose:
    count: int = 1
    text: str = ""
    maybe: int | None = None
    many: tuple[Annotated[int, Range(0, 1)], ...] = ()
    items: Annotated[tuple[str, ...], Length(0, 3)] = ()
    pair: tuple[Annotated[int, Range(0, 1)], Annotated[int, Range(0, 1)]] = (0, 1)
    named: dict[str, float] | None = None
    inner: Inner = Inner()
    good: Annotated[str, Text()] | None = None
    flag: bool = False


def test_a_class_without_ranges_is_seen() -> None:
    """The control of the tests above."""
    expected = ["count", "text", "maybe", "many", "items[]", "pair", "named{}", "inner.free"]
    assert list(without_range(Loose)) == expected


OUTSIDE = [
    (TrainConfig, "rl.steps", "-1", "0 to 10,000,000"),
    (TrainConfig, "rl.steps", "many", "0 to 10,000,000"),
    (TrainConfig, "rl.steps", "1000000000000", "0 to 10,000,000"),
    (TrainConfig, "rl.gamma", ".nan", "0.0 to 1.0"),
    (TrainConfig, "rl.gamma", "1e999", "0.0 to 1.0"),
    (TrainConfig, "rl.optim.lr", "1e30", "0.0 to 1.0"),
    (TrainConfig, "rollout.temperature", "-1", "0 or 1e-06 to 1,000,000.0"),
    (TrainConfig, "seed", "18446744073709551616", "0 to 4,294,967,295"),
    (TrainConfig, "warmstart.steps", "-4", "0 to 10,000,000"),
    (TrainConfig, "eval.during", "0", "1 to 1,000,000"),
    (TrainConfig, "rl.axis_weights.timing", ".nan", "0.0 to 1,000.0"),
    (TrainConfig, "model.preset", "huge", "nano or tiny or base or inkling_small"),
    (TrainConfig, "scenarios.timespeak.chunks", "0", "1 to 3,000"),
    (TrainConfig, "scenarios.timespeak.seconds", "[]", "1 to 10 items"),
    (TrainConfig, "scenarios.timespeak.stop_delay_chunks", "[1, 1]", "ascending order, each once"),
    (TrainConfig, "scenarios.turn_taking.sound.gain_db", "[6, -8]", "ascending order"),
    (TrainConfig, "scenarios.turn_taking.patience", "3", "4 to 3,000"),
    (TrainConfig, "tracking.trackers", "[wandb, wandb]", "each once"),
    (TrainConfig, "hub.repo", "a-model", "owner/name"),
    (TrainConfig, "hub.timeout_s", "0", "1 to 86,400"),
    (TrainConfig, "source.watch.patience", "0", "1 to 1,000,000"),
    (TrainConfig, "name", "../escaped", "letters, digits"),
    (RewardTrainConfig, "name", "../escaped", "letters, digits"),
    (RewardTrainConfig, "axes", "[]", "1 to 100 items"),
    (RewardTrainConfig, "trainer.learning_rate", "-1", "0.0 to 1.0"),
    (RewardTrainConfig, "trainer.logging_steps", "0", "above 0 to 10,000,000"),
    (RewardTrainConfig, "rationality", "0", "1e-06 to 1,000,000.0"),
    (PairsConfig, "corruptions.train_sizes", "[3, 3]", "ascending order, each once"),
    (PairsConfig, "out", "", "a folder"),
    (EvaluateConfig, "json", "x.png", "another ending"),
    (HacksConfig, "json", ".", "a file"),
    (BestOfNConfig, "samples", "1", "2 to 10,000"),
]


@pytest.mark.parametrize(("kind", "name", "value", "range_"), OUTSIDE, ids=lambda x: str(x)[:40])
def test_the_error_has_field_value_and_range(
    kind: type[Any], name: str, value: str, range_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = {
        BestOfNConfig: ["--run", "r", "--json", "j"],
        EvaluateConfig: ["--json", "j"],
        HacksConfig: ["--json", "j"],
    }
    with pytest.raises(MetronomeError) as error:
        read_recipe("a.command", "", kind, [*needed.get(kind, []), f"--{name}", value])
    text = str(error.value)
    assert text.startswith(f"recipe: {name} is ") or text.startswith(f"recipe: {name}[")
    assert range_ in text and "\n" not in text
    assert list(tmp_path.iterdir()) == []


def test_ranges_include_their_ends_and_no_nan() -> None:
    both, above = Range(0, 1), Range(0, 1, open_low=True)
    assert [x for x in (-0.1, 0, 0.5, 1, 1.1, float("nan"), True, "1") if both.problem(x) is None] == [0, 0.5, 1]
    assert above.problem(0) is not None and above.problem(1e-300) is None


def test_a_past_run_s_output_folder_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = ["--runs", str(tmp_path / "file" / "runs")]
    with pytest.raises(MetronomeError, match=r"runs is .* is no folder"):
        parse(given)
    assert parse(given, past=True)[0].runs == given[1]


def test_settings_that_only_together_are_wrong() -> None:
    with pytest.raises(MetronomeError, match=r"rl\.steps is 1000000: with 2000 scenarios each, give at most 500000"):
        check_shares(parse(["--rl.steps", "1000000", "--rl.groups", "2000"])[0])
    with pytest.raises(MetronomeError, match=r"warmstart\.steps is 10000000: with 16 .* at most 625000"):
        check_shares(parse(["--warmstart.steps", "10000000"])[0])
    check_shares(parse(["--rl.steps", "0", "--warmstart.steps", "0"])[0])


def test_the_watch_refuses_settings_that_ring_at_once_or_never() -> None:
    falls = [Point(0, 0.9, 1.0), Point(20, 0.5, 2.0), Point(40, 0.3, 3.0)]
    assert alarm(falls, WatchConfig()) is not None
    for wrong in (WatchConfig(patience=0), WatchConfig(drop=float("nan")), WatchConfig(patience=-1)):
        with pytest.raises(MetronomeError, match=r"source\.watch\.(patience|drop) is"):
            alarm(falls, wrong)


# --- what does not fit


@pytest.mark.parametrize("path", [p for p in CONFIGS if "rl:" in p.read_text()], ids=lambda p: p.stem)
def test_the_shipped_recipes_fit_their_contexts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 50)
    monkeypatch.setattr(checkpoint, "config_of", lambda _: preset("tiny"))  # a run's, which need not be there
    check_fits(parse(["--config", str(path)])[0])


LONG = ["--scenarios.timespeak.chunks", "3000", "--rollout.words_per_chunk", "9"]


@pytest.mark.parametrize("engine", ["session", "vllm"])
@pytest.mark.parametrize("main", [train_policy, minimal.main], ids=["rl.train", "rl.minimal"])
def test_episodes_beyond_the_context_are_refused_before_anything_is_written(
    main: Any, engine: str, tmp_path: Path
) -> None:
    always = ["--runs", str(tmp_path / "runs"), "--rollout.engine", engine]
    for arguments, says in (
        (["--rollout.max_tokens", "420"], r"rollout\.max_tokens is 420: .* give at least 421"),
        (["--rollout.words_per_chunk", "8"], r"rollout\.max_tokens is 512: .* give at least 841"),
        (["--rollout.max_tokens", "420", "--rollout.workers", "1"], "give at least 421"),
        (["--scenarios.timespeak.chunks", "74"], "give at least 519"),
        (
            ["--scenarios.timespeak.chunks", "3000", "--rollout.words_per_chunk", "9", "--rollout.max_tokens", "90000"],
            "knows 32768 positions",
        ),
    ):
        with pytest.raises(MetronomeError, match=says):
            main([*always, *arguments])
    assert list(tmp_path.iterdir()) == []
    check_fits(parse([*always, "--rollout.max_tokens", "421"])[0])


def test_so_are_those_of_pairs_and_evaluation(tmp_path: Path) -> None:
    policy = "[{checkpoint: nowhere}]"
    with pytest.raises(MetronomeError, match=r"rollouts\.max_tokens is 60: .* give at least 421"):
        pairs.main(["--out", str(tmp_path / "o"), "--rollouts.policies", policy, "--rollouts.max_tokens", "60"])
    with pytest.raises(MetronomeError, match=r"unseen\.max_tokens is 60: .* give at least 421"):
        evaluate.main(["--json", str(tmp_path / "o"), "--unseen.max_tokens", "60"])
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(memory, "available_bytes", lambda: 6 << 30)
    with pytest.raises(MetronomeError, match=r"model\.preset 'inkling_small': training .* smaller model"):
        train_policy([*runs, "--model.preset", "inkling_small"])
    with pytest.raises(MetronomeError, match=r"backbone\.preset 'inkling_small': training it .* smaller model"):
        train.main([*runs, "--backbone.preset", "inkling_small"])
    with pytest.raises(MetronomeError, match=r"48 sessions of up to 32000 tokens .* lower rl\.groups"):
        train_policy([*runs, "--model.preset", "base", "--rollout.max_tokens", "32000"])
    assert list(tmp_path.iterdir()) == []
    check_fits(parse(["--model.preset", "base", "--rl.groups", "1"])[0])


def test_the_bytes_are_those_of_the_model() -> None:
    """A lower bound of what is allocated, and near it."""
    model = InteractionModel(preset("nano"))
    model.init_weights(0)
    model.pack()
    weights = sum(w.nbytes for w in model.parameters())
    taken = weights + sum(x.nbytes for _, pack in packs(model) for x in pack.data.values())
    assert 0.9 * taken < model_bytes(empty(model.config, torch.float32)) <= taken
    fp32, bf16 = (training_bytes(empty(model.config, dtype)).total for dtype in (torch.float32, torch.bfloat16))
    assert fp32 == model_bytes(model) + 5 * weights and bf16 > model_bytes(model) / 2 + 6 * weights
