"""Our sampler inside vLLM: a logits processor that has already sampled when it returns.

vLLM is asked for greedy tokens and finds one finite logit in each row: the token that `TokenClasses.sample` drew there,
with the counter-based key of (session, chunk, position). So neither vLLM's random numbers nor its order of requests can
enter. Log-prob, row digest and hidden state wait in `Policy.records` until the engine takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rollout.engines.vllm.policy import CACHE_LAYER, Policy
from rollout.seeds import token_key
from rollout.turn.grammar import row_class


@dataclass(frozen=True)
class Turn:
    """One micro-turn that is being sampled."""

    session: str
    key: int
    chunk: int
    temperature: float
    keep_hidden: bool
    heard: int  # tokens before the first sampled one
    said: list[int]  # vLLM's own list, which grows

    @property
    def position(self) -> int:
        return self.heard + len(self.said)


def _turn(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Turn:
    if params.extra_args is None or prompt is None:
        raise ValueError("this model's requests come from rollout.engines.vllm.engine, with a session and its key")
    return Turn(**params.extra_args, heard=len(prompt), said=output)


class RowSampler(LogitsProcessor):
    """See the module's text."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context  # filled when the model is built
        self.turns: dict[int, Turn] = {}  # by row

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.turns, batch_update, _turn)

    def apply(self, logits: Tensor) -> Tensor:
        """logits fp32 [R, V] -> [R, V], -inf but for each row's sampled token."""
        policy = cast(Policy, self.layers[CACHE_LAYER])
        turns = [self.turns[row] for row in range(logits.shape[0])]
        chosen = torch.full_like(logits, -torch.inf)
        if not turns:
            return chosen
        device = logits.device
        keys = torch.tensor([token_key(t.key, t.chunk, t.position) for t in turns], device=device)
        classes = torch.tensor([row_class(len(t.said)) for t in turns], device=device)
        token, logprob, digest = policy.classes.sample_rows(logits, keys, classes, [t.temperature for t in turns])
        chosen[torch.arange(len(turns), device=device), token] = 0.0
        assert policy.hidden is not None
        values = zip(turns, policy.hidden, token.tolist(), logprob.tolist(), digest.tolist(), strict=True)
        for turn, row, *record in values:
            hidden = row.cpu().view(torch.uint8).numpy().tobytes() if turn.keep_hidden else b""
            # A row in the middle of a chunked prefill is sampled too; the real one overwrites it.
            policy.records.setdefault(turn.session, {})[turn.position] = (*record, hidden)
        return chosen
