"""A small run's folder, written as a run writes it: two steps of four episodes each, fresh weights for trained ones;
and what tampers with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.weights import checkpoint, packs
from rl.environment import environment
from rl.folder import RunFolder
from rl.rollers import build_engine
from rl.run import build_model
from rl.step import loop
from rl.train import parse
from rollout.play import play
from rollout.record.episode import Episode, load_episodes, save_episodes
from rollout.world.speech import SpeechBank

STEPS = 2
RECIPE = {"name": "small", "rl.steps": STEPS, "rl.groups": 2, "rl.rollouts": 2, "rl.micro_batch": 3}


SEEING = {"scenarios.families": "[lookout]", "rollout.max_patches": 4}
"""Further fields, of a run with video."""
SPEAKING = {
    "scenarios.families": "[repeat]",
    "model.voice": "{width: 32, blocks: 1, steps: 2}",
    "rollout.words_per_chunk": 1,
}
"""Of a run with a voice."""


def make(runs: Path, **more: Any) -> Path:
    """``more``: fields of the recipe beside those of `RECIPE`."""
    config, _, text = parse([part for name, value in (RECIPE | more).items() for part in (f"--{name}", str(value))])
    folder, bank, before = RunFolder.create(runs, config.name, text), SpeechBank.open(), 0
    folder.write_json("environment.json", environment() | {"processes": 2})
    digest = ""
    for step in range(STEPS + 1):
        model = build_model(replace(config, seed=step))
        digest = checkpoint.weights_digest(model)
        with folder.checkpoint(step) as path:
            checkpoint.save(model, path / "model")
        if step:
            folder.append_metrics(record(step - 1, digest, before) | {"packs_digest": packs.digest(model)})
        if step < STEPS:
            engine = build_engine(config, model)
            episodes = play(engine, loop.plays(config, bank, step), config.seed)
            before = sum(len(e.text.chunk) for e in episodes)
            for rank in (0, 1):
                name = f"episodes/step_{step:06d}.rank_{rank}.safetensors"
                save_episodes(folder.path / name, episodes[2 * rank : 2 * rank + 2])
    folder.write_json("summary.json", {"weights_digest": digest, "wall_s": 1.0})
    return folder.path


def record(step: int, digest: str, tokens: int) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    counts = {"num_tokens": tokens, "num_unequal": 0, "rows_unequal": 0, "k1": 0.0, "k3": 0.0, "max_abs": 0.0}
    rest = {"reward/mean": 0.5 + step, "reward/timing": 0.25, "reward/content": 0.25 + step, "reward/score": 0.5}
    rest |= {
        "policy/entropy": 0.1,
        "time/rollout_s": 0.7,
        "time/judge_s": 0.01,
        "time/learner_s": 1.0,
        "time/step_s": 1.8,
    }
    return {"step": step, "weights_digest": digest, **rest, **{f"mismatch/{k}": v for k, v in counts.items()}}


def first_file(run: Path) -> Path:
    return run / "episodes/step_000000.rank_0.safetensors"


def tamper(path: Path, change: Callable[[Episode], Episode], which: Sequence[int] = (0,)) -> None:
    """Replaces some of a file's episodes."""
    episodes = load_episodes(path)
    save_episodes(path, [change(e) if i in which else e for i, e in enumerate(episodes)])


def changed(values: torch.Tensor, place: int, value: float | int) -> torch.Tensor:
    out = values.clone()
    out[place] = value
    return out


def flip(values: torch.Tensor, place: int, bit: int = 0) -> torch.Tensor:
    """One bit of one fp32 value flipped."""
    bits = values.clone().view(torch.int32)
    bits[place] ^= 1 << bit if bit < 31 else -(1 << 31)
    return bits.view(torch.float32)
