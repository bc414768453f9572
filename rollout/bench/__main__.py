"""``python -m rollout.bench --json FILE``: speed of decoding and serving on this machine; ``--only`` runs some parts.

- ``text``: decoding beside transformers' (`rollout.bench.text`);
- ``turns``, ``serving``, ``real_time``: streaming sessions (`rollout.bench.serving`);
- ``vision``: the vision tower beside transformers' (`rollout.bench.vision`);
- ``voice``: the flow head's share of a speaking micro-turn (`rollout.bench.voice`);
- ``overhead``: overhead of a micro-turn beside computing, and growth of memory (`rollout.bench.overhead`);
- ``sharing``: a group's rollouts as forks of one session (`rollout.bench.sharing`), by the policy of ``--checkpoint``;
- ``workers``: rollouts in worker processes (`rollout.bench.workers`), with the same policy;
- ``engines``: the embedded engine beside vLLM's (`rollout.bench.engines`).

Engines that are compared alternate in one process, since a machine's speed varies from minute to minute. Quality is not
measured.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rollout.bench.__main__")

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels import dispatch
from model.backbone.transformer import InteractionModel
from model.placement import Placement, PlacementConfig, add_device
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file
from model.program.ranges import Range, number
from model.weights import checkpoint
from rollout.bench import crowd
from rollout.bench.engines import measure_engines
from rollout.bench.overhead import measure_growth, measure_overhead
from rollout.bench.serving import holds_real_time, measure_real_time, measure_shapes, measure_turns
from rollout.bench.sharing import measure_sharing
from rollout.bench.text import measure_text
from rollout.bench.vision import measure_vision
from rollout.bench.voice import measure_voice
from rollout.bench.workers import measure_workers
from rollout.engines.vllm import process


def text(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [asdict(r) | {"times": r.times} for r in measure_text(given.rounds)]


def vision(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [asdict(r) | {"times": r.times} for r in measure_vision(20 * given.rounds)]


def voice(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [asdict(r) | {"share": r.share, "real_time": r.real_time} for r in measure_voice(10 * given.rounds)]


def turns(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [asdict(r) for r in measure_turns(4 * given.rounds)]


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    growth = measure_growth(100 * given.rounds)
    return {"time": asdict(measure_overhead(60 * given.rounds)), "growth": asdict(growth)}


def serving(given: argparse.Namespace) -> list[dict[str, Any]]:
    shapes = measure_shapes(20 * given.rounds)
    return [{"words_per_chunk": r.words_per_chunk} | asdict(r.served) for r in shapes]


def real_time(given: argparse.Namespace) -> dict[str, Any]:
    results = measure_real_time(20 * given.rounds)
    held = holds_real_time(results)
    print(f"{held} sessions hold real time")
    return {"sessions": held, "joining": [asdict(r) for r in results]}


def engines(given: argparse.Namespace) -> list[dict[str, Any]] | str:
    if reason := process.unavailable_reason():
        return left_out(reason)
    return [asdict(r) | {"times": r.times} for r in measure_engines(given.rounds, 20)]


def left_out(reason: str) -> str:
    print(f"left out: {reason}")
    return f"left out: {reason}"


def sharing(given: argparse.Namespace) -> dict[str, Any]:
    result = measure_sharing(policy(given), given.rounds)
    return asdict(result) | {"times": result.times, "checkpoint": str(given.checkpoint)}


def workers(given: argparse.Namespace) -> dict[str, Any] | str:
    if given.device != "cpu":
        return left_out("on a GPU episodes are sampled in the learner's own process")
    return measure_workers(policy(given), given.rounds) | {"checkpoint": str(given.checkpoint)}


def policy(given: argparse.Namespace) -> InteractionModel:
    """The model of ``--checkpoint``, or random weights of the tiny preset."""
    if given.checkpoint is None:
        return crowd.tiny_model()
    return checkpoint.load(given.checkpoint, torch.float32)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "text": text,
    "vision": vision,
    "voice": voice,
    "turns": turns,
    "overhead": overhead,
    "serving": serving,
    "real_time": real_time,
    "sharing": sharing,
    "workers": workers,
    "engines": engines,
}


def parser() -> Parser:
    parser = Parser("rollout.bench", __doc__)
    parser.add_argument("--json", type=output_file(), required=True, help="file for the results")
    rounds = number(int, Range(1, 10_000))
    parser.add_argument("--rounds", type=rounds, default=5, help="measurements of each engine (the median counts)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--checkpoint", type=Path, help="policy of sharing and workers (default: random weights)")
    add_device(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(given.device), "float32")
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
        "contract": dispatch.contract(),
        "rounds": given.rounds,
    }
    for part in given.only:
        print(f"-- {part}", flush=True)
        report[part] = PARTS[part](given)
    write_json(given.json, report)
    print(f"written to {given.json}")
