"""Whether a run fits: its episodes into a session's context, its model and sessions into memory. Found out from the
recipe, before anything is allocated or written."""

from __future__ import annotations

from pathlib import Path

import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.size import activation_bytes, empty, training_bytes
from model.backbone.state import state_bytes
from model.config import most_keys, senses, voice
from model.context import check_same, give
from model.program import ranks, teams
from model.program.launched import local_world
from model.program.memory import check_room
from model.senses.video import grid
from model.tokenizer import size
from model.weights import checkpoint
from rl.config import TrainConfig
from rl.rollers import plays_of_a_step
from rollout.scenarios.registry import SHIPPED
from rollout.turn.grammar import OWN_ROWS, check_context, context_rows, turn_rows
from rollout.turn.vocabulary import Vocabulary


def check_fits(config: TrainConfig, resumed: Path | None = None) -> None:
    """Raises MetronomeError, naming the recipe's field, for episodes that a session cannot hold, pictures that a
    micro-turn cannot, demonstrations that do not suit the model's voice, a model that is to go on and remembers
    otherwise than the recipe says, and for a model, sessions or a learner's forward pass beyond what this machine's
    memory, or its GPU's, has left. ``resumed``: as in `rl.run.build_model`."""
    rollout, path = config.rollout, config.model.checkpoint
    if resumed is not None:
        check_same(checkpoint.config_of(resumed), rollout.context, str(resumed))
    shape = config.model.fresh() if path is None else checkpoint.config_of(resumed or path)
    shape = give(shape, rollout.context)
    speaks = voice(shape) is not None
    check_voice(config, speaks)
    if speaks or rollout.context.policy == "summary":
        tokenizer = None if path is None else checkpoint.tokenizer_of(resumed or path)
        vocabulary = Vocabulary.build(size(tokenizer) if tokenizer else shape.text_config.vocab_size, tokenizer)
        rollout.grammar(vocabulary, senses(shape))  # raises for a token of own sound, or a budget, that will not do
    longest = config.scenarios.most_chunks, rollout.words_per_chunk, rollout.extra + OWN_ROWS * speaks
    rows = context_rows(*longest)
    if rollout.context.policy == "summary":
        rows = min(rows, rollout.context.budget)
        if rows > rollout.max_tokens:
            raise MetronomeError(
                f"recipe: rollout.max_tokens is {rollout.max_tokens}, and rollout.context.budget {rows}: give as many"
            )
    else:
        check_context("rollout.max_tokens", rollout.max_tokens, *longest)
    check_pictures(config, shape.vision_config.patch_size)
    positions = shape.text_config.max_position_embeddings
    if rows > positions and most_keys(shape.text_config) is None:
        raise MetronomeError(
            f"recipe: the chunks of scenarios: the longest episode takes up to {rows} tokens, and the model knows "
            f"{positions} positions; give fewer chunks or words (rollout.words_per_chunk), or rollout.context.policy "
            "window"
        )
    dtype, device = getattr(torch, config.model.dtype), dispatch.device()
    model = empty(shape, dtype)
    count = sum(w.numel() for w in model.parameters())
    together = local_world() if device.type == "cpu" else 1  # a GPU is one process's own
    needed = together * training_bytes(model, config.rl.optim.zero_stage, ranks.world()).total
    name = f"model.preset {config.model.preset!r}" if path is None else f"model.checkpoint {path!r}"
    place = f"in {together} processes" if device.type == "cpu" else "on one GPU"
    purpose = f"recipe: {name}: training its {count:,} weights {place}"
    check_room(needed, purpose, "take a smaller model, or a machine with more memory", device)
    slots = plays_of_a_step(config)
    if rollout.engine == "session":
        needed += together * state_bytes(shape, slots, rollout.max_tokens, dtype, max_rows=slots)
        purpose += f", with {slots} sessions of up to {rollout.max_tokens} tokens each,"
        check_room(needed, purpose, "lower rl.groups, rl.rollouts or rollout.max_tokens", device)
    batch = min(config.rl.micro_batch, slots * teams.size())
    needed += together * activation_bytes(shape, batch * fewest_rows(config) // teams.size(), dtype)
    check_room(needed, f"{purpose} and a forward pass of {batch} episodes", "lower rl.micro_batch", device)


def check_pictures(config: TrainConfig, patch: int) -> None:
    """Raises MetronomeError where frames that a family says it shows are cut into more patches, of ``patch`` x
    ``patch`` pixels, than a micro-turn has room for."""
    for name in config.scenarios.members:
        frame: tuple[int, int] | None = getattr(config.scenarios.settings_of(name), "frame", None)
        if frame is None:
            continue
        rows, columns = grid(*frame, patch)
        if (needed := rows * columns) > config.rollout.max_patches:
            raise MetronomeError(
                f"rollout.max_patches is {config.rollout.max_patches}, but frames of {name}, {frame[0]} x {frame[1]} "
                f"pixels, are cut into {needed} patches: give as many, or smaller frames"
            )


def check_voice(config: TrainConfig, speaks: bool) -> None:
    """Raises MetronomeError for settings of a voice where the model has none (``speaks``), for sequence parallelism
    where it has one, and where a warm start would show sound to a model that has no voice, or no sound to one that
    has."""
    aloud = config.scenarios.aloud
    for name in config.scenarios.members if config.warmstart.steps else ():
        sounds = name in aloud
        if sounds and not speaks:
            raise MetronomeError(
                f"recipe: demonstrations of {name} have sound, and the model has no voice: "
                + ("give it one (model.voice {})" if config.model.checkpoint is None else "name a checkpoint with one")
                + ", or leave the family out"
            )
        if speaks and not sounds:
            raise MetronomeError(
                f"recipe: the model has a voice, and demonstrations of {name} have no sound that it could learn from: "
                "leave out the family (scenarios.families) or the voice (model.voice)"
            )
    usual = TrainConfig()
    given = {
        "rl.voice_weight": config.rl.voice_weight != usual.rl.voice_weight,
        "rl.sound_axes": config.rl.sound_axes != usual.rl.sound_axes,
        "warmstart.voice_weight": config.warmstart.voice_weight != usual.warmstart.voice_weight,
    }
    for name in (name for name, changed in given.items() if changed and not speaks):
        raise MetronomeError(
            f"{name} would be ignored: the model has no voice. Leave it out, or give it one (model.voice)"
        )
    if speaks and config.rl.sequence_parallel > 1:
        raise MetronomeError(
            f"rl.sequence_parallel is {config.rl.sequence_parallel}, but the model has a voice: give 1"
        )


def fewest_rows(config: TrainConfig) -> int:
    """The rows that any episode of the recipe has at least, with nothing said in it; 0 when a family is not ours and so
    may end an episode earlier than its recipe says."""
    scenarios = config.scenarios
    if not {*scenarios.families} <= {*SHIPPED, *SHIPPED.values()}:
        return 0
    chunks = min(int(scenarios.settings_of(name).chunks) for name in scenarios.members)
    return (chunks - 1) * turn_rows(0, config.rollout.words_per_chunk)[0]  # the last one's rows are not all needed
