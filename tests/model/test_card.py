"""Model cards: a head that the hub reads, and what the run knew, without a word of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from kernels.errors import MetronomeError
from model.program.reading import parse_yaml
from model.weights import manifest
from model.weights.card import CARD, Facts, Score, card, public, write_card
from model.weights.manifest import LOCATION_FIELDS
from reward.learned import card as reward_card
from reward.learned.model import RewardModel
from rl.card import facts
from rl.evaluate import HeldOut
from rl.folder import RunFolder
from rl.train import parse
from tests.support.models import fresh_model

RECIPE = "name: x\nruns: /home/someone/runs\ntracking:\n  project: secret\nspeech_dir: /home/someone/speech\nseed: 7\n"
FACTS = Facts(
    title="a run",
    summary="A policy.",
    identity={"step": "3", "weights digest": "0f" * 16},
    recipe=RECIPE,
    loading="import model",
    with_transformers="import transformers",
    scores=[Score("held out, after RL", 0.8125, 96, 0.05), Score("held out, x|y", 0.5, None)],
)


def test_the_head_is_what_the_hub_reads(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    head = ModelCard.load(tmp_path / CARD).data
    assert (head.library_name, head.pipeline_tag, head.license) == ("transformers", "any-to-any", None)
    assert "reinforcement-learning" in head.tags
    of_ours = ModelCard(card(replace(FACTS, with_transformers=None, tags=("reward-model",)))).data
    assert (of_ours.library_name, of_ours.pipeline_tag) == ("metronome", None) and "reward-model" in of_ours.tags


def test_it_says_what_there_is() -> None:
    text = card(FACTS)
    for said in ("# a run\n", "| weights digest | `0f0f", "| held out, after RL | 0.8125 ± 0.0500 | 96 |",
                 r"x\|y | 0.5000 |  |", "import transformers", "import model", "seed: 7"):  # fmt: skip
        assert said in text
    assert text == card(FACTS) and "With transformers" not in card(replace(FACTS, with_transformers=None))


def test_nothing_of_the_machine_is_in_it() -> None:
    assert parse_yaml(public(RECIPE)) == {"speech_dir": "speech", "seed": 7}
    everything = parse_yaml(public(parse(["--runs", "/home/someone", "--tracking.project", "secret"])[2]))
    assert not set(LOCATION_FIELDS) & everything.keys() and "rl" in everything
    assert "someone" not in card(FACTS) and "secret" not in card(FACTS)


def test_texts_cannot_leave_their_place() -> None:
    text = card(replace(FACTS, title="a\n---\nb\u202e", recipe="note: 'a ``` b'\n"))
    assert "# a\\n---\\nb\\u202e\n" in text and "````yaml\nnote: a ``` b\n````" in text


def test_the_scores_of_a_run(tmp_path: Path) -> None:
    recipe = parse(["--eval.scenarios", "10", "--eval.during", "4"])[2]
    folder = RunFolder.create(tmp_path, "r", recipe)
    before = HeldOut({"": 0.25, "a": 0.5, "b": 0.0, "a_tight": 0.1, "greedy": 0.3, "watched": 0.2, "interval": 0.1}, {})
    assert list(facts(folder, 0, "0f", "c0", before).scores) == [
        Score("held out, after warm start", 0.25, 20, 0.1), Score("held out, after warm start, a", 0.5, 10),
        Score("held out, after warm start, b", 0.0, 10), Score("held out, after warm start, greedy", 0.3, 20),
    ]  # fmt: skip
    folder.append_metrics({"step": 0, "eval/held_out": 0.75, "eval/held_out/a": 0.75})
    folder.append_metrics({"step": 1, "loss": 1.0})
    later = [(s.name, s.scenarios) for s in facts(folder, 2, "0f", "c0", before).scores][4:]
    assert later == [("held out, after 1 steps", 4), ("held out, after 1 steps, a", 4)]
    summary = {"eval/after": 1.0, "eval/after/a": 1.0, "eval/after/interval": 0.0, "eval/before": 0.1, "wall_s": 3.0}
    last = [(s.name, s.value, s.scenarios) for s in facts(folder, 2, "0f", "c0", before, summary).scores][4:]
    assert last == [("held out, after RL", 1.0, 10), ("held out, after RL, a", 1.0, 10)]


def test_a_reward_models_card_stays_with_it(tmp_path: Path) -> None:
    model = RewardModel.build(fresh_model("nano"), ("timing",))
    model.card = card(reward_card.facts("r", model.axes, 5, RECIPE, {"weights digest": "0f"}))
    model.save(tmp_path / "rm")
    assert CARD in json.loads((tmp_path / "rm" / manifest.MANIFEST).read_text())["files"]
    again = RewardModel.load(tmp_path / "rm")
    again.save(tmp_path / "again")  # as `reward.evaluate` does, with other temperatures
    assert (tmp_path / "again" / CARD).read_text() == model.card and "after 5 steps" in model.card
    (tmp_path / "rm" / CARD).write_text("another")
    with pytest.raises(MetronomeError, match=r"README.md is damaged"):
        RewardModel.load(tmp_path / "rm")
