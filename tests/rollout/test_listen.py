"""``python -m rollout.listen``: both sides of an episode as sound, where they belong in time."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.senses.audio import HOP, DMel
from model.voice.mel import mel_chunks
from model.voice.sound import LATENCY_SAMPLES
from rollout.heard import from_codes, user_sound
from rollout.listen import main
from rollout.record.episode import VOICE, Episode, save_episodes
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_SAMPLES
from rollout.world.speech import SpeechBank
from tests.support.episodes import FIRST, spoken


@pytest.fixture(scope="module")
def bank() -> SpeechBank:
    return SpeechBank.open()


@pytest.fixture(scope="module")
def word(bank: SpeechBank) -> Tensor:
    """Sound of some chunks, fp32 [N, 20, 80]."""
    return mel_chunks(torch.from_numpy(bank.clips[0].samples.copy()))


Listen = Callable[..., tuple[Tensor, str]]


@pytest.fixture
def listen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Listen:
    def heard(*episodes: Episode, name: str = "", recipe: str = "", more: Sequence[str] = ()) -> tuple[Tensor, str]:
        file, out = tmp_path / "run/episodes/e.safetensors", tmp_path / "x.wav"
        save_episodes(file, episodes)
        if recipe:
            (tmp_path / "run/config.yaml").write_text(recipe)
        try:
            main(["--episode", f"{file}{name}", "--out", str(out), *more])
        except MetronomeError:
            assert not out.exists()
            raise
        samples, rate = soundfile.read(io.BytesIO(out.read_bytes()), dtype="float32")
        assert rate == 16000
        return torch.from_numpy(samples).T, "".join(capsys.readouterr())

    return heard


def test_both_sides_are_in_their_places(bank: SpeechBank, word: Tensor, listen: Listen) -> None:
    one = spoken(bank, word)
    (user, voice), said = listen(one)
    samples = len(one.actions) * CHUNK_SAMPLES
    assert len(user) == samples + CHUNK_SAMPLES + LATENCY_SAMPLES
    expected = user_sound(one, ScenarioConfig(), bank)
    assert expected.abs().max() > 0.1
    assert (user[:samples] - expected).abs().max() <= 1 / 32767 and not user[samples:].any()
    begin = (FIRST + 1) * CHUNK_SAMPLES  # what is sampled in chunk k is heard in chunk k + 1
    end = begin + len(word) * CHUNK_SAMPLES + LATENCY_SAMPLES
    assert not voice[:begin].any() and not voice[end:].any() and voice[begin:end].abs().max() > 0.05
    assert "left, the user: what the model heard" in said.lower() and "from the beginning of chunk k + 1" in said

    def distance(shift: int) -> float:
        return float((mel_chunks(voice[begin + shift : end - LATENCY_SAMPLES + shift]) - word).abs().mean())

    assert distance(LATENCY_SAMPLES) < 0.5 * min(distance(LATENCY_SAMPLES + s) for s in (-1600, 1600)), "30 ms late"


def test_a_side_whose_codes_are_others_is_rebuilt_from_them(bank: SpeechBank, word: Tensor, listen: Listen) -> None:
    one = spoken(bank, word)
    exact, _ = listen(one)
    codes = one.codes.clone()
    codes[40, 7] ^= 1
    rough, said = listen(replace(one, codes=codes))
    assert "rough, rebuilt from dMel codes" in said and "says something else" in said
    assert torch.equal(rough[1], exact[1]) and not torch.equal(rough[0], exact[0])
    samples = len(one.actions) * CHUNK_SAMPLES

    def near(sound: Tensor, codes: Tensor) -> float:
        """Share of the codes of speech that are within one bin."""
        made = DMel.build().codes(sound[None])[0].int()
        return float(((made - codes.int()).abs() <= 1)[codes > 9].float().mean())

    assert near(rough[0, :samples], one.codes) > 0.95
    assert near(from_codes(one.codes.flip(0)), one.codes) < 0.6, "the control: other sound"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Griffin-Lim takes a second an episode."""
    monkeypatch.setattr("rollout.heard.from_codes", lambda codes: torch.zeros(len(codes) * HOP))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("turn_taking/train", "not enough values"),
        ("turn_taking/test/0", "no split is called"),
        ("turn_taking/train/x", "invalid literal"),
        ("turn_taking/train/1", "says something else"),
        ("unheard_of/train/0", "no scenario family"),
    ],
)
def test_another_scenario(bank: SpeechBank, listen: Listen, scenario: str, says: str) -> None:
    _, said = listen(replace(spoken(bank), scenario=scenario))
    assert "rough" in said and says in said and said.count("\n") == 3


