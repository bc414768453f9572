"""What the user of repeat says: reproducible to the byte, reactive to what is heard, and in noise of stated levels."""

import hashlib
import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kernels.errors import MetronomeError
from model.tokenizer import load_tokenizer
from model.voice.level import loudness_db
from reward.rules.repeat import RepeatSettings
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.repeat import (
    Prompt,
    RepeatConfig,
    RepeatExpert,
    RepeatFacts,
    RepeatScenario,
    said,
    sound_of,
)
from rollout.turn.action import CHUNK_SAMPLES, LISTEN, Action, speak
from rollout.turn.utterance import audible
from rollout.world.base import Script
from rollout.world.lexicon import lexicon
from rollout.world.speech import SpeechBank

WORDS = ("four", "seven", "echo")
CALM = {"words": WORDS, "interruptions": 0.0, "first": (1, 1), "gap": (2, 2)}
LEVEL = -25.0


def repeat(**settings: Any) -> ScenarioConfig:
    return ScenarioConfig(("repeat",), {"repeat": RepeatSettings(**settings)})


def scenario(bank: SpeechBank, split: Any = "train", seed: int = 0, **settings: Any) -> RepeatScenario:
    made = repeat(**settings).scenario("repeat", split, seed, bank)
    assert isinstance(made, RepeatScenario)
    return made


def play(item: RepeatScenario, script: Script = lambda k: LISTEN) -> tuple[np.ndarray, RepeatFacts]:
    observed, _, facts = enact(item, lambda user: script)
    assert isinstance(facts, RepeatFacts)
    return np.concatenate([one.audio.numpy() for one in observed]), facts


def from_chunk(first: int, actions: Iterable[Action]) -> Script:
    planned = dict(enumerate(actions, first))
    return lambda k: planned.get(k, LISTEN)


def test_same_id_same_bytes(bank: SpeechBank) -> None:
    audio, facts = play(scenario(bank, seed=7))
    np.random.seed(0)  # a global generator has no influence
    again, same = play(scenario(bank, seed=7))
    assert np.array_equal(audio, again) and facts == same and len(audio) == 40 * CHUNK_SAMPLES
    for split, seed in (("train", 8), ("held_out", 7)):  # the control
        assert not np.array_equal(audio, play(scenario(bank, split, seed))[0])


def test_every_machine_renders_these_bytes(bank: SpeechBank) -> None:
    digest = hashlib.sha256()
    for split in ("train", "held_out"):
        for seed in range(4):
            digest.update(play(scenario(bank, split, seed, **CALM))[0].tobytes())
    assert digest.hexdigest()[:16] == "293545ab3b70affb"


def test_facts_survive_json(bank: SpeechBank) -> None:
    config, facts = repeat(), play(scenario(bank, "held_out", 3))[1]
    stored = json.loads(json.dumps(facts.to_json()))
    assert config.facts(stored) == config.stored_facts(stored) == facts and facts.prompts
    for wrong in ({"prompts": [{"start": -1, "end": 3, "word": "four"}]}, {"target_db": 3.0}, {"noise_db": "loud"}):
        with pytest.raises(MetronomeError, match="facts"):
            config.stored_facts({**stored, **wrong})


def test_every_word_is_said(bank: SpeechBank) -> None:
    known = RepeatConfig().words
    assert len(known) >= 24 and set(known) <= set(lexicon().words) & set(load_tokenizer().get_vocab())
    heard = {planned.word for seed in range(80) for planned in scenario(bank, seed=seed).plan}
    assert heard == set(known)
    some = {planned.word for seed in range(10) for planned in scenario(bank, seed=seed, words=WORDS).plan}
    assert some == set(WORDS)
    plan = scenario(bank, words=WORDS).plan
    assert all(a.word != b.word for a, b in pairwise(plan))


def test_the_noise_has_one_of_the_levels(bank: SpeechBank) -> None:
    """Its RMS, of half a minute that the loop has, is the level; the voice's target rises half as fast."""
    config, found = RepeatConfig(), set()
    for seed in range(20):
        item = scenario(bank, seed=seed)
        nearest = min(config.noise_db, key=lambda level: abs(level - item.noise_db))
        assert abs(item.noise_db - nearest) <= config.noise_spread_db
        assert item.target_db == pytest.approx(config.softest_db + (item.noise_db - config.noise_db[0]) / 2)
        measured = 20 * np.log10(np.sqrt(np.mean(item.noise.astype(float) ** 2)))
        assert measured == pytest.approx(item.noise_db, abs=5), item.id  # some kinds swell
        found.add(nearest)
    assert found == set(config.noise_db)
    assert config.target_db(-10.0) <= 0.0 and config.target_db(-200.0) == config.audible_db


def test_held_out_gains_lie_inside(bank: SpeechBank) -> None:
    gains = {split: [scenario(bank, split, seed).gain for seed in range(40)] for split in ("train", "held_out")}
    assert min(gains["train"]) < min(gains["held_out"]) and max(gains["held_out"]) < max(gains["train"])


def test_the_words_are_where_the_facts_say(bank: SpeechBank) -> None:
    item = scenario(bank, seed=1, **CALM, noise_db=(-100.0,), noise_spread_db=0.0)
    audio, facts = play(item)
    loud = np.abs(audio.reshape(40, -1)).max(1) > 0.003
    said_in = {k for prompt in facts.prompts for k in range(prompt.start, prompt.end + 1)}
    edges = {prompt.start for prompt in facts.prompts} | {prompt.end for prompt in facts.prompts}
    assert said_in - edges <= set(np.flatnonzero(loud)) <= said_in and len(facts.prompts) >= 3


