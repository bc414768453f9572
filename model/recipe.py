"""Recipes: typed frozen dataclasses, read from YAML and dotted overrides. Unknown keys are errors."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Generic, TypeVar

import jsonargparse

from kernels.errors import MetronomeError
from model import shipped

Config = TypeVar("Config")


@dataclass(frozen=True)
class Recipe(Generic[Config]):
    config: Config
    resume: bool
    text: str  # the resolved recipe as YAML


def read_recipe(
    command: str, description: str, kind: type[Config], arguments: list[str] | None = None, resumes: bool = False
) -> Recipe[Config]:
    """``command`` ("rl.train") names itself in messages; ``resumes`` adds ``--resume``; ``arguments`` are the command
    line's unless given. Raises MetronomeError for an unknown key or a wrong type; ``--help`` prints every field."""
    parser = jsonargparse.ArgumentParser(prog=command, description=description, exit_on_error=False)
    help_text = f"recipe: a YAML file, or one that comes with the program ({', '.join(shipped.names())})"
    parser.add_argument("--config", action="config", help=help_text)
    if resumes:
        resume_help = "go on from the run's newest finished checkpoint"
        parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=resume_help)
    parser.add_class_arguments(kind)
    given = [with_underscores(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    try:
        parsed = parser.parse_args(with_shipped(given))
    except jsonargparse.ArgumentError as error:
        raise MetronomeError(f"recipe: {error}. `python -m {command} --help` lists every field and its type") from error
    resume = bool(parsed.pop("resume")) if resumes else False
    parsed.pop("config")
    text = parser.dump(parsed, skip_unset=False)
    return Recipe(kind(**vars(parser.instantiate(parsed))), resume, text)


def with_underscores(argument: str) -> str:
    """``--speech-dir=a-b`` -> ``--speech_dir=a-b``: fields have underscores, people type dashes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def with_shipped(given: list[str]) -> list[str]:
    """``--config quickstart`` -> ``--config /…/configs/quickstart.yaml``, where no file has that name."""
    out = list(given)
    for i, argument in enumerate(given):
        if argument.startswith("--config="):
            out[i] = f"--config={shipped.resolve(argument.removeprefix('--config='))}"
        elif i and given[i - 1] == "--config":
            out[i] = shipped.resolve(argument)
    return out