@pytest.mark.usefixtures("quick")
def test_recipes_that_are_none_and_families_of_others(bank: SpeechBank, listen: Listen) -> None:
    one = spoken(bank)
    assert "rough" not in listen(one, recipe="scenarios: {families: [turn_taking]}")[1]
    assert "rough" in listen(one, recipe="nothing: 1")[1]
    assert "rough" in listen(one, recipe="scenarios: {families: [timespeak]}")[1]
    short = "scenarios: {families: [turn_taking], turn_taking: {chunks: 50}}"
    assert "the scenario has 50 chunks, the episode 60" in listen(one, recipe=short)[1]
    assert "speech folder /no/such" in listen(one, recipe="scenarios: {}\nspeech_dir: /no/such")[1]
    foreign = "scenarios: {families: [tests.examples.confide:CONFIDE]}"
    assert "Give --trust-families if you trust it" in listen(one, recipe=foreign)[1]
    assert "--trust-families" not in listen(one, recipe=foreign, more=["--trust-families"])[1]


def test_an_episode_without_a_voice(bank: SpeechBank, listen: Listen) -> None:
    (user, voice), said = listen(spoken(bank))
    assert user.any() and not voice.any() and "Right: silent" in said


def test_what_is_beyond_full_scale_is_clipped(bank: SpeechBank, word: Tensor, listen: Listen) -> None:
    assert "clipped" not in listen(spoken(bank, word))[1]
    (_, voice), said = listen(spoken(bank, word + 3))
    assert voice.abs().max() >= 32767 / 32768 and "beyond full scale" in said


def test_episodes_are_found_by_number(bank: SpeechBank, word: Tensor, listen: Listen, tmp_path: Path) -> None:
    both = spoken(bank), spoken(bank, word)
    assert not listen(*both, name="#0")[0][1].any()
    (tmp_path / "x.wav").unlink()
    for name, says in {"#2": "holds 2 episodes, counted from 0", "": "name one", "x#0": "cannot be read"}.items():
        with pytest.raises(MetronomeError, match=says):
            listen(*both, name=name)
    assert listen(*both, name="#1")[0][1].any()


def test_contradictions_and_damage(bank: SpeechBank, word: Tensor, listen: Listen, tmp_path: Path) -> None:
    one = spoken(bank, word)
    voice = one.voice
    assert voice is not None and voice.payload is not None
    chains = voice.payload.clone()
    chains[1, -1, 5] = torch.nan
    for wrong in (
        replace(one, streams={**one.streams, VOICE: replace(voice, payload=chains)}),
        replace(one, streams={**one.streams, VOICE: replace(voice, payload=voice.payload[:, :, :9].contiguous())}),
        replace(one, streams={**one.streams, VOICE: replace(voice, payload=voice.payload[:, :0].clone())}),
        replace(one, codes=one.codes[:-4]),
        replace(one, codes=one.codes[:0], actions=()),
    ):
        with pytest.raises(MetronomeError, match="Roll the episodes out again"):
            listen(wrong)
    save_episodes(tmp_path / "e.safetensors", [one])
    with pytest.raises(MetronomeError, match=r"--out.*ends in \.wav"):
        main(["--episode", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "x.mp3")])
