"""Prints an episode in the terminal, one line per chunk: loudness of the input, the model's action, rewards.

    python -m rollout.show runs/quickstart/episodes/step_000040.rank_0.safetensors [--rollout N] [--list] [--json]

A file holds the rollouts of one step, group after group; ``--list`` lists them. Rewards are computed by the rules of
the episode's family, with the settings of the run whose folder contains the file; episodes of unknown families are
shown without rewards. Families that are not shipped are imported only with ``--trust-families``: importing executes
their module.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    import signal

    from model.program.startup import run_command

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    run_command("rollout.show")

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernels.errors import MetronomeError
from model.program.arguments import Parser
from model.program.ranges import Range, number
from model.program.reading import one_line, to_json
from rollout.record.episode import Episode, check_tensors, load_episodes
from rollout.record.timeline import Moment, moments
from rollout.scenarios.registry import shipped_only
from rollout.turn.action import Mode

VERDICT_FUNCTION = "reward.explain:explain"
"""module:function that judges an episode: (episode, folder of its run) -> `View.verdict`. It is imported by name when
needed, because package reward is built on this one."""
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class View:
    """An episode with what is displayed beside it."""

    episode: Episode
    moments: Sequence[Moment]
    verdict: dict[str, Any] | None  # {"score", "rewards": {axis: sum}, "events": [{"chunk", "kind", …}]}


def main(arguments: list[str] | None = None, console: Console | None = None) -> None:
    """The command. Raises MetronomeError for a file that cannot be read or a rollout that it does not have."""
    given = parser().parse_args(arguments)
    console = console or Console(highlight=False)
    with shipped_only("--trust-families", unless=given.trust_families) as refused:
        carry_out(given, console)
    for line in refused.values():
        print(line, file=sys.stderr)


def carry_out(given: argparse.Namespace, console: Console) -> None:
    """Prints what the options ask for."""
    episodes = load_episodes(given.file)
    if given.list:
        listing(episodes, given.file, console)
        return
    if not 0 <= given.rollout < len(episodes):
        raise MetronomeError(
            f"--rollout {given.rollout}: {given.file} holds {len(episodes)} rollouts, counted from 0; --list names them"
        )
    view = look(episodes[given.rollout], given.file)
    if given.json:
        print(to_json(as_json(view)), end="")
        return
    show(view, console)
    if len(episodes) > 1:
        console.print(f"Rollout {given.rollout} of {len(episodes)} in this file; --list names them all.", style="dim")


def parser() -> Parser:
    """The command line's options."""
    parser = Parser("rollout.show", "Prints an episode's timeline.")
    parser.add_argument("file", type=Path, help="RUN/episodes/step_NNNNNN.rank_N.safetensors")
    parser.add_argument(
        "--rollout",
        type=number(int, Range(0, 10**6)),
        default=0,
        metavar="N",
        help="which of the file's rollouts, from 0",
    )
    parser.add_argument("--list", action="store_true", help="name the file's rollouts")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--trust-families", action="store_true", help="import the modules of the run's own families")
    return parser


def look(episode: Episode, file: Path) -> View:
    """The view of an episode of ``file``. Raises MetronomeError when the episode's fields contradict each other."""
    module, name = VERDICT_FUNCTION.split(":")
    judge: Callable[[Episode, Path], dict[str, Any] | None] = getattr(importlib.import_module(module), name)
    try:
        check_tensors(episode)
        return View(episode, moments(episode), judge(episode, file.resolve().parent.parent))
    except ValueError as error:
        raise MetronomeError(f"{file}: {error}. Roll the episodes out again, or delete the file.") from error


def as_json(view: View) -> dict[str, Any]:
    """What ``--json`` prints."""
    e = view.episode
    head = {
        name: getattr(e, name) for name in ("scenario", "rollout", "seed", "temperature", "weights_digest", "facts")
    }
    chunks = [asdict(m) | {"logprob": m.logprob if math.isfinite(m.logprob) else None} for m in view.moments]
    return {**head, "chunks": chunks, "verdict": view.verdict}


def show(view: View, console: Console) -> None:
    """Prints the timeline and the verdict."""
    e = view.episode
    head = f"{e.name} · weights {e.weights_digest[:12]} · seed {e.seed} · temperature {e.temperature:g}"
    console.print(Text(one_line(head)))  # texts come from a file, and could otherwise control the terminal
    events: dict[int, list[dict[str, Any]]] = {}
    for event in view.verdict["events"] if view.verdict else ():
        events.setdefault(event["chunk"], []).append(event)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("chunk", "right"), ("s", "right"), ("heard", "left"), ("", "left"), ("mode", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("words")
    table.add_column("log-prob", justify="right", no_wrap=True)
    table.add_column("reward")
    low = min((m.level_db for m in view.moments), default=0.0)
    high = max((m.level_db for m in view.moments), default=0.0)
    for m in view.moments:
        bar = BARS[round((m.level_db - low) / max(high - low, 1e-9) * (len(BARS) - 1))] * 3
        style = "bold" if m.mode is not Mode.LISTEN else "dim"
        table.add_row(
            str(m.chunk),
            f"{m.start_ms / 1000:.1f}",
            Text(bar, "cyan" if m.speech else "dim"),
            "speech" if m.speech else "",
            Text(m.mode.value, style),
            Text(one_line(" ".join(m.words)), style),
            f"{m.logprob:.3f}",
            Text("; ".join(described(event) for event in events.get(m.chunk, ())), _colour(events.get(m.chunk, ()))),
        )
    console.print(table)
    if view.verdict is None:
        console.print("No rules of rewards know this family, or they cannot read its facts.", style="dim")
        return
    sums = ", ".join(f"{value:+.2f} {axis}" for axis, value in view.verdict["rewards"].items())
    console.print(f"score {view.verdict['score']:.2f} by the rules; reward {sums}")


def listing(episodes: Sequence[Episode], file: Path, console: Console) -> None:
    """Prints one line for each episode of the file."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rollout", "episode", "score", "said"):
        table.add_column(name, justify="left" if name in ("episode", "said") else "right")
    for n, episode in enumerate(episodes):
        verdict = look(episode, file).verdict
        said = one_line(" ".join(word for action in episode.actions for word in action.words))
        table.add_row(
            str(n), Text(one_line(episode.name)), "" if verdict is None else f"{verdict['score']:.2f}", Text(said)
        )
    console.print(table)


def described(event: dict[str, Any]) -> str:
    """One event as text: ``reminder hit +0.60 timing +1.00 content, due 28``."""
    rewards = "".join(f" {value:+.2f} {axis}" for axis, value in event["rewards"].items() if value)
    due = "" if event["due"] in (None, event["chunk"]) else f", due {event['due']}"
    return one_line(f"{event['kind']} {event['outcome']}{rewards}{due}")


def _colour(events: Sequence[dict[str, Any]]) -> str:
    total = math.fsum(value for event in events for value in event["rewards"].values())
    return "green" if total > 0 else "red" if total < 0 else ""
