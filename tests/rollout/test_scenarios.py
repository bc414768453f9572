"""Scenarios: reproducible, distinct, reactive, and facts that agree with the audio."""

import json
from typing import Any

import numpy as np
import pytest

from kernels.errors import MetronomeError
from model.senses.audio import SAMPLE_RATE_HZ
from reward.rules.timespeak import TimespeakSettings
from reward.rules.turn_taking import TurnTakingSettings
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.timespeak import REMINDER, TimespeakFacts
from rollout.scenarios.turn_taking import Turn, TurnTakingFacts
from rollout.turn.action import CHUNK_SAMPLES, LISTEN, Action, Mode, speak
from rollout.turn.observation import stack_audio
from rollout.world.base import Scenario, User
from rollout.world.sound import LOOP_SECONDS, NOISES, Noise, SoundConfig, amplitude, noise
from rollout.world.speech import SpeechBank

CONFIG = ScenarioConfig()


def timespeak(**settings: Any) -> ScenarioConfig:
    return ScenarioConfig(settings={"timespeak": TimespeakSettings(**settings)})


def turn_taking(**settings: Any) -> ScenarioConfig:
    return ScenarioConfig(settings={"turn_taking": TurnTakingSettings(**settings)})


QUIET = SoundConfig(snr_db=(80.0, 80.0))  # noise too faint to blur where speech is


def play(user: User, actions: list[Action]) -> np.ndarray:
    heard = [None, *actions[:-1]]
    return stack_audio([user.next_chunk(action) for action in heard]).numpy()


def seed_with(bank: SpeechBank, family: str, config: ScenarioConfig, wanted) -> Scenario:
    return next(s for s in (config.scenario(family, "train", i, bank) for i in range(200)) if wanted(s))


@pytest.mark.parametrize("family", CONFIG.families)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_same_id_same_bits(bank: SpeechBank, family: str, split: str) -> None:
    actions = [LISTEN] * 20 + [speak(REMINDER)] * 5 + [LISTEN] * 35
    first = CONFIG.scenario(family, split, 7, bank)
    again = CONFIG.scenario(family, split, 7, SpeechBank.open())
    assert first.id == f"{family}/{split}/7" and first.chunks == 60
    np.random.seed(0)  # a global generator has no influence
    one, two = first.user(), first.user()
    audio = play(one, actions)
    assert audio.shape == (60, CHUNK_SAMPLES) and audio.dtype == np.float32 and np.abs(audio).max() <= 1.0
    assert np.array_equal(audio, play(two, actions))
    assert np.array_equal(audio, play(again.user(), actions))
    assert one.facts() == two.facts()


@pytest.mark.parametrize("family", CONFIG.families)
def test_other_seed_or_split_other_bits(bank: SpeechBank, family: str) -> None:
    silent = [LISTEN] * 60
    audio = play(CONFIG.scenario(family, "train", 7, bank).user(), silent)
    for split, seed in (("train", 8), ("held_out", 7)):
        assert not np.array_equal(audio, play(CONFIG.scenario(family, split, seed, bank).user(), silent))


def test_rollouts_that_share_a_scenario_do_not_disturb_each_other(bank: SpeechBank) -> None:
    shared = seed_with(bank, "timespeak", CONFIG, lambda s: s.stop_after is not None)
    alone = play(shared.user(), [LISTEN] * 60)
    spoken, silent = shared.user(), shared.user()
    heard = None
    for k in range(60):
        spoken.next_chunk(heard)
        assert np.array_equal(silent.next_chunk(None if k == 0 else LISTEN).audio, alone[k])
        heard = speak(REMINDER)
    assert spoken.facts() != silent.facts()  # the first one was made to say stop


@pytest.mark.parametrize("family", CONFIG.families)
def test_facts_survive_json(bank: SpeechBank, family: str) -> None:
    user = CONFIG.scenario(family, "held_out", 3, bank).user()
    play(user, [LISTEN] * 60)
    stored = json.loads(json.dumps(user.facts().to_json()))
    assert CONFIG.facts(stored) == user.facts()
    with pytest.raises(ValueError, match="no scenario family is called 'chess': the recipe has timespeak, turn_taking"):
        CONFIG.facts({**stored, "family": "chess"})


def test_user_refuses_a_wrong_order_of_calls(bank: SpeechBank) -> None:
    user = CONFIG.scenario("timespeak", "train", 0, bank).user()
    with pytest.raises(ValueError, match="chunk 0"):
        user.next_chunk(LISTEN)
    user.next_chunk(None)
    with pytest.raises(ValueError, match="chunk 1"):
        user.next_chunk(None)
    for _ in range(59):
        user.next_chunk(LISTEN)
    with pytest.raises(ValueError, match="chunk 60 does not exist"):
        user.next_chunk(LISTEN)
    with pytest.raises(ValueError, match="no scenario family is called 'chess'"):
        CONFIG.scenario("chess", "train", 0, bank)


