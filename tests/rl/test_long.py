"""The recipe of long episodes, in little: pages are given away while episodes are sampled, and the learner still gives
every token's bits; with a model that remembers more it does not."""

from __future__ import annotations

import pytest

from model.backbone import state
from model.context import ContextConfig, give
from rl import minimal, run
from rl.train import parse

SMALL = [
    *("--config", "long", "--scenarios.timespeak.chunks", "110", "--scenarios.timespeak.seconds", "[1]"),
    *("--warmstart.steps", "1", "--warmstart.episodes", "1", "--rl.steps", "1", "--rl.groups", "1"),
    *("--rl.rollouts", "2", "--rollout.context.first", "64", "--rollout.context.window", "128"),
]


def test_a_step_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    honest = state._Pages.free_unseen

    def counted(pages: state._Pages, slot: int, start: int) -> None:
        before = pages.freed
        honest(pages, slot, start)
        if pages.first:  # of global layers
            freed.append(pages.freed - before)

    monkeypatch.setattr(state._Pages, "free_unseen", counted)
    config = parse(SMALL)[0]
    assert config.rollout.context == ContextConfig("window", first=64, window=128)
    minimal.train(config)  # checks every token itself
    assert sum(freed) >= 8  # at least four of each session


def test_control_of_a_learner_that_remembers_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's model has the recipe's window, the learner's one that is a page longer, with equal weights."""
    config = parse(SMALL)[0]
    longer = ContextConfig("window", first=64, window=192)
    honest = minimal.gradient_of

    def other(model, *arguments, **more):  # type: ignore[no-untyped-def]
        learning = run.InteractionModel(give(model.config, longer), model.dtype)
        learning.load_state_dict(model.state_dict())
        learning.pack()
        return honest(learning, *arguments, **more)

    monkeypatch.setattr(minimal, "gradient_of", other)
    with pytest.raises(RuntimeError, match="not the same function: logprob differs"):
        minimal.train(config)
