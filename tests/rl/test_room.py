"""What a run needs of a card's memory is asked before anything is written: the message names the field to lower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.size import activation_bytes, empty, training_bytes
from model.backbone.state import state_bytes
from model.config import preset
from model.program import gpu, memory
from model.weights import checkpoint
from rl import room
from rl.consistency import check_read, check_shares
from rl.step.batch import choice_logprobs, collate
from rl.train import parse
from rollout.record.transcript import write_transcript
from rollout.turn.action import LISTEN
from rollout.turn.grammar import Grammar
from tests.support.models import VOCABULARY, conversation, fresh_model


def test_a_run_too_large_for_the_card_names_the_fields_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a card with room for all, downwards: first the forward pass does not fit, then the sessions, then the
    model."""
    config = parse(["--placement.device", "cuda"])[0]
    shape, slots = preset("tiny"), config.rl.groups * config.rl.rollouts
    model = training_bytes(empty(shape, torch.float32), config.rl.optim.zero_stage).total
    sessions = state_bytes(shape, slots, config.rollout.max_tokens, torch.float32, max_rows=slots)
    forward = activation_bytes(shape, config.rl.micro_batch * room.fewest_rows(config), torch.float32)
    enough = int((model + sessions + forward) / (1 - memory.RESERVED_FRACTION)) + 2
    found: list[str] = []
    monkeypatch.setattr(dispatch, "device", lambda: torch.device("cuda", 0))
    for left in (enough, enough - 4, enough - int(1.2 * forward), enough - int(1.2 * (forward + sessions))):
        monkeypatch.setattr(gpu, "memory", lambda device, left=left: gpu.Memory(left, 2**35, 2**34))
        try:
            room.check_fits(config)
            found.append("fits")
        except MetronomeError as error:
            assert "weights on one GPU" in str(error) and "other processes hold 16.00 GiB of it" in str(error)
            found.append(str(error).rpartition(": ")[2])
    assert found == [
        "fits",
        "lower rl.micro_batch",
        "lower rl.groups, rl.rollouts or rollout.max_tokens",
        "take a smaller model, or a machine with more memory",
    ]


