"""Who rolls out in a run, by its recipe: one engine, or worker processes of the embedded one beside the learner's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.program import teams
from model.program.launched import local_world
from rl.config import TrainConfig
from rollout.engines.embedded import SessionEngine
from rollout.engines.engine import Engine
from rollout.engines.roller import InProcess, Roller
from rollout.engines.vllm.process import check_installed
from rollout.engines.workers.pool import WorkerPool
from rollout.engines.workers.task import Setup
from rollout.turn.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rollout.engines.vllm.engine import VllmEngine

SMALLER = "lower rollout.max_tokens, or rl.groups or rl.rollouts (in a new run)"
"""What makes a rollout need less memory. A run that goes on may have another rollout.max_tokens (`rl.resume.FREE`)."""


def check_workers(config: TrainConfig) -> None:
    """Raises MetronomeError for rollout workers that cannot be or would have nothing to do."""
    rollout, plays = config.rollout, plays_of_a_step(config)
    if rollout.workers > plays:
        raise MetronomeError(
            f"rollout.workers is {rollout.workers}: give 0, to roll out in the learner's process, or at most {plays}, "
            "one for each rollout of its share of a step"
        )
    if rollout.workers > 1 and rollout.engine == "vllm":
        raise MetronomeError(
            f"rollout.workers is {rollout.workers}: vLLM serves a learner process from one process; give 1, or 0 for "
            "the learner's own"
        )
    if rollout.workers and config.placement.device == "cuda":
        raise MetronomeError(
            f"rollout.workers is {rollout.workers}: on a GPU episodes are sampled in the learner's process; give "
            "--rollout.workers 0, or start more learner processes, one for each GPU"
        )


def check_engine(config: TrainConfig) -> None:
    """Raises MetronomeError when vLLM is asked for and cannot be used here or for this recipe, and for learned rewards
    of sessions that are summarised."""
    summarised = config.rollout.context.policy == "summary"
    if summarised and config.source.models:
        raise MetronomeError(
            "rollout.context.policy is summary, but a learned reward model (source.models) reads an episode as one "
            "sequence; take the rules, or policy window"
        )
    if config.rollout.engine != "vllm":
        return
    if summarised:
        raise MetronomeError(
            "rollout.context.policy is summary, which the vllm engine does not carry out; take rollout.engine session, "
            "or policy window"
        )
    check_installed()
    if config.placement.device == "cuda" and local_world() > 1:
        raise MetronomeError(
            "rollout.engine is vllm: it takes a machine's first GPU, which is not every process's own; use "
            "--rollout.engine session, or start one process a machine"
        )


def plays_of_a_step(config: TrainConfig) -> int:
    """This rank's share."""
    return -(-max(1, len(teams.share(config.rl.groups))) * config.rl.rollouts // teams.size())


def build_engine(config: TrainConfig, model: InteractionModel) -> Engine:
    """An engine with room for all of this rank's rollouts of a step. Raises MetronomeError when vLLM is asked for and
    not there."""
    if config.rollout.engine == "vllm":
        return build_vllm(config, model)
    return SessionEngine.of(model, config.rollout, plays_of_a_step(config))


def build_vllm(config: TrainConfig, model: InteractionModel) -> VllmEngine:
    """Raises MetronomeError when vLLM is not there."""
    from rollout.engines.vllm.engine import VllmEngine  # vLLM is optional, and slow to import

    rollout = config.rollout
    return VllmEngine(
        model,
        Vocabulary.of(model),
        slots=plays_of_a_step(config),
        max_tokens=rollout.max_tokens,
        words_per_chunk=rollout.words_per_chunk,
        max_patches=rollout.max_patches,
        max_event_words=rollout.max_event_words,
        context=rollout.context,
        worker_process=rollout.workers == 1,
        timeout_s=rollout.worker_timeout_s,
    )


@contextmanager
def start_roller(config: TrainConfig, model: InteractionModel) -> Iterator[Roller]:
    """While the block runs, gives what rolls out: one engine, or the recipe's workers. A machine's ranks share its
    cores."""
    rollout = config.rollout
    if rollout.engine == "vllm":  # which has its process in its own hands
        engine = build_vllm(config, model)
        with closing(engine.core):  # before torch's process groups end, of which it has some
            yield InProcess(engine)
        return
    if not rollout.workers:
        yield InProcess(build_engine(config, model))
        return
    setup = Setup(
        config=model.config,
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        speech_dir=None if config.speech_dir is None else str(Path(config.speech_dir).absolute()),
        scenarios=config.scenarios,
        slots=math.ceil(plays_of_a_step(config) / rollout.workers),
        max_tokens=rollout.max_tokens,
        words_per_chunk=rollout.words_per_chunk,
        max_patches=rollout.max_patches,
        max_event_words=rollout.max_event_words,
        context=rollout.context,
    )
    even = max(1, len(os.sched_getaffinity(0)) // (local_world() * rollout.workers))
    threads = even if rollout.worker_threads is None else rollout.worker_threads
    pool = WorkerPool(model, setup, workers=rollout.workers, threads=threads, timeout_s=rollout.worker_timeout_s)
    with closing(pool):
        yield pool
