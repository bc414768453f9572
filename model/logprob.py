"""The one log-probability function, used by sampler and learner alike.

logp(token) = log softmax(logits / temperature)[token], where the softmax is over the tokens that the row's class
allows. Temperature is part of the policy. There is no top-k or top-p: truncation would make the sampled policy differ
from the one that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kernels import ops
from model import tokenizer as tokenizers

MODE, FIRST_TEXT, NEXT_TEXT = 0, 1, 2
"""Row classes, which say from which tokens a row is sampled. MODE: the decision after a chunk's audio; FIRST_TEXT: the
first word after a mode other than listen; NEXT_TEXT: a further word or ``<|end|>``."""


@dataclass(frozen=True)
class TokenClasses:
    """Which tokens each row class allows; log-probs and samples under this restriction.

    >>> from model.tokenizer import load_tokenizer
    >>> [int(n) for n in TokenClasses.build(load_tokenizer(), 256).allowed.sum(1)]
    [2, 247, 248]
    """

    allowed: Tensor  # bool [3, V], rows MODE, FIRST_TEXT, NEXT_TEXT
    copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def build(tokenizer: PreTrainedTokenizerBase, vocab: int, delegate: bool = False) -> TokenClasses:
        """``vocab`` is the model's V; ids without a token and control tokens are never allowed. ``delegate``: whether
        the mode ``<|delegate|>`` may be sampled. Raises ValueError when V is smaller than the tokenizer or that lacks a
        special token."""
        if vocab < (words := tokenizers.size(tokenizer)):
            raise ValueError(f"TokenClasses: the tokenizer has {words} tokens, the model's vocabulary only {vocab}")
        ids = tokenizers.special_ids(tokenizer)
        control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        text = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids, *control, *ids.values()})
        allowed = torch.zeros(3, vocab, dtype=torch.bool)
        allowed[MODE, [ids["listen"], ids["speak"]] + [ids["delegate"]] * delegate] = True
        allowed[FIRST_TEXT, text] = True
        allowed[NEXT_TEXT, [*text, ids["end"]]] = True
        return TokenClasses(allowed)

    def logprob(
        self, logits: Tensor, token: Tensor, row_class: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logits fp32 [T, V], token and row_class int64 [T] -> (logprob fp32 [T], entropy fp32 [T] in nats, digest of
        the whole log-prob row int64 [T]). Differentiable. At temperature 0 (greedy) log-probs are those at 1, as in
        `sample`."""
        token, row_class = (x.to(logits.device, non_blocking=True) for x in (token, row_class))
        return ops.logprob(logits, token, temperature or 1.0, self.on(logits.device), row_class)

    def sample(
        self, logits: Tensor, key: Tensor, row_class: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logits fp32 [T, V], key int64 [T] (bits of the row's uint64 random key) -> (token int64 [T], logprob fp32
        [T], digest int64 [T]), the last two equal to what `logprob` gives for that token."""
        key, row_class = (x.to(logits.device, non_blocking=True) for x in (key, row_class))
        return ops.sample(logits, temperature, key, self.on(logits.device), row_class)

    def sample_rows(
        self, logits: Tensor, key: Tensor, row_class: Tensor, temperature: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `sample`, with a temperature a row, [T]. The op takes one for all of its rows, so it is called once for
        each temperature; by the row contract that changes no bit."""
        distinct = dict.fromkeys(temperature)
        if len(distinct) == 1:
            return self.sample(logits, key, row_class, temperature[0])
        rows = [torch.tensor([i for i, t in enumerate(temperature) if t == one]) for one in distinct]
        parts = [
            self.sample(logits[r.to(logits.device, non_blocking=True)], key[r], row_class[r], t)
            for r, t in zip(rows, distinct, strict=True)
        ]
        back = torch.cat(rows).argsort().to(logits.device, non_blocking=True)
        token, logprob, digest = (torch.cat(column)[back] for column in zip(*parts, strict=True))
        return token, logprob, digest

    def on(self, device: torch.device) -> Tensor:
        """``allowed`` on ``device``; copied at the first call."""
        if device.type == "cpu":
            return self.allowed
        if device not in self.copies:
            with torch.inference_mode(False):  # the learner keeps it for its backward, whoever asked first
                self.copies[device] = self.allowed.to(device)
        return self.copies[device]
