"""``python -m rl.study.matrix --checkpoint CKPT --out FOLDER``: measures what changes the bits of log-probs.

For our kernels and for naive torch (`kernels.reference.naive`), in fp32 and bf16: the log-probs of the same tokens are
computed in two ways that differ in one thing only (how many episodes run together, where the input is cut, …), and
every log-prob and row digest is compared bit for bit. Then the table of `rl.study.lesson`. Both are printed and written
to FOLDER/matrix.json, with a verdict on our kernels; naive torch is the control, which is to differ. With
``--fail-on mismatch`` the exit status is 1 when a bit of ours differs, 3 when nothing of ours was measured or the
control differs in nothing.

Only tokens are compared, so a model with a voice is refused: the audit of its run compares its sound, too."""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.study.matrix")

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.errors import MetronomeError
from model.config import voice
from model.placement import Placement, PlacementConfig, add_device
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.folders import locked
from model.program.outputs import output_folder
from model.program.ranges import Range, number
from model.weights.checkpoint import config_of, weights_digest
from rl.audit.document import plain
from rl.audit.finding import Finding, Verdict, add_fail_on, leave
from rl.audit.table import Cell, Table
from rl.environment import environment
from rl.step.gradient import gradient_of
from rl.step.identity import Mismatch
from rl.study import lesson
from rl.study.variants import (
    DTYPES,
    Cuts,
    LogProbs,
    Variant,
    beside_others,
    cached,
    engines,
    joined,
    load_variants,
    uncached,
)
from rollout.play import Play, play
from rollout.record.episode import Episode, load_episodes, save_episodes
from rollout.scenarios.registry import ScenarioConfig
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank

COLUMNS = ["what changes", "how", "variant", "dtype", "tokens", "unequal", "rows unequal", "k3", "max abs"]
SEED = 0


@dataclass(frozen=True)
class Comparison:
    """One row of the matrix: two ways to compute the log-probs of the same tokens."""

    axis: str  # what differs between them
    setting: str  # how, as "2 episodes against 1"
    variant: str
    dtype: str
    mismatch: Mismatch

    def row(self) -> list[Cell]:
        """The cells, by `COLUMNS`."""
        m = self.mismatch
        k3 = m.k3_sum / max(m.num_tokens, 1)
        counts = [m.num_tokens, m.num_unequal, m.rows_unequal]
        return [self.axis, self.setting, self.variant, self.dtype, *counts, k3, m.max_abs]


@dataclass(frozen=True)
class Matrix:
    """The content of matrix.json."""

    checkpoint: str
    weights_digest: str
    environment: dict[str, Any]
    tables: list[Table]


def scenarios(bank: SpeechBank, count: int) -> list[Scenario]:
    """Held-out scenarios, families in turn."""
    config = ScenarioConfig()
    return [config.in_turn(i, "held_out", i, bank) for i in range(count)]


def sampled(variant: Variant, engine: str, items: Sequence[Scenario], slots: int) -> list[Episode]:
    """One rollout of each scenario at temperature 1, ``slots`` at a time."""
    with variant.active(), engines(variant)[engine](variant, slots, 1024) as started:
        return play(started, [Play(item, 0) for item in items], SEED)


