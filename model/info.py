"""``python -m model.info --preset inkling_small``: a model's numbers and their sources, and what memory a run takes.

Allocates no weights. Every size is what the program itself asks for before it takes memory (`model.backbone.size`,
`model.backbone.state`).
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("model.info")

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import InklingConfig

from model import config as shapes
from model import published
from model.backbone.size import empty
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file
from model.program.ranges import Range, number
from model.sizing import counts, numbers, of_release, session_rows, training_rows, weight_rows
from model.weights import checkpoint

WIDTH = 132
"""Columns that the tables need."""


def several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """For ``type=`` of an option that takes values separated by commas, each once."""
    return lambda text: list(dict.fromkeys(read(part) for part in text.split(",")))


def dtype_named(text: str) -> torch.dtype:
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose float32 or bfloat16")
    return shapes.DTYPES[text]


def parser() -> Parser:
    parser, count = Parser("model.info", __doc__), number(int, Range(1, 10**6))
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=shapes.PRESETS)
    which.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a model in transformers' format")
    parser.add_argument(
        "--max-tokens", type=number(int, Range(1, 10**8)), default=4096,
        help="rows a session can hold (20 or more a second)",
    )  # fmt: skip
    parser.add_argument("--sessions", type=several(count), default=[1, 64, 512], help="on one device, as in 1,64,512")
    parser.add_argument("--gpus", type=several(count), default=[1, 8, 16, 128], help="processes that train together")
    stage = several(number(int, Range(0, 3)))
    parser.add_argument("--zero", type=stage, default=[0, 1, 2, 3], metavar="STAGES", help="ZeRO stages, as in 0,1")
    dtypes = [torch.float32, torch.bfloat16]
    parser.add_argument(
        "--dtype", type=several(dtype_named), default=dtypes, metavar="TYPES", help="float32, bfloat16 or both"
    )
    parser.add_argument(
        "--rows", type=number(int, Range(1, 10**8)), default=8192,
        help="of one forward pass of the learner: rl.micro_batch times an episode's",
    )  # fmt: skip
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="also write everything to a file")
    return parser


def report(config: InklingConfig, given: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as JSON; sizes in bytes."""
    models = {str(dtype).removeprefix("torch."): empty(config, dtype) for dtype in given.dtype}
    first = next(iter(models.values()))
    return {
        "model": given.preset or str(given.checkpoint),
        "numbers": numbers(config, given.preset, given.checkpoint),
        "sources": published.SOURCES if given.preset == "inkling_small" else {},
        "parameters": counts(config, first),
        "release": of_release(config, given.preset),
        "weights": [weight_rows(name, model) for name, model in models.items()],
        "max_tokens": given.max_tokens,
        "sessions": [row for model in models.values() for row in session_rows(model, given.sessions, given.max_tokens)],
        "rows": given.rows,
        "training": [
            row for model in models.values() for row in training_rows(model, given.zero, given.gpus, given.rows)
        ],
    }


def table(console: Console, title: str, rows: list[dict[str, Any]], note: str = "") -> None:
    """Prints rows, sizes in GiB, or all in MiB when they are small. In ``title`` UNIT becomes the unit."""
    sizes = [v for row in rows for name, v in row.items() if isinstance(v, int) and name not in COUNTED]
    unit, scale = ("GiB", 2**30) if max(sizes, default=0) >= 2**30 else ("MiB", 2**20)
    made = Table(
        title=title.replace("UNIT", unit),
        caption=note or None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )
    for name in rows[0]:
        made.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        made.add_row(*(cell(name, value, scale) for name, value in row.items()))
    console.print(made)


COUNTED = ("sessions", "zero_stage", "gpus", "value")
"""Columns of numbers that are no sizes."""


def cell(name: str, value: Any, scale: int) -> str:
    if value is None:
        return "any" if name == "gpus" else "-"
    if name in COUNTED or not isinstance(value, int):
        return str(value)
    if not value:
        return "0"
    size = value / scale
    return f"{size:,.1f}" if size >= 100 else f"{size:.2f}" if size >= 0.1 else f"{size:.4f}"


def show(content: dict[str, Any], console: Console) -> None:
    sources = [f"{name}: {meaning}." for name, meaning in content["sources"].items()]
    table(console, f"{content['model']}: its numbers", content["numbers"], " ".join(sources))
    for name, value in content["parameters"].items():
        console.print(f"{name:<44}{value:>22,}")
    for line in content["release"]:
        console.print(line)
    table(
        console, "Weights of one process, UNIT", content["weights"],
        "both: what trains; packed only: what only samples (model.weights.checkpoint.load, keep_weights=False).",
    )  # fmt: skip
    table(
        console, f"Sessions of up to {content['max_tokens']:,} rows on one device, UNIT", content["sessions"],
        "Beside the weights; without what a forward pass needs for a moment.",
    )  # fmt: skip
    table(
        console, f"Training, of each GPU, UNIT; one forward pass of {content['rows']:,} rows", content["training"],
        "total: what this program holds while it takes a step, at least. It runs stages 0 to 2; at each of them every "
        "GPU has all weights, packed copies, and the gradient and its sum, so 2 takes what 1 does. formula: weights, "
        "gradient and optimizer as ZeRO shares them, without packs and activations; stage 3 is not run. Sessions come "
        "on top of both.",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    config = shapes.preset(given.preset) if given.preset else checkpoint.config_of(given.checkpoint)
    content = report(config, given)
    show(content, Console(highlight=False, width=max(Console().width, WIDTH)))
    if given.json is not None:
        write_json(given.json, content)
