"""What the model card of a reward model says (`model.weights.card`)."""

from __future__ import annotations

from collections.abc import Mapping

from kernels import dispatch
from model.weights.card import Facts

LOADING = """\

model = RewardModel.load(".")  # this folder
rewards = model.score(episodes)  # of each chunk and axis"""


def facts(name: str, axes: tuple[str, ...], steps: int, recipe: str, identity: Mapping[str, str]) -> Facts:
    """``name``: the run's; ``recipe``: as YAML; ``identity``: digests of the weights, and of what they were made
    from."""
    return Facts(
        title=name,
        summary=f"A reward model of {' and '.join(axes)} for conversations in micro-turns of 200 ms, after {steps} "
        "steps on preference pairs. Its backbone, in the folder `backbone`, is of Inkling's architecture; its heads "
        "are read by Metronome.",
        identity={"steps": str(steps), **identity, "contract": dispatch.contract_id()},
        recipe=recipe,
        loading=LOADING,
        with_transformers=None,
        tags=("reward-model",),
    )
