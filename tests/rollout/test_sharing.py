"""Sessions with one past are computed once, to the same bits as apart; they part in time, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import Tensor

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from rollout.bench.sharing import UnsharedEngine
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.seeds import session_key
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank
from tests.support import sessions
from tests.support.episodes import unequal_fields
from tests.support.models import fresh_model
from tests.support.sessions import record

GROUP = 4


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return fresh_model()


def make_engine(model: InteractionModel, slots: int = GROUP) -> SessionEngine:
    return SessionEngine(
        model,
        Vocabulary.build(model.vocab),
        slots=slots,
        max_tokens=512,
        words_per_chunk=3,
        keep_hidden=True,
    )


def same(a: Episode, b: Episode) -> bool:
    return not unequal_fields(a, b)


def held(engine: SessionEngine) -> tuple[float, ...]:
    """Sessions open, sessions free, slots used."""
    stats = engine.stats()
    return stats["sessions_open"], stats["sessions_free"], stats["slots_used"]


def sound(*seeds: int) -> list[Observation]:
    return [sessions.sound(seed) for seed in seeds]


@pytest.mark.parametrize("slots", [3 * GROUP, 3])
def test_groups_played_together_equal_separate_sessions(model: InteractionModel, slots: int) -> None:
    """On all fields of all episodes, also where too few slots make a group begin in parts."""
    bank = SpeechBank.open()
    items = [ScenarioConfig().in_turn(i, "train", i, bank) for i in range(3)]
    plays = [Play(item, r) for item in items for r in range(GROUP)]
    # At a low temperature they part late, as those of a trained policy do.
    shared = SessionEngine(model, Vocabulary.build(model.vocab), slots=slots, max_tokens=512)
    apart = UnsharedEngine(model, shared.vocabulary, slots=slots, max_tokens=512)
    ours, theirs = play(shared, plays, 3, 0.05), play(apart, plays, 3, 0.05)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert shared.stats()["rows"] < 0.9 * apart.stats()["rows"]
    assert len({tuple(e.tokens.tolist()) for e in ours}) > len(items)  # they did part
    assert shared.free == slots and shared.state.open_slots == 0


def test_rollouts_without_a_session_are_not_waited_for(model: InteractionModel) -> None:
    item = ScenarioConfig().in_turn(0, "train", 0, SpeechBank.open())
    engine = make_engine(model, slots=1)
    held_by_another = engine.open(0)
    with pytest.raises(MetronomeError, match="1 rollouts wait for a session, but others hold all"):
        play(engine, [Play(item, 0)], 3)
    engine.close(held_by_another)
    assert len(play(engine, [Play(item, 0)], 3)) == 1  # the control


def test_sessions_that_wrongly_stay_together_differ(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a fork of the state that forgets the convolutions' windows, and one that never happens."""

    def together(engine: SessionEngine) -> list[Episode]:
        first = engine.open(session_key(0, "x", 0))
        sessions = [first, *(engine.fork(first, session_key(0, "x", r)) for r in range(1, GROUP))]
        for k in range(10):
            engine.append(sessions, sound(k) * GROUP)
        return [record(s) for s in sessions]

    right = together(make_engine(model))
    assert all(same(a, b) for a, b in zip(right, together(make_engine(model)), strict=True))

    forgetful = make_engine(model)
    fork = forgetful.state.fork

    def fork_without_windows(slot: int) -> int:
        twin = fork(slot)
        for layer in forgetful.state.layers:
            layer.kv_conv[twin] = 0
        return twin

    monkeypatch.setattr(forgetful.state, "fork", fork_without_windows)
    assert not all(same(a, b) for a, b in zip(right, together(forgetful), strict=True))

    stuck = make_engine(model)
    monkeypatch.setattr(stuck, "_unshare", lambda sessions, inputs: None)
    assert not all(same(a, b) for a, b in zip(right, together(stuck), strict=True))


def test_a_slot_is_taken_only_where_sessions_differ(model: InteractionModel) -> None:
    engine = make_engine(model)
    first = engine.open(1, temperature=0.0)  # greedy: what they say never differs
    second, third = engine.fork(first, 2), engine.fork(first, 3)
    engine.append([first, second, third], sound(0, 0, 0))
    assert held(engine) == (3, 1, 1)
    engine.append([third, first, second], sound(1, 2, 1))  # first hears another thing
    assert engine.stats()["slots_used"] == 2
    assert second.slot == third.slot != first.slot
    engine.append([second], sound(3))  # third waits, and must not be carried along
    assert engine.stats()["slots_used"] == 3
    engine.append([third, first], sound(4, 5))

    other = make_engine(model)
    alone = {"first": (0, 2, 5), "second": (0, 1, 3), "third": (0, 1, 4)}
    for name, seeds in alone.items():
        session = other.open(0, temperature=0.0)
        for seed in seeds:
            other.append([session], sound(seed))
        assert same(record(session), record(locals()[name])), name
    assert not same(record(first), record(second))

    for session in (second, first, third):
        engine.close(session)
    assert held(engine) == (0, 4, 0)
    assert engine.free == len([engine.open(i) for i in range(4)])


def test_shared_sessions_count_as_memory_that_they_may_need(model: InteractionModel) -> None:
    engine = make_engine(model, slots=2)
    first = engine.open(1)
    engine.fork(first, 2)
    assert engine.free == 0
    with pytest.raises(Exception, match="all 2 slots are open"):
        engine.open(3)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_inside_a_micro_turn_closes_its_sessions(model: InteractionModel, fails_at: int) -> None:
    """At the prefill and at the first decode step. Sessions outside the call go on with their bits."""
    engine, calls = make_engine(model), 0
    bystander, first = engine.open(1), engine.open(5)
    second = engine.fork(first, 6)
    engine.append([bystander, first, second], sound(0, 1, 1))
    sample = engine.vocabulary.classes.sample_rows

    def failing(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("a kernel failed")
        return sample(*arguments)

    whole = engine.vocabulary
    engine.vocabulary = replace(whole, classes=SimpleNamespace(sample_rows=failing))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        for k in range(20):
            engine.append([first, second], sound(k, k))
    assert calls == fails_at
    engine.vocabulary = whole
    assert first.closed and second.closed and not bystander.closed
    assert held(engine) == (1, 3, 1)
    with pytest.raises(ValueError, match="no whole episode"):
        record(first)
    engine.append([bystander], sound(7))
    other = make_engine(model)
    alone = other.open(1)
    for seed in (0, 7):
        other.append([alone], sound(seed))
    assert same(record(bystander), record(alone))
