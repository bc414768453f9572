"""Tokens a second of this project's decoding and of `InklingForCausalLM.generate`, at equal weights in one process.

Ours (fp32 and bf16) and theirs (fp32) decode 1, 8 and 32 sequences of 64 prompt and 64 sampled tokens on a
12.6M-parameter Inkling, one after another in each round, so that a busy moment of the machine hits all of them.
Sampling is over all tokens at temperature 1; the median over rounds counts. Not measured: quality.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import InklingConfig, InklingForCausalLM, InklingTextConfig

from kernels import dispatch, ops
from kernels.layout import Segments
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.config import SMALL_PATCH
from model.inputs import Inputs, Senses
from model.senses.video import Patches
from rollout.bench.timing import seconds
from rollout.seeds import token_key

PROMPT_TOKENS = 64
SAMPLED_TOKENS = 64
SESSIONS = (1, 8, 32)
NO_CODES = torch.empty(0, 80, dtype=torch.uint8)
VOCABULARY = NO_TOKEN = 1024


@dataclass(frozen=True)
class TextSpeed:
    """Sampled tokens a second, all sequences together."""

    sessions: int
    ours_fp32: float
    ours_bf16: float
    transformers_fp32: float

    @property
    def times(self) -> float:
        return self.ours_fp32 / self.transformers_fp32


def text_config() -> InklingTextConfig:
    return InklingTextConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        swa_num_attention_heads=8, swa_num_key_value_heads=4, swa_head_dim=32, moe_intermediate_size=256,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, logits_mup_width_multiplier=1.0,
        max_position_embeddings=4096,
    )  # fmt: skip


def text_models() -> tuple[InteractionModel, InteractionModel, InklingForCausalLM]:
    """(ours in fp32, ours in bf16, transformers' in fp32), with one set of weights."""
    text = text_config()
    config = InklingConfig(
        text_config=text,
        audio_config={"mel_vocab_size": 16},
        vision_config={"patch_size": SMALL_PATCH, "num_hidden_layers": 1},
        audio_token_id=NO_TOKEN,
        image_token_id=NO_TOKEN + 1,
    )
    ours = InteractionModel(config)
    ours.init_weights(0)
    theirs = InklingForCausalLM(text).eval()
    named = {
        name.replace("model.language_model.", "model."): weight
        for name, weight in ours.state_dict().items()
        if not name.startswith(("model.audio_tower.", "model.vision_tower."))
    }
    theirs.load_state_dict(named)
    half = InteractionModel(config, torch.bfloat16)
    half.load_state_dict(ours.state_dict())
    for model in (ours, half, theirs):
        model.to(dispatch.device())
    ours.pack()
    half.pack()
    return ours, half, theirs


def written(tokens: Tensor, segments: Segments) -> Inputs:
    """Inputs without audio: tokens int64 [T]."""
    senses = Senses(NO_TOKEN, NO_TOKEN + 1, SMALL_PATCH)
    return Inputs.of(tokens, NO_CODES.to(tokens.device), Patches.none(SMALL_PATCH), segments, senses)


@torch.inference_mode()
def generate(model: InteractionModel, prompt: Tensor) -> Tensor:
    """prompt int64 [S, P] -> sampled int64 [S, SAMPLED_TOKENS]."""
    sessions, length = prompt.shape
    state = SessionState(model.config, sessions, length + SAMPLED_TOKENS, model.dtype, max_rows=prompt.numel())
    slots = [state.open() for _ in range(sessions)]
    hidden = model(written(prompt.flatten(), state.extend(slots, [length] * sessions)), state)
    hidden = hidden[length - 1 :: length]
    allowed = torch.ones(1, model.vocab, dtype=torch.bool, device=model.device)
    row_class = torch.zeros(sessions, dtype=torch.int64, device=model.device)
    one = [1] * sessions
    sampled = []
    for position in range(SAMPLED_TOKENS):
        keys = torch.tensor([token_key(slot, 0, position) for slot in slots]).to(model.device)
        token, _, _ = ops.sample(model.logits(hidden), 1.0, keys, allowed, row_class)
        sampled.append(token)
        if position + 1 < SAMPLED_TOKENS:
            hidden = model(written(token, state.extend(slots, one)), state)
    return torch.stack(sampled, 1)


@torch.inference_mode()
def generate_transformers(model: InklingForCausalLM, prompt: Tensor) -> Tensor:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        min_new_tokens=SAMPLED_TOKENS,
        max_new_tokens=SAMPLED_TOKENS,
        pad_token_id=0,
    )
    return out[:, prompt.shape[1] :]


def measure_text(rounds: int) -> list[TextSpeed]:
    ours, half, theirs = text_models()
    results = []
    for sessions in SESSIONS:
        prompt = torch.randint(8, 1024, (sessions, PROMPT_TOKENS), generator=torch.Generator().manual_seed(sessions))
        prompt = prompt.to(dispatch.device())
        engines = (
            partial(generate, ours, prompt),
            partial(generate, half, prompt),
            partial(generate_transformers, theirs, prompt),
        )
        for engine in engines:
            assert engine().shape == (sessions, SAMPLED_TOKENS)  # and warm
        taken = [[seconds(engine) for engine in engines] for _ in range(rounds)]
        rates = (sessions * SAMPLED_TOKENS / statistics.median(column) for column in zip(*taken, strict=True))
        results.append(TextSpeed(sessions, *rates))
        last = results[-1]
        print(
            f"{sessions:3d} sequences: ours fp32 {last.ours_fp32:8.0f}, bf16 {last.ours_bf16:8.0f}, transformers fp32 "
            f"{last.transformers_fp32:6.0f} tokens/s; ours (fp32) {last.times:.1f} times transformers"
        )
    return results
