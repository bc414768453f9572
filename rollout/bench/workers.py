"""Speed and cost of rollout workers on this machine.

- A step's rollouts (8 groups of 6, as in the quickstart) by an engine in this process with all cores' threads, and by
  1 and 2 workers that share the cores; every set of episodes is compared with the first, bit for bit.
- Publishing changed weights: what the learner waits for, and what a worker's next task takes longer for loading them.
- Processor time of the idle workers.

Engines take turns, so that a busy moment of the machine hits all of them; the median over rounds is reported.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch

from model.backbone.transformer import InteractionModel
from model.weights import checkpoint
from rollout.bench.timing import GROUPS, MAX_TOKENS, ROLLOUTS, seconds, step_plays
from rollout.engines.embedded import SessionEngine
from rollout.engines.roller import InProcess, Roller
from rollout.engines.workers.pool import WorkerPool
from rollout.engines.workers.task import Setup
from rollout.play import Play
from rollout.record.episode import pack_episodes
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.vocabulary import Vocabulary

IDLE_S = 5.0
SIZES = (1, 2)  # numbers of workers of the pools


def measure_workers(model: InteractionModel, rounds: int) -> dict[str, object]:
    """``model``: the policy, packed."""
    vocabulary = Vocabulary.of(model)
    cores = len(os.sched_getaffinity(0))
    plays = step_plays()
    engine = SessionEngine(model, vocabulary, slots=len(plays), max_tokens=MAX_TOKENS)
    with ExitStack() as stack:
        pools = {size: stack.enter_context(closing(pool_of(model, size, cores))) for size in SIZES}
        rollers: dict[int, Roller] = {0: InProcess(engine), **pools}
        first = [roller.play(plays, 0) for roller in rollers.values()]  # also warms up
        unequal = sum(
            pack_episodes([a]) != pack_episodes([b])
            for episodes in first[1:]
            for a, b in zip(first[0], episodes, strict=True)
        )
        taken = [[seconds(partial(r.play, plays, 0)) for r in rollers.values()] for _ in range(rounds)]
        rollout_s = dict(zip(rollers, map(statistics.median, zip(*taken, strict=True)), strict=True))
        for size, value in rollout_s.items():
            print(f"{size} workers: {value:.3f} s, {value / rollout_s[0]:.2f} times this process alone")
        pool = pools[SIZES[0]]
        publish_ms, load_ms = publishing(model, pool, plays[0], rounds)
        print(f"publishing {publish_ms:.1f} ms, loading {load_ms:.1f} ms; {unequal} episodes differ")
        before = [cpu_s(pid) for pool in pools.values() for pid in pool.pids]
        time.sleep(IDLE_S)
        idle_s = sum(cpu_s(pid) for pool in pools.values() for pid in pool.pids) - sum(before)
        print(f"{len(before)} idle workers used {idle_s:.2f} s of processor time in {IDLE_S:.0f} s")
    return {
        "threads": {"0": torch.get_num_threads(), **{str(n): max(1, cores // n) for n in SIZES}},
        "rollout_s": {str(n): value for n, value in rollout_s.items()},
        "episodes_that_differ": unequal,
        "weights_bytes": sum(tensor.nbytes for tensor in checkpoint.weights(model).values()),
        "publish_ms": publish_ms,
        "load_ms": load_ms,
        "idle_processor_s": idle_s,
        "idle_s": IDLE_S,
    }


def pool_of(model: InteractionModel, workers: int, cores: int) -> WorkerPool:
    """A pool of ``workers`` processes that share ``cores``."""
    setup = Setup(
        config=model.config,
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        speech_dir=None,
        scenarios=ScenarioConfig(),
        slots=-(-GROUPS * ROLLOUTS // workers),
        max_tokens=MAX_TOKENS,
        words_per_chunk=1,
    )
    return WorkerPool(model, setup, workers=workers, threads=max(1, cores // workers), timeout_s=120.0)


def publishing(model: InteractionModel, pool: WorkerPool, play: Play, rounds: int) -> tuple[float, float]:
    """(milliseconds of `publish`, additional milliseconds of a play whose worker must load the new weights)."""
    publish, loaded, again = [], [], []
    weight = model.lm_head.weight.detach()
    for _ in range(2 * rounds):
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf, dtype=weight.dtype))
        publish.append(seconds(pool.publish))
        loaded.append(seconds(partial(pool.play, [play], 0)))
        again.append(seconds(partial(pool.play, [play], 0)))
    slower = statistics.median(a - b for a, b in zip(loaded, again, strict=True))
    return 1000 * statistics.median(publish), 1000 * slower


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used, all threads, user and system."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
