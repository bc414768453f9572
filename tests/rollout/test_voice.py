"""Sessions of a model with a voice: what they say is learnt from bit for bit, and they hear themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset, with_voice
from model.inputs import Inputs
from model.voice.config import BANDS, FRAMES, VoiceConfig
from model.weights import checkpoint
from rl.audit.replay.comparable import incomparable
from rl.step.gradient import Gradient, gradient_of
from rl.step.identity import Evidence, NotComparableError, NotEqualError, check_comparable, check_identity
from rollout.engines.embedded import SessionEngine
from rollout.record.episode import (
    TEXT,
    VOICE,
    Episode,
    Stream,
    check_sound,
    check_tensors,
    load_episodes,
    save_episodes,
    sounds,
    tensors,
)
from rollout.record.transcript import from_observations
from rollout.turn.action import GO_ON, LISTEN, Action, Mode, speak
from rollout.turn.grammar import OWN_ROWS, Grammar
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary
from tests.kernels.contract import generator
from tests.support.models import speaking_model

CHUNKS = 8


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return speaking_model()


def observations(seed: int = 0) -> list[Observation]:
    return [Observation(0.1 * torch.randn(3200, generator=generator(100 * seed + k))) for k in range(CHUNKS)]


def engine_of(model: InteractionModel, slots: int = 6) -> SessionEngine:
    return SessionEngine(model, Vocabulary.of(model), slots=slots, max_tokens=200)


def played(model: InteractionModel, keys: list[int], together: bool = True) -> list[Episode]:
    """One episode a key, all of one user; in one engine's batch or one after another."""
    if not together:
        return [one for key in keys for one in played(model, [key])]
    engine = engine_of(model)
    sessions = [engine.open(key) for key in keys]
    for heard in observations():
        engine.append(sessions, [heard] * len(sessions))
    return [
        s.episode(scenario="some/train/0", rollout=i if together else 0, seed=0, facts={})
        for i, s in enumerate(sessions)
    ]


@pytest.fixture(scope="module")
def episodes(model: InteractionModel) -> list[Episode]:
    found = played(model, [1, 2, 3])
    assert all(e.voice is not None and 1 < len(e.voice.chunk) < CHUNKS for e in found)
    return found


def learned(model: InteractionModel, episodes: list[Episode], micro_batch: int = 2) -> Gradient:
    weights = [torch.ones(len(e.text.chunk)) for e in episodes]
    sound = [torch.ones(len(e.voice.chunk)) for e in episodes if e.voice is not None]
    return gradient_of(model, episodes, weights, Vocabulary.of(model).classes, 1.0, micro_batch, sound_weights=sound)


def check(model: InteractionModel, episodes: list[Episode], micro_batch: int = 2) -> int:
    gradient = learned(model, episodes, micro_batch)
    return check_identity(Evidence(0, episodes, *gradient.choices(), micro_batch)).num_tokens


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_sampler_and_learner_are_one_function(
    model: InteractionModel, episodes: list[Episode], micro_batch: int
) -> None:
    choices = sum(len(s.chunk) for e in episodes for s in e.streams.values())
    assert check(model, episodes, micro_batch) == choices


def test_a_session_does_not_depend_on_the_others(model: InteractionModel, episodes: list[Episode]) -> None:
    for one, alone in zip(episodes, played(model, [1, 2, 3], together=False), strict=True):
        assert all(torch.equal(x, tensors(alone)[name]) for name, x in tensors(one).items())


def test_forks_part_when_their_sound_does(model: InteractionModel) -> None:
    """Forks sample other sound after the same words; from the next chunk on they have a past of their own, each as if
    it had been alone."""
    engine, heard = engine_of(model), observations()
    first = engine.open(1)
    engine.append([first], heard[:1])
    others = [engine.fork(first, key) for key in (1, 5, 6, 7)]
    for one in heard[1:]:
        engine.append([first, *others], [one] * 5)
    found = [s.episode(scenario="some/train/0", rollout=0, seed=0, facts={}) for s in (first, *others)]
    same = tensors(found[0]), tensors(found[1])  # of one key
    assert all(torch.equal(x, same[1][name]) for name, x in same[0].items())
    assert check(model, found) > 0
    assert torch.equal(tensors(played(model, [1])[0])["voice.payload"], tensors(found[0])["voice.payload"])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(7)), x[0, 1, 7] + 0.01),
        lambda x: x[:, [1, 0, 2]],
    ],
)
def test_other_sound_is_found_and_named(
    model: InteractionModel, episodes: list[Episode], change: Callable[[Tensor], Tensor]
) -> None:
    """A number of one step, or the steps in another order; and with it what is heard of it afterwards."""
    one = episodes[0]
    assert one.voice is not None and one.voice.payload is not None
    wrong = replace(one, streams=dict(one.streams) | {"voice": replace(one.voice, payload=change(one.voice.payload))})
    with pytest.raises(NotEqualError, match=rf"the sound of chunk {int(one.voice.chunk[0])}: "):
        check(model, [wrong])


