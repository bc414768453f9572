"""The main command: warm start, then RL, then the held-out score.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m rl.train --config configs/quickstart.yaml

Any field of the recipe can be given on the command line (``--rl.steps 20``); ``--resume`` goes on from the newest
finished checkpoint of the run of that name, from its beginning where there is none yet (`rl.resume` says what may
change). One run at a time writes into a folder. Every process runs this same program; the first one writes and prints.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.train")

from model.placement import Placement
from model.program import ranks
from model.program.folders import locate
from model.program.recipe import read_recipe
from model.program.runs import sole_writer
from rl.config import TrainConfig
from rl.display import Display
from rl.resume import finished
from rl.run import Run


def main(arguments: list[str] | None = None) -> None:
    config, resume, recipe = parse(arguments)
    folder = locate(config.runs, config.name)
    Placement.enter(config.placement, config.model.dtype)
    with ranks.joined(), sole_writer(folder):
        if resume and (said := finished(config)):
            Display(ranks.rank() == 0).say(said)
            return
        run = Run(config, recipe, resume)
        last = run.execute()
    run.sender.ended(last)  # when no other process waits for this one


def parse(arguments: list[str] | None = None, past: bool = False) -> tuple[TrainConfig, bool, str]:
    """The recipe, whether to resume, and the resolved recipe as YAML; ``past`` and errors as in `read_recipe`."""
    description = "Train an interaction model by exactly on-policy RL."
    recipe = read_recipe("rl.train", description, TrainConfig, arguments, resumes=True, past=past)
    return recipe.config, recipe.resume, recipe.text
