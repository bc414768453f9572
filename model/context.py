"""What a model remembers of a long session: the policy at the context limit, as a recipe chooses it.

An interaction model hears some twenty tokens a second without end, and layers that attend to all of them need memory
and time without end. `stop`: global layers attend to everything, and a session that would pass its limit raises.
`window`: they attend to the first ``first`` tokens and to the last ``window`` (`model.config.global_sight`), so a
session of any length has bounded memory and cost. What is dropped is gone for good, and the model is trained so.
`summary`: before the tokens of a session reach ``budget`` the model is asked, in text, for a summary; the session then
goes on as a new sequence that begins with what it wrote (`rollout.turn.summary`).

A window is a property of the model, kept in its ``config.json``, not of whoever runs it: sampler, learner, audit and
reward models read one config and compute one function. A summary changes nothing that the model computes, only where
its sequences begin: its rule is the recipe's alone, and an episode says where its contexts begin. Neither changes a
weight, so any checkpoint can be given another policy for a new run; within a run it stays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import InklingConfig

from kernels.errors import MetronomeError
from kernels.layout import SPLIT_TOKENS
from model import config as shapes
from model.program.ranges import Length, Multiples, Range, Words


@dataclass(frozen=True)
class ContextConfig:
    """``ContextConfig("window", first=64, window=4096)``: about half a minute to three minutes of a conversation."""

    policy: Literal["stop", "window", "summary"] = "stop"
    # Of policy window: tokens that global layers attend to for ever, and the last ones that they attend to.
    first: Annotated[int, Multiples(0, 2**24, of=SPLIT_TOKENS)] = 64
    window: Annotated[int, Multiples(SPLIT_TOKENS, 2**24, of=SPLIT_TOKENS)] = 4096
    # Of policy summary: the most tokens of a sequence, the words that ask for a summary, and the most that it may have.
    budget: Annotated[int, Range(16, 2**24)] = 4096
    request: Annotated[str, Length(1, 200)] = "record what you know"
    summary_words: Words = 16


def give(config: InklingConfig, context: ContextConfig) -> InklingConfig:
    """A copy of ``config`` whose model remembers by ``context``, whatever the config said before. (With a summary each
    sequence is computed as under `stop`.)"""
    out, windowed = copy.deepcopy(config), context.policy == "window"
    for name, value in (("global_window", context.window), ("global_first", context.first)):
        if windowed:
            setattr(out.text_config, name, value)
        elif hasattr(out.text_config, name):
            delattr(out.text_config, name)
    shapes.check(out)
    return out


def check_same(config: InklingConfig, context: ContextConfig, where: str) -> None:
    """Raises MetronomeError unless the model in ``where`` remembers by ``context``."""
    has, wanted = (shapes.global_sight(c.text_config) for c in (config, give(config, context)))
    if has != wanted:
        raise MetronomeError(
            f"rollout.context: {_in_words(*wanted)} in the recipe, but the model in {where} has {_in_words(*has)}; "
            "give the run's own policy, or start a new run under another --name"
        )


def _in_words(window: int | None, first: int) -> str:
    return "policy stop" if window is None else f"policy window, first {first}, window {window}"


STOP = ContextConfig()
