"""``python -m rl.audit.matrix --checkpoint CKPT --out FOLDER``: what must not change bits, and whether it does.

For our kernels and for naive torch (`kernels.naive`), in fp32 and bf16: tokens sampled once are scored in two ways that
differ in one thing only (how many episodes run together, where chunks are cut, …), and every log-prob and row digest is
compared bit for bit. Then the lesson's table (`rl.audit.lesson`). Both are printed and written to FOLDER/matrix.json.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.startup import run_command

    run_command("rl.audit.matrix")

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import weights_digest
from model.files import write_whole
from rl.audit import lesson
from rl.audit.sides import DTYPES, Cuts, Scored, Side, both, cached, engines, first_of, joined, whole
from rl.environment import environment
from rl.identity import Mismatch
from rl.learner import policy_gradient
from rollout.episode import Episode, load_episodes, save_episodes
from rollout.play import Play, play
from rollout.scenarios.base import Scenario
from rollout.scenarios.registry import ScenarioConfig
from rollout.speech import SpeechBank

COLUMNS = ["what changes", "how", "side", "dtype", "tokens", "unequal", "rows unequal", "k3", "max abs"]
SEED = 0


@dataclass(frozen=True)
class Cell:
    """One comparison of the matrix."""

    axis: str
    setting: str  # "this against that"
    side: str
    dtype: str
    mismatch: Mismatch

    def row(self) -> list[Any]:
        m = self.mismatch
        k3 = m.k3_sum / max(m.num_tokens, 1)
        return [
            self.axis, self.setting, self.side, self.dtype, m.num_tokens, m.num_unequal, m.rows_unequal, k3, m.max_abs
        ]  # fmt: skip


def scenarios(bank: SpeechBank, count: int) -> list[Scenario]:
    """Held-out scenarios, families in turn."""
    config = ScenarioConfig()
    return [config.in_turn(i, "held_out", i, bank) for i in range(count)]


def sampled(side: Side, engine: str, items: Sequence[Scenario], slots: int) -> list[Episode]:
    """One rollout of each scenario at temperature 1, ``slots`` at a time."""
    with side.active(), engines(side)[engine](side, slots, 1024, 1.0) as started:
        return play(started, [Play(item, 0) for item in items], SEED)


def cells(side: Side, items: Sequence[Scenario], tokens: Sequence[Episode], elsewhere: Scored) -> Iterator[Cell]:
    """Every comparison of one side. ``tokens``: the episodes whose tokens are scored; ``elsewhere``: the same tokens
    scored by another process, `whole` and together."""

    def cell(axis: str, setting: str, a: Scored, b: Scored) -> Cell:
        return Cell(axis, setting, side.name, side.dtype, a.against(b))

    n = len(tokens)
    alone, together = whole(side, tokens), whole(side, tokens, n)
    yield cell("batch size", f"{n} episodes against 1", together, alone)
    yield cell("batch size", "2 episodes against 1", whole(side, tokens, 2), alone)
    yield cell("order", "reversed", _reversed(side, tokens), together)
    first = joined([first_of(side, [e, tokens[(i + 1) % n]]) for i, e in enumerate(tokens)])
    other = joined([first_of(side, [e, tokens[(i + 2) % n]]) for i, e in enumerate(tokens)])
    yield cell("neighbours", "another one", other, first)
    uncut = cached(side, tokens, Cuts())
    for rows in (1, 7, 64):
        yield cell("chunk cuts", f"{rows} rows a call against all", cached(side, tokens, Cuts(rows)), uncut)
    turns = cached(side, tokens, Cuts(micro_turns=True))
    yield cell("cached or recomputed", "micro-turns against no cache", turns, together)
    half = min(int(e.sampled_at[-1]) for e in tokens) // 2
    unforked = cached(side, tokens, Cuts(half))
    yield cell("forked prefix", f"from row {half}", cached(side, tokens, Cuts(half, fork_at=half)), unforked)
    yield cell(
        "page layout", "scattered pages", cached(side, tokens, Cuts(64, scattered=True)), cached(side, tokens, Cuts(64))
    )
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(1)
            one = whole(side, tokens, n)
            torch.set_num_threads(count)
            yield cell("threads", f"{count} against 1", whole(side, tokens, n), one)
    finally:
        torch.set_num_threads(threads)
    yield cell("processes", "another process", elsewhere, together)
    for engine in engines(side):
        many, single = (sampled(side, engine, items, slots) for slots in (len(items), 1))
        yield Cell(f"engine {engine}", f"{n} sessions against 1", side.name, side.dtype, sampled_apart(many, single))
        yield Cell(f"engine {engine}", "sampler against learner", side.name, side.dtype, learner_apart(side, many))


def _reversed(side: Side, tokens: Sequence[Episode]) -> Scored:
    scored = whole(side, tokens[::-1], len(tokens))
    lengths = [len(e.sampled_at) for e in tokens[::-1]]
    parts = [Scored(p, d) for p, d in zip(scored.logprob.split(lengths), scored.digest.split(lengths), strict=True)]
    return joined(parts[::-1])


def sampled_apart(a: Sequence[Episode], b: Sequence[Episode]) -> Mismatch:
    """Two samplings of the same plays. From the first token that is another one all count as unequal, and k1, k3 and
    the largest gap are taken before it."""
    parts = []
    for x, y in zip(a, b, strict=True):
        n = max(len(x.sampled_at), len(y.sampled_at))
        both_have = min(len(x.sampled_at), len(y.sampled_at))
        xs, ys = (e.tokens[e.sampled_at[:both_have]] for e in (x, y))
        same = int((xs == ys).int().cumprod(0).sum())
        m = Scored(x.logprob[:same], x.digest[:same]).against(Scored(y.logprob[:same], y.digest[:same]))
        parts.append(Mismatch(n, m.num_unequal + n - same, m.rows_unequal + n - same, m.k1_sum, m.k3_sum, m.max_abs))
    return Mismatch.total(parts)


def learner_apart(side: Side, episodes: Sequence[Episode], micro_batch: int = 8) -> Mismatch:
    """What the sampler stored against what the learner finds under autograd."""
    weights = [torch.ones(len(e.chunk)) for e in episodes]
    with side.active():
        g = policy_gradient(side.model, episodes, weights, side.vocabulary.classes, 1.0, micro_batch)
    stored = Scored(torch.cat([e.logprob for e in episodes]), torch.cat([e.digest for e in episodes]))
    return Scored(g.logprob, g.digest).against(stored)


def _elsewhere(folder: Path, episodes: Path, dtypes: Sequence[torch.dtype]) -> list[tuple[Any, Any]]:
    """In another process: `whole`, together, of every side; as arrays, which cross processes by value."""
    tokens = load_episodes(episodes)
    scored = [whole(side, tokens, len(tokens)) for side in both(folder, dtypes)]
    return [(s.logprob.numpy(), s.digest.numpy()) for s in scored]


def invariance(folder: Path, sides: Sequence[Side], dtypes: Sequence[torch.dtype], count: int) -> list[Cell]:
    """The matrix over ``count`` episodes, whose tokens our first side samples."""
    items = scenarios(SpeechBank.load(), count)
    tokens = sampled(sides[0], "session", items, count)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "episodes.safetensors"
        save_episodes(path, tokens)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            arrays = pool.submit(_elsewhere, folder, path, dtypes).result()
    elsewhere = [Scored(torch.from_numpy(p), torch.from_numpy(d)) for p, d in arrays]
    return [c for side, other in zip(sides, elsewhere, strict=True) for c in cells(side, items, tokens, other)]


def run(
    checkpoint: Path,
    out: Path,
    *,
    episodes: int = 4,
    completions: int = 1000,
    long_completions: int = 100,
    rounds: int = 5,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> dict[str, Any]:
    """Makes the matrix and the lesson's table of one model folder, writes out/matrix.json and returns its content.

    ``episodes`` of the matrix; ``completions`` of one prompt at temperature 0, and of a long one; ``rounds`` of timing.
    Raises CheckpointError for a folder that holds no model."""
    sides = both(checkpoint, dtypes)
    found = invariance(checkpoint, sides, dtypes, episodes)
    table = {
        "title": "Invariance matrix",
        "columns": COLUMNS,
        "rows": [cell.row() for cell in found],
        "note": (
            f"{episodes} held-out episodes. Unequal: log-probs of sampled tokens that differ in any bit; rows unequal: "
            "log-prob rows over the whole vocabulary; k3: mean of exp(d) - 1 - d, nats; max abs: largest |d|."
        ),
    }
    tables = [table, *lesson.tables(sides, completions, long_completions, rounds)]
    result = {
        "checkpoint": str(checkpoint),
        "weights_digest": weights_digest(sides[0].model),
        "environment": environment(),
        "tables": tables,
    }
    write_whole(out / "matrix.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    return result


def shown(table: dict[str, Any]) -> str:
    """A table as text."""
    rows = [table["columns"], *([_text(value) for value in row] for row in table["rows"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([table["title"], *lines, table["note"]])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rl.audit.matrix", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of config.json and model.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for matrix.json")
    parser.add_argument("--completions", type=int, default=1000)
    parser.add_argument("--long-completions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    a = parser.parse_args(arguments)
    result = run(
        a.checkpoint,
        a.out,
        completions=a.completions,
        long_completions=a.long_completions,
        rounds=a.rounds,
        dtypes=[getattr(torch, name) for name in a.dtypes],
    )
    print("\n\n".join(shown(table) for table in result["tables"]))
