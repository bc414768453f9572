"""What a listener makes of words said aloud, and what it costs not to be understood."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from kernels.errors import MetronomeError
from reward.rules.repeat import RepeatSettings
from reward.source import RewardSource, SourceConfig
from reward.voice import listener
from reward.voice.listener import UNDERSTOOD, Listener, Word
from rl.config import RLConfig, TrainConfig
from rl.consistency import check_shares
from rl.run import Run
from rl.study.understood import Share, measure, table
from rl.train import parse
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.repeat import WORDS, said, sound_of
from rollout.seeds import generator
from rollout.turn.action import GO_ON, LISTEN, Action, speak
from rollout.world.lexicon import lexicon
from rollout.world.speech import SpeechBank
from tests.support.episodes import some_episode

AUDIBLE, LEVEL = -50.0, -25.0
RECIPE = str(Path(__file__).resolve().parents[2] / "configs/voice.yaml")


class Always:
    """A recogniser that takes everything for "four"."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words

    def word(self, sound: Tensor) -> str | None:
        return "four"


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Listener:
    monkeypatch.setattr(listener, "Recogniser", Always)
    return Listener(("four", "seven"), AUDIBLE)


def aloud(word: str, chunks: int | None = None) -> list[Action]:
    return said(word, sound_of(word, LEVEL))[:chunks]


def test_the_words_and_their_cost(ear: Listener) -> None:
    four, seven = (len(lexicon().target(word)) for word in ("four", "seven"))
    actions = [LISTEN, *aloud("four"), *aloud("seven"), LISTEN]
    rewards, words = ear.rewards(actions), ear.words(actions, parts=False)
    assert words == [
        Word("four", 1, 1 + four, True, "four", pytest.approx(LEVEL, abs=1e-3)),
        Word("seven", 1 + four, 1 + four + seven, True, "four", pytest.approx(LEVEL, abs=1e-3)),
    ]
    assert [word.right for word in words] == [True, False]
    assert rewards.tolist() == [-1.0 if k == four + seven else 0.0 for k in range(len(actions))]


def test_what_is_cut_short_costs_nothing_and_is_not_whole(ear: Listener) -> None:
    actions = [*aloud("seven", 1), LISTEN, *aloud("seven", 1)]
    rewards, words = ear.rewards(actions), ear.words(actions, parts=False)
    assert [word.whole for word in words] == [False, False] and not rewards.any()


def test_saying_more_earns_nothing(ear: Listener) -> None:
    actions = [*aloud("four"), LISTEN] * 5
    rewards, words = ear.rewards(actions), ear.words(actions, parts=False)
    assert len(words) == 5 and not rewards.any()


def test_what_it_does_not_judge(ear: Listener) -> None:
    """Silence, words without sound, sound without a word, and words that the family does not have."""
    silent = said("seven", sound_of("seven", -300.0))
    wordless = [Action(action.mode, (), action.sound) for action in aloud("seven")]
    assert ear.words([speak("seven"), GO_ON, LISTEN, *silent, LISTEN, *wordless, LISTEN, *aloud("hello")]) == []


def test_soft_chunks_at_the_ends_need_not_be_heard(ear: Listener) -> None:
    """At -45 dB some words' first or last chunks are not audible, and such a word is whole nevertheless."""
    for word in ("four", "seven"):
        for level in (-20.0, -45.0, -49.0):
            (found,) = ear.words(said(word, sound_of(word, level)))
            assert found.whole, (word, level)


def test_real_words_are_understood() -> None:
    pytest.importorskip("pocketsphinx", reason="the extra `voice` is not installed")
    ear = Listener(WORDS, AUDIBLE)
    heard = [ear.words(aloud(word)) for word in WORDS]
    assert sum(word.right for (word,) in heard) >= 28
    other = said("four", sound_of("seven", LEVEL))
    assert [word.understood for word in ear.words(other)] == ["seven"]  # the control: another word's sound


def test_an_axis_weight_of_it() -> None:
    rl = RLConfig(axis_weights={UNDERSTOOD: 2.0})
    with pytest.raises(MetronomeError, match=r"names understood: .* rewarded on timing"):
        check_shares(TrainConfig(scenarios=ScenarioConfig(("timespeak",)), rl=rl))
    check_shares(TrainConfig(scenarios=ScenarioConfig(("repeat",)), rl=rl))
    sound = RLConfig(sound_axes=("voice", "safety"))
    with pytest.raises(MetronomeError, match=r"rl.sound_axes names safety: .* rewarded on timing"):
        check_shares(TrainConfig(scenarios=ScenarioConfig(("repeat",)), rl=sound))


def test_where_nothing_is_said_aloud() -> None:
    with pytest.raises(MetronomeError, match="nothing is said aloud in timespeak"):
        RewardSource.load(ScenarioConfig(("timespeak",)), SourceConfig(listener=True))


def test_without_the_package_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    config, resume, recipe = parse(["--config", RECIPE, "--runs", str(tmp_path), "--source.listener", "true"])
    with pytest.raises(MetronomeError, match="needs pocketsphinx"):
        Run(config, recipe, resume)
    assert not list(tmp_path.iterdir())


def test_a_table_of_expert_play(ear: Listener) -> None:
    """All that the expert says in full is whole; a listener who hears "four" always gets the fours right."""
    scenarios = ScenarioConfig(("repeat",), settings={"repeat": RepeatSettings(words=("four", "seven"))})
    config, bank, episodes = TrainConfig(scenarios=scenarios), SpeechBank.open(), []
    for seed in range(4):
        item = scenarios.scenario("repeat", "held_out", seed, bank)
        _, actions, facts = enact(item, scenarios.expert(item, generator("expert", item.id), mistake_scale=0))
        episodes.append(replace(some_episode(), scenario=item.id, facts=facts.to_json(), actions=tuple(actions)))
    row = measure(3, "d", episodes, config, ear, free=False)
    assert (row.step, row.family, row.weights_digest, row.free) == (3, "repeat", "d", None)
    assert row.score == Share(1.0, 0.0) and row.words >= row.whole == sum(n for n, _ in row.by_word.values()) > 8
    assert row.by_word["four"][0] == row.by_word["four"][1] > 0 == row.by_word["seven"][1] < row.by_word["seven"][0]
    assert row.understood is not None and row.understood.mean == row.by_word["four"][1] / row.whole
    assert row.confused == {"seven: four": row.by_word["seven"][0]}
    assert row.level_error_db is not None and row.level_error_db.mean < 1e-3  # the level that is asked for
    assert table([row]).row_count == 1
    judged = RewardSource(scenarios, "rules", [], {"repeat": ear}).judge(episodes)
    cost = sum(rewards.sum(UNDERSTOOD) for rewards in judged.rules)
    assert (
        cost == -row.by_word["seven"][0] and sum(len(ear.words(e.actions, parts=False)) for e in episodes) == row.words
    )
    without = RewardSource(scenarios, "rules", []).judge(episodes)
    for one, other in zip(judged.rules, without.rules, strict=True):
        assert set(one.axes) == {*other.axes, UNDERSTOOD} and one.total < other.total
    assert [s.value for s in judged.scores] == [s.value for s in without.scores]  # it is no part of the score


def test_a_share_by_hand() -> None:
    """Two scenarios, of 1 right of 2 and 3 right of 3: 4 / 5; residuals -0.6 and 0.6."""
    share = Share.of([[1.0, 0.0], [1.0, 1.0, 1.0]])
    assert share is not None and share.mean == 0.8
    assert share.interval == pytest.approx(1.96 * (0.72 * 2) ** 0.5 / 5)
    assert Share.of([]) is None and Share.of([[], []]) is None
