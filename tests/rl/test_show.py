"""``python -m rollout.show`` and the pictures for trackers, on an episode that is known by heart."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kernels.errors import MetronomeError
from model.senses.audio import DMel
from rl.tracking.samples import sample, samples
from rl.train import parse
from rollout.heard import user_sound
from rollout.record.episode import TEXT, Episode, Stream, save_episodes
from rollout.record.timeline import moments
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.show import main
from rollout.turn.action import CHUNK_SAMPLES, Action, Mode
from rollout.turn.observation import stack_audio
from rollout.world.speech import SpeechBank
from tests.support.episodes import with_text


@pytest.fixture(scope="module")
def bank() -> SpeechBank:
    return SpeechBank.open()


def episode(bank: SpeechBank, family: str = "timespeak") -> Episode:
    """A model that says "four" in chunk 5 and nothing else; a mode a chunk costs 1/4 nat, the word 2 more."""
    item = ScenarioConfig().scenario(family, "train", 0, bank)
    actions = [Action(Mode.SPEAK, ("four",)) if k == 5 else Action(Mode.LISTEN) for k in range(item.chunks)]
    observed, _, facts = enact(item, lambda user: lambda k: actions[k])
    codes = DMel.build().codes(stack_audio(observed).view(1, -1))[0]
    chunk = torch.tensor(sorted([*range(item.chunks), 5]))
    logprob = torch.full((len(chunk),), -0.25)
    logprob[6] = -2.0
    zeros = torch.zeros(len(chunk), dtype=torch.int64)
    return Episode(
        scenario=item.id, rollout=0, seed=0, temperature=1.0, contract_id="c", weights_digest="d" * 32,
        facts=facts.to_json(), actions=tuple(actions), tokens=torch.zeros(9, dtype=torch.int64), codes=codes,
        streams={TEXT: Stream(zeros, zeros.clone(), chunk, logprob, zeros.clone())},
    )  # fmt: skip


def shown(*arguments: str) -> str:
    out = io.StringIO()
    main(list(arguments), Console(file=out, width=120, highlight=False))
    return out.getvalue()


def test_a_line_a_chunk(bank: SpeechBank, tmp_path: Path) -> None:
    one = episode(bank)
    file = tmp_path / "run/episodes/step_000000.rank_0.safetensors"
    save_episodes(file, [one, replace(episode(bank), rollout=1)])
    lines = shown(str(file)).splitlines()
    assert lines[0].startswith("timespeak/train/0#0 · weights dddddddddddd")
    chunks = [line for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    assert [int(line.split()[0]) for line in chunks] == list(range(len(one.actions)))
    assert "speak" in chunks[5] and "four" in chunks[5] and "-2.250" in chunks[5]
    assert sum("four" in line for line in chunks) == 1 and all("-0.250" in c for c in chunks[:5])
    assert any("spurious" in line or "hit" in line for line in chunks) and "missed" in shown(str(file))
    assert lines[-1].startswith("Rollout 0 of 2 in this file")
    assert "timespeak/train/0#1" in shown(str(file), "--rollout", "1")
    assert shown(str(file), "--list").count("timespeak/train/0#") == 2


def test_speech_is_where_the_user_speaks(bank: SpeechBank) -> None:
    one = episode(bank)
    rows = moments(one)
    begin, end = one.facts["request_start"], one.facts["request_end"]
    spoken = [row.speech for row in rows]
    assert sum(spoken[begin : end + 1]) > 0.6 * (end + 1 - begin)
    assert sum(spoken[end + 2 : one.facts["stop_start"] or len(rows)]) == 0


def test_json_holds_the_same(
    bank: SpeechBank, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_episodes(tmp_path / "run/episodes/e", [episode(bank)])
    main([str(tmp_path / "run/episodes/e"), "--json"])
    read = json.loads(capsys.readouterr().out)
    assert read["chunks"][5]["words"] == ["four"] and read["chunks"][5]["logprob"] == -2.25
    assert set(read["verdict"]) == {"score", "rewards", "events"} and read["facts"]["family"] == "timespeak"
    monkeypatch.setattr("reward.explain.explain", lambda *_: read["verdict"] | {"score": math.nan})
    with pytest.raises(MetronomeError, match=r"a result is not finite \(verdict\.score is nan\)"):
        main([str(tmp_path / "run/episodes/e"), "--json"])
    assert capsys.readouterr().out == ""


def test_rewards_are_those_of_the_runs_recipe(bank: SpeechBank, tmp_path: Path) -> None:
    file = tmp_path / "run/episodes/e"
    save_episodes(file, [episode(bank)])
    assert "-1.00 timing" in shown(str(file)) and "-7.00 timing" not in shown(str(file))
    (tmp_path / "run/config.yaml").write_text("scenarios:\n  timespeak:\n    reward:\n      miss: -7.0\n")
    assert "-7.00 timing" in shown(str(file))
    (tmp_path / "run/config.yaml").write_text(parse([])[2].replace("miss: -1.0", "miss: -7.0"))  # a whole recipe
    assert "-7.00 timing" in shown(str(file))
    (tmp_path / "run/config.yaml").write_text("scenarios:\n  timespeak:\n    reward:\n      mis: -7.0\n")
    with pytest.raises(MetronomeError, match="mis"):
        shown(str(file))
    (tmp_path / "run/config.yaml").write_text("scenarios:\n  timespeak:\n    reward:\n      miss: .nan\n")
    with pytest.raises(MetronomeError, match=r"scenarios\.timespeak\.reward\.miss is nan"):
        shown(str(file))


def test_a_family_without_rules_is_shown_without(bank: SpeechBank, tmp_path: Path) -> None:
    unknown = replace(episode(bank), scenario="chess/train/0")
    save_episodes(tmp_path / "e", [unknown])
    assert "No rules of rewards know this family" in shown(str(tmp_path / "e"))


def test_what_does_not_fit_is_an_error(bank: SpeechBank, tmp_path: Path) -> None:
    one, file = episode(bank), tmp_path / "e"
    with pytest.raises(MetronomeError, match="cannot be read as a file of episodes"):
        shown(str(file))
    save_episodes(file, [one])
    with pytest.raises(MetronomeError, match=r"--rollout 1: .* holds 1 rollouts, counted from 0"):
        shown(str(file), "--rollout", "1")
    with pytest.raises(MetronomeError, match="--rollout: '-1': give a whole number from 0"):
        shown(str(file), "--rollout", "-1")
    save_episodes(file, [with_text(one, chunk=one.text.chunk + 1)])
    with pytest.raises(MetronomeError, match=r"outside its .* chunks"):
        shown(str(file))
    save_episodes(file, [replace(one, codes=one.codes[:-1])])
    with pytest.raises(MetronomeError, match="do not fit"):
        shown(str(file))


def test_words_cannot_steer_the_terminal(bank: SpeechBank, tmp_path: Path) -> None:
    one = episode(bank)
    actions = list(one.actions)
    actions[5] = Action(Mode.SPEAK, ("\x1b[2J", "[red]"))
    save_episodes(tmp_path / "e", [replace(one, actions=tuple(actions))])
    assert "\x1b" not in shown(str(tmp_path / "e")) and "[red]" in shown(str(tmp_path / "e"))


def test_names_and_digests_cannot_steer_the_terminal(bank: SpeechBank, tmp_path: Path) -> None:
    one = episode(bank)
    save_episodes(tmp_path / "e", [one])
    for options in ([], ["--list"]):
        lines = len(shown(str(tmp_path / "e"), *options).splitlines())
        evil = replace(one, scenario=f"{one.scenario}\n\u202e", weights_digest="a\nb\x1b[8m")
        save_episodes(tmp_path / "evil", [evil])
        text = shown(str(tmp_path / "evil"), *options)
        assert text.replace("\n", "").isprintable() and r"\n\u202e" in text
        assert len(text.splitlines()) == lines, "the control: that of the sound one"


def test_the_sound_of_an_episode_is_what_was_heard(bank: SpeechBank) -> None:
    """Its codes are the episode's own; with other actions of the model the user says something else."""
    one = episode(bank, "turn_taking")
    sound = user_sound(one, ScenarioConfig(), bank)
    assert len(sound) == len(one.actions) * CHUNK_SAMPLES
    assert torch.equal(DMel.build().codes(sound[None])[0], one.codes)
    chatty = replace(one, actions=tuple(Action(Mode.SPEAK, ("yes",)) for _ in one.actions))
    assert not torch.equal(user_sound(chatty, ScenarioConfig(), bank), sound)


def test_one_sample_a_family_with_a_picture(bank: SpeechBank) -> None:
    episodes = [episode(bank, "turn_taking"), episode(bank), episode(bank)]
    drawn = samples(episodes, bank, ScenarioConfig())
    assert [one.name for one in drawn] == ["timespeak", "turn_taking"]
    picture = drawn[0].picture
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 10
    actions = tuple(Action(Mode.LISTEN) for _ in episodes[1].actions)
    silent = sample(replace(episodes[1], actions=actions), bank, ScenarioConfig())
    assert not np.array_equal(silent.picture, picture) and silent.caption.endswith(": nothing")