def test_what_is_foreseen_of_a_forward_pass_is_less_than_what_it_keeps() -> None:
    model, kept, seen = fresh_model(), 0, []
    batch = collate([conversation(0, 10), conversation(1, 10)], model.senses)

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if all(x.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() for other in seen):
            kept += x.untyped_storage().nbytes()
            seen.append(x)
        return x

    seen.extend(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        choice_logprobs(model, batch, VOCABULARY.classes, 1.0)
    rows = len(batch.inputs.tokens)
    foreseen = activation_bytes(model.config, rows, torch.float32)
    assert 0 < foreseen < kept < 20 * foreseen


def test_no_episode_of_ours_has_fewer_rows_than_foreseen() -> None:
    config = parse([])[0]
    silent = write_transcript(
        torch.zeros(60, 4, 80, dtype=torch.uint8), [LISTEN] * 60, Grammar(VOCABULARY, config.rollout.words_per_chunk)
    )
    least = len(collate([silent], fresh_model("nano").senses).inputs.tokens)
    assert 0 < room.fewest_rows(config) <= least < 1.1 * room.fewest_rows(config)
    assert {config.scenarios.settings_of(name).chunks for name in config.scenarios.members} == {60}
    foreign = parse(["--scenarios.families", "[tests.examples.confide:FAMILY]"])[0]
    assert room.fewest_rows(foreign) == 0


def test_a_window_bounds_memory_and_positions() -> None:
    """An episode longer than the positions that a model knows is refused, unless a window bounds what its rows see or
    a summary a context's length; a context that does not fit a session is refused."""
    long = ["--scenarios.families", "[timespeak]", "--scenarios.timespeak.chunks", "3000"]
    long += ["--rollout.words_per_chunk", "8", "--rollout.max_tokens", "50000"]
    small = ["--rl.groups", "1", "--rl.rollouts", "2", "--rl.micro_batch", "1"]
    with pytest.raises(MetronomeError, match=r"knows 32768 positions.*rollout\.context\.policy window"):
        room.check_fits(parse([*long, *small])[0])
    windowed = parse([*long, *small, "--rollout.context", "{policy: window, first: 64, window: 256}"])[0]
    room.check_fits(windowed)
    summarised = ["--rollout.context", "{policy: summary, budget: 4096}"]
    room.check_fits(parse([*long, *small, *summarised])[0])
    with pytest.raises(MetronomeError, match=r"rollout\.max_tokens is 4000, and rollout\.context\.budget 4096"):
        room.check_fits(parse([*long, *small, *summarised, "--rollout.max_tokens", "4000"])[0])


def test_a_recipe_without_room_for_its_pictures_is_refused() -> None:
    eyes = ["--config", "eyes"]
    for given, says in (
        (["--rollout.max_patches", "3"], "rollout.max_patches is 3, but frames of lookout, 31 x 31 .* into 4 patches"),
        (["--rollout.max_patches", "0"], "rollout.max_patches is 0"),
        (["--scenarios.lookout.looks.side", "64"], "rollout.max_patches is 4, .* 64 x 64 .* into 20 patches"),
    ):
        with pytest.raises(MetronomeError, match=says):
            room.check_fits(parse([*eyes, *given])[0])
    room.check_fits(parse(eyes)[0])  # the control


def test_demonstrations_that_do_not_suit_the_voice_are_refused() -> None:
    recipe, short = ["--config", "voice"], ["--scenarios.timespeak.chunks", "40"]
    room.check_fits(parse(recipe)[0])  # the control
    for given, says in (
        (
            ["--scenarios.families", "[repeat]"],
            "demonstrations of repeat have sound, and the model has no",
        ),
        ([*recipe, "--scenarios.families", "[timespeak]", *short], "demonstrations of timespeak have no sound"),
        ([*recipe, "--scenarios.families", "[repeat, timespeak]", *short], "demonstrations of timespeak have no sound"),
    ):
        with pytest.raises(MetronomeError, match=says):
            room.check_fits(parse(given)[0])
        room.check_fits(parse([*given, "--warmstart.steps", "0"])[0])


def test_settings_of_a_voice_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    checkpoint.save(fresh_model(), tmp_path / "model")
    silent, repeat = ["--model.checkpoint", str(tmp_path / "model")], ["--scenarios.families", "[repeat]"]
    for given, says in (
        (["--rl.voice_weight", "7"], r"rl\.voice_weight would be ignored: the model has no voice"),
        (["--rl.sound_axes", "[timing]"], r"rl\.sound_axes would be ignored"),
        (["--warmstart.voice_weight", "9"], r"warmstart\.voice_weight would be ignored"),
        ([*silent, *repeat], "the model has no voice: name a checkpoint with one"),
        (
            ["--config", "voice", "--rl.sequence_parallel", "2"],
            r"rl\.sequence_parallel is 2, but the model has a voice",
        ),
    ):
        with pytest.raises(MetronomeError, match=says):
            room.check_fits(parse(given)[0])
    with pytest.raises(MetronomeError, match=r"model\.voice is .* would be ignored: model\.checkpoint names a model"):
        check_read(parse([*silent, "--model.voice", "{}"])[0])
    alone = ["--config", "voice", "--rl.sound_axes", "[understood]"]
    check_shares(parse(alone)[0])  # the control
    with pytest.raises(MetronomeError, match="nothing would reward sound"):
        check_shares(parse([*alone, "--source.listener", "false"])[0])


@pytest.mark.parametrize(
    ("token", "says"), [(2, "has a meaning"), (8, "'zero'"), (6, "has a meaning"), (999999, "none")]
)
def test_a_token_of_own_sound_that_stands_for_something_is_refused(token: int, says: str) -> None:
    room.check_fits(parse(["--config", "voice", "--model.voice.token", "0"])[0])  # the control
    with pytest.raises(MetronomeError, match=rf"voice_config: token {token} .*{says}.*model\.voice\.token 0"):
        room.check_fits(parse(["--config", "voice", "--model.voice.token", str(token)])[0])


def test_a_run_goes_on_only_with_its_own_policy(tmp_path: Path) -> None:
    checkpoint.save(fresh_model(), tmp_path / "model")
    room.check_fits(parse([])[0], tmp_path / "model")
    with pytest.raises(MetronomeError, match="policy window, first 64, window 4096 in the recipe, but the model in"):
        room.check_fits(parse(["--rollout.context.policy", "window"])[0], tmp_path / "model")
