"""Compares naive torch, naive torch with importance weights, and ours: nondeterminism, mismatch KL and time.

- Distinct completions at temperature 0: many sessions hear one recording while the load varies (how many hear it
  together, how many others run beside them, and how far these are in their own conversations). A completion is all that
  a session samples. Counted are distinct token sequences, and distinct sequences of row digests, which also differ
  where distributions differ but the likeliest token does not.
- KL between sampler and learner at equal weights (k3 of `rl.step.identity`), and the largest KL of any episode.
- Time of sampling and of learning, naive and ours alternating in one process.

Truncated importance weights (`rl.study.baseline`) change neither completions nor KL. They correct the gradient, at the
price of another forward pass of the learner.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rl.audit.table import Cell, Table
from rl.step.gradient import gradient_of
from rl.step.identity import Mismatch, compare
from rl.study.variants import Variant, session_engine, uncached
from rollout.play import Play, play
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import LISTEN
from rollout.turn.grammar import context_rows
from rollout.turn.observation import Observation, stack_audio
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank

MAX_TOGETHER = 32
"""In a round of completions, most sessions that hear the recording."""
MAX_OTHERS = 16
"""Most other sessions beside them."""
MAX_AHEAD = 20
"""Most chunks that the other sessions have heard before."""
LONG = 4
"""Number of recordings that make up the long context."""
SEED = 0
GROUPS, ROLLOUTS, MICRO_BATCH = 2, 6, 8
"""Scenarios, rollouts of each, and episodes in a forward pass of the learner, where KL and time are measured."""
BF16_DIVISOR = 20
"""bf16 gets this many times fewer completions, no long ones, and one round: without AVX-512 torch's bf16 products take
30 times as long."""

COMPLETIONS = ["variant", "dtype", "recording", "context, rows", "completions", "distinct", "distinct in bits"]
LESSON = ["dtype", "measure", "naive", "naive + importance weights", "ours"]
"""Columns of the two tables."""
ZERO = (
    "sampled tokens unequal, %",
    "KL sampler against learner (k3), nats",
    "its largest episode",
    "largest gap of a log-prob",
)
"""Measures that are 0 where sampler and learner are one function."""


def recording(item: Scenario) -> Tensor:
    """The user's audio when the model only listens, fp32 [chunks, 3200]."""
    user, heard, chunks = item.user(), None, []
    for _ in range(item.chunks):
        chunks.append(user.next_chunk(heard))
        heard = LISTEN
    return stack_audio(chunks)


@dataclass(frozen=True)
class Completions:
    """Counts of the completions of one recording."""

    count: int
    distinct: int  # distinct sequences of tokens
    distinct_rows: int  # distinct sequences of row digests
    chunks: int  # length of the recording
    rows: int  # length of the longest context


def completions(variant: Variant, heard: Tensor, others: Sequence[Tensor], count: int) -> Completions:
    """Samples ``count`` completions of a recording ``heard`` fp32 [chunks, 3200] at temperature 0; ``others``: the
    recordings that the other sessions hear."""
    load = random.Random(SEED)
    longest = context_rows(len(heard) + MAX_AHEAD, words_per_chunk=1)
    seen: dict[tuple[int, ...], int] = {}
    digests: set[tuple[int, ...]] = set()
    rows = 0
    with variant.active():
        engine = session_engine(variant, MAX_TOGETHER + MAX_OTHERS, longest)
        while (made := sum(seen.values())) < count:
            together = min(load.randint(1, MAX_TOGETHER), count - made)
            ahead = load.randint(0, MAX_AHEAD)
            other_audio = [others[load.randrange(len(others))] for _ in range(load.randint(0, MAX_OTHERS))]
            other_sessions = [engine.open(0, 0.0) for _ in other_audio]
            for chunk in range(ahead if other_audio else 0):
                engine.append(other_sessions, [Observation(x[chunk % len(x)]) for x in other_audio])
            sessions = [engine.open(0, 0.0) for _ in range(together)]
            for chunk in range(len(heard)):
                audio = [x[(ahead + chunk) % len(x)] for x in other_audio] + [heard[chunk]] * together
                engine.append([*other_sessions, *sessions], [Observation(x) for x in audio])
            for session in sessions:
                tokens = tuple(session.tokens[at] for at, _, _ in session.sampled)
                seen[tokens] = seen.get(tokens, 0) + 1
                digests.add(tuple(session.digest))
                rows = max(rows, len(session.tokens))
            for session in (*other_sessions, *sessions):
                engine.close(session)
    return Completions(count, len(seen), len(digests), len(heard), rows)


@dataclass(frozen=True)
class Cost:
    """Time of one round."""

    sample_s: float  # sampling a batch of episodes
    learn_s: float  # the learner's gradient
    weigh_s: float  # the further forward pass that importance weights need


@dataclass(frozen=True)
class Measured:
    """One variant's mismatch on its own samples, and its cost in each round."""

    mismatch: Mismatch
    worst_k3: float  # the largest mean k3 of any episode, nats
    costs: tuple[Cost, ...]


def measured(variants: Sequence[Variant], rounds: int) -> list[Measured]:
    """Measures all variants, alternating in each round, so that other load on the machine affects all of them. In fp32
    there is one more round before, to warm up."""
    bank, config = SpeechBank.open(), ScenarioConfig()
    items = [config.in_turn(i, "train", i, bank) for i in range(GROUPS)]
    plays = [Play(item, r) for item in items for r in range(ROLLOUTS)]
    costs: list[list[Cost]] = [[] for _ in variants]
    mismatches: list[tuple[Mismatch, float]] = []
    for turn in range(rounds + 1):
        for i, variant in enumerate(variants):
            if turn and variant.dtype == "bfloat16":
                continue
            with variant.active():
                cost, parts = _round(variant, plays)
            if turn or variant.dtype == "bfloat16":
                costs[i].append(cost)
            if not turn:
                mismatches.append((Mismatch.total(parts), max(p.k3_sum / max(p.num_tokens, 1) for p in parts)))
    return [Measured(*m, tuple(c)) for m, c in zip(mismatches, costs, strict=True)]


