"""The data of the page's charts: curves over steps, and sampler against learner. `charts.js` draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.program.reading import UnreadableError, read_object
from rl.audit.records import Records
from rl.audit.replay.rescore import CheckedEpisode
from rl.audit.table import Table

CELLS = 96
"""The plot of log-probs counts tokens in CELLS x CELLS cells."""
MAX_POINTS = 2000
"""Most differing tokens that are drawn as points of their own; all are counted."""

Record = Mapping[str, Any]


def curves(records: Records, rescored: Sequence[int]) -> list[dict[str, Any]]:
    """The charts of a run; ``rescored``: the steps of which episodes were re-scored."""
    metrics, mismatch = records.metrics, records.mismatch()
    if not metrics:
        return []
    unequal = chart(
        "Unequal tokens at each step",
        "tokens",
        [line("log-probs that differ", metrics, "mismatch/num_unequal"),
         line("rows that differ", metrics, "mismatch/rows_unequal")],
        f"The run's own count, before each optimizer step: {mismatch.num_unequal:,} of {mismatch.num_tokens:,}. "
        "Diamonds: steps of which episodes were re-scored for this audit.",
    ) | {"marks": list(rescored)}  # fmt: skip
    out = [unequal]
    if mismatch.k3_sum:
        names = [line("k3", metrics, "mismatch/k3"), line("k1", metrics, "mismatch/k1")]
        out.append(chart("Mismatch KL", "nats a token", names, "Sampler against learner at equal weights."))
    axes = records.scenarios.axes if records.scenarios else ()
    rewards = [line(name, metrics, f"reward/{name}") for name in ("mean", *axes)]
    rewards += [line("learned", metrics, "proxy/mean")]
    scores = [line("training rollouts", metrics, "reward/score"), line("held-out", metrics, "eval/held_out")]
    out += [
        chart("Reward of an episode", "", rewards, "Mean over a step's rollouts, by the rules: all axes, and each."),
        chart("Score by the rules", "%", scores, "Share of what was due that was done right."),
        chart(
            "Groups that taught nothing",
            "%",
            [_share("groups", metrics, "groups"), _share("families' axes", metrics, "terms")],
            "Degenerate groups: all rollouts of a scenario were worth the same on an axis, so that their advantages "
            "are 0. Where that holds for every group of a family, its axis taught the step nothing.",
        ),
        chart("Entropy of the policy", "nats a token", [line("entropy", metrics, "policy/entropy")], ""),
        chart("Where a step's time went", "s", _times(metrics), "Seconds of a step, stacked.") | {"stacked": True},
    ]
    return [one for one in out if one["lines"]]


def chart(title: str, unit: str, lines: Iterable[dict[str, Any] | None], note: str) -> dict[str, Any]:
    """A chart with those of ``lines`` that are not None."""
    return {"title": title, "unit": unit, "lines": [one for one in lines if one], "note": note}


def line(name: str, metrics: Sequence[Record], key: str) -> dict[str, Any] | None:
    """The curve of a metric: a value for each record, None where it has none. None if no record has one."""
    values = [_number(record.get(key)) for record in metrics]
    return {"name": name, "values": values} if any(v is not None for v in values) else None


def _share(name: str, metrics: Sequence[Record], what: str) -> dict[str, Any] | None:
    """Degenerate ``what`` ("groups" or "terms") of all, as `rl.step.credit` counts them."""
    values = []
    for record in metrics:
        some, every = _number(record.get(f"credit/degenerate_{what}")), _number(record.get(f"credit/{what}"))
        values.append(some / every if some is not None and every else None)
    return {"name": name, "values": values} if any(v is not None for v in values) else None


def _times(metrics: Sequence[Record]) -> list[dict[str, Any] | None]:
    named = [("rollout", "time/rollout_s"), ("judge", "time/judge_s"), ("learner", "time/learner_s")]
    return [line(name, metrics, key) for name, key in named]


def _number(value: Any) -> float | None:
    """Six digits are enough to draw."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def scatter(episodes: Sequence[CheckedEpisode]) -> dict[str, Any] | None:
    """The sampler's log-probs against the learner's: counts of tokens by cell, and the differing tokens as points. None
    if nothing was re-scored."""
    scored = [(one, one.logprob, len(one.episode.text.logprob)) for one in episodes if one.logprob is not None]
    if not scored:
        return None
    sampler = torch.cat([one.episode.text.logprob for one, _, _ in scored]).double()
    learner = torch.cat([logprob[:words] for _, logprob, words in scored]).double()
    differs = torch.cat([one.token_differs[:words] for one, _, words in scored])
    finite = sampler.isfinite() & learner.isfinite()
    sampler, learner, differs = sampler[finite], learner[finite], differs[finite]
    low = min(float(sampler.min()), float(learner.min()), -1.0) if len(sampler) else -1.0
    high = max(float(sampler.max()), float(learner.max()), 0.0) if len(sampler) else 0.0
    edges = np.linspace(low, high, CELLS + 1)
    counts, _, _ = np.histogram2d(sampler.numpy(), learner.numpy(), bins=(edges, edges))
    x, y = counts.nonzero()
    places = differs.nonzero().flatten()[:MAX_POINTS]
    return {
        "low": low,
        "high": high,
        "cells": CELLS,
        "counts": np.stack([x, y, counts[x, y]], 1).astype(int).tolist(),
        "tokens": len(sampler),
        "differing": int(differs.sum()),
        "points": torch.stack([sampler[places], learner[places]], 1).tolist(),
    }


def tables(path: Path, gaps: list[str]) -> list[Table]:
    """The tables of a JSON file ``{"tables": [{"title", "columns", "rows", "note"}]}``, as the diagnosis and the matrix
    write it; none if there is no file. A file of another form adds a sentence to ``gaps``."""
    if not path.is_file():
        return []
    try:
        return [
            Table(
                title=str(one["title"]),
                columns=[str(c) for c in one["columns"]],
                rows=[[_cell(cell) for cell in row] for row in one["rows"]],
                note=str(one.get("note", "")),
            )
            for one in read_object(path)["tables"]
        ]
    except (UnreadableError, KeyError, TypeError, AttributeError) as error:
        gaps.append(f"{path.name} holds no tables that can be shown ({error!r}).")
        return []


def _cell(value: Any) -> int | float | str:
    if value is None:
        return ""
    return value if isinstance(value, int | float) else str(value)