def test_the_next_word_comes_when_the_answer_has_ended(bank: SpeechBank) -> None:
    item = scenario(bank, **CALM)
    first = play(item)[1].prompts[0]
    sound = sound_of("four", LEVEL)
    answer = first.end + 2
    for script, next_start in (
        (lambda k: LISTEN, first.end + 1 + item.patience),
        (from_chunk(answer, said("four", sound)), answer + len(sound) + 2),
        (from_chunk(answer, [speak("four")]), answer + 1 + 2),  # without a voice the action is heard
        (from_chunk(answer, said("four", sound_of("four", -300.0))), first.end + 1 + item.patience),  # silence is not
        (from_chunk(first.start, said("four", sound[:1])), first.end + 1 + item.patience),  # nor before the word's end
        (from_chunk(answer, said("four", sound[:1] * 30)), answer + item.tolerance),  # the user talks over it
    ):
        facts = play(item, script)[1]
        assert facts.prompts[0] == first and facts.prompts[1].start == next_start
    assert first.start == 1


def test_some_words_interrupt(bank: SpeechBank) -> None:
    for seed in range(6):
        item = scenario(bank, seed=seed, **{**CALM, "interruptions": 1.0})
        first = item.plan[0].at(1)
        sound, onset = sound_of(first.word, LEVEL), first.end + 2
        facts = play(item, from_chunk(onset, said(first.word, sound)))[1]
        assert facts.prompts[1].start == onset + 1
        mumbled = (*sound_of(first.word, -300.0)[:1], *sound)  # nothing is heard of the first chunk
        assert play(item, from_chunk(onset, said(first.word, mumbled)))[1].prompts[1].start == onset + 2
    plans = [planned for seed in range(60) for planned in scenario(bank, seed=seed).plan]
    share = sum(planned.interrupts for planned in plans) / len(plans)
    assert 0.15 < share < 0.35 and not any(scenario(bank, seed=seed).plan[0].interrupts for seed in range(9))


def test_rollouts_that_share_a_scenario_do_not_disturb_each_other(bank: SpeechBank) -> None:
    shared = scenario(bank, seed=1, **CALM)
    alone = play(shared)[0].reshape(40, -1)
    answered, quiet = shared.user(), shared.user()
    heard: Action | None = None
    for k in range(40):
        answered.next_chunk(heard)
        assert np.array_equal(quiet.next_chunk(None if k == 0 else LISTEN).audio.numpy(), alone[k])
        prompts = answered.facts().prompts
        heard = speak("four") if prompts and k == prompts[-1].end + 1 else LISTEN
    assert len(answered.facts().prompts) > len(quiet.facts().prompts)


def test_the_expert_answers_and_stops(bank: SpeechBank) -> None:
    """The right word, one chunk after the user's, at the level that the noise asks for; silent one chunk after the user
    has begun to interrupt."""
    config = repeat(words=WORDS, interruptions=0.6)
    cut = 0
    for seed in range(12):
        item = config.scenario("repeat", "train", seed, bank)
        _, actions, facts = enact(item, config.expert(item, np.random.default_rng(0), mistake_scale=0))
        assert isinstance(facts, RepeatFacts)
        for prompt, following in zip(facts.prompts, (*facts.prompts[1:], Prompt(40, 40, "")), strict=True):
            first = prompt.end + RepeatExpert.DELAY
            sound = sound_of(prompt.word, facts.target_db)
            last = min(first + len(sound), following.start + RepeatExpert.STOP, 40)
            cut += last - first < len(sound)
            for k in range(first, last):
                action = actions[k]
                assert action.words == ((prompt.word,) if k == first else ()) and action.sound is not None
                assert np.array_equal(action.sound.numpy(), sound[k - first].numpy())
            assert all(actions[k] == LISTEN for k in range(last, min(following.end + 1, 40)))
    assert cut >= 3


def test_sound_of_a_word_has_the_level(bank: SpeechBank) -> None:
    for word in WORDS:
        assert lexicon().level_db(word) == max(float(loudness_db(chunk)) for chunk in lexicon().target(word))
        for level in (-20.0, -35.0):
            assert max(float(loudness_db(chunk)) for chunk in sound_of(word, level)) == pytest.approx(level, abs=1.0)
            assert audible(said(word, sound_of(word, level))[0], -50.0)
    assert not audible(said("four", sound_of("four", -60.0))[0], -50.0) and not audible(LISTEN, -50.0)
    assert audible(speak("four"), -50.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"words": ("four", "xyzzy")}, r"scenarios\.repeat\.words: the lexicon has no sound of 'xyzzy'; choose from"),
        ({"chunks": 3}, r"scenarios\.repeat\.chunks is 3, too few: the first word of seed 0 ends in chunk"),
    ],
)
def test_settings_that_cannot_be_played_are_refused(bank: SpeechBank, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(MetronomeError, match=says):
        scenario(bank, **settings)


def test_display(bank: SpeechBank) -> None:
    facts = RepeatFacts(40, ("four", "echo"), -55.2, -27.6, (Prompt(3, 5, "four"), Prompt(9, 9, "echo")))
    assert facts.title() == "repeat: 2 words, noise at -55 dB, voice at -28 dB"
    assert [(span.first, span.last, span.text, span.letters) for span in facts.spans()] == [
        (3, 5, "four", "wwW"),
        (9, 9, "echo", "W"),
    ]
