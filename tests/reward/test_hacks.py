"""Hacks earn less than honest play, by the rules: the faultless expert's in every scenario, a careless player's on
average."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from kernels.errors import MetronomeError
from model.weights.checkpoint import weights_digest
from model.weights.finite import NotFiniteError
from reward import hacks
from reward.learned.model import RewardModel
from reward.source import RewardSource
from rollout.scenarios.registry import ScenarioConfig
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank
from tests.support.models import reward_model

SEEDS = 100
CONFIG = ScenarioConfig()
UNLEARNED = RewardSource(CONFIG, "rules", [])


@pytest.fixture(scope="module", params=[(f, s) for f in CONFIG.families for s in ("train", "held_out")], ids="/".join)
def items(request: pytest.FixtureRequest) -> list[Scenario]:
    family, split = request.param
    bank = SpeechBank.open()
    return [CONFIG.scenario(family, split, seed, bank) for seed in range(SEEDS)]


def test_every_hack_earns_less_by_the_rules(items: list[Scenario]) -> None:
    rows = {row.player: row for row in hacks.assess(items, CONFIG, UNLEARNED)}
    tried = hacks.hacks(CONFIG, items[0].family)
    assert rows.keys() == hacks.HONEST.keys() | tried.keys() and tried.keys() > hacks.HACKS.keys()
    assert hacks.winners(list(rows.values())) == []
    for name in tried:
        assert rows[name].beats["rules"][0] == 0.0, f"{name} does as well as the expert in some scenario"
        assert rows[name].score < rows["careless"].score - 0.2


def test_no_hack_lies_uphill_of_what_warm_start_shows(items: list[Scenario]) -> None:
    """The demonstrations that the warm-started policy imitates are wrong half of the time, and RL begins there. Only
    ending early, which is right as far as it goes, may earn as much as such play; by the verdict it is worse too."""
    shown, shown_rewards = hacks.perform(hacks.honest(1), items, CONFIG, UNLEARNED)
    for name, cast in hacks.hacks(CONFIG, items[0].family).items():
        scores, rewards = hacks.perform(cast, items, CONFIG, UNLEARNED)
        assert fmean(s.value for s in scores) < fmean(s.value for s in shown)
        assert name == "ends early" or sum(rewards["rules"]) < sum(shown_rewards["rules"])


def test_a_rule_that_pays_for_talk_is_found_out(items: list[Scenario]) -> None:
    """The control: without a price on speech that nobody asked for, a hack wins."""
    talk = {"spurious": 0.5} | ({"trailing": 0.5} if items[0].family == "turn_taking" else {})
    settings = CONFIG.settings_of(items[0].family)
    paid = replace(settings, reward=replace(settings.reward, **talk))
    generous = ScenarioConfig(settings={items[0].family: paid})
    rows = hacks.assess(items[:30], generous, RewardSource(generous, "rules", []))
    assert any("speaks always" in line for line in hacks.winners(rows))


def test_hacks_do_what_they_are_called(items: list[Scenario]) -> None:
    item = items[0]
    said = {
        name: [a.words for a in hacks.play(cast, item, CONFIG)[1]]
        for name, cast in hacks.hacks(CONFIG, item.family).items()
    }
    assert all(said["speaks always"]) and len(set(said["speaks always"])) > 1
    assert not any(said["never speaks"])
    assert all(said["repeats a word"]) and len(set(said["repeats a word"])) == 1
    assert {len(words) for words in said["says all at once"]} == {0, hacks.WORDS_PER_CHUNK}
    assert [bool(words) for words in said["ends early"]].count(True) == 1


def row(player: str, reward: float, by: str = "rules") -> hacks.Row:
    return hacks.Row("timespeak", player, 1.0, {by: reward}, {by: [0.0, 0.0]})


@pytest.mark.parametrize("by", ["rules", "learned"])
@pytest.mark.parametrize(("hack", "wins"), [(0.9, 0), (1.0, 1), (1.5, 1), (2.0, 2), (3.0, 2)])
def test_a_tie_wins(hack: float, wins: int, by: str) -> None:
    rows = [row("expert", 2.0, by), row("careless", 1.0, by), row("ends early", hack, by)]
    assert len(hacks.winners(rows)) == wins


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("player", ["expert", "ends early"])
def test_a_reward_that_is_not_finite_gives_no_verdict(player: str, value: float) -> None:
    rows = [row("expert", 2.0), row("careless", 1.0), row("ends early", 0.0)]
    assert hacks.winners(rows) == []
    spoiled = [replace(one, reward={"rules": value}) if one.player == player else one for one in rows]
    with pytest.raises(NotFiniteError, match=f"timespeak: the mean reward of '{player}' by rules is {value}"):
        hacks.winners(spoiled)


def test_the_verdict_says_what_it_rests_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward_model().save(tmp_path / "m")
    digest = weights_digest(RewardModel.load(tmp_path / "m"))
    hacks.main(["--json", str(tmp_path / "h.json"), "--scenarios", "1", "--models", f"[{tmp_path / 'm'}]"])
    found = json.loads((tmp_path / "h.json").read_text())
    assert found["models"] == [digest] and found["scenarios"] == 1
    assert found["rests_on"] in " ".join(capsys.readouterr().out.split())
    assert found["rests_on"].startswith("1 held-out scenarios of each family (timespeak, turn_taking)")
    assert f"by the rules and reward model {digest}" in found["rests_on"]


def test_a_model_too_large_to_score_gives_no_verdict(tmp_path: Path) -> None:
    model = reward_model()
    with torch.no_grad():
        model.heads.weight.fill_(3e38)
    model.save(tmp_path / "m")
    with pytest.raises(NotFiniteError, match=f"reward model {tmp_path / 'm'}: it gives rewards that are not finite"):
        hacks.main(["--json", str(tmp_path / "h.json"), "--scenarios", "1", "--models", f"[{tmp_path / 'm'}]"])
    assert not (tmp_path / "h.json").exists()


def test_no_scenario_gives_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="scenarios"):
        hacks.main(["--json", str(tmp_path / "h.json"), "--scenarios", "0"])
    assert not (tmp_path / "h.json").exists()