def test_control_a_sum_in_another_order_is_found(
    model: InteractionModel, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.voice import chain

    def halves(schedule: chain.Schedule, x: Tensor, clean: Tensor) -> Tensor:
        return (chain_logprob(schedule, x.flip(2), clean.flip(2)) + chain_logprob(schedule, x, clean)) / 2

    chain_logprob = chain._logprob
    monkeypatch.setattr(chain, "_logprob", halves)
    with pytest.raises(NotEqualError, match="the sound of chunk"):
        check(model, episodes)


def test_the_model_hears_itself(model: InteractionModel, episodes: list[Episode]) -> None:
    """What was said is in the next chunk's rows, and changes what is sampled after it."""
    one, senses = episodes[0], model.senses
    assert one.voice is not None
    rows = (one.tokens == senses.own).nonzero()[:, 0]
    said = [k for k in one.voice.chunk.tolist() if k < CHUNKS - 1]
    assert len(rows) == OWN_ROWS * len(said) == len(one.own)
    inputs = Inputs.cat([one], senses)
    with torch.no_grad():
        hidden = model(inputs)
        deaf = model(replace(inputs, own=torch.zeros_like(inputs.own)))
    first = int(rows[0])
    assert torch.equal(hidden[:first], deaf[:first]) and not torch.equal(hidden[first], deaf[first])


def test_gradient_reaches_head_and_backbone(model: InteractionModel, episodes: list[Episode]) -> None:
    """Of the sound alone: words have no weight."""
    weights = [torch.zeros(len(e.text.chunk)) for e in episodes]
    sound = [torch.ones(len(e.voice.chunk)) for e in episodes if e.voice is not None]
    gradient = gradient_of(model, episodes, weights, Vocabulary.of(model).classes, 1.0, 3, sound_weights=sound)
    reached = {
        name for (name, _), g in zip(model.named_parameters(), gradient.parameters, strict=True) if bool(g.any())
    }
    assert {n for n, _ in model.named_parameters() if n.startswith(("voice_head.", "model.audio_tower."))} <= reached
    assert any(n.startswith("model.language_model.layers.0.") for n in reached) and "lm_head.weight" not in reached


def test_episodes_with_sound_come_back_from_files(
    model: InteractionModel, episodes: list[Episode], tmp_path: Path
) -> None:
    save_episodes(tmp_path / "e", episodes)
    back = load_episodes(tmp_path / "e")
    for one, other in zip(episodes, back, strict=True):
        check_tensors(other)
        assert all(torch.equal(x, tensors(other)[name]) for name, x in tensors(one).items())
        for action, again in zip(one.actions, other.actions, strict=True):
            assert action == again and (action.sound is None) == (again.sound is None) == (not action.speaks)
            assert action.sound is None or torch.equal(action.sound, again.sound)
    grammar = engine_of(model).grammar
    assert incomparable(back[0], back[0].weights_digest, 1.0, grammar, model.sound_steps) is None
    moved = replace(back[0].streams["voice"], sampled_at=back[0].streams["voice"].sampled_at - 1)
    reason = incomparable(
        replace(back[0], streams=dict(back[0].streams) | {"voice": moved}),
        back[0].weights_digest,
        1.0,
        grammar,
        model.sound_steps,
    )
    assert reason is not None and "sampled positions" in reason[1]


def test_sound_that_is_missing_or_of_another_model_is_not_compared(model: InteractionModel) -> None:
    """An episode that speaks in its last chunk alone has no row of own sound that would tell."""
    one = played(model, [1])[0]
    assert one.voice is not None and one.voice.payload is not None
    steps, grammar = model.sound_steps, engine_of(model).grammar

    def with_voice(voice: Stream | None, **changes: Any) -> Episode:
        streams = {TEXT: one.text} | ({} if voice is None else {VOICE: voice})
        return replace(one, streams=streams, **changes)

    shorter = replace(one.voice, payload=one.voice.payload[:, 1:])
    fewer = replace(one.voice, **{name: x[:-1] for name, x in vars(one.voice).items()})
    empty = replace(one.voice, **{name: x[:0] for name, x in vars(one.voice).items()})
    silent = (LISTEN,) * CHUNKS
    wrong = {
        "missing": with_voice(None),
        "missing of the last chunk": with_voice(fewer),
        "empty": with_voice(empty, actions=silent),
        "of silence": with_voice(one.voice, actions=silent),
        "of fewer steps": with_voice(shorter),
    }
    for name, episode in wrong.items():
        with pytest.raises(ValueError, match="sound"):
            check_sound(episode, steps)
        with pytest.raises(NotComparableError, match="sound"):
            check_comparable([episode], one.contract_id, one.weights_digest, steps)
        found = incomparable(episode, one.weights_digest, 1.0, grammar, steps)
        assert found is not None and "sound" in found[1], name
    with pytest.raises(ValueError, match="samples sound in 0"):
        check_sound(one, None)
    check_sound(one, steps)
    check_comparable([one], one.contract_id, one.weights_digest, steps)  # the controls
    assert incomparable(one, one.weights_digest, 1.0, grammar, steps) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sound_that_is_no_number_is_refused(episodes: list[Episode], value: float) -> None:
    one = episodes[0]
    assert one.voice is not None and one.voice.payload is not None
    payload = one.voice.payload.clone()
    payload[0, 1, 3] = value
    wrong = replace(one, streams=dict(one.streams) | {"voice": replace(one.voice, payload=payload)})
    with pytest.raises(ValueError, match="sound of an episode"):
        check_tensors(wrong)


def test_a_demonstration_has_the_tokens_of_a_session(model: InteractionModel, episodes: list[Episode]) -> None:
    grammar = engine_of(model).grammar
    for one in episodes:
        written = from_observations(observations(), one.actions, grammar)
        assert torch.equal(written.tokens, one.tokens) and torch.equal(written.own, one.own)
        assert one.voice is not None and written.voice is not None
        assert torch.equal(written.voice.sampled_at, one.voice.sampled_at)
        assert torch.equal(written.sound, sounds(one.voice))


SOUND = torch.zeros(FRAMES, BANDS)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (speak("four"), "chunk 0 speaks, but has no sound"),
        (
            Action(Mode.SPEAK, ("four",), SOUND[:-1]),
            r"sound of chunk 0 is \[19, 80\], need finite float32 \[20, 80\]",
        ),
        (Action(Mode.SPEAK, ("four",), SOUND.double()), r"need finite float32"),
        (Action(Mode.SPEAK, (), SOUND + math.nan), "need finite float32"),
    ],
)
def test_targets_of_another_form_are_refused(model: InteractionModel, action: Action, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_observations(observations()[:1], [action], engine_of(model).grammar)


def test_who_has_no_voice_cannot_go_on() -> None:
    with pytest.raises(ValueError, match="says 0 words, need 1 to 1"):
        Grammar(Vocabulary.build(256), 1).write(GO_ON)
    with pytest.raises(ValueError, match="cannot have sound"):
        Action(Mode.LISTEN, (), SOUND)
    assert LISTEN.sound is None


def test_a_voice_is_stored_with_its_model(model: InteractionModel, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "m")
    back = checkpoint.load(tmp_path / "m")
    assert back.voice_head is not None and back.voice_head.config == VoiceConfig(width=32, blocks=1, steps=2)
    assert checkpoint.weights_digest(back) == checkpoint.weights_digest(model)
    packed = checkpoint.load(tmp_path / "m", keep_weights=False)
    said, again = (tensors(played(m, [1])[0])["voice.payload"] for m in (model, packed))
    assert torch.equal(said, again)
    fresh = InteractionModel(with_voice(preset("nano"), VoiceConfig(width=64)))
    with pytest.raises(MetronomeError, match="voice_config"):
        checkpoint.load_into(fresh, tmp_path / "m")