def comparisons(
    variant: Variant, items: Sequence[Scenario], tokens: Sequence[Episode], elsewhere: LogProbs
) -> Iterator[Comparison]:
    """Every comparison of one variant. ``tokens``: the episodes whose log-probs are computed; ``elsewhere``: their
    log-probs from another process, `uncached` and together."""

    def row(axis: str, setting: str, a: LogProbs, b: LogProbs) -> Comparison:
        return Comparison(axis, setting, variant.name, variant.dtype, a.against(b))

    n = len(tokens)
    alone, together = uncached(variant, tokens), uncached(variant, tokens, n)
    yield row("batch size", f"{n} episodes against 1", together, alone)
    yield row("batch size", "2 episodes against 1", uncached(variant, tokens, 2), alone)
    yield row("order", "reversed", _reversed(variant, tokens), together)
    first = joined([beside_others(variant, [e, tokens[(i + 1) % n]]) for i, e in enumerate(tokens)])
    other = joined([beside_others(variant, [e, tokens[(i + 2) % n]]) for i, e in enumerate(tokens)])
    yield row("neighbours", "another one", other, first)
    uncut = cached(variant, tokens, Cuts())
    for rows in (1, 7, 64):
        yield row("chunk cuts", f"{rows} rows a call against all", cached(variant, tokens, Cuts(rows)), uncut)
    turns = cached(variant, tokens, Cuts(micro_turns=True))
    yield row("cached or recomputed", "micro-turns against no cache", turns, together)
    half = min(int(e.text.sampled_at[-1]) for e in tokens) // 2
    unforked = cached(variant, tokens, Cuts(half))
    yield row("forked prefix", f"from row {half}", cached(variant, tokens, Cuts(half, fork_at=half)), unforked)
    yield row(
        "page layout",
        "scattered pages",
        cached(variant, tokens, Cuts(64, scattered=True)),
        cached(variant, tokens, Cuts(64)),
    )
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(1)
            one = uncached(variant, tokens, n)
            torch.set_num_threads(count)
            yield row("threads", f"{count} against 1", uncached(variant, tokens, n), one)
    finally:
        torch.set_num_threads(threads)
    yield row("processes", "another process", elsewhere, together)
    for engine in engines(variant):
        many, single = (sampled(variant, engine, items, slots) for slots in (len(items), 1))
        yield Comparison(
            f"engine {engine}", f"{n} sessions against 1", variant.name, variant.dtype, compare_samplings(many, single)
        )
        yield Comparison(
            f"engine {engine}",
            "sampler against learner",
            variant.name,
            variant.dtype,
            compare_with_learner(variant, many),
        )


def _reversed(variant: Variant, tokens: Sequence[Episode]) -> LogProbs:
    scored = uncached(variant, tokens[::-1], len(tokens))
    lengths = [len(e.text.sampled_at) for e in tokens[::-1]]
    parts = [LogProbs(p, d) for p, d in zip(scored.logprob.split(lengths), scored.digest.split(lengths), strict=True)]
    return joined(parts[::-1])


def compare_samplings(a: Sequence[Episode], b: Sequence[Episode]) -> Mismatch:
    """Compares two samplings of the same plays. In an episode, all tokens from the first different one on count as
    unequal; k1, k3 and the largest difference are of the tokens before it."""
    parts = []
    for x, y in zip(a, b, strict=True):
        n = max(len(x.text.sampled_at), len(y.text.sampled_at))
        both_have = min(len(x.text.sampled_at), len(y.text.sampled_at))
        xs, ys = (e.tokens[e.text.sampled_at[:both_have]] for e in (x, y))
        same = int((xs == ys).int().cumprod(0).sum())
        first, second = (LogProbs(e.text.logprob[:same], e.text.digest[:same]) for e in (x, y))
        m = first.against(second)
        parts.append(Mismatch(n, m.num_unequal + n - same, m.rows_unequal + n - same, m.k1_sum, m.k3_sum, m.max_abs))
    return Mismatch.total(parts)


def compare_with_learner(variant: Variant, episodes: Sequence[Episode], micro_batch: int = 8) -> Mismatch:
    """Compares the log-probs that the sampler stored with the learner's, computed under autograd."""
    weights = [torch.ones(len(e.text.chunk)) for e in episodes]
    with variant.active():
        g = gradient_of(variant.model, episodes, weights, variant.vocabulary.classes, 1.0, micro_batch)
    stored = LogProbs(torch.cat([e.text.logprob for e in episodes]), torch.cat([e.text.digest for e in episodes]))
    return LogProbs(g.logprob, g.digest).against(stored)


def _elsewhere(folder: Path, episodes: Path, dtypes: Sequence[torch.dtype]) -> list[tuple[Any, Any]]:
    """In another process: `uncached`, together, of every variant; as arrays, which cross processes by value."""
    tokens = load_episodes(episodes)
    scored = [uncached(variant, tokens, len(tokens)) for variant in load_variants(folder, dtypes)]
    return [(s.logprob.numpy(), s.digest.numpy()) for s in scored]


def invariance(
    folder: Path, variants: Sequence[Variant], dtypes: Sequence[torch.dtype], count: int
) -> list[Comparison]:
    """The comparisons for all variants over ``count`` episodes, which ``variants[0]`` samples."""
    items = scenarios(SpeechBank.open(), count)
    tokens = sampled(variants[0], "session", items, count)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "episodes.safetensors"
        save_episodes(path, tokens)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            arrays = pool.submit(_elsewhere, folder, path, dtypes).result()
    elsewhere = [LogProbs(torch.from_numpy(p), torch.from_numpy(d)) for p, d in arrays]
    return [
        c
        for variant, other in zip(variants, elsewhere, strict=True)
        for c in comparisons(variant, items, tokens, other)
    ]


