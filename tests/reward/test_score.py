"""A stored episode without its family's facts has no score; a scorer that fails or gives rewards that are not finite is
named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kernels.errors import MetronomeError
from model.weights.finite import NotFiniteError
from reward.score import score, score_stored
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score
from rollout.world.speech import SpeechBank
from tests.support.models import VOCABULARY, fresh_model

CONFIG = ScenarioConfig(families=("timespeak",))


@pytest.fixture(scope="module")
def episode() -> Episode:
    engine = SessionEngine(fresh_model("nano"), VOCABULARY, slots=1, max_tokens=512)
    return play(engine, [Play(CONFIG.of_each(1, "train", SpeechBank.open())[0], 0)], 0)[0]


def with_scorer(monkeypatch: pytest.MonkeyPatch, scorer: Callable[..., Score]) -> None:
    real = ScenarioConfig.family
    monkeypatch.setattr(ScenarioConfig, "family", lambda self, name: replace(real(self, name), score=scorer))


@pytest.mark.parametrize(
    "changed",
    [
        lambda facts: {},
        lambda facts: {"family": "timespeak"},
        lambda facts: facts | {"family": "turn_taking"},
        lambda facts: facts | {"chunks": facts["chunks"] + 1},
        lambda facts: facts | {"chunks": "many"},
        lambda facts: {name: value for name, value in facts.items() if name != "number"},
    ],
)
def test_facts_of_another_kind_have_no_score(
    episode: Episode, changed: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    assert score_stored(episode, CONFIG) is not None
    assert score_stored(replace(episode, facts=changed(dict(episode.facts))), CONFIG) is None


@pytest.mark.parametrize(
    "error",
    [KeyError("late"), ValueError("wrong"), TypeError("no"), IndexError(7), ZeroDivisionError(), StopIteration()],
)
def test_a_scorer_that_fails_is_named(episode: Episode, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def scorer(*_: Any) -> Score:
        raise error

    with_scorer(monkeypatch, scorer)
    says = f"family 'timespeak' fails on the stored episode {episode.name}: {type(error).__name__}"
    with pytest.raises(MetronomeError, match=rf"{says}: .*test_score\.py, line \d+"):
        score_stored(episode, CONFIG)


@pytest.mark.parametrize("where", ["value", "tight", "timing", "content"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_named(
    episode: Episode, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    good = score("timespeak", episode.facts, episode.actions, CONFIG)
    spoiled = {axis: rewards.copy() for axis, rewards in good.rewards.items()}
    if where in spoiled:
        spoiled[where][3] = value
    bad = replace(good, rewards=spoiled, **({} if where in spoiled else {where: value}))
    with_scorer(monkeypatch, lambda *_: good)
    assert score("timespeak", episode.facts, episode.actions, CONFIG).value == good.value
    with_scorer(monkeypatch, lambda *_: bad)
    with pytest.raises(NotFiniteError, match=r"scorer of family 'timespeak' gave a .* that is not finite"):
        score("timespeak", episode.facts, episode.actions, CONFIG)