def _round(variant: Variant, plays: Sequence[Play]) -> tuple[Cost, list[Mismatch]]:
    engine = session_engine(variant, len(plays), 512)
    clock = [time.perf_counter()]
    episodes = play(engine, plays, SEED)
    clock.append(time.perf_counter())
    weights = [torch.ones(len(e.text.chunk)) for e in episodes]
    g = gradient_of(variant.model, episodes, weights, variant.vocabulary.classes, 1.0, MICRO_BATCH)
    clock.append(time.perf_counter())
    uncached(variant, episodes, MICRO_BATCH)
    clock.append(time.perf_counter())
    lengths = [len(e.text.chunk) for e in episodes]
    parts = [
        compare(e.text.logprob, logprob, e.text.digest, digest)
        for e, logprob, digest in zip(episodes, g.logprob.split(lengths), g.digest.split(lengths), strict=True)
    ]
    return Cost(*(after - before for before, after in pairwise(clock))), parts


def tables(variants: Sequence[Variant], count: int, long_count: int, rounds: int) -> list[Table]:
    """The table that compares the variants for each dtype, and the counts of completions in full. ``count``,
    ``long_count``: completions of a short and of a long recording; ``rounds`` of timing, 0 for none."""
    costs = measured(variants, rounds) if rounds else []
    bank, config = SpeechBank.open(), ScenarioConfig()
    heard = [recording(item) for item in config.of_each(4, "held_out", bank)]
    long = torch.cat(heard[:LONG])
    counts = []
    for variant in variants:
        slow = variant.dtype == "bfloat16"
        wanted = ((heard[0], -(-count // BF16_DIVISOR) if slow else count), (long, 0 if slow else long_count))
        counts.append([completions(variant, x, heard[1:], n) for x, n in wanted if n])
    every = Table(
        "Distinct completions at temperature 0 under varying load",
        COMPLETIONS,
        [
            [variant.name, variant.dtype, f"{c.chunks} chunks", c.rows, c.count, c.distinct, c.distinct_rows]
            for variant, of in zip(variants, counts, strict=True)
            for c in of
        ],
        f"A round has 1 to {MAX_TOGETHER} sessions that hear the recording and 0 to {MAX_OTHERS} others, 0 to "
        f"{MAX_AHEAD} chunks ahead. Distinct in bits: other log-prob rows, even if the same tokens.",
    )
    return [_lesson(variants, costs, counts), every] if rounds else [every]


def problems(table: Table) -> list[str]:
    """Where one of the lesson's tables says that ours is not one function, in sentences; none for other tables."""
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    if list(table.columns) == COMPLETIONS:
        return [
            f"{row['distinct in bits']} distinct completions of {row['recording']}, {row['dtype']}, by ours."
            for row in rows
            if row["variant"] == "ours" and row["completions"] and not row["distinct"] == row["distinct in bits"] == 1
        ]
    if list(table.columns) == LESSON:
        return [
            f"The lesson's {row['measure']}, {row['dtype']}: {row['ours']} of ours."
            for row in rows
            if row["measure"] in ZERO and row["ours"] != 0
        ]
    return []


def _lesson(variants: Sequence[Variant], costs: Sequence[Measured], counts: Sequence[Sequence[Completions]]) -> Table:
    rows: list[list[Cell]] = []
    by_name = {(variant.dtype, variant.name): i for i, variant in enumerate(variants)}
    for dtype in dict.fromkeys(variant.dtype for variant in variants):
        naive, ours = by_name[dtype, "naive torch"], by_name[dtype, "ours"]
        a, b = costs[naive], costs[ours]
        p, q = counts[naive][0], counts[ours][0]
        m, n = a.mismatch, b.mismatch
        measures: list[tuple[str, float, float]] = [
            (f"distinct of {q.count:,} completions", p.distinct, q.distinct),
            ("distinct in bits", p.distinct_rows, q.distinct_rows),
            (ZERO[0], 100 * m.num_unequal / m.num_tokens, 100 * n.num_unequal / n.num_tokens),
            (ZERO[1], m.k3_sum / m.num_tokens, n.k3_sum / n.num_tokens),
            (ZERO[2], a.worst_k3, b.worst_k3),
            (ZERO[3], m.max_abs, n.max_abs),
        ]
        rows += [[dtype, measure, of_naive, of_naive, of_ours] for measure, of_naive, of_ours in measures]
        rows.append([dtype, "time to sample, naive = 1", 1.0, 1.0, _ratio(a, b, "sample")])
        rows.append([dtype, "time to learn, naive = 1", 1.0, _ratio(a, a, "weighed"), _ratio(a, b, "learn")])
        rows.append([dtype, "both", 1.0, _ratio(a, a, "both weighed"), _ratio(a, b, "both")])
    return Table(
        "The lesson's table, measured",
        LESSON,
        rows,
        f"KL and time on {GROUPS * ROLLOUTS} episodes sampled together at temperature 1 and learned from "
        f"{MICRO_BATCH} at a time; times are medians of ratios, the two by turns in one process with "
        f"{torch.get_num_threads()} thread(s), torch's CPU capability {torch.backends.cpu.get_cpu_capability()}. "
        "With a model as small as this, naive torch spends its time between ops; `python -m kernels.tools.bench` "
        "compares the ops themselves.",
    )


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
