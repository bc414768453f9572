"""Our sampler inside vLLM, as a logits processor.

It samples each row's token with `TokenClasses.sample_rows`, by the counter-based key of (session, chunk, position), and
returns logits that are -inf except at this token. vLLM is asked for greedy tokens and so takes it; vLLM's random
numbers and its order of requests have no effect. Log-prob, row digest and hidden state are kept in `Policy.records`
until the engine takes them.
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

from model.logprob import NEXT_TEXT
from rollout.engines.vllm.policy import CACHE_LAYER, Policy
from rollout.seeds import token_key
from rollout.turn.grammar import row_class


@dataclass(frozen=True)
class Turn:
    """A micro-turn that is being sampled: the keys of its session, and its tokens in vLLM."""

    session: str
    key: int
    chunk: int
    temperature: float
    keep_hidden: bool
    free_mode: int | None  # the mode after which no word need follow, as its token's id (`Grammar.row_class`)
    prompt_tokens: int  # number of tokens before the first sampled one
    output: list[int]  # tokens sampled so far; vLLM's own list, to which it appends

    @property
    def position(self) -> int:
        """Absolute position of the token that is sampled next."""
        return self.prompt_tokens + len(self.output)

    @property
    def row_class(self) -> int:
        """That of the token that is sampled next."""
        free = len(self.output) == 1 and self.output[0] == self.free_mode
        return NEXT_TEXT if free else row_class(len(self.output))


def _turn(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Turn:
    if params.extra_args is None or prompt is None:
        raise ValueError("this model's requests come from rollout.engines.vllm.engine, with a session and its key")
    return Turn(**params.extra_args, prompt_tokens=len(prompt), output=output)


class RowSampler(LogitsProcessor):
    """vLLM's interface to the sampler; see the module's docstring."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context  # filled when the model is built
        self.turns: dict[int, Turn] = {}  # by row

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.turns, batch_update, _turn)

    def apply(self, logits: Tensor) -> Tensor:
        """logits fp32 [R, V] -> [R, V], 0 at each row's sampled token and -inf elsewhere."""
        policy = cast(Policy, self.layers[CACHE_LAYER])
        turns = [self.turns[row] for row in range(logits.shape[0])]
        chosen = torch.full_like(logits, -torch.inf)
        if not turns:
            return chosen
        device = logits.device
        keys = torch.tensor([token_key(t.key, t.chunk, t.position) for t in turns], device=device)
        classes = torch.tensor([t.row_class for t in turns], device=device)
        token, logprob, digest = policy.classes.sample_rows(logits, keys, classes, [t.temperature for t in turns])
        chosen[torch.arange(len(turns), device=device), token] = 0.0
        assert policy.hidden is not None
        values = zip(turns, policy.hidden, token.tolist(), logprob.tolist(), digest.tolist(), strict=True)
        for turn, row, *record in values:
            hidden = row.cpu().view(torch.uint8).numpy().tobytes() if turn.keep_hidden else b""
            # vLLM also asks for a sample after each part of a chunked prefill; the last part's overwrites those.
            policy.records.setdefault(turn.session, {})[turn.position] = (*record, hidden)
        return chosen