def test_action_says_words_only_when_it_speaks_or_delegates() -> None:
    """Speaking without a word goes on with the last one, which takes a voice (`Grammar.write`)."""
    assert Action(Mode.SPEAK).speaks
    with pytest.raises(ValueError, match="mode 'delegate'"):
        Action(Mode.DELEGATE)
    with pytest.raises(ValueError, match="mode 'listen'"):
        Action(Mode.LISTEN, ("no",))


def test_noises_of_the_splits_differ() -> None:
    assert not set(NOISES["train"]) & set(NOISES["held_out"])
    for split, kinds in NOISES.items():
        for kind in kinds:
            loop = noise(kind, split)
            np.testing.assert_allclose(np.mean(loop.astype("f8") ** 2), 1.0, rtol=1e-5)


def spectrum(loop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Hz, power) of its bins, in bands of 32 each (1 Hz)."""
    power = np.abs(np.fft.rfft(loop.astype("f8"))[:-1]) ** 2
    return np.arange(len(power) // 32) + 0.5, power.reshape(-1, 32).mean(1)


@pytest.mark.parametrize(("split", "name"), [(split, name) for split in NOISES for name in NOISES[split]])
def test_noises_have_their_colour(split: str, name: str) -> None:
    """The spectrum falls by the tilt, nothing is below 40 Hz, and samples are distributed as a sum of many is."""
    kind, loop = NOISES[split][name], noise(name, split)
    assert loop.dtype == np.float32 and len(loop) == LOOP_SECONDS * SAMPLE_RATE_HZ and not loop.flags.writeable
    hz, power = spectrum(loop)
    lowest = 30 if kind.swells else 40  # swells spread each bin by a few Hz
    assert power[hz < lowest].sum() < 1e-9 * power.sum()
    if kind.hum_hz is None:
        some = (hz > 100) & (hz < 7900)
        slope, _ = np.polyfit(np.log(hz[some]), np.log(power[some]), 1)
        assert slope == pytest.approx(-2 * kind.tilt, abs=0.03)
        kurtosis = np.mean(loop.astype("f8") ** 4)
        assert 4 < kurtosis < 5 if kind.swells else kurtosis == pytest.approx(3, abs=0.1)
    else:
        peaks = hz[np.argsort(power)[-6:]] // 1
        assert set(peaks) == {kind.hum_hz * n for n in range(1, 7)}
    # It repeats without a click: the step from the end to the beginning is one like any other.
    assert abs(float(loop[0] - loop[-1])) < 1.2 * np.abs(np.diff(loop)).max()


def test_tilts_are_quarters() -> None:
    with pytest.raises(ValueError, match="multiple of 1/4"):
        Noise(tilt=0.3)


def test_amplitudes() -> None:
    assert [amplitude(db) for db in (0.0, 20.0, -20.0, 40.0)] == [1.0, 10.0, 0.1, 100.0]
    assert amplitude(6.0) == 1.9952623149688795  # 10^0.3 to 53 bits
    assert amplitude(6.0) != amplitude(6.000000000000002)


def speech_chunks(audio: np.ndarray) -> np.ndarray:
    """Which chunks hold speech, where the noise is 80 dB below it."""
    return np.abs(audio).max(axis=1) > 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_timespeak_facts_agree_with_the_audio(bank: SpeechBank, seed: int) -> None:
    item = timespeak(sound=QUIET, filler=0.0).scenario("timespeak", "train", seed, bank)
    user = item.user()
    loud = speech_chunks(play(user, [LISTEN] * 60))
    facts = user.facts()
    assert isinstance(facts, TimespeakFacts)
    assert facts.interval == 5 * ["zero", "one", "two", "three", "four"].index(facts.number)
    assert facts.request_start <= facts.number_end <= facts.request_end
    assert np.flatnonzero(loud).tolist() == list(range(facts.request_start, facts.request_end + 1))
    assert facts.stop_end is None  # nothing was said, so there was nothing to stop


def test_timespeak_user_stops_after_the_reminders_it_heard(bank: SpeechBank) -> None:
    config = timespeak(sound=QUIET, stop=1.0, stop_after=(2, 2), seconds=(1,))
    item = config.scenario("timespeak", "train", 1, bank)
    user = item.user()
    audio, heard = [], None
    for k in range(60):
        audio.append(user.next_chunk(heard).audio)
        heard = speak(REMINDER) if k in (20, 30) else speak("four") if k == 25 else LISTEN
    facts = user.facts()
    # The second reminder sounds in chunk 30 and is heard before chunk 31; the stop begins 1 to 3 chunks later.
    assert 32 <= facts.stop_start <= 34 and facts.stop_start < facts.stop_end <= facts.stop_start + 5
    loud = np.flatnonzero(speech_chunks(np.stack(audio)))
    assert loud[loud > facts.request_end].tolist() == list(range(facts.stop_start, facts.stop_end + 1))


def test_timespeak_covers_all_numbers_and_stops(bank: SpeechBank) -> None:
    items = [CONFIG.scenario("timespeak", "train", i, bank) for i in range(200)]
    assert {item.number for item in items} == {"one", "two", "three", "four"}
    assert 0.3 < np.mean([item.stop_after is not None for item in items]) < 0.7
    assert 0.3 < np.mean([len(item.request) == 3 for item in items]) < 0.7


@pytest.mark.parametrize("seed", range(20))
def test_turn_taking_facts_agree_with_the_audio(bank: SpeechBank, seed: int) -> None:
    config = turn_taking(sound=QUIET)
    user = config.scenario("turn_taking", "train", seed, bank).user()
    audio = play(user, [LISTEN] * 60)
    facts = user.facts()
    assert isinstance(facts, TurnTakingFacts)
    loud = speech_chunks(audio)
    for turn in facts.turns:
        assert not turn.interrupts  # nobody was speaking
        assert loud[turn.start] and loud[turn.end]
        for first, last in turn.pauses:
            assert turn.start < first <= last < turn.end and not loud[first : last + 1].any()
    inside = [k for turn in facts.turns for k in range(turn.start, turn.end + 1)]
    assert set(np.flatnonzero(loud)) <= set(inside)
    # Without a reply the user loses patience and goes on.
    for turn, following in zip(facts.turns, facts.turns[1:], strict=False):
        assert following.start == turn.end + TurnTakingSettings().patience + 1


def replies(bank: SpeechBank, item: Scenario, chunks: int) -> TurnTakingFacts:
    """The facts when the model replies 2 chunks after every turn, for at most ``chunks`` chunks."""
    user = item.user()
    heard = None
    for k in range(item.chunks):
        user.next_chunk(heard)
        end = user.facts().turns[-1].end
        heard = speak("yes") if end + 2 <= k < end + 2 + chunks else LISTEN
    return user.facts()


def test_turn_taking_user_interrupts_reactively(bank: SpeechBank) -> None:
    config = turn_taking(interrupts=1.0, interrupt_after=(3, 3), sentences=(1, 1))
    item = config.scenario("turn_taking", "train", 5, bank)
    facts = replies(bank, item, chunks=6)
    assert facts.turns[1].start == facts.turns[0].end + 2 + 3 and facts.turns[1].interrupts
    # A reply that is over before the interruption is not interrupted: the user waits, then goes on.
    facts = replies(bank, item, chunks=2)
    assert facts.turns[1].start == facts.turns[0].end + 4 + item.plan[0].gap and not facts.turns[1].interrupts


def test_turn_taking_user_cuts_in_on_an_endless_reply(bank: SpeechBank) -> None:
    config = turn_taking(interrupts=0.0, sentences=(1, 1), sentence_s=(0.7, 1.3))
    item = config.scenario("turn_taking", "train", 5, bank)
    facts = replies(bank, item, chunks=30)
    assert facts.turns[1] == Turn(facts.turns[0].end + 2 + 9, facts.turns[1].pauses, facts.turns[1].end, True)


def test_held_out_uses_other_fillers(bank: SpeechBank) -> None:
    heard = {
        split: {
            clip.file
            for i in range(100)
            for turn in CONFIG.scenario("turn_taking", split, i, bank).plan
            for _, clip in turn.clips[:-1]
        }
        for split in ("train", "held_out")
    }
    assert len(heard["train"]) > 20 and not heard["train"] & heard["held_out"]


def test_too_short_episodes_are_refused(bank: SpeechBank) -> None:
    with pytest.raises(MetronomeError, match=r"timespeak\.chunks is 5, too few"):
        timespeak(chunks=5).scenario("timespeak", "train", 0, bank)
    with pytest.raises(MetronomeError, match=r"turn_taking\.chunks is 20, too few"):
        for seed in range(20):
            turn_taking(chunks=20).scenario("turn_taking", "train", seed, bank)
