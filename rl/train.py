"""The main command: warm start, then RL, then the held-out score.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m rl.train --config configs/quickstart.yaml

Any field of the recipe can be given on the command line (``--rl.steps 20``); ``--resume`` goes on from the newest
finished checkpoint of the run of that name. Every process runs this same program; the first one writes and prints.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from rl.startup import run_command

    run_command("rl.train")

import sys

import jsonargparse

from kernels.errors import MetronomeError
from rl import ranks
from rl.config import TrainConfig
from rl.run import Run


def main(arguments: list[str] | None = None) -> None:
    config, resume, recipe = parse(arguments)
    ranks.join()
    try:
        Run(config, recipe, resume).execute()
    finally:
        ranks.leave()


def parse(arguments: list[str] | None = None) -> tuple[TrainConfig, bool, str]:
    """The recipe, whether to resume, and the resolved recipe as YAML.

    Raises MetronomeError for an unknown key or a wrong type; ``--help`` prints every field."""
    parser = jsonargparse.ArgumentParser(
        prog="rl.train", description="Train an interaction model by exactly on-policy RL.", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="recipe, YAML")
    resume_help = "go on from the run's newest finished checkpoint"
    parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=resume_help)
    parser.add_class_arguments(TrainConfig)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        parsed = parser.parse_args([with_underscores(argument) for argument in given])
    except jsonargparse.ArgumentError as error:
        raise MetronomeError(f"recipe: {error}. `python -m rl.train --help` lists every field and its type") from error
    resume = bool(parsed.pop("resume"))
    parsed.pop("config")
    recipe = parser.dump(parsed, skip_unset=False)
    return TrainConfig(**vars(parser.instantiate(parsed))), resume, recipe


def with_underscores(argument: str) -> str:
    """``--speech-dir=a-b`` -> ``--speech_dir=a-b``: fields have underscores, people type dashes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
