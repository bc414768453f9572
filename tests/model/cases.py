"""Random small models beside transformers' with the same weights, and random rows of text, audio and video, all by
seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import InklingConfig, InklingForConditionalGeneration

from model.backbone.state import SessionState
from model.backbone.transformer import Capture, InteractionModel
from model.inputs import Inputs, Senses, one_context
from model.senses.video import NO_VIDEO, Frames, grid, normalised

AUDIO, IMAGE = 2, 5
SENSES = Senses(AUDIO, IMAGE, 4)
TOWERS = [(4, 1), (4, 2), (4, 3), (6, 2), (6, 3), (10, 2), (10, 3), (9, 1), (12, 4), (16, 2)]
"""(side of a patch, layers) of vision towers: folds of 2, 3 and 5, one or several at once, time with space or after."""
ROWS = 150  # longer than every window below


@dataclass(frozen=True)
class Rows:
    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    frames: Frames = NO_VIDEO
    contexts: Tensor = field(default_factory=one_context)

    @property
    def own(self) -> Tensor:
        return self.codes[:0]

    def cut(self, first: int, end: int) -> Rows:
        """Of rows without video."""
        a, b = (int((self.tokens[:row] == AUDIO).sum()) for row in (first, end))
        return Rows(self.tokens[first:end], self.codes[a:b])


def random_config(seed: int) -> InklingConfig:
    """Both kinds of layer and of MLP, one or two shared experts, log scaling on or off, padded vocabulary or not."""
    pick = random.Random(seed).choice
    layers = pick([2, 3])
    text = {
        "vocab_size": pick([64, 97]), "unpadded_vocab_size": pick([None, 60]), "hidden_size": pick([32, 48, 64]),
        "num_hidden_layers": layers,
        "layer_types": ["hybrid_sliding", "hybrid", pick(["hybrid_sliding", "hybrid"])][:layers],
        "mlp_layer_types": [pick(["dense", "sparse"]) for _ in range(layers - 1)] + ["sparse"],
        "num_attention_heads": 4, "num_key_value_heads": pick([1, 2, 4]), "head_dim": pick([8, 16, 32]),
        "swa_num_attention_heads": 2, "swa_num_key_value_heads": pick([1, 2]), "swa_head_dim": pick([8, 16]),
        "sliding_window_size": pick([16, 40, 70]), "d_rel": pick([4, 16]), "rel_extent": pick([32, 100]),
        "log_scaling_n_floor": pick([None, 20]), "max_position_embeddings": 4096,
        "intermediate_size": 48, "moe_intermediate_size": pick([16, 24]), "n_routed_experts": pick([4, 8]),
        "num_experts_per_tok": pick([1, 2, 3]), "n_shared_experts": pick([1, 2]), "route_scale": pick([1.0, 8.0]),
        "logits_mup_width_multiplier": pick([1.0, 24.0]),
    }  # fmt: skip
    side, depth = TOWERS[seed % len(TOWERS)]
    config = InklingConfig(
        text_config=text,
        audio_config={"mel_vocab_size": 16},
        vision_config={"patch_size": side, "num_hidden_layers": depth},
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
    )
    config._attn_implementation = "eager"
    return config


def twins(seed: int, dtype: torch.dtype = torch.float32) -> tuple[InteractionModel, InklingForConditionalGeneration]:
    """(ours, packed; transformers') with the same random weights, scaled so that every part matters to the logits."""
    config = random_config(seed)
    generator = torch.Generator().manual_seed(seed)
    theirs = InklingForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in [*theirs.named_parameters(), *theirs.named_buffers()]:
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "global_scale" in name:
                weight.copy_(1 + 0.2 * noise)
            elif "sconv" in name or "rel_logits" in name:
                weight.copy_(0.3 * noise)
            elif "correction_bias" in name:
                weight.copy_(0.1 * noise)
            elif weight.is_floating_point():
                weight.copy_(noise / weight.shape[-1] ** 0.5)
    ours = InteractionModel(config, dtype)
    ours.load_state_dict(theirs.state_dict())
    ours.pack()
    return ours, theirs


def random_rows(seed: int, count: int = ROWS) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 60, (count,), generator=generator)
    tokens[torch.rand(count, generator=generator) < 0.4] = AUDIO
    codes = torch.randint(0, 16, (int((tokens == AUDIO).sum()), 80), generator=generator, dtype=torch.uint8)
    return Rows(tokens, codes)


def random_video(seed: int, side: int, count: int = ROWS) -> Rows:
    """Rows with two micro-turns of video among them: a still picture, and two frames."""
    generator = torch.Generator().manual_seed(seed)
    rows, shown, chunks = random_rows(seed, count), [], []
    for number in (1, 2):
        height, width = (int(torch.randint(1, 3 * side, (), generator=generator)) for _ in range(2))
        chunks.append(torch.randint(0, 256, (number, height, width, 3), generator=generator, dtype=torch.uint8))
        down, across = grid(height, width, side)
        shown.append(torch.full((down * across,), IMAGE))
    third = count // 3
    before, between, after = rows.tokens.tensor_split([third, 2 * third])
    parts = [before, shown[0], between, shown[1], after]
    return Rows(torch.cat(parts), rows.codes, Frames.of(chunks))


def pixel_values(rows: Rows, side: int) -> Tensor:
    """As transformers' processor gives them, fp32 [P, 2, p, p, 3]."""
    patches = rows.frames.patches(side)
    return normalised(patches.pictures, patches.inside)[patches.steps()].transpose(0, 1)


def whole(model: InteractionModel, rows: Rows, capture: Capture | None = None) -> Tensor:
    """The learner's forward: one sequence, no state."""
    return model(Inputs.cat([rows], model.senses), None, capture)


@torch.no_grad()
def in_pieces(model: InteractionModel, rows: Rows, lengths: list[int], state: SessionState, slot: int) -> Tensor:
    """The session's forward, ``lengths[i]`` rows a call."""
    outputs, at, inputs = [], 0, Inputs.cat([rows], model.senses)
    for length in lengths:
        outputs.append(model(inputs.part([(0, at, at + length)], state.extend([slot], [length])), state))
        at += length
    assert at == len(rows.tokens)
    return torch.cat(outputs)
