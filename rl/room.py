"""Whether a run fits: its episodes into a session's context, its model and sessions into memory. Found out from the
recipe, before anything is allocated or written."""

from __future__ import annotations

from pathlib import Path

import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.size import empty, training_bytes
from model.backbone.state import state_bytes
from model.config import preset
from model.program import ranks
from model.program.launched import local_world
from model.program.memory import check_room
from model.weights import checkpoint
from rl.config import TrainConfig
from rl.rollers import plays_of_a_step
from rollout.turn.grammar import check_context, context_rows


def check_fits(config: TrainConfig, resumed: Path | None = None) -> None:
    """Raises MetronomeError, naming the recipe's field, for episodes that a session cannot hold, and for a model or
    sessions beyond what this machine's memory, or its GPU's, has left. ``resumed``: as in `rl.run.build_model`."""
    rollout, path = config.rollout, config.model.checkpoint
    shape = preset(config.model.preset) if path is None else checkpoint.config_of(resumed or path)
    check_context("rollout.max_tokens", rollout.max_tokens, config.scenarios.most_chunks, rollout.words_per_chunk)
    rows = context_rows(config.scenarios.most_chunks, rollout.words_per_chunk)
    positions = shape.text_config.max_position_embeddings
    if rows > positions:
        raise MetronomeError(
            f"recipe: the chunks of scenarios: the longest episode takes up to {rows} tokens, and the model knows "
            f"{positions} positions; give fewer chunks or words (rollout.words_per_chunk)"
        )
    dtype, device = getattr(torch, config.model.dtype), dispatch.device()
    model = empty(shape, dtype)
    count = sum(w.numel() for w in model.parameters())
    shards = ranks.world() if config.rl.optim.zero_stage else 1
    together = local_world() if device.type == "cpu" else 1  # a GPU is one process's own
    needed = together * training_bytes(model, shards)
    name = f"model.preset {config.model.preset!r}" if path is None else f"model.checkpoint {path!r}"
    purpose = f"recipe: {name}: training its {count:,} weights in {together} processes"
    check_room(needed, purpose, "take a smaller model, or a machine with more memory", device)
    if rollout.engine == "session":
        slots = plays_of_a_step(config)
        needed += together * state_bytes(shape, slots, rollout.max_tokens, dtype, max_rows=slots)
        check_room(
            needed,
            f"{purpose}, with {slots} sessions of up to {rollout.max_tokens} tokens each,",
            "lower rl.groups, rl.rollouts or rollout.max_tokens",
            device,
        )