def _check_silent(folder: Path) -> None:
    """Raises MetronomeError for a model that samples sound: nothing here would compare it."""
    if voice(config_of(folder)) is not None:
        raise MetronomeError(
            f"{folder}: the model has a voice, and the matrix compares only tokens: name a checkpoint without one, or "
            "compare tokens and sound of its run by python -m rl.audit --run"
        )


def run(
    checkpoint: Path,
    out: Path,
    *,
    episodes: int = 4,
    completions: int = 1000,
    long_completions: int = 100,
    rounds: int = 5,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Matrix:
    """Makes the matrix and the lesson's table of one model folder, writes out/matrix.json and returns what it holds.

    ``episodes`` of the matrix; ``completions`` of one prompt at temperature 0, and of a long one; ``rounds`` of timing.
    Raises CheckpointError for a folder that holds no model, MetronomeError for a model with a voice."""
    _check_silent(checkpoint)
    variants = load_variants(checkpoint, dtypes)
    table = Table(
        "Invariance matrix",
        COLUMNS,
        [comparison.row() for comparison in invariance(checkpoint, variants, dtypes, episodes)],
        f"{episodes} held-out episodes. Unequal: log-probs of sampled tokens that differ in any bit; rows unequal: "
        "log-prob rows over the whole vocabulary; k3: mean of exp(d) - 1 - d, nats; max abs: largest |d|.",
    )
    tables = [table, *lesson.tables(variants, completions, long_completions, rounds)]
    result = Matrix(str(checkpoint), weights_digest(variants[0].model), environment(), tables)
    write_json(out / "matrix.json", plain(finding(tables)) | plain(result))
    return result


def finding(tables: Sequence[Table]) -> Finding:
    """The verdict on our kernels, by the matrix's rows and the lesson's. Where a row compared no token, or the control
    differs in nothing, equality shows nothing."""
    own = [table for table in tables if list(table.columns) == COLUMNS]
    rows = [dict(zip(COLUMNS, row, strict=True)) for table in own for row in table.rows]
    ours, control = ([row for row in rows if (row["variant"] == "naive torch") is naive] for naive in (False, True))
    differ, told = ([row for row in some if row["unequal"] or row["rows unequal"]] for some in (ours, control))
    tokens = sum(int(row["tokens"] or 0) for row in ours)
    empty = [row for row in ours if not row["tokens"]]
    parted = [problem for table in tables for problem in lesson.problems(table)]
    verdict = Verdict.of(0 if empty or not told else tokens, len(differ) + len(parted))
    says = [f"{len(differ):,} of {len(ours):,} comparisons of ours differ, over {tokens:,} tokens."]
    if differ:
        first = differ[0]
        says.append(f"The first: {first['what changes']}, {first['how']}, {first['variant']}, {first['dtype']}.")
    says += [f"{len(empty):,} of these compared no token."] * bool(empty)
    says += parted
    says.append(
        f"The control: {len(told):,} of {len(control):,} comparisons of naive torch differ"
        + ("." if told else ", so that nothing here shows that a difference would have been seen.")
    )
    return Finding(verdict, " ".join(says))


def show(tables: Sequence[Table]) -> Verdict:
    """Prints the tables and the verdict, and returns the latter."""
    found = finding(tables)
    print("\n\n".join([*(table.text() for table in tables), f"Matrix: {found}"]))
    return found.verdict


def parser() -> Parser:
    count = number(int, Range(1, 10**6))
    parser = Parser("rl.study.matrix", (__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of config.json and model.safetensors")
    parser.add_argument("--out", type=output_folder(), required=True, help="folder for matrix.json")
    parser.add_argument("--completions", type=count, default=1000)
    parser.add_argument("--long-completions", type=count, default=100)
    parser.add_argument("--rounds", type=count, default=5, help="rounds of timing")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    add_device(parser)
    add_fail_on(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(a.device), "float32")
    with locked(a.out):
        result = run(
            a.checkpoint,
            a.out,
            completions=a.completions,
            long_completions=a.long_completions,
            rounds=a.rounds,
            dtypes=[getattr(torch, name) for name in a.dtypes],
        )
    leave(show(result.tables), a.fail_on)
