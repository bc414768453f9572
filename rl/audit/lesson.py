"""The lesson's table (chapter 05), measured: naive torch, naive torch with importance weights, and ours.

- Distinct completions at temperature 0: one recording is heard by many sessions while the load varies: how many hear it
  together, how many others run beside them and how far these are in their own conversations. A completion is all that a
  session samples. Beside the count of token sequences stands the count of sequences of row digests: these tell two
  distributions apart even where the likeliest token is the same.
- KL between sampler and learner at equal weights (k3 of `rl.identity`; and the largest of any episode, the "spikes").
- Time of sampling and of learning, naive and ours by turns in one process.

Importance weights (truncated: `rl.audit.baseline`) change none of the completions and none of the KL; they correct the
gradient, at the price of one more forward pass of the learner.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.audit.sides import Side, session_engine, whole
from rl.identity import Mismatch, compare
from rl.learner import policy_gradient
from rollout.chunk import LISTEN
from rollout.play import Play, play
from rollout.scenarios.base import Scenario
from rollout.scenarios.registry import ScenarioConfig
from rollout.speech import SpeechBank

MOST_TOGETHER, MOST_OTHERS, MOST_AHEAD = 32, 16, 20
"""Of a round of load: sessions that hear the recording, others beside them, and chunks these are ahead."""

LONG = 4  # recordings one after another in the long context
SEED = 0
GROUPS, ROLLOUTS, MICRO_BATCH = 2, 6, 8  # of the episodes on which KL and time are measured
BF16_SHARE = 20
"""In bf16 a twentieth of the completions, no long ones, and one round: without AVX-512 torch's bf16 products take 30
times as long."""


def recording(item: Scenario) -> Tensor:
    """fp32 [chunks, 3200]: what the user says to a model that only listens."""
    user, heard, chunks = item.user(), None, []
    for _ in range(item.chunks):
        chunks.append(user.next_chunk(heard))
        heard = LISTEN
    return torch.from_numpy(np.stack(chunks))


@dataclass(frozen=True)
class Completions:
    """What the sessions that heard one recording sampled."""

    count: int
    distinct: int  # sequences of tokens
    distinct_rows: int  # sequences of row digests
    chunks: int
    rows: int  # of the longest completion's context


def completions(side: Side, heard: Tensor, others: Sequence[Tensor], count: int) -> Completions:
    """``heard`` fp32 [chunks, 3200], ``others`` the recordings that sessions beside it hear; temperature 0."""
    load = random.Random(SEED)
    longest = (len(heard) + MOST_AHEAD) * 7 + 1  # rows: 4 audio, a mode, a word and its end a chunk
    seen: dict[tuple[int, ...], int] = {}
    digests: set[tuple[int, ...]] = set()
    rows = 0
    with side.active():
        engine = session_engine(side, MOST_TOGETHER + MOST_OTHERS, longest, 0.0)
        while (made := sum(seen.values())) < count:
            mine = min(load.randint(1, MOST_TOGETHER), count - made)
            ahead = load.randint(0, MOST_AHEAD)
            beside = [others[load.randrange(len(others))] for _ in range(load.randint(0, MOST_OTHERS))]
            company = [engine.open(0) for _ in beside]
            for chunk in range(ahead if beside else 0):
                engine.append(company, torch.stack([x[chunk % len(x)] for x in beside]))
            sessions = [engine.open(0) for _ in range(mine)]
            for chunk in range(len(heard)):
                audio = [x[(ahead + chunk) % len(x)] for x in beside] + [heard[chunk]] * mine
                engine.append([*company, *sessions], torch.stack(audio))
            for session in sessions:
                tokens = tuple(session.tokens[at] for at, _, _ in session.sampled)
                seen[tokens] = seen.get(tokens, 0) + 1
                digests.add(tuple(session.digest))
                rows = max(rows, len(session.tokens))
            for session in (*company, *sessions):
                engine.close(session)
    return Completions(count, len(seen), len(digests), len(heard), rows)


@dataclass(frozen=True)
class Cost:
    """Seconds of one round: sampling a batch of episodes, the learner's gradient of it, and the further forward pass
    that importance weights need."""

    sample_s: float
    learn_s: float
    weigh_s: float


@dataclass(frozen=True)
class Measured:
    """One side's mismatch on its own samples, and its cost in each round."""

    mismatch: Mismatch
    worst_k3: float  # of any episode
    costs: tuple[Cost, ...]


def measured(sides: Sequence[Side], rounds: int) -> list[Measured]:
    """All sides by turns, round by round, so that a busy moment of the machine hits all of them; in fp32 one more round
    before warms up."""
    bank, config = SpeechBank.load(), ScenarioConfig()
    items = [config.in_turn(i, "train", i, bank) for i in range(GROUPS)]
    plays = [Play(item, r) for item in items for r in range(ROLLOUTS)]
    costs: list[list[Cost]] = [[] for _ in sides]
    mismatches: list[tuple[Mismatch, float]] = []
    for turn in range(rounds + 1):
        for i, side in enumerate(sides):
            if turn and side.dtype == "bfloat16":
                continue
            with side.active():
                cost, parts = _round(side, plays)
            if turn or side.dtype == "bfloat16":
                costs[i].append(cost)
            if not turn:
                mismatches.append((Mismatch.total(parts), max(p.k3_sum / max(p.num_tokens, 1) for p in parts)))
    return [Measured(*m, tuple(c)) for m, c in zip(mismatches, costs, strict=True)]


