"""The model card of a checkpoint: its ``README.md``, which the Hugging Face hub shows and whose head it reads.

It says what the run knew when it saved the checkpoint: nothing of the machine, the time or the people, so that equal
runs write equal cards. Whose the weights are is theirs to say who publish them: the head names no license.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from model.program.files import write_whole
from model.program.reading import one_line, parse_yaml
from model.program.yaml_text import to_yaml
from model.weights.manifest import LOCATION_FIELDS

CARD = "README.md"
TAGS = ("audio", "speech", "streaming", "reinforcement-learning", "metronome")


@dataclass(frozen=True)
class Score:
    """One figure of a card: ``Score("held out, timespeak", 0.8125, 96)``."""

    name: str
    value: float
    scenarios: int | None  # over how many, where that is known
    interval: float | None = None  # half of the 95 % interval, where that is known


@dataclass(frozen=True)
class Facts:
    """What a card says."""

    title: str  # the run's name
    summary: str  # a sentence
    identity: Mapping[str, str]  # what it is, exactly: contract, digests, step
    recipe: str  # YAML
    loading: str  # Python, with ours
    with_transformers: str | None  # Python; None: transformers alone cannot read it
    scores: Sequence[Score] = ()
    tags: Sequence[str] = ()


def card(facts: Facts) -> str:
    """The text of a card."""
    data = ModelCardData(
        library_name="metronome" if facts.with_transformers is None else "transformers",
        pipeline_tag=None if facts.with_transformers is None else "any-to-any",
        tags=[*TAGS, *facts.tags],
    )
    parts = [f"# {one_line(facts.title)}", facts.summary]
    parts.append(_table(("", ""), [(name, f"`{one_line(value)}`") for name, value in facts.identity.items()]))
    if facts.scores:
        rows = [(one_line(s.name), _with_interval(s), f"{s.scenarios or ''}") for s in facts.scores]
        parts += ["## Scores", _table(("", "mean score ± half its 95 % interval", "scenarios"), rows)]
    parts.append("## Use")
    if facts.with_transformers is not None:
        parts += ["With transformers alone:", _code("python", facts.with_transformers), "With Metronome:"]
    parts.append(_code("python", facts.loading))
    if facts.recipe:
        parts += ["## Recipe", _code("yaml", public(facts.recipe))]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").content


def write_card(folder: Path, facts: Facts) -> None:
    write_whole(folder / CARD, card(facts).encode())


def public(recipe: str) -> str:
    """A recipe as YAML without what says where a run lies and is reported; of absolute paths the last part is left."""
    fields = parse_yaml(recipe)
    kept = {name: value for name, value in fields.items() if name not in LOCATION_FIELDS}
    return to_yaml(_without_places(kept))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _with_interval(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.interval is None else f" ± {score.interval:.4f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(language: str, text: str) -> str:
    """In as many backticks as the text has nowhere in a row."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
