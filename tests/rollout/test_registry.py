"""How families are found and how a recipe sets them: what is wrong is said, and with it what would be right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from reward.rules.timespeak import TIMESPEAK, TimespeakSettings
from reward.score import score
from rl.consistency import check_shares
from rl.evaluate import INTERVAL, WATCHED
from rl.train import parse
from rollout.scenarios.family import Family
from rollout.scenarios.registry import SHIPPED, ScenarioConfig, find_family
from rollout.turn.action import LISTEN
from tests.reward.test_timespeak import FACTS

BOTH = "[timespeak, tests.examples.confide:FAMILY]"
NO_FAMILY = "not one"
TWIN = replace(TIMESPEAK, axes=("timing",))
RESERVED = ("families", "mean", WATCHED, "greedy", INTERVAL)
"""What stands among the names of families in recipes and tables of results."""


def test_shipped_families_have_their_names() -> None:
    assert {name: find_family(name).name for name in SHIPPED} == {name: name for name in SHIPPED}
    assert find_family("reward.rules.timespeak:TIMESPEAK") is find_family("timespeak") is TIMESPEAK
    assert ScenarioConfig().axes == ("timing", "content")
    assert ScenarioConfig(("tests.examples.confide:FAMILY", "timespeak")).axes == ("timing", "safety", "content")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "chess",
            r"no scenario family is called 'chess'\. Choose one of timespeak, turn_taking, lookout, repeat, or .*:NAME",
        ),
        ("no.such:FAMILY", "there is no module 'no'"),
        ("rollout.such:FAMILY", r"there is no module 'rollout\.such'"),
        ("rollout.scenarios.registry:FAMILY", "rollout.scenarios.registry has no FAMILY"),
        ("tests.rollout.test_registry:NO_FAMILY", "is 'not one', no Family"),
    ],
)
def test_a_family_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(MetronomeError, match=says):
        find_family(name)


def test_settings_are_typed_by_the_family_and_survive_a_run_s_own_recipe(tmp_path: Path) -> None:
    config, _, text = parse(["--scenarios.families", BOTH, "--scenarios.confide.reward.leak=-3"])
    assert config.scenarios.settings_of("confide").reward.leak == -3.0
    assert config.scenarios.settings_of("timespeak") == TimespeakSettings()
    saved = tmp_path / "config.yaml"
    saved.write_text(text)
    again, _, same = parse(["--config", str(saved), "--scenarios.timespeak.chunks", "40"])
    assert again.scenarios.settings_of("confide") == config.scenarios.settings_of("confide")
    assert again.scenarios.settings_of("timespeak").chunks == 40 and same != text
    assert parse(["--config", str(saved)])[2] == text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scenarios.families", "[chess]"], "no scenario family is called 'chess'"),
        (["--scenarios.families", "[]"], "is empty"),
        (["--scenarios.families", "[timespeak, timespeak]"], "two are called 'timespeak'"),
        (["--scenarios.families", "timespeak"], "families is 'timespeak': give a list of"),
        (["--scenarios.confide.chunks", "40"], "recipe: scenarios has no field 'confide'"),
        (["--scenarios.families", BOTH, "--scenarios.turn_taking.turns", "1"], "no field 'turn_taking'"),
        (
            ["--scenarios.families", BOTH, "--scenarios.confide.chunks", "many"],
            "chunks is 'many': give a whole number, 1 to 3,000",
        ),
        (
            ["--scenarios.families", BOTH, "--scenarios.confide.manners", "1"],
            "scenarios.confide has no field 'manners'",
        ),
    ],
)
def test_what_no_family_has_is_an_error(arguments: list[str], says: str) -> None:
    with pytest.raises(MetronomeError, match=says):
        parse(arguments)


def test_axis_weights_name_axes_of_the_families() -> None:
    check_shares(parse(["--rl.axis_weights", "{content: 0.5}"])[0])
    check_shares(parse(["--scenarios.families", BOTH, "--rl.axis_weights", "{safety: 2}"])[0])
    with pytest.raises(MetronomeError, match=r"rl\.axis_weights names safety: .* are rewarded on timing, content"):
        check_shares(parse(["--rl.axis_weights", "{safety: 2}"])[0])


def test_a_scorer_that_breaks_its_family_s_word_is_named() -> None:
    config = ScenarioConfig(("tests.rollout.test_registry:TWIN",))
    with pytest.raises(MetronomeError, match=r"scorer of family 'timespeak' gave rewards of .* the axes timing in"):
        score("timespeak", FACTS.to_json(), [LISTEN] * 60, config)


@pytest.mark.parametrize(
    "wrong", [{"name": "a/b"}, *({"name": name} for name in RESERVED), {"axes": ()}, {"axes": ("a", "a")}]
)
def test_a_family_with_an_impossible_name_or_axes(wrong: dict[str, object]) -> None:
    assert isinstance(replace(TIMESPEAK, name="other"), Family)
    with pytest.raises(MetronomeError, match="letters, digits and underscores"):
        replace(TIMESPEAK, **wrong)