def _round(side: Side, plays: Sequence[Play]) -> tuple[Cost, list[Mismatch]]:
    engine = session_engine(side, len(plays), 512, 1.0)
    clock = [time.perf_counter()]
    episodes = play(engine, plays, SEED)
    clock.append(time.perf_counter())
    weights = [torch.ones(len(e.chunk)) for e in episodes]
    g = policy_gradient(side.model, episodes, weights, side.vocabulary.classes, 1.0, MICRO_BATCH)
    clock.append(time.perf_counter())
    whole(side, episodes, MICRO_BATCH)
    clock.append(time.perf_counter())
    lengths = [len(e.chunk) for e in episodes]
    parts = [
        compare(e.logprob, logprob, e.digest, digest)
        for e, logprob, digest in zip(episodes, g.logprob.split(lengths), g.digest.split(lengths), strict=True)
    ]
    return Cost(*(after - before for before, after in pairwise(clock))), parts


def tables(sides: Sequence[Side], count: int, long_count: int, rounds: int) -> list[dict[str, Any]]:
    """The lesson's table for each dtype, and the counts of completions in full."""
    found = list(measured(sides, rounds)) if rounds else []
    bank, config = SpeechBank.load(), ScenarioConfig()
    heard = [recording(item) for item in config.of_each(4, "held_out", bank)]
    long = torch.cat(heard[:LONG])
    counts = []
    for side in sides:
        slow = side.dtype == "bfloat16"
        wanted = ((heard[0], -(-count // BF16_SHARE) if slow else count), (long, 0 if slow else long_count))
        counts.append([completions(side, x, heard[1:], n) for x, n in wanted if n])
    every = {
        "title": "Distinct completions at temperature 0 under varying load",
        "columns": ["side", "dtype", "recording", "context, rows", "completions", "distinct", "distinct in bits"],
        "rows": [
            [side.name, side.dtype, f"{c.chunks} chunks", c.rows, c.count, c.distinct, c.distinct_rows]
            for side, of in zip(sides, counts, strict=True)
            for c in of
        ],
        "note": (
            f"A round has 1 to {MOST_TOGETHER} sessions that hear the recording and 0 to {MOST_OTHERS} others, 0 to "
            f"{MOST_AHEAD} chunks ahead. Distinct in bits: other log-prob rows, even if the same tokens."
        ),
    }
    if not rounds:
        return [every]
    return [_lesson(sides, found, counts), every]


def _lesson(
    sides: Sequence[Side], found: Sequence[Measured], counts: Sequence[Sequence[Completions]]
) -> dict[str, Any]:
    rows: list[list[Any]] = []
    by_name = {(side.dtype, side.name): i for i, side in enumerate(sides)}
    for dtype in dict.fromkeys(side.dtype for side in sides):
        naive, ours = by_name[dtype, "naive torch"], by_name[dtype, "ours"]
        a, b = found[naive], found[ours]
        for measure, of_naive, of_ours in (
            (f"distinct of {counts[ours][0].count:,} completions", *(counts[i][0].distinct for i in (naive, ours))),
            ("distinct in bits", *(counts[i][0].distinct_rows for i in (naive, ours))),
            ("sampled tokens unequal, %", *(100 * m.mismatch.num_unequal / m.mismatch.num_tokens for m in (a, b))),
            ("KL sampler against learner (k3), nats", *(m.mismatch.k3_sum / m.mismatch.num_tokens for m in (a, b))),
            ("its largest episode", a.worst_k3, b.worst_k3),
            ("largest gap of a log-prob", a.mismatch.max_abs, b.mismatch.max_abs),
        ):
            rows.append([dtype, measure, of_naive, of_naive, of_ours])
        rows.append([dtype, "time to sample, naive = 1", 1.0, 1.0, _ratio(a, b, "sample")])
        rows.append([dtype, "time to learn, naive = 1", 1.0, _ratio(a, a, "weighed"), _ratio(a, b, "learn")])
        rows.append([dtype, "both", 1.0, _ratio(a, a, "both weighed"), _ratio(a, b, "both")])
    return {
        "title": "The lesson's table, measured",
        "columns": ["dtype", "measure", "naive", "naive + importance weights", "ours"],
        "rows": rows,
        "note": (
            f"KL and time on {GROUPS * ROLLOUTS} episodes sampled together at temperature 1 and learned from "
            f"{MICRO_BATCH} at a time; times are medians of ratios, the sides by turns in one process with "
            f"{torch.get_num_threads()} thread(s), torch's CPU capability {torch.backends.cpu.get_cpu_capability()}. "
            "With a model as small as this, naive torch spends its time between ops; `python -m kernels.bench` "
            "compares the ops themselves."
        ),
    }


def _ratio(a: Measured, b: Measured, what: str) -> float:
    """Median over rounds of b's time in units of a's; "weighed": with the forward pass that importance weights need."""
    of = {
        "sample": lambda c: c.sample_s,
        "learn": lambda c: c.learn_s,
        "both": lambda c: c.sample_s + c.learn_s,
        "weighed": lambda c: c.learn_s + c.weigh_s,
        "both weighed": lambda c: c.sample_s + c.learn_s + c.weigh_s,
    }
    base = of[what.replace("both weighed", "both").replace("weighed", "learn")]
    return statistics.median(of[what](y) / base(x) for x, y in zip(a.costs, b.costs, strict=True))
