"""Model shapes: presets of transformers' `InklingConfig`, and a check that this implementation supports one.

There is no configuration class of our own: any Inkling checkpoint's ``config.json`` can be read. The vision tower is
not built; presets give its config a small size that nothing reads.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from transformers import InklingConfig, InklingTextConfig

from kernels import exact
from kernels.layout import CONV_TAPS

MEL_CHANNELS = 80
MEL_BINS = 16
AUDIO_TOKEN_ID = 2

Preset = Literal["nano", "tiny", "base", "inkling_small"]
PRESETS: tuple[str, ...] = get_args(Preset)


def preset(name: str) -> InklingConfig:
    """A fresh config. nano: 0.3M parameters, for the reward models of tiny policies. tiny: 2.3M parameters, for CPUs.
    base: 125M. inkling_small: 276B, 12B active (meta device only).

    Of inkling_small only the two counts are published. Vocabulary, head width, experts and top-k are those of Inkling's
    default config; width, depth, heads and expert width are our guess, chosen to give these counts. Raises ValueError
    for another name."""
    match name:
        case "nano":
            text = {
                "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 32,
                "layer_types": ["hybrid_sliding"] * 2 + ["hybrid"], "mlp_layer_types": ["dense"] * 3,
                "sliding_window_size": 128, "rel_extent": 512, "d_rel": 16, "intermediate_size": 128,
                "logits_mup_width_multiplier": 1.0, "max_position_embeddings": 32768,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 6,
            }  # fmt: skip
            return _config(text, audio_token_id=AUDIO_TOKEN_ID)
        case "tiny":
            text = {
                "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32,
                "layer_types": ["hybrid_sliding"] * 3 + ["hybrid"],
                "sliding_window_size": 128, "rel_extent": 512, "d_rel": 16,
                "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8,
                "num_experts_per_tok": 2, "n_shared_experts": 1, "route_scale": 2.0,
                "logits_mup_width_multiplier": 1.0, "max_position_embeddings": 32768,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 6,
            }  # fmt: skip
            return _config(text, audio_token_id=AUDIO_TOKEN_ID)
        case "base":
            text = {
                "vocab_size": 32768, "hidden_size": 512, "num_hidden_layers": 12,
                "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
                "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 64,
                "sliding_window_size": 512, "rel_extent": 1024, "d_rel": 16,
                "intermediate_size": 2048, "moe_intermediate_size": 256, "n_routed_experts": 16,
                "num_experts_per_tok": 4, "n_shared_experts": 1, "route_scale": 4.0, "logits_mup_width_multiplier": 2.0,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 6,
            }  # fmt: skip
            return _config(text, audio_token_id=AUDIO_TOKEN_ID)
        case "inkling_small":
            text = {
                "hidden_size": 4096, "num_hidden_layers": 42,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "swa_num_attention_heads": 32, "swa_num_key_value_heads": 16, "swa_head_dim": 128,
                "intermediate_size": 16384, "moe_intermediate_size": 2048, "logits_mup_width_multiplier": 16.0,
            }  # fmt: skip
            return _config(text, audio_token_id=200053)
        case _:
            raise ValueError(f"model preset {name!r} does not exist; choose one of {', '.join(PRESETS)}")


def _config(text: dict[str, object], audio_token_id: int) -> InklingConfig:
    config = InklingConfig(
        text_config=InklingTextConfig(**text),  # type: ignore[arg-type]
        audio_config={"n_mel_bins": MEL_CHANNELS, "mel_vocab_size": MEL_BINS},
        vision_config={"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1},
        audio_token_id=audio_token_id,
        image_token_id=audio_token_id + 1,
    )
    check(config)
    return config


def check(config: InklingConfig) -> None:
    """Raises ValueError for a config that Inkling allows but this implementation does not compute."""
    text = config.text_config
    wrong = []
    if text.conv_kernel_size != CONV_TAPS:
        wrong.append(f"conv_kernel_size is {text.conv_kernel_size}, the kernels have {CONV_TAPS} taps")
    if text.hidden_act != "silu":
        wrong.append(f"hidden_act is {text.hidden_act!r}, the kernels compute 'silu'")
    if text.n_shared_experts < 1 and "sparse" in text.mlp_layer_types:
        wrong.append("n_shared_experts is 0; Inkling's router needs at least 1")
    if text.attention_dropout != 0:
        wrong.append(f"attention_dropout is {text.attention_dropout}; sampler and learner are one function only at 0")
    for field in ("layer_types", "mlp_layer_types"):
        if len(getattr(text, field)) != text.num_hidden_layers:
            wrong.append(f"{field} has {len(getattr(text, field))} entries for {text.num_hidden_layers} layers")
    if wrong:
        raise ValueError("model config not supported: " + "; ".join(wrong))


def is_sliding(text: InklingTextConfig, layer: int) -> bool:
    return text.layer_types[layer] == "hybrid_sliding"


def window(text: InklingTextConfig, layer: int) -> int | None:
    """Number of positions that a row of this layer attends to, its own included; None for all before it."""
    return text.sliding_window_size if is_sliding(text, layer) else None


def heads(text: InklingTextConfig, layer: int) -> tuple[int, int, int]:
    """(query heads, key heads, head width) of a layer; global and sliding layers differ in them."""
    if is_sliding(text, layer):
        return text.swa_num_attention_heads, text.swa_num_key_value_heads, text.swa_head_dim
    return text.num_attention_heads, text.num_key_value_heads, text.head_dim


def log_scale_table(text: InklingTextConfig) -> torch.Tensor | None:
    """The factor on attention scores of global layers by position i, fp32 [max positions]; None when the config turns
    it off: tau_i = 1 + log_scaling_alpha * ln(max((i + 1) / log_scaling_n_floor, 1)), as in transformers' Inkling.

    A table made by our own logarithm: a library's result may depend on the processor and on a value's place in a vector
    register."""
    if text.log_scaling_n_floor is None:
        return None
    position = np.arange(1, text.max_position_embeddings + 1, dtype=np.float64)
    ratio = np.maximum(position / text.log_scaling_n_floor, 1.0)
    return torch.from_numpy(1 + text.log_scaling_alpha * exact.ln_of(ratio)).float()
