"""The main command: warm start, then RL, then the held-out score.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m rl.train --config configs/quickstart.yaml

Any field of the recipe can be given on the command line (``--rl.steps 20``); ``--resume`` goes on from the newest
finished checkpoint of the run of that name. Every process runs this same program; the first one writes and prints.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.train")

from model.placement import Placement
from model.program.recipe import read_recipe
from rl.config import TrainConfig
from rl.learner import ranks
from rl.run import Run


def main(arguments: list[str] | None = None) -> None:
    config, resume, recipe = parse(arguments)
    Placement.enter(config.placement, config.model.dtype)
    ranks.join()
    try:
        Run(config, recipe, resume).execute()
    finally:
        ranks.leave()


def parse(arguments: list[str] | None = None, past: bool = False) -> tuple[TrainConfig, bool, str]:
    """The recipe, whether to resume, and the resolved recipe as YAML; ``past`` and errors as in `read_recipe`."""
    description = "Train an interaction model by exactly on-policy RL."
    recipe = read_recipe("rl.train", description, TrainConfig, arguments, resumes=True, past=past)
    return recipe.config, recipe.resume, recipe.text
